"""``python -m aiordma``: the command line."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import re
import sys
from pathlib import Path

import msgspec

from aiordma import ConfigError
from aiordma.bench import report
from aiordma.bench.errors import BenchError
from aiordma.bench.plan import KiB, Plan, default_congestion
from aiordma.bench.run import measure
from aiordma.doctor import report as diagnosis
from aiordma.doctor.facts import gather
from aiordma.doctor.findings import is_well
from aiordma.doctor.run import examine

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_QUICK = Plan(sizes=(64, 300 * KiB, 3 << 20), lanes=(1, 2), rounds=2, round_trips=50, stall_s=30)


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiordma", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_bench(commands.add_parser("bench", help="measure aiordma against raw blocking sockets"))
    _add_doctor(commands.add_parser("doctor", help="whether RDMA works here, and to a peer"))
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (BenchError, ConfigError, OSError) as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Moves tensors between two processes over loopback, by aiordma and by raw blocking sockets in "
        "turn, verifies every byte, and prints speed, CPU time, memory and round trips side by side."
    )
    add = parser.add_argument
    plan = Plan()
    add(
        "--quick",
        action="store_true",
        help="toy sizes and few rounds: whether it works, in seconds",
    )
    add("--sizes", type=_sizes, metavar="LIST", help="such as 64,4K,1M,512M,1G (powers of 1024)")
    add("--lanes", type=_numbers, metavar="LIST", help=f"default: {_list(plan.lanes)}")
    add("--loops", type=_loops, metavar="LIST", help="asyncio,uvloop; default: those installed")
    add("--rounds", type=_positive, metavar="N", help=f"default: {plan.rounds}")
    add(
        "--congestion",
        metavar="NAME",
        default=default_congestion(),
        help="TCP congestion control of all contenders (default: %(default)s)",
    )
    add("--no-checksum", action="store_true", help="let aiordma send no checks, as raw sockets do")
    add("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    chosen = {
        name: getattr(options, name)
        for name in ("sizes", "lanes", "loops", "rounds")
        if getattr(options, name) is not None
    }
    plan = msgspec.structs.replace(
        _QUICK if options.quick else Plan(),
        **{"loops": _installed_loops(), **chosen},
        congestion=options.congestion,
        checksum=not options.no_checksum,
    )
    findings = asyncio.run(measure(plan, lambda line: print(line, file=sys.stderr)))
    print(report.text(findings), end="")
    if options.json is not None:
        options.json.write_bytes(report.as_json(findings))
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = """\
Looks at what RDMA needs on this host: devices, ports, addresses (GIDs) and MTU; rdma-core and pyverbs, and
whether they fit; permissions, memory that may be locked, limits of the devices. Then moves 1 MiB through each
usable port and compares every byte. For each thing wrong it says what to do.

With HOST:PORT it also tests the way to a peer: the control connection over TCP, and small and full packets
over RDMA (RoCE v2: UDP port 4791), both ways. A program that listens with aiordma must run there."""
    parser.epilog = "Exit status: 1 if anything is wrong, else 0; a host without RDMA is not wrong, it uses TCP."
    parser.add_argument(
        "peer", nargs="?", type=_peer, metavar="HOST:PORT", help="test the way there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    findings = asyncio.run(examine(gather(), options.peer))
    if options.json:
        print(diagnosis.as_json(findings).decode())
    else:
        print(diagnosis.text(findings), end="")
    return 0 if is_well(findings) else 1


def _peer(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[(.+)\]|([^:]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT ([HOST]:PORT for IPv6)")
    return match[1] or match[2], int(match[3])


def _installed_loops() -> tuple[str, ...]:
    return ("asyncio", "uvloop") if importlib.util.find_spec("uvloop") else ("asyncio",)


def _loops(text: str) -> tuple[str, ...]:
    loops = tuple(text.split(","))
    for loop in loops:
        if loop not in _installed_loops():
            raise argparse.ArgumentTypeError(f"{loop!r} is not one of {_list(_installed_loops())}")
    return loops


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)(?:iB|B)?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64, 4K or 512M")
    return int(match[1]) * _UNITS[match[2]]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _list(values: tuple[object, ...]) -> str:
    return ",".join(str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
