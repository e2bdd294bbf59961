"""The bytes that are moved, and how their arrival is verified."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from aiordma.bench.errors import CorruptTransfer

Buffer = NDArray[np.uint8]

MESSAGE_BYTES = 64
_PERIOD_BYTES = 1_000_003
"""Prime, so that no two chunks of a transfer are alike and one in the wrong place is noticed."""
_SCRUB = 0xA5


def source(nbytes: int) -> Buffer:
    """Random bytes, the same in each process; touched, with no copy left over."""
    pattern = np.random.default_rng(1).integers(0, 256, min(nbytes, _PERIOD_BYTES), dtype=np.uint8)
    buffer = np.empty(nbytes, dtype=np.uint8)
    for start in range(0, nbytes, _PERIOD_BYTES):
        part = buffer[start : start + _PERIOD_BYTES]
        part[:] = pattern[: part.size]
    return buffer


def scrubbed(nbytes: int) -> Buffer:
    """A destination, touched."""
    return np.full(nbytes, _SCRUB, dtype=np.uint8)


def scrub(buffer: Buffer) -> None:
    """Wipe what a transfer left, so that the next one cannot pass on its account."""
    buffer.fill(_SCRUB)


def digest(buffer: Buffer) -> int:
    """xxh3_64 over all bytes."""
    return xxhash.xxh3_64_intdigest(buffer.data)


def verify(buffer: Buffer, expected_digest: int) -> None:
    """Raises `CorruptTransfer` unless the bytes are those of `expected_digest`."""
    if digest(buffer) != expected_digest:
        raise CorruptTransfer(f"{buffer.nbytes} bytes arrived, but not those that were sent")


def message(index: int) -> bytes:
    """The small message number `index`: no two are alike."""
    return index.to_bytes(8, "little") * (MESSAGE_BYTES // 8)


def verify_message(index: int, answer: bytes) -> None:
    """Raises `CorruptTransfer` unless message number `index` came back."""
    if answer != message(index):
        raise CorruptTransfer(f"message {index} came back as {answer[:16]!r}...")
