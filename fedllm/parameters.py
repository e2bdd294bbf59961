"""Which tensors of a model are meant: those of an adapter or of all of it, tied ones once, without what stays local.

With `fedllm.adapters`, which is how to use it, a home of torch and peft.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from fedllm.dtensors import Tensors, held, reshard
from fedllm.errors import FedError

__all__ = ["AdapterError", "all_parameters", "check_is_there", "kept_buffers", "lora_parameters"]


class AdapterError(FedError, ValueError):
    """Arrays that do not belong to this model, or a parameter that no array can hold."""


def lora_parameters(model: PeftModel, adapter: str, keep_local: Collection[str]) -> Tensors:
    """peft's names for the adapter's own Parameters (and, of `modules_to_save`, buffers)."""
    own = model.state_dict(keep_vars=True)  # FSDP, if there, gives up what it gathered
    tensors: Tensors = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=adapter, save_embedding_layers=False
    )
    ids = {id(tensor) for tensor in own.values()}
    for name, tensor in tensors.items():
        if id(tensor) not in ids:  # what peft computes anew each time could not be loaded
            kind = model.peft_config[adapter].peft_type
            raise AdapterError(f"{name} of a {kind} adapter is no parameter of the model: use LoRA")
    return _apart(tensors, _meant({name: (name,) for name in tensors}, keep_local))[0]


def all_parameters(model: nn.Module, keep_local: Collection[str]) -> tuple[Tensors, Tensors]:
    """The parameters that are shared, and those that stay, each once and by the first of its names."""
    reshard(model)
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    local = _meant({group[0]: tuple(group) for group in names.values()}, keep_local)
    return _apart(dict(model.named_parameters()), local)


def _apart(tensors: Tensors, local: Collection[str]) -> tuple[Tensors, Tensors]:
    """Those that are shared, and those that stay."""
    shared = {name: tensor for name, tensor in tensors.items() if name not in local}
    kept = {name: tensor for name, tensor in tensors.items() if name in local}
    if shared and kept:
        _check_memory(held(shared), held(kept))
    return shared, kept


def _check_memory(shared: Tensors, kept: Tensors) -> None:
    """Raise `AdapterError` if what stays lies where something lies that leaves: tied, but not as one Parameter."""
    spans = sorted(
        (*span, name in kept, name)
        for name, tensor in (shared | kept).items()
        if (span := _span(tensor)) is not None
    )
    end = {False: (0, ""), True: (0, "")}
    for start, stop, is_kept, name in spans:
        other_stop, other = end[not is_kept]
        if start < other_stop:
            mine, theirs = (name, other) if is_kept else (other, name)
            raise AdapterError(
                f"keep_local: {mine} stays, and lies in the same memory as {theirs}, which leaves: keep both, or "
                "tie them as one Parameter"
            )
        end[is_kept] = max(end[is_kept], (stop, name))


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where it begins and ends in memory, gaps and all; None if it lies nowhere."""
    if tensor.is_meta or not tensor.numel():
        return None
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_is_there(name: str, tensor: torch.Tensor) -> None:
    """Raise `AdapterError` for a tensor without values, on the meta device."""
    if tensor.is_meta:
        raise AdapterError(f"{name} has no values yet, on the meta device: load the model first")


def kept_buffers(model: nn.Module, keep_local: Collection[str]) -> Tensors:
    """The persistent buffers that these patterns mean: running statistics of modules that stay, for instance."""
    lasting = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return {name: buffers[name] for name in buffers if _is_meant((name,), keep_local)}


def _meant(names: Mapping[str, Collection[str]], patterns: Collection[str]) -> set[str]:
    """The keys any of whose names, or of the modules above it, any pattern matches."""
    found: set[str] = set()
    for pattern in patterns:
        here = {key for key, aliases in names.items() if _is_meant(aliases, (pattern,))}
        if not here:
            raise AdapterError(
                f"keep_local: {pattern!r} means no parameter here, and what it should keep would leave; "
                f"a name is, for instance, {next(iter(names), 'none: there are none')}"
            )
        found |= here
    return found


def _is_meant(names: Collection[str], patterns: Collection[str]) -> bool:
    return any(
        fnmatchcase(name, glob)
        for name in names
        for pattern in patterns
        for glob in (pattern, f"{pattern}.*")
    )
