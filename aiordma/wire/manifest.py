"""What a transfer carries: names, dtypes, shapes, and where each tensor lies in its data.

As in safetensors, a transfer's data is the tensors' little-endian bytes one after the other, with
no holes. They are laid out by falling item size (stable, so otherwise in the caller's order): every
tensor then begins at a multiple of its item size, and since chunk borders are multiples of 64
bytes, no chunk ever splits an element. The manifest itself lists them in the caller's order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, NamedTuple

import msgspec

from aiordma.errors import ManifestError

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E5M2": 1,
        "F8_E4M3": 1,
        "F8_E8M0": 1,
        "F8_E4M3FNUZ": 1,
        "F8_E5M2FNUZ": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "F64": 8,
        "I64": 8,
        "U64": 8,
        "C64": 8,
    }
)
"""Bytes an element of each dtype, by safetensors' names (0.8, `tensor.rs`).

safetensors' F4, F6_E2M3 and F6_E3M2 are not among them: their elements are smaller than a byte, so
a byte range of the data has no whole number of them. Send the packed bytes as U8.
"""

CHUNK_ALIGN_BYTES = 64
"""Chunks begin and end at multiples of it, or at the end of the data."""
MAX_DIMENSIONS = 64
"""As many as numpy knows."""
MAX_NAME_BYTES = 1024
MAX_META_BYTES = 64 * 1024
"""The most that a transfer's `meta` may take: it travels with the manifest."""
MAX_BYTES = (1 << 63) - 1
"""No size, offset or dimension is larger: they are signed 64-bit in numpy and torch."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: its name, its safetensors dtype, its shape, its first byte in the data."""

    name: str
    dtype: str
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    offset: int

    @property
    def item_bytes(self) -> int:
        """Bytes an element. Raises `ManifestError` for a dtype that is not in `ITEM_BYTES`."""
        found = ITEM_BYTES.get(self.dtype)
        if found is None:
            raise ManifestError(
                f"tensor {_short(self.name)} has the unknown dtype {_short(self.dtype)}:"
                f" send its bytes as U8, or one of {', '.join(ITEM_BYTES)}"
            )
        return found

    @property
    def size(self) -> int:
        """How many elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the data."""
        return self.size * self.item_bytes

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + self.nbytes


class Part(NamedTuple):
    """The bytes of one tensor that lie in one chunk: always whole elements."""

    spec: TensorSpec
    """The tensor; the first in the manifest's order where tied tensors share the bytes."""
    element_offset: int
    """Number of the part's first element in the flattened tensor."""
    start: int
    """Position of the part's first byte in the transfer's data."""
    nbytes: int


class Manifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """The tensors of one transfer in the sender's order, and how many bytes their data takes.

    One that came from a peer may claim anything until `check` has seen it.
    """

    tensors: tuple[TensorSpec, ...]
    total_bytes: int

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """What the chunk [offset, offset + length) touches, in the order of the data.

        A range that tied tensors share appears once; tensors of no bytes never do. Takes
        O(log tensors + parts). Raises `ManifestError`, before the first part, for a chunk beyond
        the data or one whose border is neither a multiple of 64 nor the end of the data.
        """
        self.check_chunk(offset, length)
        return self._parts(offset, offset + length)

    def check_chunk(self, offset: int, length: int) -> None:
        """Raise `ManifestError` if [offset, offset + length) cannot be a chunk of this data."""
        end = offset + length
        if offset < 0 or length < 0 or end > self.total_bytes:
            raise ManifestError(
                f"chunk [{offset}, {end}) is not within the transfer's {self.total_bytes} bytes"
            )
        if offset % CHUNK_ALIGN_BYTES or (end % CHUNK_ALIGN_BYTES and end != self.total_bytes):
            raise ManifestError(
                f"chunk [{offset}, {end}) may split an element: its borders must be multiples of"
                f" {CHUNK_ALIGN_BYTES} or the end of the data ({self.total_bytes})"
            )

    def _parts(self, offset: int, end: int) -> Iterator[Part]:
        starts, ranges = self._layout
        index = max(bisect_right(starts, offset) - 1, 0)
        while offset < end:
            spec, start, range_end, item_bytes = ranges[index]
            index += 1
            stop = min(range_end, end)
            yield Part(spec, (offset - start) // item_bytes, offset, stop - offset)
            offset = stop

    @cached_property
    def _layout(self) -> tuple[list[int], list[tuple[TensorSpec, int, int, int]]]:
        """Each distinct range of the data once, by rising offset: first bytes; and tensor, first byte, end, bytes an
        element."""
        by_offset: dict[int, TensorSpec] = {}
        for spec in self.tensors:
            if spec.nbytes:
                by_offset.setdefault(spec.offset, spec)
        starts = sorted(by_offset)
        specs = [by_offset[start] for start in starts]
        return starts, [(spec, spec.offset, spec.end, spec.item_bytes) for spec in specs]


def lay_out(entries: Iterable[tuple[str, str, tuple[int, ...], Hashable | None]]) -> Manifest:
    """Give each (name, dtype, shape, alias) its place in the data.

    Entries of equal alias, dtype and shape share one range (tied tensors travel once); an alias of
    None is shared with nobody. Raises `ManifestError` for a dtype that is not in `ITEM_BYTES`.
    """
    listed = [(TensorSpec(name, dtype, shape, 0), alias) for name, dtype, shape, alias in entries]
    offsets = [0] * len(listed)
    shared: dict[Hashable, int] = {}
    end = 0
    for index in sorted(range(len(listed)), key=lambda i: -listed[i][0].item_bytes):
        spec, alias = listed[index]
        offsets[index] = end
        if alias is not None:
            offsets[index] = shared.setdefault((alias, spec.dtype, spec.shape), end)
        if offsets[index] == end:
            end += spec.nbytes
    tensors = (
        TensorSpec(spec.name, spec.dtype, spec.shape, offset)
        for (spec, _), offset in zip(listed, offsets, strict=True)
    )
    return Manifest(tuple(tensors), end)


def check(
    manifest: Manifest,
    *,
    max_tensors: int,
    max_total_bytes: int,
    max_name_bytes: int = MAX_NAME_BYTES,
) -> None:
    """Raise `ManifestError` unless the manifest is within the limits and describes its data fully.

    Takes O(n log n) for n tensors, whatever sizes they claim.
    """
    _check_count(len(manifest.tensors), max_tensors)
    max_total_bytes = min(max_total_bytes, MAX_BYTES)
    if manifest.total_bytes > max_total_bytes:
        raise ManifestError(
            f"the manifest's {manifest.total_bytes} bytes are more than the limit of"
            f" {max_total_bytes}: send several transfers, or raise the receiver's"
            " ChannelConfig.max_transfer_bytes"
        )
    names: set[str] = set()
    for spec in manifest.tensors:
        _check_name(spec.name, max_name_bytes)
        if spec.name in names:
            raise ManifestError(f"tensor name {_short(spec.name)} appears twice: names must differ")
        names.add(spec.name)
        _check_size(spec)
        _check_place(spec, manifest.total_bytes)
    _check_coverage(manifest)


def encode(manifest: Manifest) -> bytes:
    """The manifest as msgpack: [[[name, dtype, [dimension, ...], offset], ...], total_bytes].

    Raises `ManifestError` for a number beyond 64 bits or a name that is not Unicode text.
    """
    try:
        return msgspec.msgpack.encode(manifest)
    except (OverflowError, UnicodeEncodeError) as exc:
        raise ManifestError(f"the manifest cannot be encoded: {exc}") from exc


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_tensors: int,
    max_total_bytes: int,
    max_name_bytes: int = MAX_NAME_BYTES,
) -> Manifest:
    """Decode and `check` what a peer sent. Anything else than a sound manifest: `ManifestError`.

    The claimed number of tensors is held against the limit before any is decoded; what is
    allocated then is bounded by the limit and by the length of `data`, not by what `data` claims.
    """
    _check_count(_claimed_tensors(data), max_tensors)
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ManifestError(
            f"the manifest is malformed ({exc}): the peer's encoder is broken"
        ) from exc
    check(
        manifest,
        max_tensors=max_tensors,
        max_total_bytes=max_total_bytes,
        max_name_bytes=max_name_bytes,
    )
    return manifest


