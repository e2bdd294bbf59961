"""The tests that are marked `verbs`, run on one virtual machine, and what their report says."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Final, NamedTuple

from tests.softroce import debian, machine, source
from tests.softroce.errors import SoftRoceError

TESTS: Final = Path(__file__).parents[1]
LANE_BYTES: Final = "lane_bytes"
"""A marked test hands the bytes that its lane counted to `record_property` under this name."""

REPORT_OPTIONS: Final = ("-o", "junit_family=xunit1")
"""Of pytest's families of reports, the one that has room for record_property."""

_REPORT: Final = "report.xml"
_TEST_TIMEOUT_S: Final = 300
"""For one test: five times that of the suite, since emulation is ten times slower than the machine."""
_RUN_TIMEOUT_S: Final = 1200.0


class Report(NamedTuple):
    """What a pytest run in a virtual machine came to."""

    run: int
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    lane_bytes: int

    def check(self) -> None:
        """Raises SoftRoceError unless tests ran, all passed, none was skipped, and a lane moved something."""
        if self.failed:
            raise SoftRoceError(f"failed: {', '.join(self.failed)}")
        if self.skipped:
            raise SoftRoceError(
                f"skipped, where there is a device to run on: {', '.join(self.skipped)}"
            )
        if not self.run:
            raise SoftRoceError("no marked test was run")
        if not self.lane_bytes:
            raise SoftRoceError(f"no marked test recorded {LANE_BYTES}: was anything moved?")


def read_report(path: Path) -> Report:
    """pytest's --junitxml, of any of its families."""
    failed, skipped, count, lane_bytes = [], [], 0, 0
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        count += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        if case.find("skipped") is not None:
            skipped.append(name)
        for entry in case.iter("property"):
            if entry.get("name") == LANE_BYTES:
                lane_bytes += int(entry.get("value", 0))
    return Report(count - len(skipped), tuple(failed), tuple(skipped), lane_bytes)


def marked_files(folder: Path = TESTS) -> list[Path]:
    """The test files that use the mark, or run over each kind of lane. Importing all would take minutes there."""
    return [
        path
        for path in sorted(folder.rglob("test_*.py"))
        if re.search(r"\bmark\.verbs\b|\bLANE_PARAMS\b|\bVERBS_KINDS\b", path.read_text())
    ]


def run(pyverbs: debian.Pyverbs | source.Pyverbs, out: Path, listener: machine.Listener) -> Report:
    """Boot one node and run the marked tests with this pyverbs, and this process's Python otherwise.

    Leaves report.xml, kernel-0 and device-0 in `out`. Raises SoftRoceError as `Report.check` does.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "verbs"]
    command += ["-k", "not torch"]  # importing it takes minutes there
    command += [*REPORT_OPTIONS, f"--junitxml=/softroce/{_REPORT}"]
    command += ["-o", f"timeout={_TEST_TIMEOUT_S}"]
    outcome = machine.run(
        [*command, *map(str, marked_files())],
        environment=pyverbs.share(out),
        out=out,
        timeout_s=_RUN_TIMEOUT_S,
        memory_mib=4096,
        listener=listener,
    )
    if not (out / _REPORT).exists():
        raise SoftRoceError(f"pytest ended with exit status {outcome.exits[0]}, and no report")
    report = read_report(out / _REPORT)
    report.check()
    outcome.check()
    return report
