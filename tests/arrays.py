"""Arrays of every wire dtype, and a way from one end to the other without a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from aiordma import tensors as tensors_module
from aiordma.outgoing import Outgoing, prepare
from aiordma.tensors import Destination, allocate
from aiordma.wire.manifest import ITEM_BYTES

NAMES = tensors_module._DTYPES
NUMPY = {d: np.dtype(getattr(np, n, None) or getattr(ml_dtypes, n)) for d, n in NAMES.items()}
TORCH = {d: getattr(torch, n) for d, n in NAMES.items()}


def chunks_of(total: int, length: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, total, length):
        yield offset, min(length, total - offset)


def move(outgoing: Outgoing, target: Destination, chunk_bytes: int = 128) -> None:
    """Send in chunks, last chunk first: by view where there is one, else by scatter."""
    for offset, length in reversed(list(chunks_of(outgoing.manifest.total_bytes, chunk_bytes))):
        data = b"".join(outgoing.views(offset, length))
        assert len(data) == length
        place = target.view(offset, length)
        if place is None:
            assert target.scatter(offset, memoryview(data)) == length
        else:
            place[:] = data
    target.finish()


def round_trip(tensors: dict[str, Any], framework: Any = "numpy") -> dict[str, Any]:
    outgoing = prepare(tensors)
    buffer, arrays = allocate(outgoing.manifest, framework)
    move(outgoing, Destination(outgoing.manifest, buffer))
    return arrays


def random_bytes(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).integers(0, 2, n, np.uint8)  # 0 and 1 suit BOOL, too


def numpy_of(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    result = np.empty(shape, NUMPY[dtype])
    result.reshape(-1).view(np.uint8)[:] = random_bytes(result.nbytes)
    return result


def torch_of(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    raw = random_bytes(int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype])
    result = torch.empty(shape, dtype=TORCH[dtype])
    result.untyped_storage().copy_(torch.from_numpy(raw).untyped_storage())
    return result
