"""The verdict: who wins on which text, told as it is."""

import math

import pytest

from fedllm.demo.events import Judged
from fedllm.demo.verdict import Verdict


def verdict(federated: float, alone: float) -> Verdict:
    table = {
        "base": (8.0, 8.0), "a-alone": (2.0, alone), "b-alone": (9.0, 9.0), "federated": (4.0, federated),
    }  # fmt: skip
    judged = [
        Judged(model, silo, math.log(perplexity) * tokens, tokens)
        for model, row in table.items()
        for silo, perplexity, tokens in zip("ab", row, (100, 300), strict=True)
    ]
    return Verdict.of("ab", judged)


def test_the_union_is_weighted_by_tokens():
    row = verdict(4.0, 32.0).perplexities["a-alone"]
    assert row["a"] == pytest.approx(2)
    assert row["union"] == pytest.approx(2 ** (1 / 4) * 32 ** (3 / 4))


def test_a_federated_win_is_told_with_what_a_silo_alone_does_better():
    won = verdict(4.0, 32.0)
    assert won.federated_wins
    assert won.sentence().startswith("On the union federated wins: 4.0 against")
    assert won.remarks() == ["On a a-alone does better than federated: 2.0 against 4.0."]


def test_a_lost_union_is_told_as_clearly():
    lost = verdict(4.0, 4.0)
    assert not lost.federated_wins
    assert "does NOT win" in lost.sentence()
    row = {"a": 4.0, "union": 4.0}
    assert not Verdict(("a",), {"base": row, "a-alone": row, "federated": row}).federated_wins


def test_personalised_models_are_compared_with_the_shared_one():
    assert verdict(4.0, 32.0).personalised() is None
    own = [Judged("personal", "a", math.log(2) * 100, 100), Judged("personal", "b", 0.0, 300)]
    shared = [
        Judged(name, text, math.log(4), 1) for name in ("federated", "a-alone") for text in "ab"
    ]
    both = Verdict.of("ab", [*shared, *own])
    assert both.alone == ("a-alone",)
    assert both.personalised() == (
        "Personalised against shared, each silo on its own text: a 2.0 against 4.0, b 1.0 against 4.0; "
        "all in all 1.2 against 4.0."
    )


@pytest.mark.parametrize("nats", [None, math.nan, math.inf, 1e6])
def test_a_model_that_diverged_never_wins(nats: float | None):
    judged = [
        Judged("base", "a", 1.0, 1),
        Judged("a-alone", "a", 2.0, 1),
        Judged("federated", "a", nats, 1),
    ]
    diverged = Verdict.of("a", judged)
    assert diverged.perplexities["federated"] == {"a": math.inf, "union": math.inf}
    assert not diverged.federated_wins
