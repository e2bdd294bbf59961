"""The silo's side of a run: train in each round that the server calls, until the run is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, SupportsFloat, TypeAlias

import msgspec
from numpy.typing import NDArray

from aiordma import Channel, MessageError, Outgoing, prepare
from fedllm.conversation import Conversation
from fedllm.errors import FedError, RunFailed, ServerLost, SettingError
from fedllm.journal import Journal, digest_of
from fedllm.kept import Kept, identify
from fedllm.memory import Memory
from fedllm.messages import Begin, Commit, Decline, Goodbye, Ready, Shard, Task, Upload, Welcome
from fedllm.policy import Policy
from fedllm.threads import finish_in_thread

__all__ = ["Evaluate", "EvaluationTask", "Report", "RoundTask", "Silo"]

OPEN: Final = Policy()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """Weights that the server wants judged."""

    round: int
    """The last whose updates are in the weights."""
    arguments: Mapping[str, Any]
    weights: dict[str, NDArray[Any]]
    """The silo's own to change."""


Evaluate: TypeAlias = Callable[
    [EvaluationTask], Awaitable[tuple[SupportsFloat | None, Mapping[str, SupportsFloat]]]
]
"""Judges weights: returns how much the silo counts (as a rule the number of examples; see `RoundTask.submit`), and
metrics by name."""


