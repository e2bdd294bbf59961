"""Models of a few thousand parameters, and what their tests compare."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    model.eval()
    return model


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


def adapted(seed: int = 0, **changes: object) -> PeftModel:
    """A LoRA model whose every factor is non-zero, so that each of them shows in the logits."""
    model = get_peft_model(tiny_gpt2(), lora(**changes))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.arange(12).reshape(1, 12)).logits
    return result


def snapshot(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in arrays.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])
