"""Which frames of an RDMA lane ask for a completion (IBV_SEND_SIGNALED).

A completion costs a wake-up, and one tells of all work requests before it. So a frame asks for one if so much went
by without that the send queue or the stages run short; else only if none is due, and nothing else is bound to make
us look again. What does so is a CREDIT for chunks that took all the slots which the last CREDIT gave back: as
long as the peer takes chunks that wait for it, the next ones go out with the next CREDIT, and some of them ask. When
fewer follow than could, or somebody wants a chunk's memory back, the last that is under way is asked for.
"""

from __future__ import annotations


class Completions:
    """Which frames ask for a completion."""

    def __init__(self, most_requests: int, most_chunks: int) -> None:
        """So many work requests, or chunks, may go by without."""
        self.is_wanted = False
        """Whether somebody waits for the memory of chunks that are under way."""
        self._is_bulk = False
        self._limits = most_requests, most_chunks
        self._requests = self._chunks = 0  # since the last that asks
        # Slots that the last CREDIT gave back, and that were spent since, until it was judged.
        self._returned = self._spent = 0
        self.asked_id = self._came_id = 0

    @property
    def is_enough(self) -> bool:
        """Whether the last frame must ask, whatever follows."""
        return self._requests >= self._limits[0] or self._chunks >= self._limits[1]

    @property
    def is_due(self) -> bool:
        """Whether a completion is bound to come."""
        return self.asked_id > self._came_id

    def is_lacking(self, *, is_short: bool) -> bool:
        """Whether chunks are under way, and nothing will come that makes us look again.

        `is_short`: no more chunks can be added before.
        """
        if not self._chunks:
            return False
        return self.is_wanted or (not self.is_due and (is_short or not self._goes_on))

    def judge(self) -> None:
        """All chunks that could follow the last CREDIT have."""
        self.is_wanted = False
        self._is_bulk = self._goes_on
        self._returned = self._spent = 0

    def credited(self, slots: int) -> None:
        # The peer owes another one for the chunks that go out from now on.
        self._returned, self._spent = slots, 0

    def posted(self, work_requests: int, *, is_chunk: bool) -> None:
        self._requests += work_requests
        self._chunks += is_chunk
        self._spent += is_chunk

    def asked(self, work_id: int) -> None:
        self.asked_id = work_id
        self._requests = self._chunks = 0

    def came(self, work_id: int) -> None:
        self._came_id = max(self._came_id, work_id)

    @property
    def _goes_on(self) -> bool:
        """Whether the last chunks took all slots that had come back, so that more are likely to follow."""
        if self._returned or self._spent:
            return 0 < self._returned <= self._spent
        return self._is_bulk
