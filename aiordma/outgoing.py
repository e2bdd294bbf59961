"""Tensors on their way out: described once, sent to any number of channels."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from aiordma.errors import ManifestError, TensorError
from aiordma.tensors import Memory, describe, require_mapping, tensor_error
from aiordma.wire import manifest as wire
from aiordma.wire.frames import payload_check
from aiordma.wire.manifest import MAX_META_BYTES, Manifest

_MOST_CHECKS: Final = 1 << 16
"""Some 10 MB of them; chunks beyond are checked each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """Tensors that are described once and can be sent to any number of channels.

    Made by `prepare`. Holds references to the arrays and copies nothing: what is written into an
    array before it was sent is what travels.
    """

    manifest: Manifest
    manifest_bytes: bytes
    meta_bytes: bytes
    """`meta` as msgpack; empty for None."""
    is_host: bool
    """False if a tensor lives on a device, so that its bytes have to be staged."""
    _memory: Mapping[int, Memory]
    _checks: dict[tuple[int, int], int] | None = None
    """By a chunk's offset and length; None: the arrays may change."""

    def with_meta(self, meta: object) -> Outgoing:
        """The same tensors with another `meta`. Raises `TensorError` as `prepare` does."""
        return replace(self, meta_bytes=_encode_meta(meta))

    def views(self, offset: int, length: int) -> list[memoryview]:
        """The host memory of the chunk [offset, offset + length): no copies, in layout order.

        The views are borrowed from the arrays, and must not be written. Raises `TensorError` if the chunk touches a
        tensor on a device; `ManifestError` for what is no chunk of this data."""
        views: list[memoryview] = []
        for spec, _, start, nbytes in self.manifest.parts(offset, length):
            memory, first = self._memory[spec.offset], start - spec.offset
            if memory.device != "cpu":
                raise tensor_error(spec.name, f"lives on {memory.device}: use stage()")
            views.append(memory.data[first : first + nbytes])
        return views

    def check(self, offset: int, length: int, parts: Sequence[memoryview]) -> int:
        """xxh3_64 of the chunk [offset, offset + length), whose bytes are in `parts`."""
        known = None if self._checks is None else self._checks.get((offset, length))
        if known is not None:
            return known
        check = payload_check(parts)
        if self._checks is not None and len(self._checks) < _MOST_CHECKS:
            self._checks[offset, length] = check
        return check

    def stage(self, offset: int, length: int, into: memoryview) -> None:
        """Copy the chunk [offset, offset + length) into the first `length` bytes of `into`, writable host memory of
        bytes. The copy from a device is complete on return."""
        for spec, _, start, nbytes in self.manifest.parts(offset, length):
            memory, first = self._memory[spec.offset], start - spec.offset
            target = into[start - offset : start - offset + nbytes]
            source = memory.data[first : first + nbytes]
            if memory.device == "cpu":
                target[:] = source
            else:
                sys.modules["torch"].frombuffer(target, dtype=source.dtype).copy_(source)


def prepare(
    tensors: Mapping[str, object], *, meta: object = None, is_constant: bool = False
) -> Outgoing:
    """Describe tensors for sending. Nothing is copied.

    `tensors` maps names (at most 1024 bytes of UTF-8) to numpy arrays, torch tensors, objects with `__dlpack__`, or
    objects with the buffer protocol (of a dtype that their format tells, or else U8). All must be C-contiguous and of
    a dtype in `ITEM_BYTES`. Those that are the same memory, dtype and shape travel once. `meta` is any object that
    msgpack can encode in 64 KiB. `is_constant`: the arrays will not be written while this is in use, and each chunk's
    checksum is made once, for all channels; if they are written, receivers find the chunks damaged.

    Raises `TensorError`, which names the tensor and the remedy.
    """
    require_mapping("tensors", tensors)
    memory = {name: describe(name, value) for name, value in tensors.items()}
    manifest = wire.lay_out(
        (name, m.dtype, m.shape, (m.device, m.address)) for name, m in memory.items()
    )
    try:
        wire.check(manifest, max_tensors=len(memory), max_total_bytes=wire.MAX_BYTES)
    except ManifestError as exc:
        raise TensorError(f"these tensors cannot be sent: {exc}") from exc
    by_offset = {spec.offset: memory[spec.name] for spec in manifest.tensors if spec.nbytes}
    return Outgoing(
        manifest=manifest,
        manifest_bytes=wire.encode(manifest),
        meta_bytes=_encode_meta(meta),
        is_host=all(m.device == "cpu" for m in by_offset.values()),
        _memory=by_offset,
        _checks={} if is_constant else None,
    )


def _encode_meta(meta: object) -> bytes:
    if meta is None:
        return b""
    try:
        encoded = msgspec.msgpack.encode(meta)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise TensorError(f"`meta` cannot be encoded as msgpack: {exc}") from exc
    if len(encoded) > MAX_META_BYTES:
        size = f"{len(encoded)} bytes, more than the limit of {MAX_META_BYTES}"
        raise TensorError(f"`meta` takes {size}: send it as a tensor")
    return encoded
