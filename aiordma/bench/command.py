"""The options of `python -m aiordma bench`, and what they make of it."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from aiordma import ConfigError
from aiordma.bench import far, fedrdma, fedrdma_report, lane, lane_report, report
from aiordma.bench.fedrdma import FedPlan
from aiordma.bench.lane import LanePlan
from aiordma.bench.near import Address
from aiordma.bench.plan import KiB, MiB, Plan, default_congestion
from aiordma.bench.run import measure

Say = Callable[[str], None]

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_PORT: Final = 18516
_QUICK: Final = Plan(
    sizes=(64, 300 * KiB, 3 << 20), lanes=(1, 2), rounds=2, round_trips=50, stall_s=30
)
_QUICK_LANE: Final = LanePlan(sizes=(64 * KiB,), rounds=2, total_bytes=2 * MiB)
_QUICK_FED: Final = FedPlan(scale=48, chunk_bytes=64 * KiB, rounds=1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    parser.description = (
        "Moves tensors between two processes by aiordma and, in turn, by what it is measured against: raw blocking "
        "sockets over loopback; with --lane verbs, ib_write_bw over an RDMA device. With --fedrdma, moves a model "
        "in the ways that FedRDMA compares. Verifies every byte, and prints speed, CPU time and memory side by side."
    )
    add = parser.add_argument
    plan, lane_plan, fed_plan = Plan(), LanePlan(), FedPlan()
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lane", choices=("tcp", "verbs"), default="tcp", help="default: tcp")
    what.add_argument("--fedrdma", action="store_true", help="naive, fedrdma, fedrdma-e, tcp")
    what.add_argument(
        "--serve",
        type=_address,
        metavar="HOST[:PORT]",
        help="be the far end, on an address of this machine, of one `--peer` elsewhere. Nothing is encrypted or "
        "authenticated: on a network that you trust",
    )
    add("--peer", type=_address, metavar="HOST[:PORT]", help="where `bench --serve` runs (not tcp)")
    add(
        "--quick",
        action="store_true",
        help="toy sizes and few rounds: whether it works, in seconds",
    )
    add(
        "--sizes",
        type=_sizes,
        metavar="LIST",
        help="such as 64,4K,1M,512M,1G (powers of 1024); with --lane verbs of messages and chunks, with --fedrdma "
        "one, of chunks",
    )
    add("--lanes", type=_numbers, metavar="LIST", help=f"default: {_list(plan.lanes)} (tcp)")
    add("--loops", type=_loops, metavar="LIST", help="asyncio,uvloop; default: those installed")
    add(
        "--rounds",
        type=_positive,
        metavar="N",
        help=f"default: {plan.rounds}; verbs {lane_plan.rounds}, fedrdma {fed_plan.rounds}",
    )
    add("--total", type=_size, metavar="SIZE", help="moved in a round (verbs); default: 64M")
    add(
        "--scale",
        type=_positive,
        metavar="N",
        help=f"by what GPT-2 is scaled down (fedrdma); default: {fed_plan.scale}; 1: 498 MB",
    )
    add(
        "--congestion",
        metavar="NAME",
        default=default_congestion(),
        help="TCP congestion control of all contenders (default: %(default)s)",
    )
    add("--no-checksum", action="store_true", help="let aiordma send no checks, as the others do")
    add("--json", type=Path, metavar="FILE", help="also write all figures there")


def run(options: argparse.Namespace, say: Say, progress: Say) -> int:
    """Measure, and `say` what came of it. Returns the exit status."""
    if options.serve is not None:
        asyncio.run(far.serve(options.serve, stall_s=FedPlan().stall_s, say=say))
        return 0
    if options.fedrdma:
        fed = asyncio.run(fedrdma.measure(_fed_plan(options), progress))
        is_whole = not any(row.error for row in fed.rows)
        return _conclude(options, fed, fedrdma_report.text(fed), say, is_whole=is_whole)
    if options.lane == "verbs":
        found = asyncio.run(lane.measure(_lane_plan(options), progress))
        is_whole = not found.failed
        return _conclude(options, found, lane_report.text(found), say, is_whole=is_whole)
    findings = asyncio.run(measure(_plan(options), progress))
    return _conclude(options, findings, report.text(findings), say)


def _conclude(
    options: argparse.Namespace,
    findings: msgspec.Struct,
    text: str,
    say: Say,
    *,
    is_whole: bool = True,
) -> int:
    """Exit status 1 if some figures are missing, since what should give them failed."""
    say(text.rstrip("\n"))
    if options.json is not None:
        options.json.write_bytes(report.as_json(findings))
    return 0 if is_whole else 1


def _plan(options: argparse.Namespace) -> Plan:
    if options.peer is not None:
        raise ConfigError("--peer goes with --lane verbs or --fedrdma")
    return msgspec.structs.replace(
        _QUICK if options.quick else Plan(),
        **{"loops": _installed_loops(), **_chosen(options, "sizes", "lanes", "loops", "rounds")},
        congestion=options.congestion,
        checksum=not options.no_checksum,
    )


def _lane_plan(options: argparse.Namespace) -> LanePlan:
    _refuse(options, "--lane verbs", "lanes", "loops", "scale")
    return msgspec.structs.replace(
        _QUICK_LANE if options.quick else LanePlan(),
        **_chosen(options, "sizes", "rounds", total="total_bytes"),
        checksum=not options.no_checksum,
        peer=options.peer,
    )


def _fed_plan(options: argparse.Namespace) -> FedPlan:
    _refuse(options, "--fedrdma", "lanes", "loops", "total")
    plan = msgspec.structs.replace(
        _QUICK_FED if options.quick else FedPlan(),
        **_chosen(options, "rounds", "scale"),
        checksum=not options.no_checksum,
        peer=options.peer,
    )
    if options.sizes is None:
        return plan
    if len(options.sizes) > 1:
        raise ConfigError("--fedrdma takes one size of chunks: give --sizes 1M, say")
    return msgspec.structs.replace(plan, chunk_bytes=options.sizes[0])


def _chosen(options: argparse.Namespace, *names: str, **renamed: str) -> dict[str, Any]:
    """What the user gave of these options, by the name of the plan's field."""
    fields = {name: name for name in names} | renamed
    given = {field: getattr(options, name) for name, field in fields.items()}
    return {field: value for field, value in given.items() if value is not None}


def _refuse(options: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} has no meaning with {what}")


def _installed_loops() -> tuple[str, ...]:
    return ("asyncio", "uvloop") if importlib.util.find_spec("uvloop") else ("asyncio",)


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", str(_PORT))
    if not host or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST or HOST:PORT")
    return host, int(port)


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
