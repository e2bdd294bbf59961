"""The demo's child processes: started together, watched, and all gone before their block ends."""

import asyncio
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from fedllm.demo.events import Event, read_event
from fedllm.errors import FedError

LOG_TAIL_LINES = 12
CHILD_FLAGS = ("--json", "--leash")


class ChildFailed(FedError):
    """A child process ended before its work was done. Carries the end of what it complained of."""


class Crew:
    """Runs fedllm's commands as children: events on standard output, complaints into a log.

    Leaving the block, by cancelling too, kills whatever still runs and waits until it is gone. Each
    child's standard input is a pipe that nobody writes to: should this process die without a word,
    the pipe closes and `hold_leash` ends the child. A child has a process group of its own, so that
    Ctrl-C at the terminal reaches this process alone, which then ends them all.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        logs: Path,
        on_event: Callable[[str, Event], None],
    ) -> None:
        """`command` starts a child, its arguments follow; `on_event(name, event)` hears them all."""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._logs = logs
        self._on_event = on_event
        self._running: set[Process] = set()

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        running = tuple(self._running)
        for process in running:
            if process.returncode is None:
                process.kill()
        for process in running:
            await process.wait()

    async def run(self, name: str, *arguments: str) -> None:
        """Run one child to its end; `ChildFailed` if that is not a good one."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                *CHILD_FLAGS,
                stdin=PIPE,
                stdout=PIPE,
                stderr=stderr,
                env=self._environment,
                process_group=0,
            )
        self._running.add(process)
        await self._listen(name, process)
        code = await process.wait()
        self._running.discard(process)
        if code != 0:
            raise ChildFailed(f"{name} ended with code {code}; from {log}:\n{_tail(log)}")

    async def _listen(self, name: str, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            try:
                event = read_event(line)
            except msgspec.DecodeError as exc:
                raise ChildFailed(f"{name} said what is no event: {line[:200]!r}") from exc
            self._on_event(name, event)


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, maxlen=LOG_TAIL_LINES)).rstrip() or "(it is empty)"
