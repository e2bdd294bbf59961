"""Memory that a transfer lent to the lanes: when the caller has it back.

TCP copies aside what it still has to send, and moves what is coming elsewhere. A device reads and writes what it was
given until its work requests complete, or are flushed, whoever was cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from aiordma.lanes.rendezvous import Lease, Windows
from aiordma.tensors import Destination


class Loans:
    """What devices read of the transfers that are sent, and may write of those that are received."""

    def __init__(self, recall: Callable[[int], bool]) -> None:
        """`recall` asks the lanes for a transfer's memory, and says whether they let go of it."""
        self._recall = recall
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._is_over = False
        self.windows: list[Windows] = []
        """Of the lanes that have any."""

    def lend(self, transfer: int, destination: Destination) -> Leases:
        """Let the peer's devices write a transfer to its destination, as far as that is registered."""
        parts = destination.parts() if self.windows else []
        return Leases((windows, windows.open(transfer, parts)) for windows in self.windows)

    async def returned(self, transfer: int) -> None:
        """Wait until no lane reads this transfer's memory. A cancellation is heeded only then."""
        if self._is_over or self._recall(transfer):
            return
        await _settled(
            [self._waiting.setdefault(transfer, asyncio.get_running_loop().create_future())]
        )

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


class Leases:
    """The memory that the peer's devices may write a transfer to, on whichever lane."""

    def __init__(self, leases: Iterable[tuple[Windows, Lease | None]] = ()) -> None:
        self._leases = [(windows, lease) for windows, lease in leases if lease is not None]

    async def end(self, *, is_complete: bool) -> None:
        """Wait until no device writes there. A cancellation is heeded only then.

        `is_complete`: the whole transfer has come.
        """
        leases, self._leases = self._leases, []
        for windows, lease in leases:
            windows.close(lease, is_complete=is_complete)
        await _settled([lease.over for _, lease in leases])


async def _settled(futures: Iterable[asyncio.Future[None]]) -> None:
    """Wait for all of them, and heed a cancellation only then."""
    cancelled: asyncio.CancelledError | None = None
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
