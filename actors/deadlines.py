"""What is due when: the next deadline of each entity of a shard, asleep or awake."""

import heapq
from uuid import UUID


class Deadlines:
    """A heap with one live entry an entity; entries that were replaced are skipped when they surface."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bytes, UUID]] = []
        self._due_at: dict[UUID, int] = {}

    def __len__(self) -> int:
        """How many entities wait for something."""
        return len(self._due_at)

    def set(self, entity_id: UUID, due_at: int | None) -> None:
        """Replace an entity's deadline (milliseconds); None: it waits for nothing."""
        if due_at is None:
            self._due_at.pop(entity_id, None)
        elif self._due_at.get(entity_id) != due_at:
            self._due_at[entity_id] = due_at
            heapq.heappush(self._heap, (due_at, entity_id.bytes, entity_id))
            if len(self._heap) > 2 * len(self._due_at) + 64:
                self._rebuild()

    def next_at(self) -> int | None:
        """The earliest deadline."""
        while self._heap and self._due_at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: int) -> list[UUID]:
        """Take out the entities whose deadline has come; each sets its next one, if it has one."""
        due = []
        while (next_at := self.next_at()) is not None and next_at <= now:
            entity_id = heapq.heappop(self._heap)[2]
            del self._due_at[entity_id]
            due.append(entity_id)
        return due

    def _rebuild(self) -> None:
        """Drop what was replaced, so that auctions extended again and again do not fill the heap."""
        self._heap = [(due_at, entity_id.bytes, entity_id) for entity_id, due_at in self._due_at.items()]
        heapq.heapify(self._heap)
