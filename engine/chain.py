"""The hash chain over an entity's stored events: each hash covers its event and the hash before it.

A hash is SHA-256 over the previous hash (32 zero bytes before the first event), a header (entity id, `seq`, `at`,
`version`, big-endian) and the kind and the body as they are stored. Changing, dropping or reordering anything in the
past changes every later hash, so one that somebody kept from an acknowledgement shows it.
"""

from hashlib import sha256
from struct import Struct
from typing import Final
from uuid import UUID

GENESIS: Final = bytes(32)
_HEADER: Final = Struct(">32s16sqqH")


def link(previous: bytes, entity_id: UUID, seq: int, at: int, kind: str, version: int, body: bytes) -> bytes:
    """The hash (32 bytes) of an event whose predecessor has the hash `previous`."""
    header = _HEADER.pack(previous, entity_id.bytes, seq, at, version)
    return sha256(header + kind.encode() + b"\0" + body).digest()


def seal(salt: bytes, text: str) -> str:
    """What an event holds of a text that a person wrote: its salted SHA-256, in hex.

    The text and the salt stand beside the event and can be erased; without the salt the hash gives nothing away.
    """
    return sha256(salt + text.encode()).hexdigest()
