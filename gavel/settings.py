"""Settings from the environment (`GAVEL_PORT`, …) and the command line, checked before anything starts.

A variable that nobody knows is a mistyped one, so it stops the start just as an impossible value does.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.limits import RAISED_ADDRESSES
from gateway.origins import Origins
from gateway.rates import networks
from gavel.errors import CommandError

PREFIX: Final = "GAVEL_"
TEST_PREFIX: Final = "GAVEL_TEST_"
"""Variables of the test suite (see tests/conftest.py); the engines that tests start inherit them."""
_NOBODY: Final = "none"
"""Instead of a list of addresses: an empty variable is one that is not set."""


class SettingsError(CommandError):
    """A setting that cannot be; the sentence names it, and what would be right."""


def load_settings(**overrides: object) -> "Settings":
    """Read the environment; what the command line gave (and is not None) takes precedence.

    Raises `SettingsError`, whose sentence never holds the value of a secret.
    """
    _refuse_unknown_variables()
    given = {name: value for name, value in overrides.items() if value is not None}
    arguments: dict[str, Any] = dict(given)
    try:
        return Settings(**arguments)
    except ValidationError as error:
        # Without `from`: the original's message holds the values, those of secrets too.
        raise SettingsError(_sentence(error, given)) from None


def default_data_dir() -> Path:
    """Where the data lie if nobody says otherwise."""
    return Path("/var/lib/gavel") if os.geteuid() == 0 else platformdirs.user_data_path("gavel")


def _printable_word(value: str) -> str:
    if not value.isprintable() or " " in value:
        raise ValueError("has spaces or control characters in it")
    return value


def _database_url(value: str) -> str:
    if not _printable_word(value).startswith(("postgresql://", "postgres://")):
        raise ValueError("is not the address of a Postgres")
    return value


def _addresses(value: str) -> str:
    if value.strip().lower() == _NOBODY:
        return ""
    try:
        networks(value)
    except ValueError:
        raise ValueError("is not a list of addresses") from None
    return value


def _origins(value: str) -> str:
    try:
        Origins(value)
    except ValueError:
        raise ValueError("is not a list of origins") from None
    return value


def _file(value: Path) -> Path:
    file = value.expanduser().absolute()
    if not file.is_file():
        raise ValueError("is not a file")
    return file


def _folder(value: Path) -> Path:
    folder = value.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError("is a file")
    return folder


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Word = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(_printable_word)]


class Settings(BaseSettings):
    """All that can be set. Each field is the variable `GAVEL_<NAME>`; an empty variable is one that is not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: Word = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8700, ge=0, le=65_535, description="the port to listen on; 0 takes a free one")
    data_dir: Annotated[Path, AfterValidator(_folder)] = Field(
        default_factory=default_data_dir, description="the folder for keys and the embedded Postgres"
    )
    archive_dir: Annotated[Path, AfterValidator(_folder)] | None = Field(
        None, description="a folder to which the embedded Postgres's write-ahead log is copied, for `gavel restore`"
    )
    database_url: Annotated[str, Field(max_length=2_000), AfterValidator(_database_url)] | None = Field(
        None, repr=False, description="a Postgres server; without it an embedded one is started"
    )
    ray_address: Word | None = Field(None, description="a Ray cluster to join; without it a local one is started")
    shards: int = Field(2, ge=1, le=64, description="the number of shards, each a process that holds auctions")
    gateways: int = Field(1, ge=1, le=16, description="the number of gateways, each a process that holds sockets")
    secret: Annotated[SecretStr, Field(min_length=16, max_length=1_000)] | None = Field(
        None, description="the cluster's secret; without it one is made in the data folder"
    )
    raised_addresses: Annotated[str, Field(max_length=10_000), AfterValidator(_addresses)] = Field(
        RAISED_ADDRESSES,
        description="addresses and networks whose clients have no rate limits, separated by commas, or none",
    )
    origins: Annotated[str, Field(max_length=10_000), AfterValidator(_origins)] | None = Field(
        None,
        description="whose web pages may open sockets, beside the gateways' own: origins separated by commas, or *",
    )
    tls_certificate: Annotated[Path, AfterValidator(_file)] | None = Field(
        None, description="the PEM file of the certificate, with its chain; with it the gateways speak TLS only"
    )
    tls_key: Annotated[Path, AfterValidator(_file)] | None = Field(
        None, description="the PEM file of the certificate's private key, without a passphrase"
    )
    gateway_memory_mb: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="the MiB of memory over which a gateway lets nobody in; "
        "without it the gateways share half of the machine's",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="what is logged: debug, info, warning or error"
    )

    @property
    def url(self) -> str:
        """Where clients on this machine find the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - not to listen on
        scheme = "http" if self.tls_certificate is None else "https"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"


_RIGHT: Final = {
    "host": "the name or address of one of this machine's interfaces, such as 127.0.0.1",
    "port": "a whole number from 0 to 65535",
    "data_dir": "a folder",
    "archive_dir": "a folder",
    "database_url": "like postgresql://user:password@host/database",
    "ray_address": "like 10.0.0.1:6379 or ray://10.0.0.1:10001",
    "shards": "a whole number from 1 to 64",
    "gateways": "a whole number from 1 to 16",
    "secret": "16 to 1000 characters long",
    "raised_addresses": "like 10.0.0.0/8,192.0.2.7,::1, or none",
    "origins": "like https://gavel.example,http://localhost:5173, or *",
    "tls_certificate": "a PEM file",
    "tls_key": "a PEM file",
    "gateway_memory_mb": "a whole number from 1 to 1000000",
    "log_level": "debug, info, warning or error",
}
assert _RIGHT.keys() == Settings.model_fields.keys()

_HIDDEN: Final = frozenset({"secret", "database_url"})

_WRONG: Final = {
    "int_parsing": "is not a whole number",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "greater_than_equal": "is too small",
    "less_than_equal": "is too large",
    "literal_error": "is not a level",
    "string_too_short": "is too short",
    "string_too_long": "is too long",
    "too_short": "is too short",
    "too_long": "is too long",
}


def _refuse_unknown_variables() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable in sorted(os.environ):
        upper = variable.upper()
        if not upper.startswith(PREFIX) or upper.startswith(TEST_PREFIX) or upper in known:
            continue
        # Compared without what all of them begin with.
        close = difflib.get_close_matches(
            upper.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in known], n=1
        )
        way_out = f"did you mean {PREFIX}{close[0]}?" if close else f"unset it (there are {', '.join(sorted(known))})."
        raise SettingsError(f"{variable} is not a setting of Gavel; {way_out}")


def _sentence(error: ValidationError, given: dict[str, object]) -> str:
    problem = error.errors(include_url=False)[0]
    field = str(problem["loc"][0])
    name = f"--{field.replace('_', '-')}" if field in given else PREFIX + field.upper()
    value = "" if field in _HIDDEN else f" {str(problem['input'])!r}"
    wrong = _WRONG.get(problem["type"])
    if wrong is None:
        # Our own validators speak of the value without repeating it.
        wrong = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else "cannot be read"
    return f"{name}{value} {wrong}; it should be {_RIGHT[field]}."
