"""What server and silo say to each other, as aiordma messages; weights and updates go as transfers.

::

    silo                         server
      Join ─────────────────────▶          or Refused, and the channel is closed
           ◀───────────────────── Welcome
           ◀───────────────────── Task     and the global weights
      Ready ────────────────────▶          or Decline: exactly one of them for each Task
           ◀───────────────────── Upload   again, with a higher attempt, if the upload failed
      the update ═══════════════▶          or Decline: it was given up after Ready
           ◀───────────────────── Commit   exactly one for each Task, at any time after it
           ◀───────────────────── Goodbye  and, if `has_weights`, the final weights

A Task that `evaluates` is over with its Ready, or Decline: no Upload and no Commit follow.

A Task carries a `ticket` drawn for it alone: round numbers may come again (a round that failed is tried
anew), tickets do not. What bears another ticket than the present one is stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import msgspec

from fedllm.errors import SettingError

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[\w.:@-]+\Z")]
Key = Annotated[str, msgspec.Meta(max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Fingerprint = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=256)]],
    msgspec.Meta(max_length=64),
]
Metrics = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], float], msgspec.Meta(max_length=256)
]


class Join(msgspec.Struct, frozen=True, tag=True):
    """The silo's first message."""

    name: Name
    fingerprint: Fingerprint
    key: Key = ""
    """Drawn by the silo, once: who joins with the key of a member is that silo, and takes its place."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The silo takes part from the next round that begins."""

    run: str
    round: int
    rounds: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The silo does not take part; if that is not final, it may ask again."""

    reason: str
    is_final: bool = True


class Task(msgspec.Struct, frozen=True, tag=True):
    """Train on the weights that follow as a transfer; or only judge them, if it `evaluates`."""

    round: int
    ticket: int
    arguments: dict[str, Any]
    evaluates: bool = False

    def meta(self, attempt: int) -> dict[str, int]:
        """The `meta` of its transfers; `attempt` is 0 for the weights, an Upload's for the update."""
        return {"round": self.round, "ticket": self.ticket, "attempt": attempt}


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Training is done, and the update will not change until the Commit; or the weights are judged."""

    ticket: int
    weight: float
    norm: float | None
    metrics: Metrics


class Decline(msgspec.Struct, frozen=True, tag=True):
    """There will be no update for this task."""

    ticket: int
    reason: Text


class Upload(msgspec.Struct, frozen=True, tag=True):
    """The silo is in the cohort: send the update, from its first byte."""

    ticket: int
    attempt: int


class Commit(msgspec.Struct, frozen=True, tag=True):
    """The round is over for this silo: its update is in the new weights, or not, and why."""

    ticket: int
    accepted: bool
    reason: str


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The run is over; `failure` says why, if it was given up."""

    ticket: int
    has_weights: bool
    failure: str = ""


ServerMessage: TypeAlias = Task | Upload | Commit | Goodbye

# For Channel.recv, whose `type` is no union for a type checker.
FROM_SERVER: Any = ServerMessage
FROM_SILO: Any = Ready | Decline
JOIN_ANSWER: Any = Welcome | Refused


def check_arguments(arguments: Mapping[str, object]) -> dict[str, Any]:
    """A Task's arguments. Raises `SettingError` unless they arrive as a silo must find them."""
    checked = dict(arguments)
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(Task(1, 0, checked)), type=Task)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise SettingError(
            f"no silo can be told these arguments: {exc}; give names and plain values, which msgspec encodes"
        ) from exc
    return checked


def is_for(meta: object, ticket: int, attempt: int = 0) -> bool:
    """Whether a transfer with this `meta` belongs to the ticket and the attempt."""
    return (
        isinstance(meta, dict) and meta.get("ticket") == ticket and meta.get("attempt") == attempt
    )
