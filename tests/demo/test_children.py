"""Whole files, events line by line, and child processes that end when they should."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.demo.crew import ChildFailed, Crew
from fedllm.demo.events import (
    Event,
    Judged,
    Listening,
    RoundDone,
    Said,
    SiloRow,
    Step,
    Wrote,
    json_lines,
    read_event,
)
from fedllm.demo.publish import publish
from tests.demo.processes import ends_in_time, running


def test_published_files_appear_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "result"

    def fail_halfway() -> None:
        with publish(target) as part:
            (part / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [path.name for path in tmp_path.iterdir()] == ["result.part"]
    for content in ("one", "two"):
        with publish(target) as part:
            (part / "weights").write_text(content)
        assert (target / "weights").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize(
    "event",
    [
        Step("round 1", 2, 3, 4.5),
        Step("judging", 1, 2),
        Listening("127.0.0.1", 1),
        RoundDone(
            1, 5, 0.5, (SiloRow("a", "committed", 10, 0.1, 2.0), SiloRow("b", "late", 0, 0.0))
        ),
        Judged("base", "a", 1.0, 2),
        Wrote("x", "y"),
        Said('with "quotes"\nand lines'),
    ],
)
def test_events_survive_their_line(event: Event, tmp_path: Path):
    path = tmp_path / "lines"
    with path.open("w") as stream:
        json_lines(stream)(event)
        assert path.read_bytes().count(b"\n") == 1  # flushed, and one line
    assert read_event(path.read_bytes()) == event


def crew(tmp_path: Path, program: str, heard: list[tuple[str, Event]]) -> Crew:
    return Crew(
        (sys.executable, "-c", program),
        environment=os.environ,
        logs=tmp_path,
        on_event=lambda name, event: heard.append((name, event)),
    )


async def test_a_child_is_heard_line_by_line(tmp_path: Path):
    heard: list[tuple[str, Event]] = []
    program = 'import sys; print(\'{"type": "Said", "text": "\' + sys.argv[1] + \'"}\')'
    async with crew(tmp_path, program, heard) as children:
        await children.run("one", "hello")
    assert heard == [("one", Said("hello"))]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('out of luck')", "one ended with code 1.*out of luck"),
        ("print('hello')", "one said what is no event: b'hello"),
    ],
)
async def test_a_failed_child_is_told_with_its_complaint(tmp_path: Path, program, message):
    async with crew(tmp_path, program, []) as children:
        with pytest.raises(ChildFailed, match=re.compile(message, re.DOTALL)):
            await children.run("one")


async def test_cancelling_ends_the_children_first(tmp_path: Path):
    started = asyncio.Event()
    heard: list[int] = []
    program = (
        "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'print(\'{"type": "Said", "text": "%d"}\' % os.getpid(), flush=True)\n'
        "signal.pause()"
    )

    def on_event(name: str, event: Event) -> None:
        assert isinstance(event, Said)
        heard.append(int(event.text))
        started.set()

    async def work() -> None:
        command = (sys.executable, "-c", program)
        async with Crew(command, environment=os.environ, logs=tmp_path, on_event=on_event) as it:
            await it.run("one")

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


def test_a_child_on_the_leash_ends_when_its_parent_lets_go():
    program = "from fedllm.demo.leash import hold_leash; hold_leash(); print(flush=True)\nwhile True: pass"
    with running([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.poll() is None
        assert child.stdin is not None
        with ends_in_time(child.pid):
            child.stdin.close()
        assert child.wait() == 75
