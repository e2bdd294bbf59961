"""Tokens, training steps and perplexity: what a silo's machine does between two transfers."""

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedllm.demo.arguments import LONGEST_WINDOW_TOKENS, MAX_BATCH, MAX_STEPS
from fedllm.demo.text import Document
from fedllm.errors import FedError

Tokens = np.ndarray[Any, np.dtype[np.int64]]
MAX_GRADIENT_NORM = 1.0
JUDGE_BATCH = 16


class TooLittleText(FedError, ValueError):
    """A silo holds fewer tokens than one training window."""


class TrainingStopped(FedError):
    """Training was told to stop; the model is somewhere between its start and its end."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one stretch of training: the same for every silo, federated or alone.

    The bounds are what a silo accepts from a server.
    """

    steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)]
    batch: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
    block_tokens: Annotated[int, msgspec.Meta(ge=2, le=LONGEST_WINDOW_TOKENS)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    warmup_steps: int = 0
    decays: bool = False

    def rate(self, step: int) -> float:
        """The rate at `step`: linear warm-up, then constant or a cosine down to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if not self.decays:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every silo of a run does in each round; the server tells it with the weights."""

    recipe: Recipe
    seed: int


def round_seed(seed: int, silo: str, round: int) -> tuple[int, ...]:
    """The seed of one silo's data order in one round, the same in every process."""
    return (seed, zlib.crc32(silo.encode()), round)


@dataclass(frozen=True)
class Judgement:
    """The negative log-likelihood of some tokens, summed: perplexity is exp(nats / tokens)."""

    nats: float
    tokens: int


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Tokens:
    """All documents as one row of token ids, each closed by the tokenizer's end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [document.text for document in documents]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return np.fromiter((token for row in rows for token in (*row, *end)), dtype=np.int64)


def windows(tokens: Tokens, recipe: Recipe, seed: Sequence[int]) -> Iterator[torch.Tensor]:
    """`recipe.steps` batches of windows drawn at random, by `seed` alone.

    Each batch has shape (batch, block_tokens), dtype int64.
    """
    last_start = len(tokens) - recipe.block_tokens
    if last_start < 0:
        raise TooLittleText(
            f"{len(tokens)} tokens are fewer than one window of {recipe.block_tokens}: "
            f"give this silo more text"
        )
    random = np.random.default_rng(tuple(seed))
    offsets = np.arange(recipe.block_tokens)
    for _ in range(recipe.steps):
        starts = random.integers(0, last_start + 1, size=(recipe.batch, 1))
        yield torch.from_numpy(tokens[starts + offsets])


def train(
    model: nn.Module,
    tokens: Tokens,
    recipe: Recipe,
    *,
    seed: Sequence[int],
    on_step: Callable[[int, float], None],
    stop: threading.Event | None = None,
) -> float:
    """Train the parameters that require gradients, in place, with a fresh AdamW; the mean loss.

    `on_step(step, loss)` is called after each step, counted from 1, in this thread. When `stop` is
    set, `TrainingStopped` is raised after the step in progress.
    """
    torch.manual_seed(int(np.random.SeedSequence(tuple(seed)).generate_state(1)[0]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(windows(tokens, recipe, seed)):
        if stop is not None and stop.is_set():
            raise TrainingStopped(f"stopped after {step} of {recipe.steps} steps")
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        losses.append(loss.item())
        on_step(step + 1, losses[-1])
    return float(np.mean(losses))


def judge(model: nn.Module, tokens: Tokens, *, block_tokens: int, limit_tokens: int) -> Judgement:
    """How well the model predicts the first `limit_tokens` tokens, in windows without overlap.

    The first token of each window is given, not judged.
    """
    count = min(len(tokens), limit_tokens) // block_tokens
    if count == 0:
        raise TooLittleText(f"{len(tokens)} held-out tokens are fewer than one window")
    rows = torch.from_numpy(tokens[: count * block_tokens].reshape(count, block_tokens))
    nats = 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, count, JUDGE_BATCH):
            batch = rows[start : start + JUDGE_BATCH]
            logits = model(input_ids=batch).logits[:, :-1].float()
            nats += nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
            ).item()
    return Judgement(nats=nats, tokens=count * (block_tokens - 1))
