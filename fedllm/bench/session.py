"""The processes of one contender, and the rounds that they run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from fedllm.bench.contender import Setup
from fedllm.bench.errors import BenchError, WrongWeights
from fedllm.bench.peer import Answer, Order

__all__ = ["Sample", "Session", "open_session"]

STALL_S: Final = 600.0
"""A process that is silent for so long ends the benchmark."""
_LOOK_S: Final = 0.01
_END_S: Final = 10.0


class Sample(msgspec.Struct, frozen=True):
    """One round."""

    seconds: float
    """On the server, from the start of the round until it has the new weights and the silos know of them."""
    server_cpu_s: float
    """User and system seconds of the server's process."""
    silos_cpu_s: float
    """Of all silos' together."""


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._stdin, self._stdout = process.stdin, process.stdout

    def order(self, order: Order) -> None:
        self._stdin.write(msgspec.json.encode(order) + b"\n")

    async def answer(self) -> Answer:
        try:
            async with asyncio.timeout(STALL_S):
                line = await self._stdout.readline()
        except TimeoutError as exc:
            raise BenchError(f"a process of the benchmark stalled for {STALL_S:g} s") from exc
        if not line:
            raise BenchError("a process of the benchmark died; see its traceback above")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise (WrongWeights if answer.is_wrong else BenchError)(answer.error)
        return answer


class Session:
    """A server and its silos, connected. Made by `open_session`."""

    def __init__(self, server: _Process, silos: Sequence[_Process]) -> None:
        self._server = server
        self._silos = silos
        self.peak_bytes = 0
        """The most anonymous memory that the server had during rounds so far."""

    async def round(self) -> Sample:
        """One round, verified. Raises `WrongWeights`, and `BenchError` for all that went wrong otherwise."""
        everyone = (self._server, *self._silos)
        for process in everyone:
            process.order("round")
        looking = asyncio.create_task(self._look())
        try:
            # Together: one that fails must not leave the others waited for.
            async with asyncio.TaskGroup() as group:
                answers = [group.create_task(process.answer()) for process in everyone]
        except ExceptionGroup as exc:
            raise _worst(exc) from exc
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        self._note()
        led, *followed = [answer.result() for answer in answers]
        return Sample(led.seconds, led.cpu_s, sum(answer.cpu_s for answer in followed))

    async def _look(self) -> None:
        # From outside, since a thread of the server's would compete with it for its interpreter.
        while True:
            self._note()
            await asyncio.sleep(_LOOK_S)

    def _note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, _anonymous_bytes(self._server.pid))


@asynccontextmanager
async def open_session(
    setup: Setup, *, prefixes: tuple[Sequence[str], Sequence[str]] = ((), ())
) -> AsyncIterator[tuple[Session, int]]:
    """The processes like `setup`, which is the server's; all are gone afterwards.

    `prefixes`: what comes before the commands of the server and of the silos. Gives the session, and what the
    server had of anonymous memory after its imports. Raises `BenchError`.
    """
    async with AsyncExitStack() as stack:
        server = await _start(stack, setup, prefixes[0])
        await server.answer()
        imported_bytes = _anonymous_bytes(server.pid)
        server.order("listen")
        port = (await server.answer()).port
        server.order("gather")
        silos = [
            await _start(
                stack, msgspec.structs.replace(setup, number=number, port=port), prefixes[1]
            )
            for number in range(setup.silos)
        ]
        for process in (*silos, server):
            await process.answer()
        yield Session(server, silos), imported_bytes
        for process in (server, *silos):
            process.order("quit")


async def _start(stack: AsyncExitStack, setup: Setup, prefix: Sequence[str]) -> _Process:
    return await stack.enter_async_context(_process(setup, prefix))


@asynccontextmanager
async def _process(setup: Setup, prefix: Sequence[str]) -> AsyncIterator[_Process]:
    # A session of its own: Ctrl-C reaches the conductor only, which then ends the others.
    process = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, "-m", "fedllm.bench.peer", msgspec.json.encode(setup).decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    is_good = False
    try:
        yield _Process(process)
        is_good = True
    finally:
        if not is_good:
            _kill(process)
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            _kill(process)
            await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


def _worst(group: ExceptionGroup[Exception]) -> Exception:
    """What is to be told of several failures: wrong weights, or that of who failed first."""
    wrong, _ = group.split(WrongWeights)
    error: Exception = group if wrong is None else wrong
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _anonymous_bytes(pid: int) -> int:
    """RssAnon and RssShmem, for a ring is a shared mapping; proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = dict(line.partition(":")[::2] for line in lines)
    return sum(int(fields.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "RssShmem"))
