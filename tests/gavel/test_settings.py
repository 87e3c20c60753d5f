"""Settings: what is given, what is refused, and in which words."""

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from engine.limits import RAISED_ADDRESSES
from gavel.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("GAVEL_")]:
        monkeypatch.delenv(variable)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    settings = load_settings()
    assert (settings.host, settings.port, settings.shards, settings.gateways) == ("127.0.0.1", 8700, 2, 1)
    assert (settings.database_url, settings.ray_address, settings.secret) == (None, None, None)
    assert (settings.raised_addresses, settings.gateway_memory_mb) == ("127.0.0.0/8,::1", None)
    assert (settings.origins, settings.tls_certificate, settings.tls_key) == (None, None, None)
    assert settings.log_level == "info"
    assert settings.data_dir == Path("/var/lib/gavel")


def test_who_is_not_root_has_the_data_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_settings().data_dir == tmp_path / "gavel"


def test_the_command_line_precedes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_PORT", "9000")
    monkeypatch.setenv("GAVEL_LOG_LEVEL", "DEBUG")
    assert load_settings().port == 9000
    assert load_settings(port=None).port == 9000
    assert load_settings(port=0).port == 0
    assert load_settings().log_level == "debug"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_PORT", "")
    assert load_settings().port == 8700


def test_the_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_SECRET", "0123456789abcdef")
    monkeypatch.setenv("GAVEL_DATABASE_URL", "postgresql://gavel:password@host/gavel")
    settings = load_settings()
    assert settings.secret == SecretStr("0123456789abcdef")
    assert "0123456789abcdef" not in repr(settings)
    assert "password" not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("GAVEL_PORT", "http", "GAVEL_PORT 'http' is not a whole number; it should be a whole number from 0 to 65535."),
        ("GAVEL_PORT", "65536", "GAVEL_PORT '65536' is too large; it should be a whole number from 0 to 65535."),
        ("GAVEL_SHARDS", "0", "GAVEL_SHARDS '0' is too small; it should be a whole number from 1 to 64."),
        ("GAVEL_GATEWAYS", "17", "GAVEL_GATEWAYS '17' is too large; it should be a whole number from 1 to 16."),
        (
            "GAVEL_LOG_LEVEL",
            "loud",
            "GAVEL_LOG_LEVEL 'loud' is not a level; it should be debug, info, warning or error.",
        ),
        ("GAVEL_SECRET", "hush", "GAVEL_SECRET is too short; it should be 16 to 1000 characters long."),
        (
            "GAVEL_DATABASE_URL",
            "mysql://u:hush@h/d",
            "GAVEL_DATABASE_URL is not the address of a Postgres; it should be like "
            "postgresql://user:password@host/database.",
        ),
        (
            "GAVEL_HOST",
            "a b",
            "GAVEL_HOST 'a b' has spaces or control characters in it; it should be the name or address of one of this "
            "machine's interfaces, such as 127.0.0.1.",
        ),
        ("GAVEL_DATA_DIR", __file__, f"GAVEL_DATA_DIR '{__file__}' is a file; it should be a folder."),
        (
            "GAVEL_RAISED_ADDRESSES",
            "10.0.0.0/8,office",
            "GAVEL_RAISED_ADDRESSES '10.0.0.0/8,office' is not a list of addresses; it should be like "
            "10.0.0.0/8,192.0.2.7,::1, or none.",
        ),
        (
            "GAVEL_ORIGINS",
            "https://gavel.example,gavel.example",
            "GAVEL_ORIGINS 'https://gavel.example,gavel.example' is not a list of origins; it should be like "
            "https://gavel.example,http://localhost:5173, or *.",
        ),
        (
            "GAVEL_ORIGINS",
            "https://gavel.example/auctions",
            "GAVEL_ORIGINS 'https://gavel.example/auctions' is not a list of origins; it should be like "
            "https://gavel.example,http://localhost:5173, or *.",
        ),
        (
            "GAVEL_TLS_CERTIFICATE",
            "/nowhere.pem",
            "GAVEL_TLS_CERTIFICATE '/nowhere.pem' is not a file; it should be a PEM file.",
        ),
        (
            "GAVEL_GATEWAY_MEMORY_MB",
            "0",
            "GAVEL_GATEWAY_MEMORY_MB '0' is too small; it should be a whole number from 1 to 1000000.",
        ),
        ("GAVEL_PROT", "8700", "GAVEL_PROT is not a setting of Gavel; did you mean GAVEL_PORT?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == sentence
    # The original error holds the value, and a traceback would show it.
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(("value", "expected"), [("none", ""), (" None", ""), ("", RAISED_ADDRESSES), ("::1", "::1")])
def test_whose_addresses_are_raised(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("GAVEL_RAISED_ADDRESSES", value)
    assert load_settings().raised_addresses == expected


def test_a_variable_without_a_similar_one_lists_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_XYLOPHONE", "1")
    with pytest.raises(SettingsError, match=r"GAVEL_XYLOPHONE is not a setting of Gavel; unset it .*GAVEL_SHARDS"):
        load_settings()


def test_variables_of_the_test_suite_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_TEST_SEED", "1")
    load_settings()


def test_an_impossible_option_is_called_by_its_own_name() -> None:
    with pytest.raises(SettingsError, match=r"^--log-level 'loud' is not a level"):
        load_settings(log_level="loud")


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:8700"), ("::", "http://[::1]:8700"), ("::1", "http://[::1]:8700")]
)
def test_clients_on_this_machine_have_an_address(host: str, url: str) -> None:
    assert load_settings(host=host).url == url


def test_with_a_certificate_the_address_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_TLS_CERTIFICATE", __file__)
    assert load_settings().url == "https://127.0.0.1:8700"
