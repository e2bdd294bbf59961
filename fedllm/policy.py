"""What a silo lets a server ask of it, and what it tells the server of itself.

A server sends numbers and plain values, never code; which of them a silo's training obeys, the silo says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from fedllm.errors import SettingError
from fedllm.messages import Ready

__all__ = ["Between", "OneOf", "Policy", "Rule"]

_MAX_QUOTED = 80


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise SettingError(f"there is no number from {self.low} to {self.high}")

    def allows(self, value: object) -> bool:
        """Whether it is such a number. A boolean is none."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"


@dataclass(frozen=True)
class OneOf:
    """One of these values."""

    values: tuple[object, ...]

    def allows(self, value: object) -> bool:
        """Whether it is one of them. True is not 1."""
        return any(
            value == mine and isinstance(value, bool) is isinstance(mine, bool)
            for mine in self.values
        )

    def __str__(self) -> str:
        return " or ".join(repr(value) for value in self.values)


Rule: TypeAlias = Between | OneOf


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A silo's own rules, for `join`. Without any, a server may ask for whatever the silo's program obeys."""

    arguments: Mapping[str, Rule] | None = None
    """What a server may ask, by the argument's name; those within another by names with dots (``recipe.steps``).

    A task with an argument that is not here, or has a value that its rule does not allow, is declined with the reason,
    and the silo's program never sees it. One that the server does not give is none of the rules'."""
    tells_weight: bool = True
    """Whether the server is told how much this silo counts, as a rule its number of examples. If not, all silos of a
    round count alike."""
    tells_metrics: Collection[str] | None = None
    """The names of metrics, "norm" among them, that the server is told; None: all that the silo's program gives."""

    def objection(self, arguments: Mapping[str, Any]) -> str | None:
        """Why this silo does not do what it is asked; None if it does."""
        if self.arguments is None:
            return None
        for name, value in _leaves(arguments):
            rule = self.arguments.get(name)
            if rule is None:
                return f"this silo lets no server ask for {name[:_MAX_QUOTED]!r}"
            if not rule.allows(value):
                return f"this silo allows {name} to be {rule}, and not {value!r:.{_MAX_QUOTED}}"
        return None

    def told(self, ready: Ready) -> Ready:
        """What of a report leaves the silo."""
        may = self.tells_metrics
        metrics = {n: v for n, v in ready.metrics.items() if may is None or n in may}
        return msgspec.structs.replace(
            ready,
            weight=ready.weight if self.tells_weight else None,
            norm=ready.norm if may is None or "norm" in may else None,
            metrics=metrics,
        )


def _leaves(arguments: Mapping[Any, Any], within: str = "") -> Iterator[tuple[str, object]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value
