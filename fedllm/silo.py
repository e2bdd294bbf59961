"""The silo's side: join a server, train in each round that it calls, go when the run is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, SupportsFloat, TypeVar

import msgspec
from numpy.typing import NDArray

from aiordma import (
    Channel,
    ChannelConfig,
    ChannelError,
    MessageError,
    Outgoing,
    Transfer,
    TransferError,
    connect,
    prepare,
)
from fedllm.config import check_seconds
from fedllm.errors import FedError, JoinRefused, RunFailed, ServerLost, SettingError
from fedllm.messages import (
    FROM_SERVER,
    JOIN_ANSWER,
    Commit,
    Decline,
    Goodbye,
    Join,
    Ready,
    Refused,
    ServerMessage,
    Task,
    Upload,
    Welcome,
    is_for,
)
from fedllm.participation import turn_away

__all__ = ["Report", "RoundTask", "Silo", "join"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of an update."""

    accepted: bool
    """Whether it is in the new global weights."""
    reason: str
    """Why not, in the server's words."""
    bytes: int
    """Tensor bytes that were uploaded whole."""
    seconds: float
    """What the upload took, restarts and all."""


@contextlib.asynccontextmanager
async def join(
    host: str,
    port: int,
    *,
    name: str,
    fingerprint: Mapping[str, str],
    config: ChannelConfig | None = None,
    timeout_s: float = 10.0,
) -> AsyncGenerator[Silo, None]:
    """Connect to a server and be admitted: ``async with join(...) as silo``. Leaving the block says goodbye.

    `name`: 1 to 64 letters, digits and ``_.:@-``, of no other silo of the run. `fingerprint`: digests by what
    they are of ("weights", "tokenizer", "adapter"), which must equal the server's. Connecting and admission
    may take `timeout_s` each.

    Raises `SettingError` for a name or fingerprint that is none, `JoinRefused` with the server's reason,
    `ServerLost` if it does not answer, `aiordma.ConnectError` if there is no aiordma server. Cancelled, nothing is
    left behind.
    """
    check_seconds("timeout_s", timeout_s)
    request = Join(name, dict(fingerprint))
    try:
        msgspec.convert(msgspec.to_builtins(request), Join)
    except msgspec.ValidationError as exc:
        raise SettingError(f"no server takes such a request to join: {exc}") from exc
    async with connect(host, port, config=config, timeout_s=timeout_s) as channel:
        welcome = await _be_admitted(channel, request, timeout_s)
        async with Silo(channel, name, run=welcome.run, total_rounds=welcome.rounds) as silo:
            yield silo


async def _be_admitted(channel: Channel, request: Join, timeout_s: float) -> Welcome:
    try:
        async with asyncio.timeout(timeout_s):
            with _server_lost():
                await channel.send(request)
                answer: Welcome | Refused = await channel.recv(JOIN_ANSWER)
    except TimeoutError as exc:
        raise ServerLost(f"the server did not answer the join within {timeout_s:g} s") from exc
    if isinstance(answer, Refused):
        raise JoinRefused(answer.reason)
    return answer