def _claimed_tensors(data: bytes | bytearray | memoryview) -> int:
    """The count in the header of the inner msgpack array; 0 where there is none to be read.

    Source: the msgpack specification, formats fixarray, array 16 and array 32.
    """
    head = bytes(data[:6])
    if len(head) < 2 or head[0] != 0x92:
        return 0
    marker = head[1]
    if marker & 0xF0 == 0x90:
        return marker & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(marker, 0)
    return int.from_bytes(head[2 : 2 + width], "big")


def _check_count(tensors: int, max_tensors: int) -> None:
    if tensors > max_tensors:
        raise ManifestError(
            f"the manifest has {tensors} tensors, more than the limit of {max_tensors}: send"
            " several transfers, or raise the receiver's ChannelConfig.max_tensors"
        )


def _check_name(name: str, max_name_bytes: int) -> None:
    if not name:
        raise ManifestError("a tensor has an empty name: give it one")
    try:
        name_bytes = len(name.encode())
    except UnicodeEncodeError as exc:
        raise ManifestError(
            f"tensor name {_short(name)} is not Unicode text ({exc.reason}): rename it"
        ) from exc
    if name_bytes > max_name_bytes:
        raise ManifestError(
            f"tensor name {_short(name)} has {name_bytes} bytes, more than the limit of"
            f" {max_name_bytes}: shorten it"
        )


def _check_size(spec: TensorSpec) -> None:
    item_bytes = spec.item_bytes
    if len(spec.shape) > MAX_DIMENSIONS:
        raise ManifestError(
            f"tensor {_short(spec.name)} has {len(spec.shape)} dimensions, more than"
            f" {MAX_DIMENSIONS}: reshape it"
        )
    if any(dimension < 0 for dimension in spec.shape):
        raise ManifestError(
            f"tensor {_short(spec.name)} has a negative dimension in its shape {spec.shape}:"
            " the peer's encoder is broken"
        )
    # A zero hides the other dimensions' overflow from the product, but not from numpy's strides.
    if math.prod(max(dimension, 1) for dimension in spec.shape) * item_bytes > MAX_BYTES:
        raise ManifestError(
            f"tensor {_short(spec.name)} overflows 63 bits with its shape {spec.shape}:"
            " the peer's encoder is broken"
        )


def _check_place(spec: TensorSpec, total_bytes: int) -> None:
    if spec.offset % spec.item_bytes:
        raise ManifestError(
            f"tensor {_short(spec.name)} is misaligned: its offset {spec.offset} is no multiple"
            f" of its item size {spec.item_bytes}; lay tensors out by falling item size"
        )
    if spec.offset < 0 or spec.end > total_bytes:
        raise ManifestError(
            f"tensor {_short(spec.name)} takes bytes [{spec.offset}, {spec.end}), beyond the"
            f" manifest's {total_bytes}: the peer's layout is broken"
        )


def _check_coverage(manifest: Manifest) -> None:
    """Raise unless the ranges cover the data without hole or overlap; tied ones count as one."""
    end = 0
    previous: TensorSpec | None = None
    for spec in sorted((s for s in manifest.tensors if s.nbytes), key=lambda s: s.offset):
        if previous is not None and spec.offset == previous.offset:
            if (spec.dtype, spec.shape) == (previous.dtype, previous.shape):
                continue
        elif spec.offset > end:
            raise _hole(end, spec.offset)
        if spec.offset < end:
            other = previous.name if previous is not None else ""
            raise ManifestError(
                f"tensors {_short(other)} and {_short(spec.name)} overlap at byte {spec.offset}:"
                " only tensors of one dtype and shape may share a range"
            )
        end = spec.end
        previous = spec
    if end != manifest.total_bytes:
        raise _hole(end, manifest.total_bytes)


def _hole(start: int, end: int) -> ManifestError:
    return ManifestError(
        f"the manifest has a hole: no tensor covers bytes [{start}, {end});"
        " lay tensors out one after the other"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
