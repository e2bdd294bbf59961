"""The demo's result: perplexities of every model on every silo's held-out text, and who wins."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm.demo.events import Judged

BASE = "base"
FEDERATED = "federated"
PERSONAL = "personal"
"""Each silo's own model, on its own text: one that kept some layers to itself."""
UNION = "union"


@dataclass(frozen=True)
class Verdict:
    """`perplexities[model][text]`, with the union of all texts (weighted by tokens) as one more."""

    texts: tuple[str, ...]
    perplexities: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, texts: Sequence[str], judged: Iterable[Judged]) -> "Verdict":
        """From one `Judged` for each model and text."""
        sums: dict[str, dict[str, tuple[float, int]]] = {}
        for one in judged:
            sums.setdefault(one.model, {})[one.text] = (_number(one.nats), one.tokens)
        return cls(tuple(texts), {model: _row(texts, parts) for model, parts in sums.items()})

    @property
    def alone(self) -> tuple[str, ...]:
        """The models that one silo trained for itself."""
        return tuple(m for m in self.perplexities if m not in (BASE, FEDERATED, PERSONAL))

    @property
    def federated_wins(self) -> bool:
        """Whether the federated model is better on the union than every silo's own."""
        federated = self.perplexities[FEDERATED][UNION]
        return all(federated < self.perplexities[model][UNION] for model in self.alone)

    def best(self, text: str) -> str:
        """The model with the lowest perplexity on one text."""
        return min(self.perplexities, key=lambda model: self.perplexities[model][text])

    def remarks(self) -> list[str]:
        """Where a model that one silo trained alone does better than the federated one."""
        federated = self.perplexities[FEDERATED]
        return [
            f"On {text} {model} does better than federated: {row[text]:.1f} against "
            f"{federated[text]:.1f}."
            for text in self.texts
            for model, row in self.perplexities.items()
            if model in self.alone and row[text] < federated[text]
        ]

    def personalised(self) -> str | None:
        """What layers of their own did for the silos, against one model for all; None: nobody has any."""
        personal = self.perplexities.get(PERSONAL)
        if personal is None:
            return None
        shared = self.perplexities[FEDERATED]
        parts = (f"{text} {personal[text]:.1f} against {shared[text]:.1f}" for text in self.texts)
        return (
            f"Personalised against shared, each silo on its own text: {', '.join(parts)}; "
            f"all in all {personal[UNION]:.1f} against {shared[UNION]:.1f}."
        )

    def sentence(self) -> str:
        """Who wins on the union."""
        rival = min(self.alone, key=lambda model: self.perplexities[model][UNION])
        ours, theirs = (self.perplexities[model][UNION] for model in (FEDERATED, rival))
        if self.federated_wins:
            return (
                f"On the union federated wins: {ours:.1f} against {theirs:.1f} for the best silo "
                f"alone ({rival})."
            )
        return (
            f"On the union federated does NOT win: {ours:.1f} against {theirs:.1f} for {rival}. "
            f"Too few steps, or another --lr?"
        )


def _row(texts: Sequence[str], parts: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    row = {text: perplexity(*parts[text]) for text in texts}
    nats = sum(parts[text][0] for text in texts)
    tokens = sum(parts[text][1] for text in texts)
    return row | {UNION: perplexity(nats, tokens)}


def _number(nats: float | None) -> float:
    return nats if nats is not None and math.isfinite(nats) else math.inf


def perplexity(nats: float, tokens: int) -> float:
    """Of so many tokens' negative log-likelihood; infinite if it is too large a number."""
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf
