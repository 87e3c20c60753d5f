"""The files with the keys: made once, whole, and for their owner's eyes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import NoReturn
from uuid import uuid4

import pytest
from pydantic import SecretStr

from gateway.tokens import Verifier, issue
from gavel import keys
from gavel.errors import CommandError


def test_the_keys_issue_and_verify_and_stay(tmp_path: Path) -> None:
    pair = keys.ensure_keys(tmp_path / "data")
    user = uuid4()
    token = issue(pair.private_pem, user, "maker", 60, 1_000)
    assert Verifier(pair.public_pem).verify(token, 2_000).user == user
    assert keys.ensure_keys(tmp_path / "data") == pair == keys.read_keys(tmp_path / "data")
    assert "PRIVATE" not in repr(pair)


def test_only_their_owner_may_read_them(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    keys.ensure_keys(tmp_path)
    keys.ensure_secret(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert modes == {keys.KEYS_FILE: 0o600, keys.SECRET_FILE: 0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_of_many_that_start_at_once_all_read_the_same(tmp_path: Path) -> None:
    starters = 8
    barrier = Barrier(starters)

    def start(_number: int) -> bytes:
        barrier.wait()
        return keys.ensure_secret(tmp_path)

    with ThreadPoolExecutor(starters) as pool:
        assert len(set(pool.map(start, range(starters)))) == 1
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [keys.SECRET_FILE]


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    keys.create(path, b"first")
    keys.create(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_start_that_breaks_off_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(CommandError, match=r"cannot be used .No space left on device."):
            keys.ensure_secret(tmp_path)
    assert list((tmp_path / "keys").iterdir()) == []
    assert len(keys.ensure_secret(tmp_path)) == 2 * keys.SECRET_BYTES


def test_a_given_secret_needs_no_file(tmp_path: Path) -> None:
    assert keys.ensure_secret(tmp_path, SecretStr("0123456789abcdef")) == b"0123456789abcdef"
    assert list(tmp_path.iterdir()) == []


def test_reading_makes_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"There are no keys in .*; start `gavel up` once"):
        keys.read_keys(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_file_that_holds_no_key_pair_is_refused(tmp_path: Path, content: bytes) -> None:
    keys.create(tmp_path / "keys" / keys.KEYS_FILE, content)
    with pytest.raises(CommandError, match="holds no key pair"):
        keys.ensure_keys(tmp_path)


def test_a_secret_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys" / keys.SECRET_FILE, b"short")
    with pytest.raises(CommandError, match="too short"):
        keys.ensure_secret(tmp_path)
