"""`bench --lane verbs`: one RDMA lane against ib_write_bw, in alternation, every byte verified."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import msgspec

from aiordma import AiordmaError, ConfigError
from aiordma.bench import perftest
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.far import Open
from aiordma.bench.near import Address, Far, Link, Sample, far_end
from aiordma.bench.payload import Buffer, source
from aiordma.bench.plan import KiB, MiB, Spread
from aiordma.bench.run import Progress, describe_host, in_turn

Way = Literal["in place", "registered", "ring"]

YARDSTICK: Final = "ib_write_bw"
WAYS: Final[tuple[Way, ...]] = ("in place", "registered", "ring")
_LEAST_ITERATIONS: Final = 5
"""perftest takes no fewer."""


class LanePlan(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...] = (64 * KiB, 256 * KiB, MiB)
    """Bytes of a message of ib_write_bw, and of a chunk (slot_bytes) of ours."""
    rounds: int = 10
    """Each round measures all of them, in turn; one more round before them warms up."""
    total_bytes: int = 64 * MiB
    """What each of them moves in a round."""
    slots: int = 8
    checksum: bool = True
    """Whether aiordma checks each chunk. ib_write_bw has nothing like it, and looks at no byte."""
    peer: Address | None = None
    """Where `bench --serve` runs; None: a process of this machine."""
    stall_s: float = 120.0


class LaneRow(msgspec.Struct, frozen=True):
    """One way at one size."""

    size: int
    way: Way
    mb_per_s: Spread
    """MB are 10^6 bytes."""
    yardstick_mb_per_s: Spread
    ratio: Spread
    """Of a round's two figures."""
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    sender_copied_bytes: int
    """Of each delivery; the same in all of them."""
    receiver_copied_bytes: int
    deliveries: int


class LaneFindings(msgspec.Struct, frozen=True):
    """All that was measured."""

    plan: LanePlan
    host: dict[str, str]
    path: str
    """What the lane ran on."""
    rows: list[LaneRow]
    failed: list[str] = []
    """Sizes that have no figures, and why."""


async def measure(plan: LanePlan, progress: Progress) -> LaneFindings:
    """Carry the plan out; `progress` gets a line now and then.

    Raises `ConfigError`, an `AiordmaError` that says why there are no RDMA lanes, `BenchError` without perftest,
    and `CorruptTransfer` if a single byte arrived wrong. A size at which something else fails is in `failed`.
    """
    for size in plan.sizes:
        if size < 64 or plan.total_bytes % size or plan.total_bytes // size < _LEAST_ITERATIONS:
            raise ConfigError(
                f"{plan.total_bytes} bytes are no whole number of messages of {size} bytes, of at least "
                f"{_LEAST_ITERATIONS}: choose --total and --sizes so that they are"
            )
    rows: list[LaneRow] = []
    failed: list[str] = []
    path = ""
    async with far_end(plan.peer, plan.stall_s) as far:
        for size in plan.sizes:
            ring = Open(plan.total_bytes, size, plan.slots, True, plan.checksum)
            async with far.channel(ring) as link:
                perftest.require_tool()
                path = link.channel.lanes[0].reason
                progress(f"{size:,} bytes a message: {plan.rounds} rounds")
                try:
                    rows += await _measure_size(plan, size, far, link)
                except CorruptTransfer:
                    raise
                except (AiordmaError, BenchError) as exc:
                    failed.append(f"{size:,} bytes a message: {exc}")
    return LaneFindings(plan, describe_host(), path, rows, failed)


async def _measure_size(plan: LanePlan, size: int, far: Far, link: Link) -> list[LaneRow]:
    pinned, other = (source(plan.total_bytes) for _ in range(2))
    rates: list[float] = []
    samples: dict[Way, list[Sample]] = {way: [] for way in WAYS}
    contenders: tuple[Way | None, ...] = (None, *WAYS)
    with link.channel.register(pinned):
        for number in range(1 + plan.rounds):
            for way in in_turn(contenders, number):
                if way is None:
                    rates.append(await far.yardstick(link, size, plan.total_bytes // size))
                    continue
                send = _whole(other if way == "ring" else pinned)
                samples[way].append(await link.deliver(send, is_in_place=way == "in place"))
    return [_row(plan, size, way, rates[1:], samples[way][1:]) for way in WAYS]


def _whole(array: Buffer) -> Callable[[Link], Awaitable[None]]:
    async def send(link: Link) -> None:
        await link.channel.send_tensor(array, meta=0, confirm=True)

    return send


def _row(
    plan: LanePlan, size: int, way: Way, rates: Sequence[float], samples: Sequence[Sample]
) -> LaneRow:
    ours = [plan.total_bytes / sample.seconds for sample in samples]
    gigabytes = plan.total_bytes / 1e9
    return LaneRow(
        size=size,
        way=way,
        mb_per_s=Spread.of([rate / 1e6 for rate in ours]),
        yardstick_mb_per_s=Spread.of([rate / 1e6 for rate in rates]),
        ratio=Spread.of([our / their for our, their in zip(ours, rates, strict=True)]),
        sender_cpu_s_per_gb=Spread.of([s.sender.cpu_s / gigabytes for s in samples]).median,
        receiver_cpu_s_per_gb=Spread.of([s.receiver.cpu_s / gigabytes for s in samples]).median,
        sender_copied_bytes=max(sample.sender.copied_bytes for sample in samples),
        receiver_copied_bytes=max(sample.receiver.copied_bytes for sample in samples),
        deliveries=len(samples),
    )
