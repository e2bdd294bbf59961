"""What a round moves: names and shapes of float32 tensors, written down, so that no model has to be there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, TypeAlias

from fedllm.errors import SettingError

__all__ = ["ITEM_BYTES", "NAMED", "Layout", "layout_of", "nbytes_of", "size_of"]

Layout: TypeAlias = Mapping[str, tuple[int, ...]]

ITEM_BYTES: Final = 4
_WIDTH: Final = 768
_BLOCKS: Final = 12
_RANK: Final = 8
_TENSOR_ITEMS: Final = 1 << 24
"""Of a layout that is only a size: 64 MiB a tensor."""
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Of one block of GPT-2, in the order in which the model has them; `Conv1D` holds its weight as (in, out).
_LINEAR: Final = {
    "attn.c_attn": (_WIDTH, 3 * _WIDTH),
    "attn.c_proj": (_WIDTH, _WIDTH),
    "mlp.c_fc": (_WIDTH, 4 * _WIDTH),
    "mlp.c_proj": (4 * _WIDTH, _WIDTH),
}


def _gpt2() -> Layout:
    """transformers' `GPT2LMHeadModel(GPT2Config())`, 124M, by `named_parameters()`: `lm_head` is tied to `wte`."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (50257, _WIDTH),
        "transformer.wpe.weight": (1024, _WIDTH),
    }
    for number in range(_BLOCKS):
        block = f"transformer.h.{number}"
        for norm, layers in (
            ("ln_1", ("attn.c_attn", "attn.c_proj")),
            ("ln_2", ("mlp.c_fc", "mlp.c_proj")),
        ):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (_WIDTH,)
            for layer in layers:
                shapes[f"{block}.{layer}.weight"] = _LINEAR[layer]
                shapes[f"{block}.{layer}.bias"] = _LINEAR[layer][1:]
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (_WIDTH,)
    return shapes


def _lora(*layers: str) -> Layout:
    """peft's adapter of that model, of rank 8, on these layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(_BLOCKS):
        for layer in layers:
            name = f"base_model.model.transformer.h.{number}.{layer}"
            inputs, outputs = _LINEAR[layer]
            shapes[f"{name}.lora_A.weight"] = (_RANK, inputs)
            shapes[f"{name}.lora_B.weight"] = (outputs, _RANK)
    return shapes


NAMED: Final[Mapping[str, Layout]] = {
    "gpt2": _gpt2(),
    "lora24": _lora("attn.c_attn"),
    "lora96": _lora(*_LINEAR),
}


def layout_of(what: str) -> Layout:
    """One of `NAMED`, or a size such as 5G in tensors of 64 MiB. Raises `SettingError`."""
    if what in NAMED:
        return NAMED[what]
    try:
        items = size_of(what) // ITEM_BYTES
    except SettingError as exc:
        raise SettingError(f"{what!r} is not one of {', '.join(NAMED)}, and {exc}") from exc
    whole, rest = divmod(items, _TENSOR_ITEMS)
    sizes = [_TENSOR_ITEMS] * whole + [rest] * bool(rest)
    return {f"tensor.{number}": (size,) for number, size in enumerate(sizes)}


def size_of(text: str) -> int:
    """Bytes, as in 256K, 64M or 5G: powers of 1024. Raises `SettingError`."""
    match = re.fullmatch(r"([1-9][0-9]*)([KMG])", text)
    if match is None:
        raise SettingError(f"{text!r} is no size such as 256K, 64M or 5G")
    return int(match[1]) * _UNITS[match[2]]


def nbytes_of(layout: Layout) -> int:
    """All of it, in float32."""
    return sum(math.prod(shape) for shape in layout.values()) * ITEM_BYTES
