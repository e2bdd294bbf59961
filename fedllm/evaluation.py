"""Ask silos how good the global weights are on what they hold: metrics come back, and nothing else."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from aiordma import prepare
from fedllm.aggregate import Arrays
from fedllm.config import check_seconds
from fedllm.messages import Task, check_arguments
from fedllm.participation import Outcome, Status, ask
from fedllm.rounds import committed, mean_metrics
from fedllm.shards import Peer, Shards

__all__ = ["Evaluation", "run_evaluation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What the silos think of the weights of a round."""

    round: int
    """The last whose updates are in the weights."""
    outcomes: Mapping[str, Outcome]
    """By silo, in the order of the names."""
    metrics: Mapping[str, float]
    """Means over the silos that answered of what all of them reported, by their weights, without figures that are not
    finite; empty if none did."""
    seconds: float


async def run_evaluation(
    channels: Mapping[str, Peer],
    weights: Arrays,
    *,
    round: int,
    deadline_s: float | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Evaluation:
    """Send `weights` to the silos behind `channels`, by name, and gather their metrics, for at most `deadline_s`.

    No quorum: silos that decline, fail or are late are outcomes. Raises `SettingError` for arguments that cannot
    work, `aiordma.TensorError` for weights that cannot be sent. Cancelled, it leaves each channel usable or
    closed and no task.
    """
    if deadline_s is not None:
        check_seconds("deadline_s", deadline_s)
    task = Task(round, secrets.randbits(63), check_arguments(arguments or {}), evaluates=True)
    outgoing = prepare(weights, is_constant=True)
    loop = asyncio.get_running_loop()
    started = loop.time()
    asked = {
        name: loop.create_task(
            peer.ask(weights, task) if isinstance(peer, Shards) else ask(peer, outgoing, task)
        )
        for name, peer in sorted(channels.items())
    }
    try:
        if asked:
            await asyncio.wait(asked.values(), timeout=deadline_s)
    finally:
        late = {name for name, one in asked.items() if not one.done()}
        for name in late:
            asked[name].cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)
    reason = f"its metrics did not come within {deadline_s} s"
    too_late = Outcome(status=Status.LATE, reason=reason, unanswered=task.ticket)
    outcomes = {name: too_late if name in late else one.result() for name, one in asked.items()}
    return Evaluation(
        round=round,
        outcomes=outcomes,
        metrics=mean_metrics(committed(outcomes)),
        seconds=loop.time() - started,
    )
