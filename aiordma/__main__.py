"""``python -m aiordma``: the command line."""

from __future__ import annotations

import argparse
import sys

from aiordma import AiordmaError
from aiordma.bench import command
from aiordma.bench.errors import BenchError


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiordma", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bench = commands.add_parser("bench", help="measure aiordma against raw sockets or ib_write_bw")
    command.add_options(bench)
    bench.set_defaults(run=lambda options: command.run(options, _print, _tell))
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


if __name__ == "__main__":
    sys.exit(main())
