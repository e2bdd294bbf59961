"""Adapters and state dicts <-> ordered, named numpy arrays.

With `fedllm.demo`, and `fedllm.parameters`, `loading` and `dtensors` below it, the only home of torch, and of peft:
everything else in fedllm sees names and arrays.
Names and their order are the model's own (peft: adapter names taken out; transformers:
`named_parameters`), so two processes that build the same model agree on both.

Lifetime of what is returned: on the CPU an array is a *view* of the parameter's memory, no copy
(of one that is not contiguous it is a copy, since only what is contiguous is sent). It changes
when the model trains or is loaded again, and keeps that memory alive for as long as it lives;
`.copy()` it to keep the values. A bfloat16 parameter is such a view as well, in ml_dtypes' dtype.
Parameters on another device are copied to the CPU.

A mean of bfloat16 weights is rounded to bfloat16, and loses updates below 2^-9 of a weight. For
global weights in float32 give the server, and `submit`, ``array.astype(np.float32)``: loading takes
any float dtype, and rounds to the parameter's own, to nearest even.

`keep_local` names what never leaves a silo: globs (`fnmatch`) of dotted parameter names, or of
modules, whose parameters they then all mean (``["lm_head", "*.h.11", "*.ln_?.bias"]``). The same
patterns at the server and at every silo leave the same names out of what is sent and of what is
loaded: a silo takes the global layers, and keeps its own for these. A pattern that means no
parameter is an `AdapterError`, since what it should have kept would leave.

Of a model that is sharded (`fully_shard`, `distribute_tensor`) each rank gets, and loads, its own
rows; `full_shard` says which these are. Take the `fingerprint` before it is sharded. What FSDP gathered and a forward
without a backward left so is given up first: every call here finds, and leaves, the model sharded.
"""

import enum
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import xxhash
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

from fedllm.dtensors import Tensors, held, is_sharded, shard_of
from fedllm.loading import load, on_trial
from fedllm.messages import Shard
from fedllm.parameters import (
    AdapterError,
    all_parameters,
    check_is_there,
    kept_buffers,
    lora_parameters,
)

__all__ = [
    "AdapterError",
    "Arrays",
    "fingerprint",
    "full_arrays",
    "full_on_trial",
    "full_shard",
    "load_full",
    "load_local",
    "load_lora",
    "local_arrays",
    "lora_arrays",
    "lora_on_trial",
    "lora_shard",
    "save_lora",
]

Arrays = dict[str, np.ndarray[Any, Any]]

# Where one silo keeps its files and which releases wrote them is not what it trains.
_LOCAL_SETTINGS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
# What a tokenizer last did (peft's and transformers' calls set these), not what it is.
_TOKENIZER_STATE = frozenset({"padding", "truncation"})


def lora_arrays(
    model: PeftModel, *, adapter: str = "default", keep_local: Collection[str] = ()
) -> Arrays:
    """What peft would save of `adapter`: its factors and `modules_to_save`, as arrays.

    Embedding layers are never added: by default (`save_embedding_layers="auto"`) peft looks the
    base model up, on the hub if need be, and adds whole embedding matrices when it guesses that the
    vocabulary grew. Train those with `modules_to_save`; then they are part of the adapter.

    Source: `peft.get_peft_model_state_dict`.
    """
    return _arrays(lora_parameters(model, adapter, keep_local))


def lora_shard(
    model: PeftModel, *, adapter: str = "default", keep_local: Collection[str] = ()
) -> Shard:
    """`full_shard` for an adapter."""
    return shard_of(lora_parameters(model, adapter, keep_local))


def load_lora(
    model: PeftModel,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    adapter: str = "default",
    keep_local: Collection[str] = (),
) -> None:
    """Copy arrays, named and shaped as `lora_arrays` returns them, into `adapter`.

    `AdapterError` names what is missing, unknown or of another shape; the model is then as it was.
    """
    load(lora_parameters(model, adapter, keep_local), arrays)


