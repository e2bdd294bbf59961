"""How a channel ends: goodbye, connections, lanes, and only then the memory that they touched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from aiordma.control import Control
from aiordma.lanes.base import close_all
from aiordma.loans import Loans
from aiordma.port import Port


class Ending:
    """The end of one channel, which comes to its own end even if who waits for it is cancelled, or its task is."""

    def __init__(self, control: Control, loans: Loans, close_timeout_s: float) -> None:
        self._control = control
        self._loans = loans
        self._close_timeout_s = close_timeout_s
        self._task: asyncio.Task[None] | None = None
        self._is_under_way = False
        self._gives_rings_back = False

    def begin(self, ports: Sequence[Port], *, is_orderly: bool) -> None:
        """`is_orderly`: after a goodbye, whose answer is waited for, up to `close_timeout_s`."""
        self._task = asyncio.get_running_loop().create_task(self._run(ports, is_orderly=is_orderly))

        def done(_: asyncio.Task[None]) -> None:
            if not self._is_under_way:  # cancelled before its first step, as at the end of a loop
                self.begin(ports, is_orderly=is_orderly)
            elif self._gives_rings_back:
                _give_back(ports)

        self._task.add_done_callback(done)

    async def over(self, ports: Sequence[Port]) -> None:
        """Wait for it. Then, even if this was cancelled, the rings' budget is given back."""
        self._gives_rings_back = True
        while self._task is not None and not (self._is_under_way and self._task.done()):
            await asyncio.wait([self._task])
        _give_back(ports)

    async def _run(self, ports: Sequence[Port], *, is_orderly: bool) -> None:
        self._is_under_way = True
        try:
            if is_orderly:
                # The peer answers a goodbye by ending the connection; a goodbye of its own is answered so.
                self._control.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._close_timeout_s):
                        await self._control.wait_ended()
        finally:
            self._control.abort()
            try:
                await close_all([port.lane for port in ports])
            finally:
                self._loans.end()


def _give_back(ports: Sequence[Port]) -> None:
    for port in ports:
        port.ring.close()
