"""What an RDMA lane sends, whatever happens in whatever order: nothing is lost, told twice, or waited for in vain."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from aiordma.config import MAX_SLOTS
from aiordma.errors import RemoteProtocolError
from aiordma.lanes.outbox import (
    MAX_PIECES,
    WINDOWS,
    Frame,
    Kind,
    Outbox,
    Piece,
    Sources,
    Window,
    WindowWork,
)
from aiordma.ring import CELLS, MemoryBudget, Ring, slot_offset
from aiordma.wire import frames
from aiordma.wire.credit import bits
from aiordma.wire.frames import ChunkHeader, CreditHeader, WindowHeader

SLOT = 64
REGISTERED = memoryview(bytearray(SLOT))
OTHER = memoryview(bytearray(SLOT))


def outbox_of(slots: int, depth: int, stages: int) -> Outbox:
    def find(memory: memoryview) -> Piece | None:
        return Piece(1, memory.nbytes, 7) if memory.obj is REGISTERED.obj else None

    ring = Ring(stages, SLOT, budget=MemoryBudget(1 << 40))
    assert ring.slots == stages
    sources = Sources(
        ring, lambda index, nbytes: Piece(1000 + index, nbytes, 8), find, lambda memory: None
    )
    return Outbox(sources, depth=depth, peer_slots=slots, peer_slot_bytes=SLOT)


def parts_of(kind: str, count: int) -> list[memoryview]:
    source = OTHER if kind == "copied" else REGISTERED
    return [source[:1]] * count


def requests(frame: Frame | WindowWork) -> int:
    return len(frame.pieces) + 1 if isinstance(frame, Frame) else 1


class Conversation(RuleBasedStateMachine):
    """An outbox, its send queue, and a peer that keeps chunks for as long as it likes."""

    @initialize(
        slots=st.integers(4, 40), slack=st.integers(0, 200), stages_beside=st.integers(0, 20)
    )
    def begin(self, slots: int, slack: int, stages_beside: int) -> None:
        self.slots, self.depth = slots, 2 * slots + 40 + 5 * WINDOWS + slack
        self.stages = max(4, slots // 2 + stages_beside)
        self.outbox = outbox_of(slots, self.depth, self.stages)
        self.free = list(range(slots))  # the peer's, as we know it
        self.untold: deque[ChunkHeader] = deque()  # added, and not completed
        self.queue: deque[Frame | WindowWork] = deque()  # posted, and still in the send queue
        self.at_peer: list[int] = []  # slots that it could give back
        self.to_give = 0
        self.given = 0
        self.sequence = 0
        self.added = 0
        self.windows: dict[int, Window] = {}  # ours, until they are invalidated
        self.stopping: set[int] = set()
        self.closing: set[int] = set()
        self.aims: dict[int, WindowHeader] = {}  # the peer's
        self.unsaid: set[int] = set()  # of those, which we have not said that we stopped

    # What the channel does

    @precondition(lambda self: self.outbox.room and self.free)
    @rule(
        kind=st.sampled_from(["registered", "copied"]),
        count=st.integers(1, MAX_PIECES + 1),
        transfer=st.integers(1, 3),
    )
    def add(self, kind: str, count: int, transfer: int) -> None:
        self.added += 1
        header = ChunkHeader(self.free.pop(), count, transfer, self.added, None)
        copied = self.outbox.add(header, parts_of(kind, count))
        assert copied == (count if kind == "copied" or count > MAX_PIECES else 0)
        self.untold.append(header)

    @rule(bitmap=st.integers(1, (1 << 40) - 1))
    def credit(self, bitmap: int) -> None:
        bitmap &= ~self.to_give & ((1 << self.slots) - 1)
        self.outbox.credit(bitmap)
        self.to_give |= bitmap

    @rule(goes_on=st.booleans())
    def batch(self, goes_on: bool) -> None:
        batch = self.outbox.batch(goes_on=goes_on)
        for frame in batch:
            assert frame.work_id == (self.queue[-1].work_id + 1 if self.queue else frame.work_id)
            self.queue.append(frame)
            self.deliver(frame)
        assert self.outbox.last_id >= (self.queue[-1].work_id if self.queue else 0)
        if self.outbox._special:
            assert self.is_due
        elif not goes_on:
            assert not self.outbox._waiting
            assert self.is_due or not self.untold or self.peer_owes

    @precondition(lambda self: self.queue)
    @rule()
    def remind(self) -> None:
        """Whatever is under way, a completion tells of it from now on."""
        self.queue += self.outbox.remind()
        assert self.queue[-1].is_signalled or self.is_due

    @rule(transfer=st.integers(1, 3))
    def recall(self, transfer: int) -> None:
        """A completion tells when its memory is free, whatever the peer does, and whatever else is sent."""
        is_reading = not self.outbox.is_done_with(transfer)
        assert not is_reading or any(header.transfer == transfer for header in self.untold)
        for _ in range(2):  # windows may have held it back
            self.batch(goes_on=False)
            while is_reading and self.is_due:
                self.complete()
        assert not is_reading or self.outbox.is_done_with(transfer)

    # Windows

    @precondition(lambda self: len(self.windows) < WINDOWS)
    @rule()
    def announce(self) -> None:
        number = next(n for n in range(WINDOWS) if n not in self.windows)
        window = Window(Piece(1, 1, 1), number, None, lambda: None)
        self.windows[number] = window
        self.outbox.announce(window, WindowHeader(number, number, 1, 0, 1, 1))

    @precondition(lambda self: self.windows.keys() - self.stopping - self.closing)
    @rule(is_asked=st.booleans())
    def close(self, is_asked: bool) -> None:
        number = min(self.windows.keys() - self.stopping - self.closing)
        if is_asked:
            self.stopping.add(number)
            self.outbox.stop(number)
        else:
            self.closing.add(number)
            self.outbox.invalidate(self.windows[number])

    @precondition(lambda self: self.stopping - self.closing)
    @rule()
    def was_stopped(self) -> None:
        number = min(self.stopping - self.closing)
        self.closing.add(number)
        self.outbox.invalidate(self.windows[number])

    @precondition(lambda self: len(self.aims) + len(self.unsaid) < WINDOWS)
    @rule(transfer=st.integers(1, 3), first=st.integers(0, 20), nbytes=st.integers(1, 40))
    def aim(self, transfer: int, first: int, nbytes: int) -> None:
        number = next(n for n in range(WINDOWS) if n not in self.aims.keys() | self.unsaid)
        self.aims[number] = WindowHeader(number, 9, transfer, first, nbytes, 1 << 40)
        self.outbox.aim(self.aims[number])

    @precondition(lambda self: self.aims)
    @rule()
    def stop(self) -> None:
        """What goes out from now on does not go there."""
        number = min(self.aims)
        del self.aims[number]
        self.unsaid.add(number)
        self.outbox.stopped(number)

    # What the device and the peer do

    @precondition(lambda self: self.is_due)
    @rule()
    def complete(self) -> None:
        while True:
            frame = self.queue.popleft()
            if frame.is_signalled:
                break
        told = self.outbox.completed(frame.work_id)
        assert told == [self.untold.popleft() for _ in told]
        assert not self.outbox.completed(frame.work_id)
        for window in self.outbox.take_invalidated():
            self.closing.remove(window.key)
            self.stopping.discard(window.key)
            del self.windows[window.key]

    @precondition(lambda self: self.at_peer)
    @rule(data=st.data())
    def credited(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.at_peer)))
        self.outbox.credited(count)
        self.free += self.at_peer[:count]
        del self.at_peer[:count]
        if data.draw(st.booleans()):  # as a channel with chunks to send does
            while self.free and self.outbox.room:
                self.add("registered", 1, 1)
        self.batch(goes_on=False)

    def deliver(self, frame: Frame | WindowWork) -> None:
        if isinstance(frame, WindowWork):
            assert self.windows[frame.window.key] is frame.window
            assert all(isinstance(earlier, WindowWork) for earlier in self.queue)
            assert frame.is_bind or frame.window.key in self.closing
            return
        kind, index = divmod(frame.immediate or 0, 1 << 16)
        if frame.immediate is None:
            assert not frame.header
            assert not frame.pieces
            return
        if kind in (Kind.STOP, Kind.STOPPED):
            if kind == Kind.STOPPED:  # only now may the peer use its number again
                self.unsaid.remove(index)
            return
        self.sequence += 1
        header = frames.decode(frame.header, self.sequence)
        if kind == Kind.CREDIT:
            assert isinstance(header, CreditHeader)
            assert frame.cell == index
            assert MAX_SLOTS <= index < 2 * MAX_SLOTS
            self.to_give &= ~header.slots
            self.given += len(bits(header.slots))
        elif kind == Kind.WINDOW:
            assert isinstance(header, WindowHeader)
            assert 2 * MAX_SLOTS <= frame.cell == index < CELLS
        else:
            assert kind == Kind.CHUNK
            assert isinstance(header, ChunkHeader)
            assert header.slot == index == frame.cell
            aim = next((aim for aim in self.aims.values() if aim.holds(header)), None)
            assert header.is_in_place is (aim is not None)
            if aim is None:
                assert frame.key is None
                assert frame.target == slot_offset(index, SLOT)
            else:
                assert frame.key == 9
                assert frame.target == (1 << 40) + header.offset - aim.offset
            assert sum(piece.length for piece in frame.pieces) == header.length
            self.at_peer.append(index)

    # What is true at any time

    @property
    def is_due(self) -> bool:
        return any(frame.is_signalled for frame in self.queue)

    @property
    def peer_owes(self) -> bool:
        """A CREDIT that makes us look again, and there is room for what it then lets go."""
        return bool(self.at_peer) and self.outbox.room > 0

    @invariant()
    def the_send_queue_holds_it_all(self) -> None:
        taken = sum(map(requests, self.queue))
        assert taken <= self.depth - 2, "an END and a marker must still fit"
        if not self.is_due:
            assert taken < self.depth // 4 + MAX_PIECES + 1, "it would never be emptied"
        assert self.outbox.is_busy == bool(self.queue)

    @invariant()
    def no_stage_is_lost_or_used_twice(self) -> None:
        chunks = [posted.chunk for posted in self.outbox._posted] + list(self.outbox._waiting)
        leased = [chunk.stage for chunk in chunks if chunk and chunk.stage is not None]
        assert sorted(leased + self.outbox._free_stages) == list(range(self.stages))

    def teardown(self) -> None:
        """Everything comes to an end when the peer takes what it got."""
        if not hasattr(self, "outbox"):
            return
        self.batch(goes_on=False)
        while self.is_due or self.at_peer:
            while self.is_due:
                self.complete()
            self.at_peer.clear()
            self.outbox.credited(1)
            self.batch(goes_on=False)
        assert not self.untold
        assert not self.to_give
        self.outbox.end()
        *_, end = self.outbox.batch()
        assert isinstance(end, Frame)
        assert end.is_signalled
        assert end.immediate == Kind.END << 16


TestConversation = Conversation.TestCase


@given(
    slots=st.integers(4, 64),
    quarter=st.booleans(),
    is_prompt=st.booleans(),
    kind=st.sampled_from(["registered", "copied"]),
    eager=st.integers(1, 8),
)
def test_completions_are_few_in_bulk(
    slots: int, quarter: bool, is_prompt: bool, kind: str, eager: int
) -> None:
    """However soon they come, and however few slots a CREDIT gives back."""
    depth = 2 * slots + 160 + 5 * WINDOWS
    outbox = outbox_of(slots, depth, slots + max(4, slots // 2))
    signalled = added = 0
    free, at_peer, due = list(range(slots)), deque[int](), deque[int]()
    total = 20 * slots

    def batch(goes_on: bool) -> None:
        nonlocal signalled
        for frame in outbox.batch(goes_on=goes_on):
            if frame.is_signalled:
                signalled += 1
                due.append(frame.work_id)

    while added < total or at_peer:
        for i in range(total - added):
            if not (free and outbox.room):
                break
            if i and not i % eager:
                batch(True)
            slot = free.pop()
            outbox.add(ChunkHeader(slot, 1, 1, added, None), parts_of(kind, 1))
            at_peer.append(slot)
            added += 1
        batch(False)
        while due and (is_prompt or not outbox.room):
            outbox.completed(due.popleft())
        count = min(len(at_peer), max(1, slots // 4) if quarter else 1)
        free += [at_peer.popleft() for _ in range(count)]
        outbox.credited(count)
        if not is_prompt and len(due) > 1:
            outbox.completed(due.popleft())
    apart = min(max(6, slots * 3 // 4), depth // 8)  # by slots, or by the send queue
    assert signalled <= added / apart + 3


@pytest.mark.parametrize("room", [9, 1])
def test_chunks_that_may_be_the_last_ask(room: int) -> None:
    """Nobody waits a round trip for a marker after a transfer that went at once."""
    outbox = outbox_of(8, 17 * room + 8 + 5 * WINDOWS, 12)
    assert outbox.room == room
    outbox.add(ChunkHeader(0, 1, 1, 0, None), parts_of("registered", 1))
    (frame,) = outbox.batch()
    assert frame.is_signalled
    assert not outbox.batch()


def test_a_peer_cannot_have_us_say_stopped_without_end() -> None:
    """Each STOP takes a window that was announced, and each announcement a STOPPED that is out."""
    outbox = outbox_of(8, 80 + 5 * WINDOWS, 12)
    window = WindowHeader(3, 9, 1, 0, 1, 1 << 40)
    outbox.aim(window)
    outbox.stopped(3)
    with pytest.raises(RemoteProtocolError, match="stopped window 3, which was not open"):
        outbox.stopped(3)
    with pytest.raises(RemoteProtocolError, match="window 3 came anew before it had stopped"):
        outbox.aim(window)
    outbox.batch()
    outbox.aim(window)


def test_credits_alone_ask_now_and_then() -> None:
    outbox = outbox_of(8, 80 + 5 * WINDOWS, 12)
    signalled = 0
    for _ in range(10_000):
        outbox.credit(1)
        for frame in outbox.batch():
            if frame.is_signalled:
                signalled += 1
                outbox.completed(frame.work_id)
    assert signalled == 10_000 // 40
