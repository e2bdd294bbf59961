"""What a run is told, checked on creation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.errors import SettingError

MAX_SILOS = 100_000
MAX_ROUNDS = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of a run of many rounds. One that cannot work raises `SettingError`. Times are seconds."""

    min_silos: int
    """The quorum: a round with fewer silos fails. There is no default, since it is a policy."""
    rounds: int
    """How many rounds have to succeed."""
    expect: int | None = None
    """How many silos the first round waits for; None: `min_silos`."""
    deadline_s: float | None = None
    """How long each of a round's two phases, training and upload, may take; None: as long as it does."""
    join_timeout_s: float = 10.0
    """How long a peer that has connected may take to say who it is."""
    absence_timeout_s: float | None = None
    """How long a round waits for its quorum of silos to be there; None: for ever."""

    def __post_init__(self) -> None:
        _whole("min_silos", self.min_silos, 1, MAX_SILOS)
        _whole("rounds", self.rounds, 1, MAX_ROUNDS)
        if self.expect is not None:
            _whole("expect", self.expect, self.min_silos, MAX_SILOS)
        for name in ("deadline_s", "absence_timeout_s"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        check_seconds("join_timeout_s", self.join_timeout_s)


def check_seconds(name: str, value: object) -> None:
    """Raise `SettingError` unless `value` is a positive, finite number."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise SettingError(f"{name} must be a positive number of seconds, not {value!r}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SettingError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
