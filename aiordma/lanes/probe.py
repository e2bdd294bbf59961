"""Whether an RDMA path carries what a lane will send, found out before the lane counts."""

from __future__ import annotations

import asyncio
from typing import Final

PROBES: Final = 2
"""Frames of a probe: one without a payload, one that fills the path's MTU."""


class PathProbe:
    """Whether frames get to the peer, and come from it: small ones, and such as fill the path's MTU.

    A queue pair reaches "ready to send" without that a packet was exchanged.
    """

    def __init__(self) -> None:
        self._first_id = 0
        self._sent = [False] * PROBES
        self._came = [False] * PROBES
        self._is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, first_id: int) -> None:
        """Our probes are sent as the frames from this one on."""
        self._first_id = first_id

    async def wait(self) -> None:
        """Until all four are there. Raises what `fail` was told."""
        await asyncio.shield(self._is_over)

    def check(self) -> None:
        """Raise what `fail` was told."""
        if self._is_over.done():
            self._is_over.result()

    def was_sent(self, work_id: int) -> None:
        """A frame of ours arrived."""
        if self._first_id and 0 <= work_id - self._first_id < PROBES:
            self._sent[work_id - self._first_id] = True
            self._judge()

    def has_come(self, index: int) -> None:
        """A probe of the peer's came."""
        self._came[index] = True
        self._judge()

    def fail(self, exc: Exception) -> None:
        """No more will come."""
        if not self._is_over.done():
            self._is_over.set_exception(exc)
            self._is_over.exception()  # nobody has to wait for it

    @property
    def is_well(self) -> bool:
        """Whether all came."""
        return all(self._sent) and all(self._came)

    def verdict(self) -> str:
        """What is missing, and the likely cause."""
        if not (self._sent[0] or self._came[0]):
            return "no packet got through in either direction: is UDP port 4791 (RoCE v2) blocked?"
        if not (self._sent[0] and self._came[0]):
            way = "from the peer" if self._sent[0] else "to the peer"
            return f"no packet got through {way}: is UDP port 4791 (RoCE v2) blocked there?"
        return (
            "small packets got through, and large ones did not: something on the path takes no packets of the "
            "devices' MTU; lower it (ip link set ... mtu)"
        )

    def _judge(self) -> None:
        if self.is_well and not self._is_over.done():
            self._is_over.set_result(None)
