"""From which web pages sockets may be opened here: a browser names the page's origin (RFC 6454) in every upgrade."""

from typing import Final
from urllib.parse import urlsplit

ANY: Final = "*"
_PORTS: Final = {"http": 80, "https": 443}

_Origin = tuple[str, str, int]
"""Scheme, host and port."""


class Origins:
    """The origins that are let in: the gateway's own, and those that are listed."""

    def __init__(self, listed: str = "", *, is_tls: bool = False) -> None:
        """`listed` are origins separated by commas, or `*` for all. Raises `ValueError` where one is none."""
        names = [name.strip() for name in listed.split(",")] if listed else []
        self._is_any = ANY in names
        self._listed = frozenset(_read(name) for name in names if name != ANY)
        self._own_scheme = "https" if is_tls else "http"

    def admit(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may connect to `host`, both as a request's headers name them."""
        if self._is_any:
            return True
        try:
            page = _read(origin)
            return page in self._listed or page == _read(f"{self._own_scheme}://{host}")
        except ValueError:
            # A page without an origin of its own, in a sandbox or from a file, is called "null".
            return False


def _read(origin: str) -> _Origin:
    parts = urlsplit(origin)
    if parts.scheme not in _PORTS or not parts.hostname or origin.count("/") > len("//") or "@" in origin:
        raise ValueError("this is not an origin")
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]
