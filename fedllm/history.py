"""What a run has come to: told to its caller, and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

from fedllm.participation import Outcome
from fedllm.rounds import RoundResult

__all__ = ["History", "Progress", "RoundRecord", "State"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """A `RoundResult` without its weights."""

    round: int
    outcomes: Mapping[str, Outcome]
    metrics: Mapping[str, float]
    seconds: float

    @classmethod
    def of(cls, result: RoundResult) -> Self:
        """Its record."""
        return cls(
            round=result.round,
            outcomes=result.outcomes,
            metrics=result.metrics,
            seconds=result.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a run has come to."""

    weights: Mapping[str, NDArray[Any]]
    """Those of the last of the rounds, or the first global weights."""
    rounds: tuple[RoundRecord, ...]
    """Those that succeeded, without those before a `resume`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has come: all that decides, beside the weights, how it goes on."""

    round: int = 0
    """The last that succeeded."""
    cohort: tuple[str, ...] = ()
    """Whose updates are in its weights."""
    evaluated: int = 0
    """The last whose weights were judged."""
    figures: tuple[float, ...] = ()
    """Of the metric that may end the run early, the oldest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a checkpoint holds beside the weights."""

    run: str
    fingerprint: dict[str, str]
    progress: Progress
