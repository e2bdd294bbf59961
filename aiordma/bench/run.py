"""The contenders take turns, round by round, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from importlib import metadata
from typing import TypeVar

from aiordma.bench import gauge
from aiordma.bench.orders import Setup
from aiordma.bench.pair import Extra, Pair, Sample, open_pair
from aiordma.bench.payload import MESSAGE_BYTES
from aiordma.bench.plan import (
    RAW,
    Contender,
    Findings,
    MessageRow,
    Plan,
    Spread,
    TransferRow,
)

Progress = Callable[[str], None]
T = TypeVar("T")


async def measure(plan: Plan, progress: Progress) -> Findings:
    """Carry the plan out; `progress` gets a line now and then.

    Raises `BenchError`, and `CorruptTransfer` if a single byte arrived wrong. Cancelled, its processes end.
    """
    transfers: list[TransferRow] = []
    left_out: list[str] = []
    for nbytes in plan.sizes:
        for lanes in plan.lanes_for(nbytes):
            contenders = (*RAW, *(Contender(loop, lanes) for loop in plan.loops))
            needed_bytes = 2 * nbytes * (1 + len(plan.loops))
            if needed_bytes > gauge.available_bytes() * 0.9:
                left_out.append(
                    f"{nbytes:,} bytes with {lanes} lanes: needs {needed_bytes / 1e9:.1f} GB of memory"
                )
                continue
            progress(f"{nbytes:,} bytes, {lanes} lane(s): {plan.rounds} rounds")
            transfers += await _measure_transfers(plan, nbytes, contenders)
    progress(f"messages of {MESSAGE_BYTES} bytes: {plan.rounds} rounds")
    host = describe_host(*(loop for loop in plan.loops if loop != "asyncio"))
    return Findings(plan, host, transfers, await _measure_messages(plan), left_out)


async def _open(
    plan: Plan, contenders: Sequence[Contender], nbytes: int, stack: AsyncExitStack
) -> Mapping[Contender, Pair]:
    pairs: dict[Setup, Pair] = {}
    for setup in dict.fromkeys(contender.setup(plan, nbytes) for contender in contenders):
        pairs[setup] = await stack.enter_async_context(open_pair(setup, stall_s=plan.stall_s))
    return {contender: pairs[contender.setup(plan, nbytes)] for contender in contenders}


def in_turn(contenders: Sequence[T], number: int) -> Sequence[T]:
    """Nobody always comes first, or always after the same one."""
    start = number % len(contenders)
    turned = (*contenders[start:], *contenders[:start])
    return turned if number // len(contenders) % 2 == 0 else turned[::-1]


async def _measure_transfers(
    plan: Plan, nbytes: int, contenders: Sequence[Contender]
) -> list[TransferRow]:
    samples: dict[Contender, list[list[Sample]]] = {contender: [] for contender in contenders}
    async with AsyncExitStack() as stack:
        pairs = await _open(plan, contenders, nbytes, stack)
        for number in range(1 + plan.rounds):
            for contender in in_turn(contenders, number):
                connections = contender.width if contender.kind == "raw" else 1
                samples[contender].append(
                    [
                        await pairs[contender].transfer(connections)
                        for _ in range(plan.repeats(nbytes))
                    ]
                )
        extras = {contender: await pairs[contender].extra() for contender in contenders}
    rates = {
        contender: [
            nbytes / 1e9 / statistics.median(s.seconds for s in round_) for round_ in rounds[1:]
        ]
        for contender, rounds in samples.items()
    }
    return [
        _row(nbytes, contender, rates, samples[contender][1:], extras[contender])
        for contender in contenders
    ]


def _row(
    nbytes: int,
    contender: Contender,
    rates: Mapping[Contender, Sequence[float]],
    rounds: Sequence[Sequence[Sample]],
    extra: Extra,
) -> TransferRow:
    samples = [sample for round_ in rounds for sample in round_]
    return TransferRow(
        nbytes=nbytes,
        contender=contender,
        gb_per_s=Spread.of(rates[contender]),
        raw_ratios=tuple(_ratio(rates[contender], rates[raw]) for raw in RAW),
        sender_cpu_s_per_gb=statistics.median(s.sender_cpu_s for s in samples) / nbytes * 1e9,
        receiver_cpu_s_per_gb=statistics.median(s.receiver_cpu_s for s in samples) / nbytes * 1e9,
        sender_extra_bytes=extra.sender_bytes,
        receiver_extra_bytes=extra.receiver_bytes,
        copied_bytes=extra.copied_bytes,
        transfers=len(samples),
    )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    by_round = [our / their for our, their in zip(ours, theirs, strict=True)]
    return Spread(statistics.median(ours) / statistics.median(theirs), min(by_round), max(by_round))


async def _measure_messages(plan: Plan) -> list[MessageRow]:
    contenders = (RAW[0], *(Contender(loop, 1) for loop in plan.loops))
    p50s: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    p99s: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    async with AsyncExitStack() as stack:
        pairs = await _open(plan, contenders, MESSAGE_BYTES, stack)
        for number in range(1 + plan.rounds):
            for contender in in_turn(contenders, number):
                seconds = sorted(await pairs[contender].round_trips(plan.round_trips))
                if number:
                    p50s[contender].append(seconds[len(seconds) // 2])
                    p99s[contender].append(seconds[len(seconds) * 99 // 100])
    return [
        MessageRow(
            contender=contender,
            p50_s=Spread.of(p50s[contender]),
            p99_s=Spread.of(p99s[contender]),
            raw_ratio=_ratio(p50s[contender], p50s[RAW[0]]),
            round_trips=plan.rounds * plan.round_trips,
        )
        for contender in contenders
    ]


def describe_host(*libraries: str) -> dict[str, str]:
    """The machine, and versions of what was measured."""
    return {
        "cpus": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: metadata.version(name) for name in ("aiordma", "numpy", *libraries)},
    }
