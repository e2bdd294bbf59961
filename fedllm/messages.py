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

The ranks of a sharded silo say all this over a channel each. When all of them have their weights, each is told to
Begin, and before that none trains: training is one computation of all ranks, which a missing one would stop for ever.

A Task carries a `ticket` drawn for it alone: round numbers may come again (a round that failed is tried
anew), tickets do not. What bears another ticket than the present one is stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from numpy.typing import NDArray

from fedllm.errors import SettingError

MAX_WORLD: Final = 1 << 16

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


class Shard(msgspec.Struct, frozen=True):
    """Which part of the weights one rank of a silo holds. `SettingError` for one that makes no sense."""

    rank: Annotated[int, msgspec.Meta(ge=0)]
    """From 0 to `world` - 1."""
    world: Annotated[int, msgspec.Meta(ge=1, le=MAX_WORLD)]
    """How many ranks the silo has."""
    rows: dict[str, tuple[int, int] | None]
    """By tensor, the first of its rows (along dimension 0) and the one after the last; None is all of the tensor.

    What is not named the rank does not hold."""
    replicas: frozenset[str] = frozenset()
    """Tensors whose rows another rank holds as well, and uploads: this one only receives them."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise SettingError(f"of {self.world} ranks none is number {self.rank}")
        if unknown := sorted(self.replicas - self.rows.keys()):
            raise SettingError(
                f"replicas of tensors that rank {self.rank} does not hold: {unknown[:5]}"
            )

    def part_of(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Views of the rows that the rank holds. Raises `KeyError` for a tensor that is not there."""
        return {
            name: arrays[name] if rows is None else arrays[name][slice(*rows)]
            for name, rows in self.rows.items()
        }


class Join(msgspec.Struct, frozen=True, tag=True):
    """The silo's first message."""

    name: Name
    fingerprint: Fingerprint
    key: Key = ""
    """Drawn by the silo, once: who joins with the key of a member is that silo, and takes its place."""
    shard: Shard | None = None
    """If the silo is sharded: its ranks join one by one, under one name."""


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


class Begin(msgspec.Struct, frozen=True, tag=True):
    """All ranks of the sharded silo have the task's weights."""

    ticket: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Training is done, and the update will not change until the Commit; or the weights are judged."""

    ticket: int
    weight: float | None
    """None: not disclosed. All silos of the round count alike then."""
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


ServerMessage: TypeAlias = Task | Begin | Upload | Commit | Goodbye

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
