"""Two sessions and their rings under any interleaving."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.simulated import CHUNK_BYTES, End, limits


class World:
    """Both ends, and what can be done with the pair of them."""

    def __init__(self, slots: tuple[int, int], lanes: int, opens: int) -> None:
        left, right = limits(slots[0], opens), limits(slots[1], 5)
        self.ends = End(left, right, lanes), End(right, left, lanes)
        self.ends[0].peer, self.ends[1].peer = reversed(self.ends)
        self.lanes = lanes

    def check(self) -> None:
        for end in self.ends:
            end.check()

    def drain(self) -> None:
        """Deliver everything, and release every chunk that somebody wants, until nothing moves."""
        while self._step(self.ends[0]) | self._step(self.ends[1]):
            self.check()

    def _step(self, end: End) -> bool:
        moved = [end.deliver_control(), end.release(0), end.take_message()]
        for lane in range(self.lanes):
            moved += [end.fill(lane), end.deliver_lane(lane), end.give_credit(lane)]
        return any(moved)

    def finish(self) -> None:
        """Whatever was going on: all that is claimed completes, then all that is open, and nothing is left."""
        self.drain()
        for end in self.ends:
            for received in end.received.values():
                if received.incoming.is_claimed:
                    assert received.incoming.is_complete, "a claimed transfer is stuck"
        for end in self.ends:
            end.session.claim_next(0)
            for i in range(len(end.received)):
                end.claim(i)
        self.drain()
        for end in self.ends:
            while end.done(0):
                pass
            assert not end.received, "a claimed transfer is stuck"
        self.drain()
        for end in self.ends:
            end.check_empty()
            assert not any(sent.is_live for sent in end.sent.values())


MOVES: dict[str, Callable[[World, End, int], object]] = {
    "open": lambda world, end, n: end.open(n % 9 * n % 700, is_sound=n % 16 != 3),
    "open small": lambda world, end, n: end.open(n % 2 * CHUNK_BYTES, is_sound=True),
    "fill": lambda world, end, n: end.fill(n % world.lanes, n // 8 % 4 + 1),
    "control": lambda world, end, n: end.deliver_control(n % 97),
    "all control": lambda world, end, n: end.deliver_control(),
    "lane": lambda world, end, n: end.deliver_lane(n % world.lanes),
    "begin": lambda world, end, n: end.begin_lane(n % world.lanes),
    "claim": lambda world, end, n: end.claim(n),
    "claim next": lambda world, end, n: end.session.claim_next(n % 6),
    "unclaim": lambda world, end, n: end.unclaim(n),
    "release": lambda world, end, n: end.release(n),
    "credit": lambda world, end, n: end.give_credit(n % world.lanes, n // world.lanes),
    "done": lambda world, end, n: end.done(n),
    "refuse": lambda world, end, n: end.refuse(n),
    "abort": lambda world, end, n: end.abort_sending(n),
    "message": lambda world, end, n: end.message(n % 75),
    "take message": lambda world, end, n: end.take_message(),
    "drain": lambda world, end, n: world.drain() if n % 8 == 0 else None,
}
BULK = ["fill", "lane", "all control", "release", "credit", "open"]


class Sessions(RuleBasedStateMachine):
    """Any moves in any order."""

    @initialize(
        slots=st.tuples(*[st.integers(4, 9)] * 2), lanes=st.integers(1, 3), opens=st.integers(1, 20)
    )
    def begin(self, slots: tuple[int, int], lanes: int, opens: int) -> None:
        self.world = World(slots, lanes, opens)
        self.is_sound = True

    @rule(
        moves=st.lists(
            st.tuples(st.sampled_from([*MOVES, *BULK]), st.integers(0, 1), st.integers(0, 9999)),
            min_size=1,
            max_size=12,
        )
    )
    def act(self, moves: Any) -> None:
        self.is_sound = False
        for name, side, n in moves:
            MOVES[name](self.world, self.world.ends[side], n)
            self.world.check()
        self.is_sound = True

    def teardown(self) -> None:
        if getattr(self, "is_sound", False):
            self.world.finish()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(stateful_step_count=25)


@pytest.mark.parametrize("seed", range(24))
def test_long_conversations(seed: int) -> None:
    dice = random.Random(seed)
    world = World((dice.randint(4, 9), dice.randint(4, 9)), dice.randint(1, 3), dice.randint(1, 20))
    # Each conversation has habits of its own, so that some are full of claims and others of aborts.
    weights = [dice.random() ** 3 for _ in MOVES]
    names = [*dice.choices(list(MOVES), weights, k=500), *BULK * 100]
    dice.shuffle(names)
    for name in names:
        MOVES[name](world, world.ends[dice.randrange(2)], dice.randrange(10_000))
        world.check()
    world.finish()
    for end in world.ends:
        assert end.sent
