"""Weighted means of named arrays that do not depend on the order in which they arrived.

`Staged` keeps each silo's update in its own memory and folds all of them at the commit, in the order of
the silos' names. A silo that aborts therefore leaves no trace.

Floats only: F16, BF16, F32 and F64; the mean has the dtype of its tensor. Integers (a step counter, say)
have no mean that is one of them, and rounding would move them silently: they raise `WeightsError`. Keep
such tensors out of the shared weights. BF16 arrays are of ml_dtypes' dtype, which is what aiordma receives
BF16 as; here they are worked on as bits, so that ml_dtypes itself is not needed.

Sums are float32 (float64 for F64), each term multiplied by its share of the total weight, which is
computed in float64. They are added as a balanced tree, so that the error relative to the terms' magnitude
is about (2 + log2(silos)) * 2^-24 (Higham 1993, "The accuracy of floating point summation", on pairwise
sums): below 1e-6 for up to 16,384 silos.
"""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import FedError, UpdateError, WeightsError

__all__ = [
    "Aggregation",
    "Arrays",
    "Contribution",
    "Staged",
    "check_layout",
    "check_weight",
    "wire_dtype",
]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
_Flat: TypeAlias = NDArray[Any]

MAX_WEIGHT = 1e12
BLOCK_ITEMS = 1 << 15
"""Elements that are folded at a time: the scratch blocks stay in the L2 cache."""
MAX_LISTED = 5
"""Names that an error lists."""

_WIRE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


class Stage(enum.Enum):
    OPEN = "open"
    ADDED = "added"
    FOLDED = "folded"
    ABORTED = "aborted"


_MOVES = {
    (Stage.OPEN, "add"): Stage.ADDED,
    (Stage.OPEN, "abort"): Stage.ABORTED,
    (Stage.ADDED, "abort"): Stage.ABORTED,
    (Stage.ABORTED, "abort"): Stage.ABORTED,
    (Stage.ADDED, "fold"): Stage.FOLDED,
}


class Contribution(Protocol):
    """One silo's part in an aggregation."""

    @property
    def buffers(self) -> Mapping[str, NDArray[Any]]:
        """Where its update is to be received: writable arrays with the global weights' names, shapes, dtypes."""

    def add(self) -> None:
        """Its update is complete: check it, and let it take part. Raises `UpdateError`, and is aborted."""

    def abort(self) -> None:
        """Take it out again, without a trace. Harmless if it was aborted before."""


class Aggregation(Protocol):
    """How the updates of one round become one set of weights."""

    def begin(self, name: str, weight: float) -> Contribution:
        """A silo's place. Raises `UpdateError` for a weight that is none, or a name that has a place."""

    def commit(self) -> None:
        """Fold what was added, abort what was not. Raises `WeightsError` if nothing was added."""

    def result(self) -> dict[str, NDArray[Any]]:
        """What `commit` made: new arrays with the global weights' names, shapes and dtypes, in their order."""


class Staged:
    """The weighted mean; each update waits in memory of its own until `commit`.

    Holds one set of weights a contribution. Not thread-safe, but contributions may `add` in threads of their
    own, also while another one aborts them.
    """

    def __init__(self, like: Arrays) -> None:
        """`like` are the global weights; only their names, shapes and dtypes matter. Raises `WeightsError`."""
        if not like:
            raise WeightsError("there are no weights to average")
        for name, array in like.items():
            wire_dtype(name, array)
        self._like = {name: (array.shape, array.dtype) for name, array in like.items()}
        self._begun: dict[str, StagedContribution] = {}
        self._result: dict[str, NDArray[Any]] | None = None

    def begin(self, name: str, weight: float) -> StagedContribution:
        """A silo's place, whose `buffers` are allocated here. Raises `UpdateError`.

        The name of an aborted contribution may begin again.
        """
        if self._result is not None:
            raise FedError("this aggregation is committed: begin a new one")
        check_weight(weight)
        taken = self._begun.get(name)
        if taken is not None and taken.stage is not Stage.ABORTED:
            raise UpdateError(f"silo {name!r} takes part in this round already")
        buffers = {n: np.empty(shape, dtype) for n, (shape, dtype) in self._like.items()}
        self._begun[name] = StagedContribution(weight, buffers)
        return self._begun[name]

    def commit(self) -> None:
        """Fold what was added, in the order of the names; the rest is aborted."""
        added = []
        for _, contribution in sorted(self._begun.items()):
            if contribution.stage is Stage.ADDED:
                added.append(contribution)
            else:
                contribution.abort()
        if not added:
            raise WeightsError("no update was added, so there is no mean")
        total = math.fsum(c.weight for c in added)
        shares = [c.weight / total for c in added]
        updates = [c.take() for c in added]
        for name in self._like:
            _fold([update[name].reshape(-1) for update in updates], shares)
        self._result = updates[0]

    def result(self) -> dict[str, NDArray[Any]]:
        """The mean. Each call gives the same arrays."""
        if self._result is None:
            raise FedError("commit() comes before result()")
        return self._result


