"""How a round's updates become new weights: the seam for what is not plain averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from fedllm.aggregate import Aggregation, Arrays, check_weight
from fedllm.staged import Staged

__all__ = ["FedAvg", "Strategy"]


class Strategy(Protocol):
    """What a round asks; the calls of one round come in this order."""

    def aggregation(self, weights: Arrays) -> Aggregation:
        """Where this round's updates are gathered. `weights` are the global ones. Raises `WeightsError`."""

    def weight(self, reported: float | None) -> float | None:
        """How much a silo counts that reported `reported` examples; None if it did not say.

        If one is None all silos of the round count alike. Raises `UpdateError`.
        """

    def step(
        self, weights: Arrays, combined: dict[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """The new global weights from the old ones and what the aggregation made of the updates."""


@dataclass(frozen=True)
class FedAvg:
    """The mean of the silos' weights (McMahan et al. 2017, arXiv:1602.05629), each by its examples.

    With `weighted=False` all silos count alike, whatever they report. So they do in a round in which one of them
    does not disclose its examples.
    """

    weighted: bool = True
    aggregate: Callable[[Arrays], Aggregation] = Staged
    """How updates are gathered; the weights come out the same. `Staged` holds all of them, and needs no silo twice.
    `Aligned` holds none, goes at the pace of the slowest, and asks for all of them again when a silo falls out.
    ``partial(Staged, memory_bytes=...)`` gives it settings."""

    def aggregation(self, weights: Arrays) -> Aggregation:
        """As `aggregate` makes it."""
        return self.aggregate(weights)

    def weight(self, reported: float | None) -> float | None:
        """The number reported, or 1. Raises `UpdateError` unless 0 < `reported` <= 1e12, or it is None."""
        check_weight(reported)
        return reported if self.weighted else 1.0

    def step(
        self, weights: Arrays, combined: dict[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """The mean, as it is (a server learning rate of 1)."""
        return combined
