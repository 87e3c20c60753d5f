"""The hash chain shows every change of the past."""

from hashlib import sha256
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chain import GENESIS, link
from engine.events import ReserveReached, encode
from tests.engine.support import AUCTION, NOW, STORY

BODY = encode(ReserveReached(8_000, 8_500))


def fixed(
    previous: bytes = GENESIS,
    entity_id: UUID = AUCTION,
    seq: int = 1,
    at: int = NOW,
    kind: str = "reserve_reached",
    version: int = 1,
    body: bytes = BODY,
) -> bytes:
    return link(previous, entity_id, seq, at, kind, version, body)


def test_the_hash_of_a_fixed_event_stays_what_it_is() -> None:
    assert fixed().hex() == "702900f1184252cfa1189e71058b9b420a2a20b46513af8cd99cbb871eb12ad0"
    assert fixed(previous=fixed(), seq=2).hex() == "4a31d19b93da3d8445f186054d6927451199d71bd0a188aabca0fdbb63e7b3e0"


def test_a_hash_covers_the_one_before_it_the_header_the_kind_and_the_stored_body() -> None:
    header = AUCTION.bytes + (1).to_bytes(8, "big") + NOW.to_bytes(8, "big") + (1).to_bytes(2, "big")
    assert fixed() == sha256(bytes(32) + header + b"reserve_reached\0" + BODY).digest()


@pytest.mark.parametrize(
    "changed",
    [
        fixed(previous=b"\1" + bytes(31)),
        fixed(entity_id=STORY),
        fixed(seq=2),
        fixed(at=NOW + 1),
        fixed(kind="reserve_reache"),
        fixed(version=2),
        fixed(body=BODY + b" "),
    ],
)
def test_whatever_changes_changes_the_hash(changed: bytes) -> None:
    assert changed != fixed()


def test_kind_and_body_cannot_trade_bytes() -> None:
    assert fixed(kind="ab", body=b"c") != fixed(kind="a", body=b"bc")


def chain(bodies: list[bytes]) -> bytes:
    last = GENESIS
    for seq, body in enumerate(bodies, start=1):
        last = fixed(previous=last, seq=seq, body=body)
    return last


@given(st.lists(st.binary(max_size=3), max_size=6), st.lists(st.binary(max_size=3), max_size=6))
def test_two_histories_have_the_same_last_hash_only_if_they_are_the_same(one: list[bytes], other: list[bytes]) -> None:
    assert (chain(one) == chain(other)) == (one == other)
