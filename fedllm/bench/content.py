"""The numbers that are moved, and how it is verified that a round came to what it must.

All are whole, and the silos' weights add up to a power of two: each sum of a round is exact, whatever the order of
its terms, so that every bit of the new weights can be compared, whoever summed them.

Before each round every number grows by one, and what stands for training changes one in every `STRIDE` on the silos;
all others come back as they went out. So the new weights are right only if every byte of this round went both ways,
whatever memory of earlier ones held; and those that the silos changed show that their round took place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedllm.bench.errors import WrongWeights
from fedllm.bench.layouts import ITEM_BYTES, Layout, nbytes_of

__all__ = ["STRIDE", "Arrays", "empty", "fill", "renew", "row_of", "train", "verify", "weights_of"]

Arrays = Mapping[str, NDArray[Any]]

STRIDE: Final = 1 << 12
"""Items: one in 16 KiB."""
_PERIOD: Final = 100_003
"""Prime, so that no two chunks of a transfer are alike and one in the wrong place is noticed."""
_MOST: Final = 1 << 16
"""Small enough that sums of what becomes of such numbers in many rounds are exact in float32."""


def weights_of(silos: int) -> list[int]:
    """How much each silo counts: no two alike, as long as there are few."""
    first = [1 + number % 7 for number in range(silos - 1)]
    return [*first, (1 << (sum(first) + 1).bit_length()) - sum(first)] if first else [1]


def empty(layout: Layout) -> dict[str, NDArray[Any]]:
    """Arrays of this layout, one after the other in one piece of memory."""
    row, end = np.empty(nbytes_of(layout) // ITEM_BYTES, np.float32), 0
    arrays = {}
    for name, shape in layout.items():
        start, end = end, end + math.prod(shape)
        arrays[name] = row[start:end].reshape(shape)
    return arrays


def row_of(arrays: Arrays) -> NDArray[np.float32]:
    """The memory of all these arrays, which `empty` has made."""
    row = next(iter(arrays.values())).base
    assert row is not None
    return row


def fill(arrays: Arrays) -> None:
    """Write the first global weights."""
    for _, flat, start in _flat(arrays):
        for at, part in _pieces(flat):
            part[:] = _pattern(start + at, part.size)


def renew(arrays: Arrays) -> None:
    """Make every number another one than in the round before, in place."""
    for array in arrays.values():
        array += np.float32(1)


def train(arrays: Arrays, number: int, silos: int) -> None:
    """What stands for the training of silo `number`, in place; takes no time."""
    step = (number + 1) * sum(weights_of(silos))
    for _, flat, _start in _flat(arrays):
        flat[::STRIDE] += np.float32(step)


def verify(arrays: Arrays, layout: Layout, silos: int, rounds: int) -> None:
    """Compare every bit with what so many rounds must have come to. Raises `WrongWeights`."""
    if {name: array.shape for name, array in arrays.items()} != dict(layout):
        raise WrongWeights("the new weights have other names or shapes than the old ones")
    gain = rounds * sum(w * (i + 1) for i, w in enumerate(weights_of(silos)))
    for name, flat, start in _flat({name: arrays[name] for name in layout}):
        for at, part in _pieces(flat):
            expected = _pattern(start + at, part.size) + np.float32(rounds)
            expected[-at % STRIDE :: STRIDE] += np.float32(gain)
            if not np.array_equal(part.view(np.uint32), expected.view(np.uint32)):
                bad = int(np.argmax(part != expected))
                raise WrongWeights(
                    f"tensor {name!r} is {part[bad]} at item {at + bad} after {rounds} rounds, and must be "
                    f"{expected[bad]}"
                )


def _flat(arrays: Arrays) -> Iterator[tuple[str, NDArray[np.float32], int]]:
    """Each tensor as one row, and how many items come before it."""
    start = 0
    for name, array in arrays.items():
        yield name, array.reshape(-1), start
        start += array.size


def _pieces(flat: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for at in range(0, flat.size, _PERIOD):
        yield at, flat[at : at + _PERIOD]


def _pattern(start: int, items: int) -> NDArray[np.float32]:
    """The first weights' items from `start` on, at most `_PERIOD` of them."""
    pattern, shift = _whole_pattern(), start % _PERIOD
    return np.concatenate((pattern[shift:], pattern[:shift]))[:items]


@functools.cache
def _whole_pattern() -> NDArray[np.float32]:
    return np.random.default_rng(1).integers(0, _MOST, _PERIOD).astype(np.float32)
