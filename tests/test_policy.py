"""What a silo lets a server ask of it, and what it tells: in whole runs, and rule by rule."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from fedllm import (
    Aligned,
    Between,
    Evaluation,
    EvaluationTask,
    FedAvg,
    OneOf,
    Policy,
    QuorumNotReached,
    RoundResult,
    SettingError,
    Status,
)
from fedllm.messages import Ready
from fedllm.policy import Rule
from tests.federation import Log, joining, running, weights_of

pytestmark = pytest.mark.usefixtures("no_leaks", "loop_kind")

RULES: dict[str, Rule] = {
    "recipe.steps": Between(1, 100),
    "mode": OneOf(("lora", 1)),
    "seed": Between(0, 2**63),
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"recipe": {"steps": 1}, "mode": "lora", "seed": 2**63 - 1},
        {"recipe": {"steps": 100.0}, "mode": 1.0},
    ],
)
def test_what_a_silo_allows_it_does(arguments: dict[str, Any]):
    assert Policy(arguments=RULES).objection(arguments) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"recipe": {"steps": 101}}, "allows recipe.steps to be 1 to 100, and not 101"),
        ({"recipe": {"steps": True}}, "and not True"),
        ({"recipe": {"steps": float("nan")}}, "and not nan"),
        ({"recipe": {"steps": "5"}}, "and not '5'"),
        ({"recipe": {"steps": [5]}}, r"and not \[5\]"),
        ({"recipe": {"steps": {"steps": 5}}}, "recipe.steps to be 1 to 100, and not {'steps': 5}"),
        ({"other": {"steps": 5}}, "lets no server ask for 'other'"),
        ({"recipe": {b"steps": 5}}, "lets no server ask for \"recipe.b'steps'\""),
        ({"recipe": {}}, "lets no server ask for 'recipe'"),
        ({"mode": "full"}, "allows mode to be 'lora' or 1, and not 'full'"),
        ({"mode": True}, "and not True"),
        ({"seed": 0, "shell": "rm -rf /"}, "lets no server ask for 'shell'"),
        ({"seed": 10**400}, r"and not 1000000"),
    ],
)
def test_all_else_is_refused_with_the_reason(arguments: dict[str, Any], says: str):
    objection = Policy(arguments=RULES).objection(arguments)
    with pytest.raises(SettingError, match=says):
        raise SettingError(objection)
    assert len(objection or "") < 200


@pytest.mark.parametrize("wrap", [lambda x: {"a": x}, lambda x: [x]], ids=["mappings", "lists"])
def test_what_is_nested_deeper_than_python_can_go_is_refused_like_all_else(wrap: Any):
    """Nothing that a server sends may end a silo by an error that it does not expect."""
    nested: Any = 1
    for _ in range(100_000):
        nested = wrap(nested)
    objection = Policy(arguments={"x": Between(0, 1)}).objection({"x": nested})
    assert objection is not None
    assert objection.startswith("this silo ")
    assert len(objection) < 200


def test_a_policy_without_rules_lets_a_server_ask_for_anything():
    assert Policy().objection({"shell": "rm -rf /"}) is None
    assert Policy(arguments={}).objection({"seed": 1}) is not None


def test_rules_that_allow_nothing_are_told():
    for low, high in ((2, 1), (float("nan"), 1)):
        with pytest.raises(SettingError, match="there is no number from"):
            Between(low, high)


def test_what_is_not_to_be_told_does_not_leave():
    ready = Ready(7, 120.0, 3.5, {"loss": 1.0, "words": 9.0})
    assert Policy().told(ready) == ready
    quiet = Policy(tells_weight=False, tells_metrics={"loss"}).told(ready)
    assert quiet == Ready(7, None, None, {"loss": 1.0})
    assert Policy(tells_metrics=("norm",)).told(ready) == Ready(7, 120.0, 3.5, {})
    assert b"null" in msgspec.json.encode(quiet)


async def take_part(
    address: tuple[str, int], name: str, adds: float, weight: float | None, **options: Any
) -> None:
    async with joining(address, name, **options) as silo:
        async for task in silo.rounds():
            update = {n: (a + np.float32(adds)).astype(a.dtype) for n, a in task.weights.items()}
            await task.submit(update, weight=weight, metrics={"loss": adds})


async def one_round(*silos: tuple[str, float, float | None, Policy], **options: Any) -> RoundResult:
    log = Log()
    async with running(log, min_silos=len(silos), expect=len(silos), **options) as (address, run):
        parts = [take_part(address, n, adds, w, policy=p) for n, adds, w, p in silos]
        await asyncio.gather(run, *parts)
    return log.rounds[0]


@pytest.mark.parametrize("aggregate", [None, Aligned])
async def test_if_one_silo_keeps_its_number_of_examples_all_count_alike(aggregate: Any):
    strategy = FedAvg() if aggregate is None else FedAvg(aggregate=aggregate)
    told, hidden = Policy(), Policy(tells_weight=False)
    plain = await one_round(("a", 1, 1, told), ("b", 3, 1, told), strategy=strategy)
    for policies in ((told, hidden), (hidden, hidden)):
        silos = [("a", 1, 900, policies[0]), ("b", 3, 100, policies[1])]
        result = await one_round(*silos, strategy=strategy)
        assert result.metrics == plain.metrics == {"loss": 2.0}
        for name, array in plain.weights.items():
            assert result.weights[name].tobytes() == array.tobytes()
        weights = [outcome.weight for outcome in result.outcomes.values()]
        assert weights == [None if policy is hidden else 900.0 for policy in policies[:1]] + [None]


async def test_a_silo_may_give_no_weight_at_all():
    result = await one_round(("a", 1, None, Policy()), ("b", 3, 100, Policy()))
    assert result.weights["w"].tobytes() == weights_of(2)["w"].tobytes()


async def test_a_silo_that_keeps_its_weight_and_is_refused_changes_no_other_silos():
    """It is out: the others are weighed as if it had never been there."""
    log = Log()
    async with running(log, min_silos=2, expect=3) as (address, run):
        parts = [
            take_part(address, "a", 1, 300),
            take_part(address, "b", 3, 100),
            take_part(address, "c", np.nan, 5, policy=Policy(tells_weight=False)),
        ]
        await asyncio.gather(run, *parts)
    (result,) = log.rounds
    assert result.outcomes["c"].status is Status.REFUSED
    assert result.weights["w"].tobytes() == weights_of(1.5)["w"].tobytes()
    assert result.metrics == {"loss": 1.5}


async def test_an_evaluation_is_by_the_same_rules():
    """A silo that keeps its number of examples makes plain means of its metrics; what it refuses it does not judge."""
    seen: list[Evaluation] = []

    async def judging(address: tuple[str, int], name: str, policy: Policy) -> None:
        async def judge(_: EvaluationTask) -> tuple[float, dict[str, float]]:
            return (900, {"loss": 2.0}) if name == "a" else (100, {"loss": 4.0, "words": 5.0})

        async with joining(address, name, policy=policy) as silo:
            async for task in silo.rounds(judge):
                await task.submit(task.weights, weight=1)

    asks = {"arguments": {"seed": 1}, "evaluate_every": 1, "on_evaluation": seen.append}
    async with running(Log(), min_silos=1, expect=3, **asks) as (address, run):
        await asyncio.gather(
            run,
            judging(address, "a", Policy()),
            judging(address, "b", Policy(tells_weight=False, tells_metrics=["loss"])),
            judging(address, "c", Policy(arguments={})),
        )
    (evaluation,) = seen
    assert evaluation.metrics == {"loss": 3.0}
    kept = evaluation.outcomes["b"]
    assert (kept.weight, kept.metrics) == (None, {"loss": 4.0})
    refused = evaluation.outcomes["c"]
    assert refused.status is Status.REFUSED
    assert "lets no server ask for 'seed'" in refused.reason


async def test_a_server_that_asks_too_much_is_told_so_and_the_round_goes_on():
    log = Log()
    said: list[str] = []
    asks = {"recipe": {"steps": 1000}}
    async with running(log, min_silos=1, expect=2, arguments=asks) as (address, run):
        willing = take_part(address, "a", 1, 1)
        unwilling = take_part(
            address, "b", 3, 1, policy=Policy(arguments=RULES), on_event=said.append
        )
        await asyncio.gather(run, willing, unwilling)
    (result,) = log.rounds
    why = "this silo allows recipe.steps to be 1 to 100, and not 1000"
    assert result.outcomes["b"].status is Status.REFUSED
    assert why in result.outcomes["b"].reason
    assert said == [f"round 1: refused: {why}"]
    assert result.weights["w"].tobytes() == weights_of(1)["w"].tobytes()


async def test_a_reason_of_any_length_is_told():
    """A message takes 4096 characters of it."""
    rules: dict[str, Rule] = {"mode": OneOf(tuple(f"mode {number}" for number in range(1000)))}
    log = Log()
    async with running(log, min_silos=1, expect=2, arguments={"mode": "x"}) as (address, run):
        unwilling = take_part(address, "b", 3, 1, policy=Policy(arguments=rules))
        await asyncio.gather(run, take_part(address, "a", 1, 1), unwilling)
    outcome = log.rounds[0].outcomes["b"]
    assert outcome.status is Status.REFUSED
    assert "this silo allows mode to be 'mode 0' or 'mode 1'" in outcome.reason


async def test_a_run_that_no_silo_allows_ends_and_says_why():
    log = Log()
    async with running(log, min_silos=1, arguments={"shell": "x"}) as (address, run):
        silo = asyncio.ensure_future(take_part(address, "a", 1, 1, policy=Policy(arguments=RULES)))
        with pytest.raises(QuorumNotReached, match="lets no server ask for 'shell'"):
            await run
        await asyncio.gather(silo, return_exceptions=True)
