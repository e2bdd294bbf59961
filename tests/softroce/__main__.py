"""The command line of the harness; `python -m tests.softroce -h`."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.softroce import debian, image, machine, marked, source
from tests.softroce.errors import SoftRoceError


def main(arguments: Sequence[str]) -> int:
    """Exit status: that of the command on the nodes (the worst), or 1 with a message on stderr."""
    options = _parser().parse_args(arguments)
    try:
        prepare(is_agreed=options.yes)
        if options.verb == "test":
            run_marked(from_source=options.source)
        if options.verb == "run":
            return run(options)
    except SoftRoceError as exc:
        print(f"softroce: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def prepare(*, is_agreed: bool) -> None:
    """Install and make what is missing, if the user agrees."""
    debian.require_debian()
    missing = debian.missing_packages()
    folder = image.cache_folder()
    needs_image = image.cached(folder) is None
    if not missing and not needs_image:
        return
    if missing:
        print(f"softroce: installs Debian's {', '.join(missing)}, and what they depend on")
    if needs_image:
        name = debian.kernel_package() or "the kernel that Debian's linux-image-amd64 names"
        print(f"softroce: downloads {name}, 70 MB, into {folder}, without installing it")
    if not is_agreed:
        _ask()
    started = time.monotonic()
    debian.update_lists()
    debian.install(missing)
    if needs_image:
        package = debian.kernel_package()
        if package is None:
            raise SoftRoceError("apt knows no linux-image-amd64: is `main` among its sources?")
        image.build(package, folder)
    print(f"softroce: prepared in {time.monotonic() - started:.0f} s")


def run_marked(*, from_source: bool) -> None:
    """Run the marked tests, and say on what they ran."""
    if from_source:
        print(
            "softroce: builds pyverbs from source, about four minutes, unless it is there",
            flush=True,
        )
        pyverbs: debian.Pyverbs | source.Pyverbs = source.build(image.cache_folder())
    else:
        pyverbs = debian.pyverbs()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        report = marked.run(pyverbs, out, _show)
        print(f"kernel: {(out / 'kernel-0').read_text().strip()}")
        print(f"device: {(out / 'device-0').read_text().strip()}")
    print(f"pyverbs: {pyverbs.version}")
    print(f"lane bytes: {report.lane_bytes}")
    print(f"softroce: {report.run} marked tests, none skipped, {time.monotonic() - started:.0f} s")


def run(options: argparse.Namespace) -> int:
    """Run any command; its exit status is the worst of the nodes'."""
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        raise SoftRoceError("a command is missing: python -m tests.softroce run -- ibv_devinfo")
    outcome = machine.run(
        command,
        nodes=options.nodes,
        netem=options.netem,
        out=options.out,
        timeout_s=options.timeout,
        memory_mib=options.memory,
        listener=_show if options.nodes == 1 else _show_with_node,
    )
    return max(outcome.exits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.softroce", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--yes", action="store_true", help="install without asking")
    verbs.add_parser("prepare", parents=[common], help="install and make what is missing")
    test = verbs.add_parser("test", parents=[common], help="run the tests that are marked `verbs`")
    test.add_argument(
        "--source",
        action="store_true",
        help=f"with pyverbs {source.VERSION} of PyPI, built with all of rdma-core, not with Debian's",
    )
    one = verbs.add_parser("run", parents=[common], help="run a command on one node or two")
    one.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    one.add_argument("--netem", default="", help="tc-netem(8), each way: 'delay 10ms loss 0.1%%'")
    one.add_argument("--out", type=Path, help="a folder that the nodes may write, as $OUT")
    one.add_argument("--timeout", type=float, default=600.0, help="seconds, boot included (600)")
    one.add_argument("--memory", type=int, default=2048, help="MiB, for each node (2048)")
    one.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command")
    return parser


def _ask() -> None:
    if not sys.stdin.isatty():
        raise SoftRoceError("nobody is there to agree to that: set YES=1, or give --yes")
    if input("softroce: go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SoftRoceError("not agreed; nothing was done")


def _show(_node: int, line: str) -> None:
    print(line, flush=True)


def _show_with_node(node: int, line: str) -> None:
    print(f"{node} | {line}", flush=True)


def _end(_signal: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that the machines are ended on the way."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main(sys.argv[1:]))
