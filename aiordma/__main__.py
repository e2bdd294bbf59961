"""``python -m aiordma``: the command line."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys

from aiordma import AiordmaError
from aiordma.bench import command
from aiordma.bench.errors import BenchError
from aiordma.doctor import report as diagnosis
from aiordma.doctor.facts import gather
from aiordma.doctor.findings import is_well
from aiordma.doctor.run import examine


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiordma", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bench = commands.add_parser("bench", help="measure aiordma against raw sockets or ib_write_bw")
    command.add_options(bench)
    bench.set_defaults(run=lambda options: command.run(options, _print, _tell))
    _add_doctor(commands.add_parser("doctor", help="whether RDMA works here, and to a peer"))
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (BenchError, AiordmaError, OSError) as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _print(text: str) -> None:
    print(text, flush=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


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


if __name__ == "__main__":
    sys.exit(main())
