"""The command `python -m fedllm bench-round`: its options, and what they make of it."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from fedllm.bench import report
from fedllm.bench.contender import SLOT_BYTES, Contender
from fedllm.bench.errors import BenchError
from fedllm.bench.layouts import NAMED, size_of
from fedllm.bench.link import Shape
from fedllm.bench.run import Plan, default_congestion, measure
from fedllm.errors import SettingError
from fedllm.interrupt import run_interruptibly

__all__ = ["add_command", "run"]

_WAYS: Final = ("staged", "aligned")
_RATES: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_TIMES: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_YARDSTICKS: Final = ("plain_sockets.py", "grpc_aio.py")
_SOURCES: Final = Path(__file__).parents[2]
"""Where fedllm's sources are, if it runs from a copy of them; the yardsticks are no part of the package."""

_DESCRIPTION = """\
What a round costs, apart from its training: a server and silos as processes of their own move
weights of GPT-2's names and shapes, no model needed, and every bit of each round's mean is
compared. Seconds, CPU seconds and the server's memory, beside those of other programs, which take
turns with fedllm."""

_EXAMPLES = """\
examples:
  in a copy of the sources, against blocking sockets, threads and numpy:
      python -m fedllm bench-round
  LoRA adapters, of 4.7 MB; one update of 5 GiB:
      python -m fedllm bench-round --layout lora96
      python -m fedllm bench-round --layout 5G --silos 1 --turns 3
  over a long, shaped link between network namespaces of this machine (as root):
      python -m fedllm bench-round --rate 10gbit --delay 10ms --lanes 1,8"""


def add_command(commands: Any) -> None:
    """Make it one of `commands`."""
    parser = commands.add_parser(
        "bench-round",
        help="measure rounds at full size, beside other programs'",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(leash=False)
    add = parser.add_argument
    add(
        "--layout",
        default="gpt2",
        metavar="WHAT",
        help=f"what a round moves: {', '.join(NAMED)}, or a size such as 5G (default: gpt2, 498 MB)",
    )
    add("--silos", type=_whole, default=3, metavar="N", help="default 3")
    add(
        "--aggregate",
        type=_ways,
        default=_WAYS,
        metavar="LIST",
        help="how fedllm gathers updates (default: staged,aligned)",
    )
    add("--lanes", type=_numbers, default=(1,), metavar="LIST", help="fedllm's lanes (default: 1)")
    add(
        "--slots",
        type=_sizes,
        default=(SLOT_BYTES,),
        metavar="LIST",
        help="sizes of its receive slots, such as 256K,1M (default: 1M)",
    )
    add(
        "--against",
        type=Path,
        action="append",
        metavar="FILE",
        help="another contender: a file of Python with a Server and a Silo, as fedllm.bench.contender describes them; "
        f"may be given again (default: {', '.join(_YARDSTICKS)} of fedllm's sources; the last only with --rate)",
    )
    add("--turns", type=_whole, default=5, metavar="N", help="of every contender (default 5)")
    add("--rounds", type=_whole, metavar="N", help="a turn (default: as many as move 8 GiB, to 50)")
    add(
        "--congestion",
        default=default_congestion(),
        metavar="NAME",
        help="TCP congestion control of all that choose one (default: %(default)s)",
    )
    add(
        "--rate",
        type=_rate,
        metavar="RATE",
        help="between network namespaces, over a link of this rate, such as 10gbit (as root)",
    )
    add("--delay", type=_delay, metavar="TIME", help="of that link, one way, such as 10ms")
    add("--json", dest="figures", type=Path, metavar="FILE", help="also write all figures there")


def run(options: argparse.Namespace, out: TextIO, progress: TextIO) -> int:
    """Measure: the table goes to `out`, and which turn it is to `progress`.

    Returns the exit status: 1 if a contender was left out that was asked for. Raises `BenchError`.
    """
    measuring = measure(_plan(options), lambda line: progress.write(f"{line}\n"))
    findings = run_interruptibly(measuring)
    out.write(report.text(findings))
    if options.figures is not None:
        options.figures.write_bytes(msgspec.json.format(msgspec.json.encode(findings)) + b"\n")
    left_out = [row.contender for row in findings.rows if row.error]
    return int(any(options.against or not contender.program for contender in left_out))


def _plan(options: argparse.Namespace) -> Plan:
    if options.delay is not None and options.rate is None:
        raise BenchError("--delay goes with --rate: a link has both")
    ours = [
        Contender(aggregate=way, lanes=lanes, slot_bytes=slot_bytes)
        for lanes, slot_bytes, way in itertools.product(
            options.lanes, options.slots, options.aggregate
        )
    ]
    yardsticks = [_SOURCES / "tests/benchmarks" / name for name in _YARDSTICKS]
    others = options.against or yardsticks[: 1 if options.rate is None else None]
    theirs = [Contender(program=str(path.resolve())) for path in others]
    return Plan(
        contenders=tuple(dict.fromkeys((*theirs, *ours))),
        layout=options.layout,
        silos=options.silos,
        turns=options.turns,
        rounds=options.rounds,
        congestion=options.congestion,
        shape=None if options.rate is None else Shape(options.rate, options.delay or 0.0),
    )


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    for way in ways:
        if way not in _WAYS:
            raise argparse.ArgumentTypeError(f"{way!r} is not one of {', '.join(_WAYS)}")
    return ways


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(size_of(part) for part in text.split(","))
    except SettingError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _whole(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> int:
    return round(_quantity(text, _RATES, "a rate such as 10gbit"))


def _delay(text: str) -> float:
    return _quantity(text, _TIMES, "a time such as 10ms")


def _quantity(text: str, units: dict[str, Any], what: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]+)", text)
    if match is None or match[2] not in units or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} ({', '.join(units)})")
    return float(match[1]) * float(units[match[2]])
