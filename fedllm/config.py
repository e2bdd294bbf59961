"""What a run is told, checked on creation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.errors import SettingError

MAX_SILOS = 100_000
MAX_ROUNDS = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStop:
    """End a run when a metric has not become better for a while. What cannot work raises `SettingError`."""

    metric: str
    """One that the silos report. What not all of them report says nothing, and does not count; nor does a silo's figure
    that is not finite."""
    patience: int
    """So many figures in a row that are no better than the best before them end the run."""
    min_change: float = 0.0
    """By how much a figure has to be better than the best so far to count as better."""
    is_higher_better: bool = False

    def __post_init__(self) -> None:
        _whole("patience", self.patience, 1, MAX_ROUNDS)
        if not (isinstance(self.min_change, int | float) and 0 <= self.min_change < math.inf):
            raise SettingError(f"min_change must be 0 or a positive number, not {self.min_change}")

    def is_due(self, figures: Sequence[float]) -> bool:
        """Whether the run ends after these figures, the oldest first. NaN is no improvement."""
        best, since = -math.inf, 0
        for figure in figures:
            value = figure if self.is_higher_better else -figure
            if value > best + self.min_change:
                best, since = value, 0
            else:
                since += 1
        return since >= self.patience


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of a run of many rounds. One that cannot work raises `SettingError`. Times are seconds."""

    min_silos: int
    """The quorum: a round with fewer silos fails. There is no default, since it is a policy."""
    rounds: int
    """How many rounds have to succeed."""
    expect: int | None = None
    """How many silos the first round waits for; None: `min_silos`."""
    fraction: float = 1.0
    """Which part of the silos that are there a round asks, rounded up, but at least `min_silos`."""
    seed: int = 0
    """Chooses them: with the round's number and the names alone, it says which."""
    train_deadline_s: float | None = None
    """How long training (or an evaluation) may take, from the task to READY; None: as long as it does."""
    upload_deadline_s: float | None = None
    """How long an update may take from there until it is whole; None: as long as it does."""
    evaluate_every: int | None = None
    """After every so many rounds all silos that are there judge the new weights; None: never."""
    stop: EarlyStop | None = None
    """Watches the evaluations' metrics, or those of the rounds if there are no evaluations."""
    join_timeout_s: float = 10.0
    """How long a peer that has connected may take to say who it is."""
    absence_timeout_s: float | None = None
    """How long a round waits for its quorum of silos to be there, and to catch up if they are late; and a rank
    of a sharded silo for the others; None: for ever."""
    farewell_s: float = 60.0
    """How long the end of the run waits for silos of the last round whose connection broke, to give them the
    final weights when they are back."""

    def __post_init__(self) -> None:
        _whole("min_silos", self.min_silos, 1, MAX_SILOS)
        _whole("rounds", self.rounds, 1, MAX_ROUNDS)
        _whole("seed", self.seed, 0, 1 << 63)
        if self.expect is not None:
            _whole("expect", self.expect, self.min_silos, MAX_SILOS)
        if not (isinstance(self.fraction, int | float) and 0 < self.fraction <= 1):
            raise SettingError(f"fraction must be above 0 and at most 1, not {self.fraction!r}")
        if self.evaluate_every is not None:
            _whole("evaluate_every", self.evaluate_every, 1, MAX_ROUNDS)
        for name in ("train_deadline_s", "upload_deadline_s", "absence_timeout_s"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        for name in ("join_timeout_s", "farewell_s"):
            check_seconds(name, getattr(self, name))


def check_seconds(name: str, value: object) -> None:
    """Raise `SettingError` unless `value` is a positive, finite number."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise SettingError(f"{name} must be a positive number of seconds, not {value!r}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SettingError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
