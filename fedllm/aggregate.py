"""What an aggregation of a round's updates is, and which updates it takes.

Floats only: F16, BF16, F32 and F64; the result has the dtype of its tensor. Integers (a step counter, say)
have no mean that is one of them, and rounding would move them silently: they raise `WeightsError`. Keep
such tensors out of the shared weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aiordma import Transfer
from fedllm.errors import UpdateError, WeightsError

__all__ = [
    "Aggregation",
    "Arrays",
    "Contribution",
    "check_layout",
    "check_weight",
    "check_weights",
    "tie",
    "ties_of",
    "wire_dtype",
]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]

MAX_WEIGHT: Final = 1e12
MAX_LISTED: Final = 5
"""Names that an error lists."""

_WIRE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


class Contribution(Protocol):
    """One silo's part in an aggregation."""

    @property
    def is_awaited(self) -> bool:
        """Whether the update, while it is received, waits for its silo and not for others: whose fault a missed
        deadline is."""

    async def receive(self, transfer: Transfer) -> bool:
        """Take the update, and let it take part.

        False: it has to be sent once more, from its first byte, because of another silo. Raises `UpdateError` for
        one that is not acceptable, an `aiordma` error if the transfer fails; another one may be tried then. Cancelled,
        the transfer is aborted; `abort` is due.
        """

    def abort(self) -> None:
        """Take it out again, without a trace. Harmless if it was aborted before."""


class Aggregation(Protocol):
    """How the updates of one round become one set of weights, whatever the order in which they come."""

    @property
    def restarts(self) -> int:
        """How often all uploads had to begin anew, because a silo fell out."""

    @property
    def takes_parts(self) -> bool:
        """Whether an update may come in parts, a sharded silo's: into the `buffers` of a `StagedContribution`."""

    def begin(self, name: str, weight: float | None) -> Contribution:
        """A silo's place; all begin before the first update is received.

        If the weight of one whose update is taken is None, all count alike: a mean by weights that are known in
        part would be that of nobody.

        Raises `UpdateError` for a weight that is none, or a name that has a place; `StagingError` if there is no
        room.
        """

    def commit(self) -> None:
        """Finish what was received, and abort what was not. Raises `WeightsError` if nothing was."""

    def result(self) -> dict[str, NDArray[Any]]:
        """What `commit` made: new arrays with the global weights' names, shapes and dtypes, in their order."""


def check_weight(weight: float | None) -> None:
    """Raise `UpdateError` unless 0 < `weight` <= 1e12, or it is not disclosed."""
    if weight is not None and not 0 < weight <= MAX_WEIGHT:
        raise UpdateError(f"weight {weight!r} is not above 0 and at most {MAX_WEIGHT:g}")


def check_weights(weights: Arrays) -> None:
    """Raise `WeightsError` unless there are global weights, and all of them have a mean."""
    if not weights:
        raise WeightsError("there are no weights to average")
    for name, array in weights.items():
        wire_dtype(name, array)


def wire_dtype(name: str, array: NDArray[Any]) -> str:
    """The array's dtype by its safetensors name. Raises `WeightsError` for one that has no mean."""
    found = _WIRE_DTYPES.get(array.dtype.name)
    if found is None or not array.dtype.isnative:
        raise WeightsError(
            f"tensor {name!r} is {array.dtype.str} ({array.dtype.name}), and only native "
            f"{', '.join(_WIRE_DTYPES)} can be averaged: convert it, or keep it out of the shared weights"
        )
    return found


def check_layout(like: Arrays, got: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Raise `UpdateError`, naming the tensor, unless `got` has the names, dtypes and shapes of `like`.

    `got` are (name, safetensors dtype, shape) in any order.
    """
    found = {name: (dtype, tuple(shape)) for name, dtype, shape in got}
    missing = sorted(like.keys() - found.keys())
    unknown = sorted(found.keys() - like.keys())
    if missing or unknown:
        lacks = f" lacks {missing[:MAX_LISTED]}" if missing else ""
        has = f" has {[n[:80] for n in unknown[:MAX_LISTED]]} besides" if unknown else ""
        raise UpdateError(
            f"the update's names are not the round's: it{lacks}{' and' * bool(lacks and has)}{has}"
        )
    for name, array in like.items():
        dtype, shape = found[name]
        if shape != array.shape:
            raise UpdateError(f"tensor {name!r} has shape {shape}, not {array.shape}")
        if dtype != wire_dtype(name, array):
            raise UpdateError(f"tensor {name!r} is {dtype}, not {wire_dtype(name, array)}")


def ties_of(weights: Arrays) -> dict[str, str]:
    """Of tensors that are the same memory, dtype and shape: each further one's name, and the first one's."""
    firsts: dict[object, str] = {}
    ties = {}
    for name, array in weights.items():
        first = firsts.setdefault((array.ctypes.data, array.dtype, array.shape), name)
        if first != name and array.nbytes:
            ties[name] = first
    return ties


def tie(arrays: dict[str, NDArray[Any]], ties: Mapping[str, str]) -> None:
    """Let tensors be one array that are to be, unless their bits differ: so that they travel once, as before."""
    for name, first in ties.items():
        bits = f"u{arrays[name].itemsize}"
        if np.array_equal(arrays[name].view(bits), arrays[first].view(bits)):
            arrays[name] = arrays[first]