class Silo:
    """A member of a run: made by `join`, or on a channel of one's own to somebody who calls `run_round` on it.

    A context manager, which stops listening at its end, and leaves the channel open.
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        *,
        run: str = "",
        total_rounds: int | None = None,
        return_to: Callable[[ServerLost], Awaitable[tuple[Channel, Welcome]]] | None = None,
        kept: Kept | None = None,
        shard: Shard | None = None,
        policy: Policy = OPEN,
        journal: Journal | None = None,
        on_event: Callable[[str], object] | None = None,
    ) -> None:
        """`return_to` is how to get back to a server that was lost, `kept` where updates are kept, `shard` what
        this rank of a sharded silo holds; see `join`."""
        self.name = name
        self.run = run
        """The server's name for the run."""
        self.total_rounds = total_rounds
        """None if nobody has said."""
        self.final: dict[str, NDArray[Any]] | None = None
        """The last global weights, once the run is over and the server has sent them."""
        self.memory: Memory | None = None
        """Where that for the weights of each round comes from: to be set before them. None: the system."""
        self._policy = policy
        self._journal = journal
        self._talk = Conversation(channel, policy, journal)
        self._unanswered: int | None = None
        """The ticket of the last task, until it has its Ready or Decline."""
        self._return_to = return_to
        self._kept = kept
        self._shard = shard
        self._on_event = on_event

    async def rounds(self, evaluate: Evaluate | None = None) -> AsyncGenerator[RoundTask, None]:
        """The rounds in which this silo takes part, one after the other, until the run is over.

        Train, then ``await task.submit(...)``; asking for the next task without that declines this one, also
        by calling `rounds` anew after this was left or cancelled, at any point. Training
        that blocks belongs in a thread, ``await asyncio.to_thread(train, ...)``: the loop answers the server
        meanwhile. While the silo trains the server may give the round up: `submit` then says so, at once.

        An upload may have to restart, because it was damaged, or because the server dropped another silo: `submit`
        then sends the whole update once more, without asking. The arrays given to it must not change until it
        returns.

        `evaluate` is awaited, between rounds, when the server wants weights judged; without it this silo declines.

        A silo made by `join` finds a server again that was lost, and goes on: the round that it was in may come
        again, and needs no training if the update was kept. Raises `ServerLost` when it does not get back, or knows
        no way; `JoinRefused` when it is not wanted back; `RunFailed` when the server gave the run up;
        `CheckpointError` for a kept update that cannot be read.
        """
        while True:
            try:
                task = await self._next_task(evaluate)
            except ServerLost as exc:
                await self._go_back(exc)
            else:
                if task is None:
                    return
                yield task

    async def _next_task(self, evaluate: Evaluate | None) -> RoundTask | None:
        """The next round for the caller to train in; None when the run is over."""
        while True:
            if self._unanswered is not None:
                await self.say(Decline(self._unanswered, "no update was submitted"))
            message = await self._talk.hear()
            if isinstance(message, Goodbye):
                if message.failure:
                    raise RunFailed(message.failure)
                if message.has_weights:
                    self.final = await self._talk.receive_weights(message.ticket)
                return None
            if isinstance(message, Upload):
                await self.say(Decline(message.ticket, "its submission was given up"))
            if not isinstance(message, Task):
                continue  # about a task that was given up on this side
            self._unanswered = message.ticket
            weights = await self._talk.receive_weights(message.ticket, self.memory)
            if weights is None:
                await self.say(Decline(message.ticket, "the weights did not arrive"))
            elif not await self._may_begin(message.ticket):
                continue  # and decline
            elif objection := self._policy.objection(message.arguments):
                self._tell(f"round {message.round}: refused: {objection}")
                await self.say(Decline(message.ticket, objection[:4096]))
            elif message.evaluates:
                await self._judge(message, weights, evaluate)
            else:
                task = await self._begin(message, weights)
                if task is not None:
                    return task

    async def _may_begin(self, ticket: int) -> bool:
        """Whether all ranks of this silo have their weights; if it is not sharded, it has."""
        if self._shard is None:
            return True
        # The server says nothing else first, unless the silo is out of the round: then no rank begins.
        if await self._talk.peek() != Begin(ticket):
            return False
        await self._talk.hear()
        return True

    def to_upload(self, update: Mapping[str, object]) -> Mapping[str, object]:
        """The update without what another rank of this silo uploads."""
        elsewhere = frozenset[str]() if self._shard is None else self._shard.replicas
        return {name: value for name, value in update.items() if name not in elsewhere}

    async def _judge(
        self, message: Task, weights: dict[str, NDArray[Any]], evaluate: Evaluate | None
    ) -> None:
        if evaluate is None:
            await self.say(Decline(message.ticket, "this silo does not evaluate"))
            return
        asked = EvaluationTask(round=message.round, arguments=message.arguments, weights=weights)
        weight, metrics = await evaluate(asked)
        await self.say(_report(message.ticket, weight, None, metrics))

    async def _begin(self, message: Task, weights: dict[str, NDArray[Any]]) -> RoundTask | None:
        """The task; None if its update was there, and has been handed in."""
        if self._kept is None:
            return RoundTask(self, message, weights)
        identity = await asyncio.to_thread(identify, self.run, message, weights)
        found = await asyncio.to_thread(self._kept.find, identity, message.ticket, weights)
        task = RoundTask(self, message, weights, identity)
        if found is None:
            return task
        self._tell(f"round {message.round} again: its update is there, and is handed in")
        update, ready = found
        report = await task.hand_in(prepare(update), ready)
        if not report.accepted:
            self._tell(f"not taken in round {message.round}: {report.reason}")
        return None

    async def keep(self, identity: str, update: Mapping[str, object], ready: Ready) -> None:
        """Keep an update for a round that may come again. Raises `CheckpointError`. Cancelled, it finishes first."""
        if self._kept is not None:
            await finish_in_thread(self._kept.save, identity, update, ready)

    @property
    def can_return(self) -> bool:
        """Whether the loss of the server is no end."""
        return self._return_to is not None

    async def _go_back(self, lost: ServerLost) -> None:
        if self._return_to is None or isinstance(lost.__cause__, MessageError):
            raise lost
        await self.aclose()
        self._unanswered = None
        channel, welcome = await self._return_to(lost)
        self._talk = Conversation(channel, self._policy, self._journal)
        self.run, self.total_rounds = welcome.run, welcome.rounds
        self._tell(f"back: round {welcome.round} of {welcome.rounds}")

    def _tell(self, what: str) -> None:
        if self._on_event is not None:
            self._on_event(what)

    async def say(self, message: Ready | Decline) -> None:
        """Answer a task, or the request for an update that there is not any more."""
        await self._talk.say(message)
        if message.ticket == self._unanswered:
            self._unanswered = None

    async def describe(self, outgoing: Outgoing) -> dict[str, Any]:
        """What the journal says of an update. It reads all of it, and so belongs before READY: later the server
        waits, and not for ever."""
        if self._journal is None:
            return {}
        digest = await asyncio.to_thread(digest_of, outgoing)
        ordered = sorted(outgoing.manifest.tensors, key=lambda spec: spec.offset)
        tensors = {spec.name: [spec.dtype, spec.shape] for spec in ordered}
        size = outgoing.manifest.total_bytes
        return {"run": self.run, "bytes": size, "sha256_at_ready": digest, "tensors": tensors}

    async def deliver(self, task: Task, outgoing: Outgoing, facts: Mapping[str, Any]) -> Report:
        """After READY: upload as often as the server asks, until its verdict. `facts`: as `describe` made them."""
        loop = asyncio.get_running_loop()
        is_uploaded, seconds = False, 0.0
        while True:
            message = await self._talk.peek()
            if isinstance(message, Task | Goodbye):
                accepted, reason = False, "the server went on without this update"
                break
            await self._talk.hear()
            if message.ticket != task.ticket:
                continue
            if isinstance(message, Commit):
                accepted, reason = message.accepted, message.reason
                break
            if not isinstance(message, Upload):
                continue
            started = loop.time()
            is_uploaded = await self._talk.upload(outgoing, task.meta(message.attempt), facts)
            seconds += loop.time() - started
        uploaded = outgoing.manifest.total_bytes if is_uploaded else 0
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
        await self._talk.aclose()


