"""`python -m fedllm serve`: what it finds wrong before it loads torch, and what it leaves when a run ends early."""

import asyncio
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel

import fedllm
from fedllm import EvaluationTask
from fedllm.__main__ import main
from fedllm.adapters import full_arrays
from fedllm.checkpoint import Checkpoints
from fedllm.demo import arguments
from fedllm.demo.events import Event, Listening, RoundDone, Said, Wrote
from fedllm.demo.joining import JoinOptions, _assignment, _Silo
from fedllm.demo.learner import Learner, prepare_learner
from fedllm.demo.model import Base, load_base, train_tokenizer
from fedllm.demo.serving import ServeOptions, _serve
from tests.test_checkpoint import files_of_at_most

ROOT = Path(__file__).parent.parent
SILO = ["--name", "a", "--text", "docstrings"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--base", "b", "--port", "65536"], "--port: 65536 is above 65535"),
        (["serve", "--base", "b", "--port", "-1"], "--port: -1 is negative"),
        (["serve", "--base", "b", "--batch", "4097"], "--batch: 4097 is above 4096"),
        (["demo", "--steps", "1000001"], "--steps: 1000001 is above 1000000"),
        (["join", "--base", "b", *SILO, "--server", "h:65536"], "65536 is above 65535"),
    ],
)
def test_a_figure_that_no_silo_or_network_takes_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_a_silo_takes_what_the_command_line_does():
    recipe = {"block_tokens": 2, "learning_rate": 1.0}
    for steps, batch in ((arguments.MAX_STEPS, 1), (1, arguments.MAX_BATCH)):
        asked = {"recipe": {**recipe, "steps": steps, "batch": batch}, "seed": 0}
        assert _assignment(asked).recipe.steps == steps


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["serve", "--base", "typo"], "no base model at 'typo': there is no such folder"),
        (["join", "--base", "./a/typo", "--server", "h:1", *SILO], "no base model at './a/typo'"),
        (["demo", "--model", "typo"], "no base model at 'typo'"),
        (["serve", "--base", ".", "--host", "0.0.0.0"], "or add --insecure on a network that"),
        (["serve", "--base", ".", "--min-silos", "100001"], "min_silos must be a whole number"),
    ],
)
def test_what_cannot_work_is_told_before_torch_is_loaded(words: list[str], complaint: str):
    program = (
        "import sys; sys.modules['torch'] = None; import fedllm.__main__ as m; sys.exit(m.main())"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr.startswith("fedllm: ")
    assert child.stderr.count("\n") == 1
    assert complaint in child.stderr


async def test_a_silo_judges_by_text_that_it_holds_out(learner: Learner, tmp_path: Path):
    tokens = np.arange(100, dtype=np.int64) % 50
    told = JoinOptions(
        host="", port=0, name="a", base="", mode="full", text="", threads=1, out=None, keep=None,
        retry=1.0,
    )  # fmt: skip
    silo = _Silo(told, learner, tokens[:0], tokens, lambda event: None)
    recipe = {"steps": 1, "batch": 1, "block_tokens": 10, "learning_rate": 1.0}
    weights = {name: np.zeros_like(array) for name, array in learner.arrays().items()}
    asked = EvaluationTask(round=1, arguments={"recipe": recipe, "seed": 0}, weights=weights)
    judged_tokens, metrics = await silo._evaluate(asked)
    assert judged_tokens == 10 * (10 - 1)
    assert metrics["loss"] == pytest.approx(math.log(learner.base.model.config.vocab_size))


# A run that ends early


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 300)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return prepare_learner(Base(GPT2LMHeadModel(config), tokenizer), "full", seed=0)


def options(out: Path) -> ServeOptions:
    return ServeOptions(
        base="", mode="full", out=out, host="127.0.0.1", port=0, insecure=False, rounds=3,
        min_silos=1, fraction=1.0, train_deadline=None, upload_deadline=None, absence_timeout=None,
        evaluate_every=None, patience=None, resume=False, keep=2, steps=1, batch=1, lr=1e-3, seed=0,
    )  # fmt: skip


async def add_one(address: tuple[str, int], learner: Learner, rounds: int) -> None:
    """A silo that adds 1 to all weights in so many rounds, and then has nothing to give."""
    joining = fedllm.join(*address, name="a", fingerprint=learner.fingerprint, backoff=None)
    async with joining as silo:
        async for task in silo.rounds():
            if task.round <= rounds:
                update = {name: array + np.float32(1) for name, array in task.weights.items()}
                await task.submit(update, weight=1)


