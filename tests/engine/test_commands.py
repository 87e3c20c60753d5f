from uuid import UUID

from engine.commands import BID_COMMAND_ID_BYTES, CancelAuction, EndAuction, OpenAuction, PlaceBid, command_id
from tests.engine.support import ANNA, AUCTION, BEN, make_terms

ID, OTHER_ID, OTHER = UUID(int=5), UUID(int=6), UUID(int=7)

Command = OpenAuction | PlaceBid | EndAuction | CancelAuction


def commands(who: UUID, id_: UUID, auction: UUID = AUCTION) -> list[Command]:
    """One of each kind, all under the same id."""
    return [
        PlaceBid(auction=auction, bidder=who, bid_id=id_, amount=1),
        OpenAuction(auction=auction, maker=who, request_id=id_, terms=make_terms()),
        EndAuction(auction=auction, caller=who, role="maker", request_id=id_),
        CancelAuction(auction=auction, caller=who, role="admin", request_id=id_),
    ]


def test_a_command_is_known_by_its_kind_who_asked_and_the_id_that_it_chose() -> None:
    asked = [command for who in (ANNA, BEN) for id_ in (ID, OTHER_ID) for command in commands(who, id_)]
    known = [command_id(command) for command in asked]
    assert len(set(known)) == len(known) == 16
    # What it asks for does not count: asked again under the same id it is the same.
    assert [command_id(command) for command in commands(ANNA, ID, OTHER)] == known[:4]
    again = PlaceBid(auction=AUCTION, bidder=ANNA, bid_id=ID, max_amount=99, currency="USD")
    assert command_id(again) == known[0]


def test_only_a_bids_id_has_its_length() -> None:
    lengths = [len(command_id(command)) for command in commands(ANNA, ID)]
    assert lengths[0] == BID_COMMAND_ID_BYTES
    assert BID_COMMAND_ID_BYTES not in lengths[1:]
    # As the audit expects it.
    assert command_id(commands(ANNA, ID)[0]) == ANNA.bytes + ID.bytes
