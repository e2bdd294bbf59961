"""The tokenizer, training and judging."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import GPT2LMHeadModel

from fedllm.demo import text
from fedllm.demo.training import (
    Recipe,
    TooLittleText,
    TrainingStopped,
    encode,
    judge,
    round_seed,
    train,
    windows,
)
from tests.demo.conftest import RECIPE


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips_through_the_tokenizer(tiny, words):
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(words)) == words


def test_documents_are_joined_by_end_of_text(tiny):
    tokens = encode(tiny.tokenizer, [text.Document("a", "the cat"), text.Document("b", "sat")])
    end = tiny.tokenizer.eos_token_id
    assert [tokens[-1], list(tokens).count(end)] == [end, 2]
    assert tiny.tokenizer.decode(tokens, skip_special_tokens=True) == "the catsat"


def test_data_order_depends_on_seed_silo_and_round_alone():
    tokens = np.arange(5000, dtype=np.int64)

    def drawn(seed: int, silo: str, round: int) -> torch.Tensor:
        return torch.stack(list(windows(tokens, RECIPE, round_seed(seed, silo, round))))

    first = drawn(0, "a", 1)
    assert first.shape == (3, 2, 16)
    assert torch.equal(first, drawn(0, "a", 1))
    for other in (drawn(1, "a", 1), drawn(0, "b", 1), drawn(0, "a", 2)):
        assert not torch.equal(first, other)
    assert torch.equal(first[:, :, 1:], first[:, :, :-1] + 1)  # each window is consecutive


def test_too_little_text_is_an_error():
    with pytest.raises(TooLittleText, match="15 tokens are fewer than one window of 16"):
        next(windows(np.zeros(15, dtype=np.int64), RECIPE, (0,)))


def test_training_lowers_the_loss_and_repeats_exactly(tiny):
    tokens = encode(tiny.tokenizer, [text.Document("a", "the cat sat on the mat " * 40)])
    recipe = Recipe(steps=12, batch=4, block_tokens=16, learning_rate=1e-2)
    losses: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(1)
        model = GPT2LMHeadModel(tiny.model.config)
        heard: list[float] = []

        def on_step(step: int, loss: float, heard: list[float] = heard) -> None:
            heard.append(loss)

        mean = train(model, tokens, recipe, seed=(5,), on_step=on_step)
        assert mean == pytest.approx(np.mean(heard))
        losses.append(heard)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


def test_training_stops_when_told(tiny):
    stop = threading.Event()
    done: list[int] = []

    def on_step(step: int, loss: float) -> None:
        done.append(step)
        stop.set()

    with pytest.raises(TrainingStopped, match="after 1 of 3"):
        train(tiny.model, np.zeros(99, np.int64), RECIPE, seed=(0,), on_step=on_step, stop=stop)
    assert done == [1]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny):
    model = GPT2LMHeadModel(tiny.model.config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = judge(model, np.arange(100, dtype=np.int64), block_tokens=16, limit_tokens=70)
    assert result.tokens == 4 * 15
    assert math.exp(result.nats / result.tokens) == pytest.approx(len(tiny.tokenizer))


def test_judging_is_the_models_own_loss(tiny):
    tokens = np.random.default_rng(0).integers(0, 200, 32)
    result = judge(tiny.model, tokens, block_tokens=16, limit_tokens=32)
    rows = torch.from_numpy(tokens.reshape(2, 16))
    with torch.inference_mode():
        mean = tiny.model(input_ids=rows, labels=rows).loss.item()
    assert result.nats / result.tokens == pytest.approx(mean)


def test_warm_up_then_constant_or_decay():
    constant = Recipe(steps=10, batch=1, block_tokens=1, learning_rate=1.0, warmup_steps=2)
    assert [constant.rate(step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    decaying = Recipe(steps=10, batch=1, block_tokens=1, learning_rate=1.0, decays=True)
    assert decaying.rate(0) == pytest.approx(1.0)
    assert decaying.rate(10) == pytest.approx(0.1)