def save_lora(model: PeftModel, directory: Path, *, adapter: str = "default") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder.

    `PeftModel.from_pretrained(base, directory)` reads them. `AdapterError` if the model is sharded.
    """
    tensors = lora_parameters(model, adapter, ())
    state = {name: _whole(name, tensor) for name, tensor in tensors.items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[adapter].save_pretrained(str(directory))


def full_arrays(model: nn.Module, *, keep_local: Collection[str] = ()) -> Arrays:
    """All parameters of any module, in its order; tied ones (GPT-2's `wte` and `lm_head`) once.

    Tied means the same Parameter object; it goes by the first of its names, and stays here if
    `keep_local` means any of them. Parameters that only share memory are sent one by one, and none
    may stay while the other leaves (`AdapterError`). Buffers stay out: they are not trained, and averaging them would
    mean nothing.
    """
    return _arrays(all_parameters(model, keep_local)[0])


def full_shard(model: nn.Module, *, keep_local: Collection[str] = ()) -> Shard:
    """What this rank of a sharded model holds, for `join`: see `fedllm.dtensors.shard_of`."""
    return shard_of(all_parameters(model, keep_local)[0])


def load_full(
    model: nn.Module,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    keep_local: Collection[str] = (),
) -> None:
    """Copy arrays, named and shaped as `full_arrays` returns them, into the model.

    `AdapterError` names what is missing, unknown or of another shape; the model is then as it was.
    """
    load(all_parameters(model, keep_local)[0], arrays)


def local_arrays(model: nn.Module, keep_local: Collection[str]) -> Arrays:
    """What a silo itself must save to keep: the parameters that `full_arrays` leaves out, and the
    buffers that `keep_local` means, such as a BatchNorm's running statistics."""
    return _arrays(_local_tensors(model, keep_local))


def load_local(
    model: nn.Module, arrays: Mapping[str, np.ndarray[Any, Any]], keep_local: Collection[str]
) -> None:
    """Copy what `local_arrays` returned back into the model; see `load_full`."""
    load(_local_tensors(model, keep_local), arrays)


@contextmanager
def full_on_trial(
    model: nn.Module,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    keep_local: Collection[str] = (),
) -> Iterator[None]:
    """Within the block the model computes with `arrays` in place of its own parameters, then as before.

    So a silo looks at a new global model before it adopts it, or keeps what it has::

        with full_on_trial(model, task.weights):
            theirs = perplexity(model)
        if theirs <= mine:
            load_full(model, task.weights)

    On the CPU nothing is copied where dtypes agree: the parameters lie in the arrays' memory, and
    what trains them there changes the arrays. However the block ends, the model's own memory is
    back, untouched, and its buffers have their values again. Raises `AdapterError` as `load_full`
    does, before anything is changed.

    Of a sharded model each rank's rows are copied aside for the block, and all ranks enter it, and
    decide on what they saw together: each by the same number, as of ``dist.all_reduce(loss)``.
    Who declines or loads alone leaves the others waiting in their next collective.
    """
    with on_trial(model, all_parameters(model, keep_local)[0], arrays):
        yield


@contextmanager
def lora_on_trial(
    model: PeftModel,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    adapter: str = "default",
    keep_local: Collection[str] = (),
) -> Iterator[None]:
    """`full_on_trial` for an adapter: `arrays` as `load_lora` takes them."""
    with on_trial(model, lora_parameters(model, adapter, keep_local), arrays):
        yield


def fingerprint(
    model: nn.Module,
    tokenizer: Any,
    adapter_config: PeftConfig | None,
    *,
    keep_local: Collection[str] = (),
) -> dict[str, str]:
    """Three digests that silos and server must share before they average anything.

    - `weights`: names, dtypes, shapes and bytes of the *base* model's parameters and buffers, tied
      ones once; the same before and after an adapter is attached. Of all weights that are trained
      (no adapter) those that `keep_local` means, buffers too, are left out: they are each silo's own.
    - `tokenizer`: its serialised form and special tokens, without what the last call set.
    - `adapter`: the adapter's settings as sorted JSON, without paths and version numbers; `None`
      (full fine-tuning) has a digest as well. Give the configuration that the attached model holds
      (`model.peft_config["default"]`): peft fills in `target_modules` there.

    Equal inputs give equal digests in any process on machines of one byte order. It finds mistakes,
    not forgers: xxh3_128 is not a cryptographic hash.
    """
    return {
        "weights": _weights_digest(model, _local_tensors(model, keep_local)),
        "tokenizer": _json_digest(_tokenizer_form(tokenizer)),
        "adapter": _json_digest(_adapter_form(adapter_config)),
    }


def _local_tensors(model: nn.Module, keep_local: Collection[str]) -> Tensors:
    return all_parameters(model, keep_local)[1] | kept_buffers(model, keep_local)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: _array(name, tensor) for name, tensor in held(tensors).items()}


def _array(name: str, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A view of the tensor's memory."""
    check_is_there(name, tensor)
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype is torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    try:
        return plain.numpy()
    except TypeError as exc:
        raise AdapterError(
            f"{name} is {tensor.dtype}, which numpy cannot hold: convert the model "
            f"(`model.float()`), or keep it frozen under an adapter"
        ) from exc


def _whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    check_is_there(name, tensor)
    if is_sharded(tensor):
        raise AdapterError(
            f"{name} is sharded, and this is about the whole model: do it before, or elsewhere"
        )
    return tensor.detach().cpu().contiguous()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's persistent tensors under the names they had before peft wrapped them."""
    seen: set[int] = set()
    adapters = str(model.base_model.prefix) if isinstance(model, PeftModel) else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (adapters and adapters in name):
            continue
        seen.add(id(tensor))
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def _weights_digest(model: nn.Module, without: Collection[str]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(_base_tensors(model), key=lambda named: named[0]):
        if name in without:
            continue
        plain = _whole(name, tensor)
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