class RoundTask:
    """One round's work for this silo."""

    def __init__(
        self, silo: Silo, task: Task, weights: dict[str, NDArray[Any]], identity: str = ""
    ) -> None:
        self.weights = weights
        """The global weights, the silo's own to change."""
        self.is_submitted = False
        """Whether it has its answer: an update, or that there is none."""
        self._silo = silo
        self._task = task
        self._identity = identity

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
        weight: SupportsFloat | None,
        metrics: Mapping[str, SupportsFloat] | None = None,
        norm: SupportsFloat | None = None,
    ) -> Report:
        """Say READY, upload when the server asks, and wait for its verdict.

        `update`: names to contiguous numpy arrays or torch tensors, of the names, shapes and dtypes of `weights`.
        It must not change until this returns: the server may ask for all of it again. `weight`: how much it
        counts, as a rule the number of training examples; None if that is not to be known: all silos of the round
        count alike then. `norm`, if known, is reported as it is.

        Returns the verdict, also when the silo was late or the update was refused, or when the server was lost and
        there is a way back: the next task may then be this one again. A silo that keeps its updates (see `join`)
        writes this one first, and raises `CheckpointError` if it cannot; that can be mended too. Raises
        `aiordma.TensorError` for an update that cannot be sent, `SettingError` for a weight, norm or metric that is
        no number, or more than 256 metrics, all of which can be mended; and `ServerLost`. Cancelled, the upload is
        given up and the update is no longer read; the silo can ask for the next task, and until it does, the server
        waits.
        """
        self._check_unanswered()
        outgoing = prepare(self._silo.to_upload(_in_order_of(self.weights, update)))
        ready = _report(self._task.ticket, weight, norm, metrics or {})
        await self._silo.keep(self._identity, update, ready)
        return await self.hand_in(outgoing, ready)

    async def hand_in(self, outgoing: Outgoing, ready: Ready) -> Report:
        """What `submit` does with an update that is described and, if it is to be, kept."""
        try:
            facts = await self._silo.describe(outgoing)
            await self._silo.say(ready)
            self.is_submitted = True
            return await self._silo.deliver(self._task, outgoing, facts)
        except ServerLost as exc:
            if not self._silo.can_return:
                raise
            return Report(accepted=False, reason=str(exc), bytes=0, seconds=0.0)

    async def decline(self, reason: str) -> None:
        """Take no part in this round, and say why (as much as fits into 4096 characters).

        For who looks at the weights and does not want them, say. The silo is asked again in the next round.
        """
        self._check_unanswered()
        await self._silo.say(Decline(self._task.ticket, reason[:4096]))
        self.is_submitted = True

    def _check_unanswered(self) -> None:
        if self.is_submitted:
            raise FedError("this task's update was submitted already, or declined")


def _in_order_of(
    weights: Mapping[str, object], update: Mapping[str, object]
) -> Mapping[str, object]:
    """The update with its tensors in the order of the weights: that of all silos, in which they lie side by side."""
    return {**{name: update[name] for name in weights if name in update}, **update}


def _report(
    ticket: int,
    weight: SupportsFloat | None,
    norm: SupportsFloat | None,
    metrics: Mapping[str, SupportsFloat],
) -> Ready:
    """The READY of these figures: any kind of float, numpy's and one-element tensors included."""
    try:
        ready = Ready(
            ticket,
            None if weight is None else float(weight),
            None if norm is None else float(norm),
            {name: float(value) for name, value in metrics.items()},
        )
        return msgspec.convert(msgspec.to_builtins(ready), Ready)  # within what a server takes
    except (TypeError, ValueError) as exc:  # msgspec.ValidationError is a ValueError
        raise SettingError(
            f"weight, norm and metrics must be numbers by short names: {exc}"
        ) from exc
