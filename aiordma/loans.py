"""Memory that a transfer lent to the lanes: when the caller has it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Loans:
    """Which transfers wait for a device to be done with their memory.

    TCP copies aside what it still has to send. A device reads what it was given until its work request
    completes or is flushed, whoever was cancelled meanwhile.
    """

    def __init__(self, recall: Callable[[int], bool]) -> None:
        """`recall` asks the lanes for a transfer's memory, and says whether they let go of it."""
        self._recall = recall
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._is_over = False

    async def returned(self, transfer: int) -> None:
        """Wait until no lane reads this transfer's memory. A cancellation is heeded only then."""
        if self._is_over or self._recall(transfer):
            return
        back = self._waiting.setdefault(transfer, asyncio.get_running_loop().create_future())
        cancelled: asyncio.CancelledError | None = None
        while not back.done():
            try:
                await asyncio.wait([back])
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled

    def settle(self, transfer: int) -> None:
        """A lane is done with a chunk of this transfer."""
        if transfer in self._waiting and self._recall(transfer):
            self._waiting.pop(transfer).set_result(None)

    def end(self) -> None:
        """The lanes are closed, and read nothing more."""
        self._is_over = True
        for back in self._waiting.values():
            back.set_result(None)
        self._waiting.clear()
