"""One base model under one way of fine-tuning: what a silo trains and a server averages."""

import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.adapters import (
    Arrays,
    fingerprint,
    full_arrays,
    full_on_trial,
    load_full,
    load_lora,
    lora_arrays,
    lora_on_trial,
    save_lora,
)
from fedllm.demo.model import Base
from fedllm.demo.publish import publish
from fedllm.errors import CheckpointError, SettingError

Mode = Literal["lora", "full"]
MODES: tuple[Mode, ...] = ("lora", "full")
_GPT2_LAYERS = ("c_attn", "c_proj", "c_fc")


def lora_config(model: nn.Module) -> LoraConfig:
    """Rank 8, alpha 16 on every attention and feed-forward layer.

    GPT-2 keeps these as `Conv1D`, whose weights are stored transposed (`fan_in_fan_out`).
    """
    is_gpt2 = any(isinstance(module, Conv1D) for module in model.modules())
    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=list(_GPT2_LAYERS) if is_gpt2 else "all-linear",
        fan_in_fan_out=is_gpt2,
        task_type="CAUSAL_LM",
    )


@dataclass(frozen=True)
class Learner:
    """A model whose trainable part goes in and out as named arrays.

    What `keep_local` means is trained here, and neither goes out nor comes in; see `fedllm.adapters`.
    """

    base: Base
    model: PeftModel | nn.Module
    fingerprint: dict[str, str]
    keep_local: tuple[str, ...] = ()

    def arrays(self) -> Arrays:
        """Views of what is shared; see `fedllm.adapters` for how long they live."""
        if isinstance(self.model, PeftModel):
            return lora_arrays(self.model, keep_local=self.keep_local)
        return full_arrays(self.model, keep_local=self.keep_local)

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Copy arrays of the same names and shapes into what is shared."""
        if isinstance(self.model, PeftModel):
            load_lora(self.model, arrays, keep_local=self.keep_local)
        else:
            load_full(self.model, arrays, keep_local=self.keep_local)

    def on_trial(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> AbstractContextManager[None]:
        """Compute with these arrays within the block, and be as before after it."""
        if isinstance(self.model, PeftModel):
            return lora_on_trial(self.model, arrays, keep_local=self.keep_local)
        return full_on_trial(self.model, arrays, keep_local=self.keep_local)

    def whole(self) -> "Learner":
        """The same model with all that is trained, what stays here included."""
        return replace(self, keep_local=())

    def save(self, directory: Path) -> None:
        """Write the adapter (peft's two files), or model and tokenizer as transformers does.

        Raises `CheckpointError`, and what was there before stays.
        """
        try:
            with publish(directory) as part:
                if isinstance(self.model, PeftModel):
                    save_lora(self.model, part)
                else:
                    self.base.model.save_pretrained(part)
                    self.base.tokenizer.save_pretrained(part)
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"the model cannot be written to {directory}: {exc}") from exc


def prepare_learner(
    base: Base, mode: Mode, *, seed: int, keep_local: Collection[str] = ()
) -> Learner:
    """Make `base` trainable: a seeded, untrained adapter over frozen weights, or all weights.

    `base.model` is changed in place (that is peft's way); an untrained adapter computes nothing. Raises
    `SettingError` if `keep_local` leaves nothing to share.
    """
    learner = _learner(base, mode, seed, tuple(keep_local))
    if not learner.arrays():
        raise SettingError(f"keep_local {' '.join(learner.keep_local)} leaves nothing to share")
    return learner


def _learner(base: Base, mode: Mode, seed: int, local: tuple[str, ...]) -> Learner:
    if mode == "full":
        prints = fingerprint(base.model, base.tokenizer, None, keep_local=local)
        return Learner(base, base.model, prints, local)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft still asks transformers for `is_gradient_checkpointing`, which transformers 5 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(base.model, lora_config(base.model))
    prints = fingerprint(model, base.tokenizer, model.peft_config["default"])
    return Learner(base, model, prints, local)