class Silo:
    """A member of a run: made by `join`, or on a channel of one's own to somebody who calls `run_round` on it.

    A context manager, which stops listening at its end; it closes only what `join` has opened.
    """

    def __init__(
        self, channel: Channel, name: str, *, run: str = "", total_rounds: int | None = None
    ) -> None:
        self.name = name
        self.run = run
        """The server's name for the run."""
        self.total_rounds = total_rounds
        """None if nobody has said."""
        self.final: dict[str, NDArray[Any]] | None = None
        """The last global weights, once the run is over and the server has sent them."""
        self._channel = channel
        self._heard: asyncio.Task[ServerMessage] | None = None
        self._offered: deque[Transfer] = deque()
        """What is not for the present task: for an earlier one, or for one that is yet to be read."""
        self._unanswered: int | None = None
        """The ticket of the last task, until it has its Ready or Decline."""

    async def rounds(self) -> AsyncGenerator[RoundTask, None]:
        """The rounds in which this silo takes part, one after the other, until the run is over.

        Train, then ``await task.submit(...)``; asking for the next task without that declines this one, also
        by calling `rounds` anew after this was left or cancelled, at any point. Training
        that blocks belongs in a thread, ``await asyncio.to_thread(train, ...)``: the loop answers the server
        meanwhile. While the silo trains the server may give the round up: `submit` then says so, at once.

        An upload may have to restart, because it was damaged, or because the server dropped another silo: `submit`
        then sends the whole update once more, without asking. The arrays given to it must not change until it
        returns.

        Raises `ServerLost` when the connection breaks, or ends without a goodbye; `RunFailed` when the server
        gave the run up.
        """
        while True:
            if self._unanswered is not None:
                await self.say(Decline(self._unanswered, "no update was submitted"))
            message = await self._next_message()
            if isinstance(message, Goodbye):
                if message.failure:
                    raise RunFailed(message.failure)
                if message.has_weights:
                    self.final = await self._receive_weights(message.ticket)
                return
            if isinstance(message, Upload):
                await self.say(Decline(message.ticket, "its submission was given up"))
            if not isinstance(message, Task):
                continue  # about a task that was given up on this side
            self._unanswered = message.ticket
            weights = await self._receive_weights(message.ticket)
            if weights is None:
                await self.say(Decline(message.ticket, "the weights did not arrive"))
                continue
            yield RoundTask(self, message, weights)

    async def say(self, message: Ready | Decline) -> None:
        """Answer a task, or the request for an update that there is not any more."""
        # A channel that is over says so to who listens, after what the server said before.
        with contextlib.suppress(ChannelError):
            await self._channel.send(message)
        if message.ticket == self._unanswered:
            self._unanswered = None

    async def deliver(self, task: Task, outgoing: Outgoing) -> Report:
        """After READY: upload as often as the server asks, until its verdict."""
        loop = asyncio.get_running_loop()
        is_uploaded, seconds = False, 0.0
        while True:
            message = await self._peek()
            if isinstance(message, Task | Goodbye):
                accepted, reason = False, "the server went on without this update"
                break
            self._heard = None
            if message.ticket != task.ticket:
                continue
            if isinstance(message, Commit):
                accepted, reason = message.accepted, message.reason
                break
            started = loop.time()
            is_uploaded = await self._upload(outgoing, task.meta(message.attempt))
            seconds += loop.time() - started
        # The verdict may overtake the acknowledgement of the last chunk.
        uploaded = outgoing.manifest.total_bytes if accepted or is_uploaded else 0
        return Report(accepted=accepted, reason=reason, bytes=uploaded, seconds=seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening; the channel stays open."""
        heard, self._heard = self._heard, None
        if heard is not None:
            heard.cancel()
            await asyncio.gather(heard, return_exceptions=True)

    async def _upload(self, outgoing: Outgoing, meta: object) -> bool:
        """Whether the update was sent whole. If not, the server says what comes next."""

        async def send() -> bool:
            await self._channel.send_tensors(outgoing, meta=meta)
            return True

        try:
            return await self._unless_told(send()) is not None
        except TransferError:
            return False

    async def _receive_weights(self, ticket: int) -> dict[str, NDArray[Any]] | None:
        """The weights of a ticket; None if the server has something else to say first, or they fail."""
        try:
            return await self._unless_told(self._next_weights(ticket))
        except TransferError:
            return None

    async def _next_weights(self, ticket: int) -> dict[str, NDArray[Any]]:
        offered = self._offered
        while not (mine := [one for one in offered if is_for(one.meta, ticket)]):
            offered.append(await self._next_transfer())
        # Weights come in the order of their tasks, though perhaps before a task was read.
        while (transfer := offered.popleft()) is not mine[0]:
            await turn_away(transfer, "it is for another task")
        return await transfer.arrays("numpy")

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
        with _server_lost():
            return doing.result()

    def _listen(self) -> asyncio.Task[ServerMessage]:
        if self._heard is None:
            self._heard = asyncio.create_task(self._channel.recv(FROM_SERVER))
        return self._heard

    async def _peek(self) -> ServerMessage:
        # Waiting, not awaiting: cancelling the caller must not cancel what others wait for as well.
        heard = self._listen()
        await asyncio.wait({heard})
        with _server_lost():
            return heard.result()

    async def _next_message(self) -> ServerMessage:
        message = await self._peek()
        self._heard = None
        return message


class RoundTask:
    """One round's work for this silo."""

    def __init__(self, silo: Silo, task: Task, weights: dict[str, NDArray[Any]]) -> None:
        self.weights = weights
        """The global weights, the silo's own to change."""
        self.is_submitted = False
        self._silo = silo
        self._task = task

    @property
    def round(self) -> int:
        """The round's number, from 1. One that failed comes again."""
        return self._task.round

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the server asks of the training."""
        return self._task.arguments

    async def submit(
        self,
        update: Mapping[str, object],
        *,
        weight: SupportsFloat,
        metrics: Mapping[str, SupportsFloat] | None = None,
        norm: SupportsFloat | None = None,
    ) -> Report:
        """Say READY, upload when the server asks, and wait for its verdict.

        `update`: names to contiguous numpy arrays or torch tensors, of the names, shapes and dtypes of `weights`.
        It must not change until this returns: the server may ask for all of it again. `weight`: how much it
        counts, as a rule the number of training examples. `norm`, if known, is reported as it is.

        Returns the verdict, also when the silo was late or the update was refused. Raises `aiordma.TensorError`
        for an update that cannot be sent, `SettingError` for a weight, norm or metric that is no number, or more
        than 256 metrics, all of which can be mended; and `ServerLost`. Cancelled, the upload is given up and the
        update is no longer read; the silo can ask for the next task, and until it does, the server waits.
        """
        if self.is_submitted:
            raise FedError("this task's update was submitted already")
        outgoing = prepare(_in_order_of(self.weights, update))
        await self._silo.say(_report(self._task.ticket, weight, norm, metrics or {}))
        self.is_submitted = True
        return await self._silo.deliver(self._task, outgoing)


def _in_order_of(
    weights: Mapping[str, object], update: Mapping[str, object]
) -> Mapping[str, object]:
    """The update with its tensors in the order of the weights: that of all silos, in which they lie side by side."""
    return {**{name: update[name] for name in weights if name in update}, **update}


def _report(
    ticket: int,
    weight: SupportsFloat,
    norm: SupportsFloat | None,
    metrics: Mapping[str, SupportsFloat],
) -> Ready:
    """The READY of these figures: any kind of float, numpy's and one-element tensors included."""
    try:
        ready = Ready(
            ticket,
            float(weight),
            None if norm is None else float(norm),
            {name: float(value) for name, value in metrics.items()},
        )
        return msgspec.convert(msgspec.to_builtins(ready), Ready)  # within what a server takes
    except (TypeError, ValueError) as exc:  # msgspec.ValidationError is a ValueError
        raise SettingError(
            f"weight, norm and metrics must be numbers by short names: {exc}"
        ) from exc


@contextlib.contextmanager
def _server_lost() -> Iterator[None]:
    try:
        yield
    except ChannelError as exc:
        raise ServerLost(f"the connection to the server is gone: {exc}") from exc
    except MessageError as exc:
        raise ServerLost(f"the server speaks another protocol: {exc}") from exc