class Stage:
    """Hears what `serve` reports, and lets one silo take part."""

    def __init__(self, learner: Learner, out: Path, *, rounds: int, **settings: Any) -> None:
        self.heard: list[Event] = []
        told = replace(options(out), **settings)
        self.serving = asyncio.ensure_future(_serve(told, learner, self.hear))
        self.silo: asyncio.Future[None] | None = None
        self._learner = learner
        self._rounds = rounds
        self.is_round_done = asyncio.Event()

    def hear(self, event: Event) -> None:
        self.heard.append(event)
        if isinstance(event, Listening):
            joining = add_one((event.host, event.port), self._learner, self._rounds)
            self.silo = asyncio.ensure_future(joining)
        elif isinstance(event, RoundDone):
            self.is_round_done.set()

    async def end(self) -> BaseException | None:
        """What ended the server."""
        async with asyncio.timeout(10):
            [error] = await asyncio.gather(self.serving, return_exceptions=True)
            if self.silo is not None:
                await asyncio.gather(self.silo, return_exceptions=True)
        return error


@pytest.mark.parametrize("end", ["quorum", "signal", "no round"])
async def test_a_run_that_ends_early_leaves_the_model_that_it_has(
    end: str, learner: Learner, tmp_path: Path
):
    before = {name: array.copy() for name, array in learner.arrays().items()}
    stage = Stage(learner, tmp_path, rounds=0 if end == "no round" else 2)
    if end == "signal":
        await stage.is_round_done.wait()
        stage.serving.cancel()  # what `run_interruptibly` does
    error = await stage.end()
    kind = asyncio.CancelledError if end == "signal" else fedllm.QuorumNotReached
    assert isinstance(error, kind)
    wrote = [event for event in stage.heard if isinstance(event, Wrote)]
    federated = tmp_path / "federated"
    if end == "no round":
        assert wrote == []
        assert not federated.exists()
        return
    rounds = sum(isinstance(event, RoundDone) for event in stage.heard)
    what = f"the federated model, after only {rounds} of 3 rounds,"
    assert wrote == [Wrote(what, str(federated))]
    for name, array in full_arrays(load_base(str(federated)).model).items():
        np.testing.assert_allclose(array, before[name] + rounds, rtol=1e-5)


@pytest.mark.parametrize("bytes_left", [0, 4096])
async def test_a_disk_that_is_full_is_the_error_and_the_model_that_does_not_fit_is_told_of(
    bytes_left: int, learner: Learner, tmp_path: Path
):
    stage = Stage(learner, tmp_path, rounds=3)
    await stage.is_round_done.wait()
    with files_of_at_most(bytes_left):
        error = await stage.end()
    assert isinstance(error, fedllm.CheckpointError)
    assert "'round-000002' cannot be written" in str(error)
    told = stage.heard[-1]
    assert isinstance(told, Said)
    assert f"the model cannot be written to {tmp_path / 'federated'}: " in told.text
    assert "too large" in told.text
    assert Checkpoints(tmp_path / "checkpoints").rounds() == [0, 1]


async def test_a_model_that_does_not_fit_is_the_error_of_a_run_that_ended_well(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_room(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(learner.base.model, "save_pretrained", no_room)
    stage = Stage(learner, tmp_path, rounds=3)
    error = await stage.end()
    assert isinstance(error, fedllm.CheckpointError)
    assert f"the model cannot be written to {tmp_path / 'federated'}: No space left" in str(error)


@pytest.mark.parametrize("aggregate", ["staged", "aligned"])
async def test_each_round_is_saved_as_it_ends(
    learner: Learner,
    tmp_path: Path,
    aggregate: Literal["staged", "aligned"],
    monkeypatch: pytest.MonkeyPatch,
):
    unused = {"staged": "Aligned", "aligned": "Staged"}[aggregate]
    monkeypatch.setattr(f"fedllm.demo.serving.{unused}", None)
    before = {name: array.copy() for name, array in learner.arrays().items()}
    stage = Stage(learner, tmp_path, rounds=3, aggregate=aggregate)
    await stage.is_round_done.wait()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.rounds() == [0, 1]
    weights, _ = checkpoints.load(1, before)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, before[name] + np.float32(1))
    assert await stage.end() is None
    assert checkpoints.rounds() == [2, 3]
    assert stage.heard[-1] == Wrote("the federated model", str(tmp_path / "federated"))


async def test_a_run_is_resumed_if_that_is_asked_and_never_mixed_with_another(
    learner: Learner, tmp_path: Path
):
    before = {name: array.copy() for name, array in learner.arrays().items()}
    stage = Stage(learner, tmp_path, rounds=2)
    assert isinstance(await stage.end(), fedllm.QuorumNotReached)
    learner.load(before)
    stage = Stage(learner, tmp_path, rounds=3)
    error = await stage.end()
    assert isinstance(error, fedllm.CheckpointError)
    assert "holds round 2 of an earlier run: resume it (--resume), or give" in str(error)
    assert not any(isinstance(event, Listening) for event in stage.heard)
    stage = Stage(learner, tmp_path, rounds=3, resume=True)
    assert await stage.end() is None
    assert stage.heard[0] == Said("2 of 3 rounds are done")
    assert stage.heard[-1] == Wrote("the federated model", str(tmp_path / "federated"))
    for name, array in full_arrays(load_base(str(tmp_path / "federated")).model).items():
        np.testing.assert_allclose(array, before[name] + 3, rtol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
