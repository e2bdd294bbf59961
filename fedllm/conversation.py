"""What a silo hears and sends over one channel: messages in order, and transfers that a message may overtake."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import msgspec
from numpy.typing import NDArray

from aiordma import Channel, ChannelError, MessageError, Outgoing, Transfer, TransferError
from fedllm.door import turn_away
from fedllm.errors import JournalError, ServerLost
from fedllm.journal import Journal
from fedllm.memory import Memory
from fedllm.messages import FROM_SERVER, Commit, Decline, Ready, ServerMessage, is_for
from fedllm.policy import Policy
from fedllm.threads import run_in_thread

__all__ = ["Conversation", "server_lost"]

T = TypeVar("T")


class Conversation:
    """One silo's talk with the server. All calls but `say` raise `ServerLost` when the channel is over.

    All that leaves the silo goes through `say` and `upload`: trimmed to its policy, and written to its journal first
    (or `JournalError`).
    """

    def __init__(self, channel: Channel, policy: Policy, journal: Journal | None) -> None:
        self._channel = channel
        self._policy = policy
        self._journal = journal
        self._heard: asyncio.Task[ServerMessage] | None = None
        self._offered: deque[Transfer] = deque()
        """What is not for the present task: for an earlier one, or for one that is yet to be read."""

    async def say(self, message: Ready | Decline) -> None:
        """Answer a task, or the request for an update that there is not any more."""
        if isinstance(message, Ready):
            message = self._policy.told(message)
        await self._note("said", _facts(message))
        # A channel that is over says so to who listens, after what the server said before.
        with contextlib.suppress(ChannelError):
            await self._channel.send(message)

    async def peek(self) -> ServerMessage:
        """The next message, which stays the next one. Cancelling loses nothing."""
        # Waiting, not awaiting: cancelling the caller must not cancel what others wait for as well.
        heard = self._listen()
        await asyncio.wait({heard})
        with server_lost():
            return heard.result()

    async def hear(self) -> ServerMessage:
        """The next message."""
        message = await self.peek()
        await self._note("heard", _facts(message))
        self._heard = None
        return message

    async def upload(
        self, outgoing: Outgoing, meta: Mapping[str, int], facts: Mapping[str, Any]
    ) -> bool:
        """Whether the update was taken whole. If not, the server says what comes next.

        The journal has two lines of it, however it ends: with these `facts` before, and behind whether it was taken.
        """
        try:
            await self._note("upload", {**meta, **facts})
            reason = await self._send(outgoing, meta)
        except JournalError:
            raise
        except BaseException as exc:
            why = str(exc) or "it was given up here"
            await self._note("uploaded", {**meta, "acknowledged": False, "reason": why})
            raise
        await self._note("uploaded", {**meta, "acknowledged": not reason, "reason": reason})
        return not reason

    async def _send(self, outgoing: Outgoing, meta: Mapping[str, int]) -> str:
        """Why an update was not taken whole; empty if it was."""

        async def send() -> bool:
            # A few chunks are acknowledged before anybody has looked at them: they may still be refused.
            await self._channel.send_tensors(outgoing, meta=meta, confirm=True)
            return True

        try:
            if await self._unless_told(send()):
                return ""
        except TransferError as exc:
            return str(exc)
        message = await self.peek()
        if isinstance(message, Commit) and message.accepted and message.ticket == meta["ticket"]:
            return ""  # the verdict overtook the acknowledgement of the last chunk
        return f"an {type(message).__name__} of the server came first"

    async def receive_weights(
        self, ticket: int, memory: Memory | None = None
    ) -> dict[str, NDArray[Any]] | None:
        """The weights of a ticket, in this memory; None if the server has something else to say first, or they fail."""
        try:
            return await self._unless_told(self._next_weights(ticket, memory))
        except TransferError:
            return None

    async def aclose(self) -> None:
        """Stop listening; the channel stays open."""
        heard, self._heard = self._heard, None
        if heard is not None:
            heard.cancel()
            await asyncio.gather(heard, return_exceptions=True)

    async def _note(self, event: str, facts: Mapping[str, Any]) -> None:
        if self._journal is not None:
            write = partial(self._journal.write, event, **facts)
            await run_in_thread(lambda stop: write())  # cancelled, the next line waits for this one

    async def _next_weights(self, ticket: int, memory: Memory | None) -> dict[str, NDArray[Any]]:
        offered = self._offered
        while not (mine := [one for one in offered if is_for(one.meta, ticket)]):
            offered.append(await self._next_transfer())
        # Weights come in the order of their tasks, though perhaps before a task was read.
        while (transfer := offered.popleft()) is not mine[0]:
            await turn_away(transfer, "it is for another task")
        return await transfer.arrays(take=None if memory is None else memory.take)

    async def _next_transfer(self) -> Transfer:
        async with contextlib.aclosing(self._channel.incoming()) as transfers:
            async for transfer in transfers:
                return transfer
        raise ServerLost("the server closed the connection before the weights came")

    async def _unless_told(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do the work, but drop it, and return None, when a message comes first: that is then the next one."""
        doing, heard = asyncio.create_task(work), self._listen()
        try:
            await asyncio.wait({doing, heard}, return_when=asyncio.FIRST_COMPLETED)
            if heard.done() and heard.exception() is not None:
                # The channel is over. What came whole before can still be received; all else fails by itself.
                await asyncio.wait({doing})
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        if doing.cancelled():
            return None
        with server_lost():
            return doing.result()

    def _listen(self) -> asyncio.Task[ServerMessage]:
        if self._heard is None:
            self._heard = asyncio.create_task(self._channel.recv(FROM_SERVER))
        return self._heard


def _facts(message: ServerMessage | Ready | Decline) -> dict[str, Any]:
    return {"message": type(message).__name__, **msgspec.structs.asdict(message)}


@contextlib.contextmanager
def server_lost() -> Iterator[None]:
    """Raise `ServerLost` for what says that there is no server any more."""
    try:
        yield
    except ChannelError as exc:
        raise ServerLost(f"the connection to the server is gone: {exc}") from exc
    except MessageError as exc:
        raise ServerLost(f"the server speaks another protocol: {exc}") from exc
