"""Adapters and state dicts <-> ordered, named numpy arrays.

With `fedllm.demo` the only home of torch and peft: everything else in fedllm sees names and arrays.
Names and their order are the model's own (peft: adapter names taken out; transformers:
`named_parameters`), so two processes that build the same model agree on both.

Lifetime of what is returned: on the CPU an array is a *view* of the parameter's memory, no copy. It
changes when the model trains or is loaded again, and keeps that memory alive for as long as it
lives; `.copy()` it to keep the values. Parameters in bfloat16 (which numpy does not know) are
widened to float32, exactly, into memory of their own; loading rounds them back, to nearest even.
Parameters on another device are copied to the CPU.
"""

import enum
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from fedllm.errors import FedError

Arrays = dict[str, np.ndarray[Any, Any]]

# Where one silo keeps its files and which releases wrote them is not what it trains.
_LOCAL_SETTINGS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
# What a tokenizer last did (peft's and transformers' calls set these), not what it is.
_TOKENIZER_STATE = frozenset({"padding", "truncation"})


class AdapterError(FedError, ValueError):
    """Arrays that do not belong to this model, or a parameter that no array can hold."""


def lora_arrays(model: PeftModel, *, adapter: str = "default") -> Arrays:
    """What peft would save of `adapter`: its factors and `modules_to_save`, as arrays.

    Embedding layers are never added: by default (`save_embedding_layers="auto"`) peft looks the
    base model up, on the hub if need be, and adds whole embedding matrices when it guesses that the
    vocabulary grew. Train those with `modules_to_save`; then they are part of the adapter.

    Source: `peft.get_peft_model_state_dict`.
    """
    return {name: _array(name, tensor) for name, tensor in _lora_state(model, adapter).items()}


def load_lora(
    model: PeftModel, arrays: Mapping[str, np.ndarray[Any, Any]], *, adapter: str = "default"
) -> None:
    """Copy arrays, named and shaped as `lora_arrays` returns them, into `adapter`.

    `AdapterError` names what is missing, unknown or of another shape (peft alone passes over the
    first two without a word); the model is then as it was.

    Source: `peft.set_peft_model_state_dict`.
    """
    _check_fit(_lora_state(model, adapter), arrays)
    state = {name: _tensor(array) for name, array in arrays.items()}
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def save_lora(model: PeftModel, directory: Path, *, adapter: str = "default") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder.

    `PeftModel.from_pretrained(base, directory)` reads them.
    """
    state = {
        name: tensor.contiguous().cpu() for name, tensor in _lora_state(model, adapter).items()
    }
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[adapter].save_pretrained(str(directory))


def full_arrays(model: nn.Module) -> Arrays:
    """All parameters, in the model's order; tied ones (GPT-2's `wte` and `lm_head`) once.

    Tied means the same Parameter object; it goes by the first of its names. Buffers stay out: they
    are not trained, and averaging them would mean nothing.
    """
    return {name: _array(name, parameter) for name, parameter in model.named_parameters()}


def load_full(model: nn.Module, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Copy arrays, named and shaped as `full_arrays` returns them, into the model.

    `AdapterError` names what is missing, unknown or of another shape; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    _check_fit(parameters, arrays)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_tensor(arrays[name]))


def fingerprint(
    model: nn.Module, tokenizer: Any, adapter_config: PeftConfig | None
) -> dict[str, str]:
    """Three digests that silos and server must share before they average anything.

    - `weights`: names, dtypes, shapes and bytes of the *base* model's parameters and buffers, tied
      ones once; the same before and after an adapter is attached.
    - `tokenizer`: its serialised form and special tokens, without what the last call set.
    - `adapter`: the adapter's settings as sorted JSON, without paths and version numbers; `None`
      (full fine-tuning) has a digest as well. Give the configuration that the attached model holds
      (`model.peft_config["default"]`): peft fills in `target_modules` there.

    Equal inputs give equal digests in any process on machines of one byte order. It finds mistakes,
    not forgers: xxh3_128 is not a cryptographic hash.
    """
    return {
        "weights": _weights_digest(model),
        "tokenizer": _json_digest(_tokenizer_form(tokenizer)),
        "adapter": _json_digest(_adapter_form(adapter_config)),
    }


def _lora_state(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return state


def _array(name: str, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A view of the tensor's memory where numpy knows its dtype; bfloat16 widened into a copy."""
    plain = tensor.detach().cpu()
    if plain.dtype is torch.bfloat16:
        plain = plain.float()
    try:
        return plain.contiguous().numpy()
    except TypeError as exc:
        raise AdapterError(
            f"{name} is {tensor.dtype}, which numpy cannot hold: convert the model "
            f"(`model.float()`), or keep it frozen under an adapter"
        ) from exc


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's memory; over a copy where torch could not write (it would warn)."""
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _check_fit(
    expected: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is unknown here" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {arrays[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in arrays and arrays[name].shape != tuple(tensor.shape)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterError(
            f"these arrays belong to another model or adapter: {'; '.join(problems[:3])}{more}"
        )


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's persistent tensors under the names they had before peft wrapped them."""
    seen: set[int] = set()
    adapters = str(model.base_model.prefix) if isinstance(model, PeftModel) else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (adapters and adapters in name):
            continue
        seen.add(id(tensor))
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def _weights_digest(model: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(_base_tensors(model), key=lambda named: named[0]):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_form(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        form: dict[str, object] = {"vocabulary": tokenizer.get_vocab()}
    else:
        form = {
            key: value
            for key, value in json.loads(backend.to_str()).items()
            if key not in _TOKENIZER_STATE
        }
    return form | {"special_tokens": _plain(tokenizer.special_tokens_map)}


def _adapter_form(config: PeftConfig | None) -> object:
    if config is None:
        return None
    return {
        key: _plain(value) for key, value in config.to_dict().items() if key not in _LOCAL_SETTINGS
    }


def _plain(value: object) -> object:
    """A setting as JSON has it: sets sorted, enums by value, anything else foreign by its `str`."""
    match value:
        case enum.Enum():
            return _plain(value.value)
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(str(item) for item in value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _json_digest(form: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(form, sort_keys=True).encode())
