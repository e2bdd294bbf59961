"""The base model and its tokenizer: made in the run from neutral text, or loaded from where one is.

torch, transformers and tokenizers cost seconds to import; whoever imports this module pays them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fedllm.demo.arguments import LONGEST_WINDOW_TOKENS
from fedllm.demo.preflight import BaseModelError
from fedllm.demo.publish import publish
from fedllm.demo.text import Document
from fedllm.demo.training import Recipe, encode, train

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Base:
    """A causal language model and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def block_tokens(self) -> int:
        """The window that is trained and judged at once: 128, or what a shorter model takes."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(LONGEST_WINDOW_TOKENS, int(positions or LONGEST_WINDOW_TOKENS))


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """How large a base the demo makes, and how long that base reads."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    positions: int = LONGEST_WINDOW_TOKENS
    steps: int = 300
    batch: int = 16
    learning_rate: float = 2e-3


def silence() -> None:
    """Turn off transformers' notices and progress bars by its own switches."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text round-trips) of up to `vocabulary` tokens, from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def make_base(
    documents: Sequence[Document],
    size: BaseSize,
    *,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Base:
    """Train a tokenizer and a small GPT-2 on `documents`; `on_step(step, loss)` after each step."""
    tokenizer = train_tokenizer([document.text for document in documents], size.vocabulary)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=size.positions,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    base = Base(model, tokenizer)
    recipe = Recipe(
        steps=size.steps,
        batch=size.batch,
        block_tokens=base.block_tokens,
        learning_rate=size.learning_rate,
        warmup_steps=size.steps // 10,
        decays=True,
    )
    train(model, encode(tokenizer, documents), recipe, seed=(seed,), on_step=on_step)
    return base


def save_base(base: Base, directory: Path) -> None:
    """Write model and tokenizer as transformers does; each file appears whole."""
    with publish(directory) as part:
        base.model.save_pretrained(part)
        base.tokenizer.save_pretrained(part)


def load_base(source: str) -> Base:
    """Load model (in float32, on the CPU) and tokenizer from a folder, or by a name from the hub.

    Raises `BaseModelError` when there is none, or not a causal one.
    """
    place = str(Path(source).resolve()) if Path(source).exists() else source
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return Base(model, AutoTokenizer.from_pretrained(place))
    except (OSError, ValueError) as exc:
        raise BaseModelError(
            f"no base model at {source!r}; give a folder that save_pretrained wrote, with its "
            f"tokenizer, or a name on the hub ({str(exc).splitlines()[0]})"
        ) from exc
