"""Lane frames: a fixed 64-byte little-endian header, followed by the payload if it is a chunk.

====== ===== =============================== ========================= ===========================
offset bytes CHUNK                           CREDIT                    WINDOW
====== ===== =============================== ========================= ===========================
0      4     magic ``aior``                  the same                  the same
4      1     kind (1)                        kind (2)                  kind (3)
5      1     flags                           0                         0
6      2     slot in the receiver's ring     0                         its number
8      4     payload bytes                   0                         its key
12     4     0                               0                         0
16     8     transfer id                     slots 0..63 given back    transfer id
24     8     offset in the transfer's data   slots 64..127             where it begins in the data
32     8     xxh3_64 of the payload          slots 128..191            bytes
40     8     0                               slots 192..255            address
48     8     sequence number in the lane     the same                  the same
56     8     xxh3_64 of bytes 0..55          the same                  the same
====== ===== =============================== ========================= ===========================

Flags: 1, the payload's xxh3_64 is there; 2, the payload was written through a window, not to the slot. Only RDMA
lanes have windows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from aiordma.errors import RemoteProtocolError

HEADER_BYTES = 64
_BODY_BYTES = 56
_MAGIC = b"aior"
_CHUNK, _CREDIT, _WINDOW = 1, 2, 3
_CHECKED, _IN_PLACE = 1, 2
_WORD = (1 << 64) - 1
_BODY = struct.Struct("<4sBBHIIQQQQQ")
_CHECK = struct.Struct("<Q")

xxh3 = xxhash.xxh3_64_intdigest


class ChunkHeader(NamedTuple):
    """What a chunk is and where it belongs: a range of one transfer, and the slot it may occupy."""

    slot: int
    length: int
    transfer: int
    offset: int
    check: int | None
    """xxh3_64 of the payload; None where the sender computes none."""
    is_in_place: bool = False
    """Whether the payload went through a window of the receiver's, and not into the slot."""


class CreditHeader(NamedTuple):
    """Slots that the receiver gives back to the sender: bit s is slot s."""

    slots: int


class WindowHeader(NamedTuple):
    """Memory of the receiver's that the sender may write a part of a transfer to, until it is told to stop."""

    number: int
    key: int
    transfer: int
    offset: int
    """Of its first byte in the transfer's data."""
    nbytes: int
    address: int

    def holds(self, header: ChunkHeader) -> bool:
        """Whether all of this chunk belongs there."""
        first = header.offset - self.offset
        return (
            header.transfer == self.transfer and first >= 0 and first + header.length <= self.nbytes
        )


def payload_check(parts: Sequence[memoryview]) -> int:
    """xxh3_64 over the parts as if they were one buffer."""
    if len(parts) == 1:
        return xxh3(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def encode_chunk(header: ChunkHeader, sequence: int) -> bytes:
    """The 64 bytes that go before a chunk's payload."""
    slot, length, transfer, offset, check, is_in_place = header
    flags = (0 if check is None else _CHECKED) | (_IN_PLACE if is_in_place else 0)
    body = _BODY.pack(
        _MAGIC, _CHUNK, flags, slot, length, 0, transfer, offset, check or 0, 0, sequence
    )
    return body + _CHECK.pack(xxh3(body))


def encode_credit(slots: int, sequence: int) -> bytes:
    """A CREDIT frame that gives back the slots whose bits are set."""
    words = [slots >> shift & _WORD for shift in (0, 64, 128, 192)]
    body = _BODY.pack(_MAGIC, _CREDIT, 0, 0, 0, 0, *words, sequence)
    return body + _CHECK.pack(xxh3(body))


def encode_window(window: WindowHeader, sequence: int) -> bytes:
    """A WINDOW frame."""
    number, key, *rest = window
    body = _BODY.pack(_MAGIC, _WINDOW, 0, number, key, 0, *rest, sequence)
    return body + _CHECK.pack(xxh3(body))


def decode(
    frame: memoryview | bytes | bytearray, sequence: int
) -> ChunkHeader | CreditHeader | WindowHeader:
    """Decode 64 bytes that must be the lane's frame number `sequence`.

    Raises `RemoteProtocolError` for anything that this version would not have sent: from then on the
    borders between frames are lost, and with them the lane.
    """
    body = frame[:_BODY_BYTES]
    (check,) = _CHECK.unpack_from(frame, _BODY_BYTES)
    magic, kind, flags, slot, length, rest, a, b, c, d, found = _BODY.unpack(body)
    if magic != _MAGIC or check != xxh3(body):
        raise RemoteProtocolError(
            f"lane frame {sequence} is damaged ({bytes(frame[:8]).hex()}...): its header check fails"
        )
    if found != sequence:
        raise RemoteProtocolError(f"lane frame {sequence} was due, frame {found} came")
    is_checked = bool(flags & _CHECKED)
    if (
        kind == _CHUNK
        and flags <= _CHECKED | _IN_PLACE
        and not (rest or d)
        and (is_checked or not c)
    ):
        return ChunkHeader(slot, length, a, b, c if is_checked else None, bool(flags & _IN_PLACE))
    if kind == _CREDIT and not (flags or slot or length or rest):
        return CreditHeader(a | b << 64 | c << 128 | d << 192)
    if kind == _WINDOW and not (flags or rest):
        return WindowHeader(slot, length, a, b, c, d)
    raise RemoteProtocolError(
        f"lane frame {sequence} is of kind {kind} with flags {flags}, or has bits set that must be 0: "
        f"no peer of this version sends it"
    )
