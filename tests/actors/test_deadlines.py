import random
from uuid import UUID

from actors.deadlines import Deadlines

A, B, C = UUID(int=1), UUID(int=2), UUID(int=3)


def test_the_earliest_is_next_and_what_is_due_is_taken_out_in_order() -> None:
    deadlines = Deadlines()
    assert deadlines.next_at() is None
    for entity, due_at in ((A, 30), (B, 10), (C, 20)):
        deadlines.set(entity, due_at)
    assert (len(deadlines), deadlines.next_at()) == (3, 10)
    assert deadlines.pop_due(9) == []
    assert deadlines.pop_due(20) == [B, C]
    assert (len(deadlines), deadlines.next_at()) == (1, 30)
    assert deadlines.pop_due(100) == [A]
    assert (len(deadlines), deadlines.next_at()) == (0, None)


def test_a_new_deadline_replaces_the_old_one_whether_later_or_earlier() -> None:
    deadlines = Deadlines()
    deadlines.set(A, 10)
    deadlines.set(A, 50)
    assert deadlines.next_at() == 50
    assert deadlines.pop_due(49) == []
    deadlines.set(A, 20)
    assert deadlines.pop_due(20) == [A]
    assert deadlines.pop_due(1_000) == []


def test_a_deadline_that_is_set_back_to_what_it_was_comes_once() -> None:
    deadlines = Deadlines()
    for due_at in (10, 20, 10, 10):
        deadlines.set(A, due_at)
    assert deadlines.pop_due(100) == [A]
    assert deadlines.pop_due(100) == []


def test_none_waits_for_nothing() -> None:
    deadlines = Deadlines()
    deadlines.set(A, None)
    deadlines.set(A, 10)
    deadlines.set(B, 20)
    deadlines.set(A, None)
    assert (len(deadlines), deadlines.next_at()) == (1, 20)
    assert deadlines.pop_due(100) == [B]


def test_an_auction_that_is_extended_again_and_again_does_not_fill_the_heap() -> None:
    deadlines = Deadlines()
    deadlines.set(B, 5_000)
    for due_at in range(10_000):
        deadlines.set(A, due_at)
    assert len(deadlines._heap) < 100
    assert deadlines.pop_due(20_000) == [B, A]


def test_like_a_sorted_list(randomness: random.Random) -> None:
    deadlines, expected = Deadlines(), dict[UUID, int]()
    entities = [UUID(int=number) for number in range(20)]
    now = 0
    for _ in range(3_000):
        if randomness.random() < 0.9:
            entity = randomness.choice(entities)
            due_at = randomness.choice([None, now + randomness.randrange(1, 50)])
            deadlines.set(entity, due_at)
            expected.pop(entity, None)
            if due_at is not None:
                expected[entity] = due_at
        else:
            now += randomness.randrange(30)
            due = sorted((at, entity.bytes) for entity, at in expected.items() if at <= now)
            expected = {entity: at for entity, at in expected.items() if at > now}
            assert [entity.bytes for entity in deadlines.pop_due(now)] == [entity for _, entity in due]
        assert len(deadlines) == len(expected)
        assert deadlines.next_at() == min(expected.values(), default=None)
