"""The contenders, turn by turn."""

from __future__ import annotations

import os
import platform
import socket
import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Final, Self

import msgspec

from fedllm.bench.contender import Contender, Setup
from fedllm.bench.errors import BenchError, WrongWeights
from fedllm.bench.layouts import layout_of, nbytes_of
from fedllm.bench.link import SERVER_HOST, Link, Shape, open_link
from fedllm.bench.session import Sample, open_session
from fedllm.errors import SettingError

__all__ = ["Findings", "Plan", "Row", "Spread", "default_congestion", "measure"]

MAX_SILOS: Final = 16
MAX_ROUNDS: Final = 100
"""Within both, all sums are exact; see `content`."""
_TURN_BYTES: Final = 8 << 30
_LOOPBACK: Final = "127.0.0.1"


class Plan(msgspec.Struct, frozen=True):
    """What to measure. Raises `SettingError`."""

    contenders: tuple[Contender, ...]
    layout: str = "gpt2"
    silos: int = 3
    turns: int = 5
    """In each, every contender starts, runs its rounds, and ends."""
    rounds: int | None = None
    """That count, a turn; None: as many as move 8 GiB, but at most 50. As a tenth more go before, at least one."""
    congestion: str = ""
    """TCP congestion control; empty: the host's."""
    shape: Shape | None = None
    """The link between server and silos; None: loopback."""

    def __post_init__(self) -> None:
        layout_of(self.layout)
        for name, value, most in (
            ("silos", self.silos, MAX_SILOS),
            ("rounds a turn", self.rounds or 1, MAX_ROUNDS),
        ):
            if not 1 <= value <= most:
                raise SettingError(f"{name} must be from 1 to {most}, not {value}")

    @property
    def nbytes(self) -> int:
        """The weights'."""
        return nbytes_of(layout_of(self.layout))

    @property
    def counted_rounds(self) -> int:
        """A turn."""
        whole = _TURN_BYTES // (2 * self.silos * self.nbytes)
        return self.rounds or max(1, min(50, whole))


class Spread(msgspec.Struct, frozen=True):
    """A median, and the least and the greatest of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value a turn."""
        return cls(statistics.median(values), min(values), max(values))


class Turn(msgspec.Struct, frozen=True):
    """What one contender did in one turn."""

    samples: list[Sample]
    peak_bytes: int
    """The server's anonymous memory, above that after its imports."""
    relay_cpu_s: float = 0.0
    """Of the link's relay, a round."""

    def median(self, figure: Callable[[Sample], float]) -> float:
        """Of the rounds."""
        return statistics.median(figure(sample) for sample in self.samples)


class Row(msgspec.Struct, frozen=True):
    """One contender."""

    contender: Contender
    turns: list[Turn]
    error: str = ""
    """Why it has no figures."""

    def spread(self, figure: Callable[[Sample], float]) -> Spread:
        """Of a figure's medians, turn by turn."""
        return Spread.of([turn.median(figure) for turn in self.turns])

    def ratio(self, other: Row, figure: Callable[[Sample], float]) -> Spread:
        """To the other's, turn by turn."""
        return Spread.of(
            [
                ours.median(figure) / theirs.median(figure)
                for ours, theirs in zip(self.turns, other.turns, strict=True)
            ]
        )

    @property
    def relay_cpu_s(self) -> Spread:
        """Of the link's relay, a round."""
        return Spread.of([turn.relay_cpu_s for turn in self.turns])

    @property
    def peak_bytes(self) -> int:
        """The most of all turns."""
        return max(turn.peak_bytes for turn in self.turns)


class Findings(msgspec.Struct, frozen=True):
    """All that was measured."""

    plan: Plan
    host: dict[str, str]
    rows: list[Row]


async def measure(plan: Plan, progress: Callable[[str], object]) -> Findings:
    """Let all contenders run. One that cannot is left out with the reason. Raises `WrongWeights`, and `BenchError`
    if none can, there is no link, or too little memory."""
    _check_memory(plan)
    turns: dict[Contender, list[Turn]] = {contender: [] for contender in plan.contenders}
    failed: dict[Contender, str] = {}
    async with AsyncExitStack() as stack:
        link = (
            None if plan.shape is None else await stack.enter_async_context(open_link(plan.shape))
        )
        for number in range(plan.turns):
            for contender in _in_turn(plan.contenders, number):
                if contender in failed:
                    continue
                progress(f"turn {number + 1} of {plan.turns}: {contender.name}")
                try:
                    turns[contender].append(await _run(plan, contender, link))
                except WrongWeights as exc:
                    raise WrongWeights(f"{contender.name}: {exc}") from exc
                except BenchError as exc:
                    failed[contender] = str(exc)
    if len(failed) == len(turns):
        raise BenchError("; ".join(failed.values()))
    rows = [
        Row(contender, [] if contender in failed else turns[contender], failed.get(contender, ""))
        for contender in plan.contenders
    ]
    return Findings(plan, describe_host(), rows)


def _check_memory(plan: Plan) -> None:
    """Raise `BenchError` rather than have the kernel kill somebody; proc_meminfo(5)."""
    # All updates, the old weights and the new ones at the server, and a model at each silo.
    needed_bytes = (2 * plan.silos + 2) * plan.nbytes
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available_kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    if int(available_kib) << 10 < needed_bytes:
        raise BenchError(
            f"{plan.layout} with {plan.silos} silos may take {needed_bytes / (1 << 30):.1f} GiB of memory, and "
            f"{int(available_kib) / (1 << 20):.1f} are available: take fewer --silos or a smaller --layout"
        )


def _in_turn(contenders: Sequence[Contender], number: int) -> Sequence[Contender]:
    """Nobody always comes first, or always after the same one."""
    start = number % len(contenders)
    turned = (*contenders[start:], *contenders[:start])
    return turned if number // len(contenders) % 2 == 0 else turned[::-1]


async def _run(plan: Plan, contender: Contender, link: Link | None) -> Turn:
    setup = Setup(
        contender,
        plan.layout,
        plan.silos,
        host=_LOOPBACK if link is None else SERVER_HOST,
        congestion=plan.congestion,
    )
    prefixes = ((), ()) if link is None else (link.server_prefix, link.silos_prefix)
    async with open_session(setup, prefixes=prefixes) as (session, imported_bytes):
        for _ in range(max(1, plan.counted_rounds // 10)):
            await session.round()
        relay_cpu_s = 0.0 if link is None else -link.relay_cpu_s()
        samples = [await session.round() for _ in range(plan.counted_rounds)]
        relay_cpu_s += 0.0 if link is None else link.relay_cpu_s()
        peak_bytes = session.peak_bytes - imported_bytes
        return Turn(samples, peak_bytes, relay_cpu_s / plan.counted_rounds)


def default_congestion() -> str:
    """CUBIC where it may be chosen, for BBR paces loopback down; else what the host has (tcp(7))."""
    with socket.socket() as probe, suppress(OSError):  # not there, or not allowed
        probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        return "cubic"
    return ""


def describe_host() -> dict[str, str]:
    """The machine, and versions of what was measured."""
    return {
        "cpus": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: metadata.version(name) for name in ("aiordma", "numpy")},
    }
