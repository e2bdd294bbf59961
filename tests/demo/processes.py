"""The command line as processes of their own: started, watched, and ended with all that they started."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


END_S = 2.0
"""How long after a signal everything may take to be gone."""


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of fedllm's that runs. What is left of it, and of all that it started, is killed at the end."""
    with running([sys.executable, "-m", "fedllm", *arguments]) as process:
        yield process


@contextmanager
def running(command: list[str], *, stdin: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """The same of any command. It has a session of its own, by which its children are found."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in session_of(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def session_of(leader: int) -> list[int]:
    """The processes of a session, zombies among them."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(ProcessLookupError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


@contextmanager
def ends_in_time(*pids: int) -> Iterator[None]:
    """Once the block has told them to, the processes end within `END_S`.

    The clock runs for the processes alone, not for reading what they said; and a process that has ended in
    time counts as such however late a busy machine lets this one look: the last look comes after the deadline.
    """
    with ExitStack() as closing:
        ends = {pid: os.pidfd_open(pid) for pid in pids}
        for end in ends.values():
            closing.callback(os.close, end)
        yield
        deadline = time.monotonic() + END_S
        for pid, end in ends.items():
            ended, _, _ = select.select([end], [], [], max(0.0, deadline - time.monotonic()))
            assert ended, f"process {pid} still ran {END_S} s later"


def processes_of(out: Path) -> Iterator[int]:
    """The processes that work for the run in `out`, by their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if str(out).encode() in command:
                yield int(entry.name)


def read_until(process: subprocess.Popen[str], words: str) -> int | None:
    """Read what it says until a line with these words; the port that was listened on, if any."""
    assert process.stdout is not None
    port = None
    for line in process.stdout:
        if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
        if words in line:
            return port
    raise AssertionError(f"it ended without a word of {words!r}")


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
