"""A silo's own weights: layers that stay, what it refuses to adopt, and what outlives its process."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedllm import (
    EvaluationTask,
    Federation,
    QuorumNotReached,
    RunConfig,
    RunFailed,
    SettingError,
    join,
)
from fedllm.adapters import Arrays
from fedllm.demo.events import Event, Said
from fedllm.demo.joining import JoinOptions, _Silo
from fedllm.demo.learner import Learner, Mode, prepare_learner
from fedllm.demo.model import Base
from fedllm.demo.training import Assignment, Tokens
from tests.demo.conftest import RECIPE, make_tiny

KEEP = ("transformer.ln_f",)
OWN = "transformer.ln_f.bias"
SHARED = "transformer.wte.weight"
TOKENS: Tokens = np.tile(np.arange(16, dtype=np.int64), 12)
ARGUMENTS: dict[str, Any] = msgspec.to_builtins(Assignment(recipe=RECIPE, seed=0))


def silo_of(tiny: Base, heard: list[Event], **told: Any) -> _Silo:
    given = {"host": "", "port": 0, "name": "a", "base": "", "text": "", "threads": 1, "retry": 1.0}
    options = JoinOptions(**{"mode": "full", "out": None, "keep": None, **given, **told})
    learner = prepare_learner(tiny, "full", seed=0, keep_local=options.keep_local)
    return _Silo(options, learner, TOKENS, TOKENS, heard.append)


def copied(learner: Learner) -> Arrays:
    return {name: array.copy() for name, array in learner.arrays().items()}


def noise(array: np.ndarray[Any, Any]) -> Any:
    return np.random.default_rng(array.size).normal(0, 5, array.shape).astype(np.float32)


async def test_weights_that_are_worse_than_allowed_are_refused_and_the_silos_own_stay():
    heard: list[Event] = []
    silo = silo_of(make_tiny(), heard, refuse_above=1.5)
    before = copied(silo._learner)
    worse = {name: noise(array) for name, array in before.items()}
    for weights in (worse, {name: array * np.nan for name, array in before.items()}):
        await silo._adopt(weights, "round 2")
        for name, array in silo._learner.arrays().items():
            np.testing.assert_array_equal(array, before[name])
        said = heard.pop()
        assert isinstance(said, Said)
        assert said.text.startswith("round 2: refuses the server's weights, of perplexity ")
    silo._learner.load({name: array * np.nan for name, array in before.items()})
    await silo._adopt(worse, "round 3")  # what has diverged itself takes anything that is a number
    assert heard == []
    silo._learner.load(before)
    near = {name: array + np.float32(1e-4) for name, array in before.items()}
    await silo._adopt(near, "round 4")
    assert heard == []
    np.testing.assert_array_equal(silo._learner.arrays()[SHARED], near[SHARED])


async def test_a_silo_in_a_run_keeps_its_own_before_it_trains_and_at_the_end():
    """A server that begins with noise, and another silo that outweighs this one with it."""
    heard: list[Event] = []
    learner = prepare_learner(make_tiny(), "full", seed=0)
    before = copied(learner)
    worse = {name: noise(array) for name, array in before.items()}
    async with Federation(
        worse,
        RunConfig(min_silos=2, rounds=2),
        fingerprint=learner.fingerprint,
        arguments=ARGUMENTS,
    ) as server:
        host, port = await server.start()

        async def spoil() -> None:
            async with join(host, port, name="b", fingerprint=learner.fingerprint) as member:
                async for task in member.rounds():
                    await task.submit(worse, weight=1e6)

        silo = silo_of(make_tiny(), heard, host=host, port=port, refuse_above=1.5)
        _, _, is_there = await asyncio.gather(server.run(), spoil(), silo.take_part())
    assert is_there
    refused = [one.text for one in heard if isinstance(one, Said) and "refuses" in one.text]
    assert [line.partition(":")[0] for line in refused] == ["round 1", "round 2", "the last round"]
    for name, array in silo._learner.arrays().items():
        assert not np.array_equal(array, before[name])
        np.testing.assert_allclose(array, before[name], atol=0.2)  # six steps from where it began


async def test_without_a_limit_any_weights_are_adopted():
    silo = silo_of(make_tiny(), [])
    worse = {name: noise(array) for name, array in copied(silo._learner).items()}
    await silo._adopt(worse, "round 1")
    np.testing.assert_array_equal(silo._learner.arrays()[SHARED], worse[SHARED])


async def test_what_a_silo_judges_it_does_not_adopt():
    silo = silo_of(make_tiny(), [])
    before = copied(silo._learner)
    zeros = {name: np.zeros_like(array) for name, array in before.items()}
    asked = EvaluationTask(round=1, arguments=ARGUMENTS, weights=zeros)
    _, metrics = await silo._evaluate(asked)
    vocabulary = before[SHARED].shape[0]
    assert metrics["loss"] == pytest.approx(np.log(vocabulary))
    for name, array in silo._learner.arrays().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_silo_that_keeps_all_to_itself_takes_no_part(mode: Mode):
    with pytest.raises(SettingError, match=r"^keep_local \* leaves nothing to share$"):
        prepare_learner(make_tiny(), mode, seed=0, keep_local=["*"])


async def test_layers_of_its_own_never_reach_the_server_and_outlive_the_silos_process(
    tmp_path: Path,
):
    shared = prepare_learner(make_tiny(), "full", seed=0, keep_local=KEEP)
    assert OWN not in shared.arrays()
    async with Federation(
        shared.arrays(),
        RunConfig(min_silos=1, rounds=1),
        fingerprint=shared.fingerprint,
        arguments=ARGUMENTS,
    ) as server:
        host, port = await server.start()
        told = {"host": host, "port": port, "keep": tmp_path, "keep_local": KEEP}
        silo = silo_of(make_tiny(), [], **told)
        untrained = copied(silo._learner.whole())
        _, is_there = await asyncio.gather(server.run(), silo.take_part())
    assert is_there
    assert set(server.history.weights) == set(untrained) - {OWN, "transformer.ln_f.weight"}
    trained = silo._learner.whole().arrays()
    assert not np.array_equal(trained[OWN], untrained[OWN])
    async with Federation(
        shared.arrays(),
        RunConfig(min_silos=1, rounds=1),
        fingerprint=shared.fingerprint,
        arguments={"not": "what a silo does"},
    ) as server:
        host, port = await server.start()
        again = silo_of(make_tiny(), [], **{**told, "port": port})
        ends = await asyncio.gather(server.run(), again.take_part(), return_exceptions=True)
    assert [type(end) for end in ends] == [QuorumNotReached, RunFailed]  # and nothing was trained
    np.testing.assert_array_equal(again._learner.whole().arrays()[OWN], trained[OWN])
