"""The certificate for TLS: what cannot be used is refused in one sentence."""

from pathlib import Path

import pytest

from gavel.certificate import check_certificate
from gavel.settings import SettingsError
from tests.support.certificates import make_certificate


def test_none_and_a_right_one(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    check_certificate(None, None)
    check_certificate(made.path, made.key_path)


def test_one_without_the_other(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    with pytest.raises(SettingsError) as caught:
        check_certificate(made.path, None)
    assert str(caught.value) == ("GAVEL_TLS_CERTIFICATE is set and GAVEL_TLS_KEY is not; set both, or none for no TLS.")
    with pytest.raises(SettingsError, match="GAVEL_TLS_KEY is set and GAVEL_TLS_CERTIFICATE is not"):
        check_certificate(None, made.key_path)


def test_what_is_no_pem(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    made.path.write_text("not a certificate")
    with pytest.raises(SettingsError, match=r"cannot be used \(.+\); they should be a certificate and its own private"):
        check_certificate(made.path, made.key_path)


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    made, other = make_certificate(tmp_path), make_certificate(tmp_path / "other")
    with pytest.raises(SettingsError, match="KEY_VALUES_MISMATCH"):
        check_certificate(made.path, other.key_path)


def test_a_key_with_a_passphrase_is_not_asked_for_it(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, passphrase=b"hush")
    with pytest.raises(SettingsError, match="without a passphrase"):
        check_certificate(made.path, made.key_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    made.key_path.unlink()
    with pytest.raises(SettingsError, match=r"GAVEL_TLS_KEY .*key.pem cannot be read \(No such file"):
        check_certificate(made.path, made.key_path)
