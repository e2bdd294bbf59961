"""What is measured, and what came of it."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import msgspec

from aiordma import ChannelConfig
from aiordma.bench.orders import Kind, Setup

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
AIM_BYTES = 512 * MiB
AIM_RATIO = 0.8
AIM_EXTRA_BYTES = 32 * MiB


class Plan(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...] = (64, 4 * KiB, 64 * KiB, MiB, 16 * MiB, 512 * MiB, GiB)
    """Tensor sizes in bytes."""
    lanes: tuple[int, ...] = (1, 2, 4)
    loops: tuple[Kind, ...] = ("asyncio", "uvloop")
    rounds: int = 7
    """Each round measures every contender, in turn; one more round before them warms up."""
    round_trips: int = 1000
    """Small messages a round."""
    congestion: str = "cubic"
    """TCP congestion control of all contenders."""
    checksum: bool = True
    """Whether aiordma checks each chunk. Raw sockets have nothing like it."""
    stall_s: float = 120.0
    """A process that is silent for so long ends the benchmark."""

    def repeats(self, nbytes: int) -> int:
        """Transfers a contender makes in a round: more of the small ones, whose times scatter."""
        return max(1, min(20, 64 * MiB // max(1, nbytes)))

    def lanes_for(self, nbytes: int) -> tuple[int, ...]:
        """A transfer of one chunk cannot use a second lane."""
        chunks = -(-nbytes // ChannelConfig().slot_bytes)
        return tuple(lanes for lanes in self.lanes if lanes <= max(1, chunks))


class Contender(msgspec.Struct, frozen=True):
    """One row of the comparison."""

    kind: Kind
    width: int
    """Connections of raw sockets, lanes of a channel."""

    @property
    def name(self) -> str:
        """As the table has it."""
        if self.kind == "raw":
            return f"raw sockets x{self.width}"
        return f"aiordma {self.kind}, {self.width} lane{'s' * (self.width > 1)}"

    @property
    def ring_bytes(self) -> int:
        """Receive slots of each end; raw sockets have none."""
        config = ChannelConfig()
        return 0 if self.kind == "raw" else self.width * config.slots * config.slot_bytes

    def setup(self, plan: Plan, nbytes: int) -> Setup:
        """Its processes. All raw contenders share one pair."""
        lanes = 1 if self.kind == "raw" else self.width
        return Setup(self.kind, "sender", nbytes, lanes, plan.congestion, plan.checksum)


RAW = (Contender("raw", 1), Contender("raw", 2))


class Spread(msgspec.Struct, frozen=True):
    """A median, and the least and the greatest of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value a round."""
        return cls(statistics.median(values), min(values), max(values))


class TransferRow(msgspec.Struct, frozen=True):
    """One contender at one size."""

    nbytes: int
    contender: Contender
    gb_per_s: Spread
    """GB are 10^9 bytes."""
    raw_ratios: tuple[Spread, ...]
    """Ratio of the medians to raw sockets with 1 and 2 connections; spread: round by round."""
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    sender_extra_bytes: int
    receiver_extra_bytes: int
    copied_bytes: int
    transfers: int


class MessageRow(msgspec.Struct, frozen=True):
    """Round trips of small messages by one contender."""

    contender: Contender
    p50_s: Spread
    p99_s: Spread
    raw_ratio: Spread
    """Of the p50."""
    round_trips: int


class Findings(msgspec.Struct, frozen=True):
    """All that was measured."""

    plan: Plan
    host: dict[str, str]
    transfers: list[TransferRow]
    messages: list[MessageRow]
    left_out: list[str]


def default_congestion() -> str:
    """CUBIC where it may be chosen, for BBR paces loopback down; else what the host has (tcp(7))."""
    with socket.socket() as probe:
        with suppress(OSError):  # not there, or not allowed
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        found = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return found.rstrip(b"\0").decode()
