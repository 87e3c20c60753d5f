"""Whose an archive folder is."""

from pathlib import Path

import pytest

from gavel.archive import claim
from gavel.errors import CommandError


def test_a_folder_is_used_again_by_whom_it_belongs_to(tmp_path: Path) -> None:
    claim(tmp_path, tmp_path / "to" / "archive")
    (tmp_path / "to" / "archive" / "000000010000000000000001").touch()
    claim(tmp_path, tmp_path / "to" / "archive")


def test_what_another_has_written_is_not_mixed_with_ours(tmp_path: Path) -> None:
    folder, other = tmp_path / "archive", tmp_path / "other"
    other.mkdir()
    claim(tmp_path, folder)
    (folder / "000000010000000000000001").touch()
    with pytest.raises(CommandError, match="name an empty folder with --archive-dir"):
        claim(other, folder)
    assert not (other / "archived_to").exists()


def test_what_was_left_out_for_a_while_is_not_gone_on_with(tmp_path: Path) -> None:
    claim(tmp_path, tmp_path / "first")
    (tmp_path / "first" / "000000010000000000000001").touch()
    claim(tmp_path, tmp_path / "second")
    with pytest.raises(CommandError, match="first holds what this engine has not written"):
        claim(tmp_path, tmp_path / "first")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"cannot be used \(Not a directory\); name another with --archive-dir"):
        claim(tmp_path, tmp_path / "file" / "archive")