class StagedContribution:
    """One silo's part in a `Staged` aggregation::

    OPEN ──add──▶ ADDED ──fold──▶ FOLDED
      └───abort─────┴──abort──▶ ABORTED
    """

    def __init__(self, weight: float, buffers: dict[str, NDArray[Any]]) -> None:
        self.weight = weight
        self.stage = Stage.OPEN
        self._buffers = buffers
        self._moving = threading.Lock()

    @property
    def buffers(self) -> Mapping[str, NDArray[Any]]:
        """Where the update is to be received; empty once it was folded or aborted."""
        return self._buffers

    def add(self) -> None:
        """Check that every number is finite, and take part. Raises `UpdateError`, and is aborted then."""
        try:
            for name, array in self._buffers.items():
                _check_finite(name, array)
        except UpdateError:
            self.abort()
            raise
        self._move("add")

    def abort(self) -> None:
        """Take it out again; its memory is given up."""
        self._move("abort")
        self._buffers = {}

    def take(self) -> dict[str, NDArray[Any]]:
        """Hand its arrays over to the fold."""
        self._move("fold")
        buffers, self._buffers = self._buffers, {}
        return buffers

    def _move(self, verb: str) -> None:
        # `add` may run in a thread whose waiter was cancelled, and who aborts then: one comes first.
        with self._moving:
            stage = _MOVES.get((self.stage, verb))
            if stage is None:
                raise FedError(
                    f"this contribution is {self.stage.value}: it is too late to {verb} it"
                )
            self.stage = stage


def check_weight(weight: float) -> None:
    """Raise `UpdateError` unless 0 < `weight` <= 1e12."""
    if not 0 < weight <= MAX_WEIGHT:
        raise UpdateError(f"weight {weight!r} is not above 0 and at most {MAX_WEIGHT:g}")


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


def _is_bf16(array: NDArray[Any]) -> bool:
    return array.dtype.name == "bfloat16"


def _check_finite(name: str, array: NDArray[Any]) -> None:
    flat = array.reshape(-1)
    if _is_bf16(array):
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, BLOCK_ITEMS):
        block = flat[start : start + BLOCK_ITEMS]
        # A bfloat16 is not finite when all 8 bits of its exponent are set.
        good = (block & 0x7F80) != 0x7F80 if _is_bf16(array) else np.isfinite(block)
        if not good.all():
            at = np.unravel_index(start + int(np.argmin(good)), array.shape)
            value = float(array[at])
            raise UpdateError(f"tensor {name!r} holds {value} at {[int(i) for i in at]}")


def _fold(sources: Sequence[_Flat], shares: Sequence[float]) -> None:
    """Write the mean of the sources, flat arrays of one dtype and size, over the first of them."""
    out = sources[0]
    sum_dtype = np.float64 if out.dtype == np.float64 else np.float32
    is_direct = out.dtype == sum_dtype
    depth = (len(sources) - 1).bit_length() + 1
    scratch = [np.empty(min(BLOCK_ITEMS, out.size), sum_dtype) for _ in range(depth)]
    with np.errstate(over="raise", under="ignore"):
        for start in range(0, out.size, BLOCK_ITEMS):
            blocks = [source[start : start + BLOCK_ITEMS] for source in sources]
            rows = [row[: blocks[0].size] for row in scratch]
            total = blocks[0] if is_direct else rows[0]
            _sum(blocks, shares, total, rows[1:])
            if not is_direct:
                _narrow(total, blocks[0])


def _sum(
    blocks: Sequence[_Flat], shares: Sequence[float], total: _Flat, rows: Sequence[_Flat]
) -> None:
    """Write the shares' sum into `total`, which may be the first block: each block is read before."""
    if len(blocks) == 1:
        wide = _widen(blocks[0], total)
        np.multiply(wide, total.dtype.type(shares[0]), out=total)
        return
    half = (len(blocks) + 1) // 2
    _sum(blocks[:half], shares[:half], total, rows[1:])
    _sum(blocks[half:], shares[half:], rows[0], rows[1:])
    try:
        np.add(total, rows[0], out=total)
    except FloatingPointError:
        # A mean is no larger than its largest term; only the shares' rounding can lead beyond the dtype.
        limit = np.finfo(total.dtype).max
        np.clip(total, -limit, limit, out=total)


def _widen(block: _Flat, into: _Flat) -> _Flat:
    """The block in the dtype of `into`: the block itself if it has that, else written to `into`."""
    if block.dtype == into.dtype:
        return block
    if _is_bf16(block):
        bits = into.view(np.uint32)
        bits[...] = block.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        into[...] = block
    return into


def _narrow(total: _Flat, into: _Flat) -> None:
    """Round to nearest, ties to even."""
    if not _is_bf16(into):
        into[...] = total
        return
    bits = total.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    bits += odd + np.uint32(0x7FFF)
    np.right_shift(bits, 16, out=bits)
    into.view(np.uint16)[...] = bits
