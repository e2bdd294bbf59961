"""Arrays into a model's tensors, for good or for a look.

Below `fedllm.adapters`, which is how to use it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from fedllm.dtensors import Tensors, held, is_sharded, reshard
from fedllm.parameters import AdapterError, check_is_there

__all__ = ["load", "on_trial"]

_FLOATS = frozenset(map(np.dtype, (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)))


def load(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Copy the arrays into the tensors, or raise `AdapterError` and change nothing."""
    parts = held(tensors)
    _check_fit(parts, arrays)
    _fill(parts, arrays)


@contextmanager
def on_trial(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    arrays: Mapping[str, np.ndarray[Any, Any]],
) -> Iterator[None]:
    """Within the block these tensors of the model are the arrays, or, of DTensors, copies of them."""
    parts = held(tensors)
    _check_fit(parts, arrays)
    # FSDP gathers from memory of its own, which no other can take the place of.
    sharded = {name: part for name, part in parts.items() if is_sharded(tensors[name])}
    whole = {name: part for name, part in parts.items() if name not in sharded}
    rows = {name: part.detach().clone() for name, part in sharded.items()}
    own = {name: tensor.data for name, tensor in whole.items()}
    # A forward may change them, or assign new ones in their place.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        _fill(sharded, arrays)
        for name, tensor in whole.items():
            tensor.data = _tensor(arrays[name]).to(tensor.device, tensor.dtype)
        yield
    finally:
        for name, tensor in whole.items():
            tensor.data = own[name]
        reshard(model)  # what it gathered is of the arrays
        with torch.no_grad():
            for name, part in sharded.items():
                part.copy_(rows[name])
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                if not _overlaps_itself(buffer):  # nor could a forward have written there
                    buffer.copy_(value)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _fill(tensors: Tensors, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(_tensor(arrays[name]))


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's memory; over a copy where torch could not write (it would warn)."""
    plain = np.require(array, requirements=("C", "W"))
    if plain.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(plain.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(plain)


def _goes_into(dtype: np.dtype[Any], wanted: torch.dtype) -> bool:
    """Any float goes into any; else it must be the same. Always in this machine's byte order."""
    if wanted.is_floating_point:
        return dtype in _FLOATS
    return dtype.isnative and str(wanted) == f"torch.{dtype.name}"


def _check_fit(
    expected: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    for name, tensor in expected.items():
        check_is_there(name, tensor)
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is unknown here" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {arrays[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in arrays and arrays[name].shape != tuple(tensor.shape)
    ]
    problems += [
        f"{name} holds {arrays[name].dtype}, which does not go into {tensor.dtype}"
        for name, tensor in expected.items()
        if name in arrays and not _goes_into(arrays[name].dtype, tensor.dtype)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterError(
            f"these arrays belong to another model or adapter: {'; '.join(problems[:3])}{more}"
        )
