"""A model that is quickly made, for the tests of the demo."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedllm.demo.model import Base, train_tokenizer
from fedllm.demo.training import Recipe

RECIPE = Recipe(steps=3, batch=2, block_tokens=16, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tiny() -> Base:
    return make_tiny()


def make_tiny() -> Base:
    tokenizer = train_tokenizer(["def f(x): return x\n", "the cat sat on the mat"] * 3, 300)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return Base(GPT2LMHeadModel(config), tokenizer)
