"""A piece of a transfer, as it lies in a receive slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np

from aiordma.errors import Busy
from aiordma.tensors import typed_view
from aiordma.wire.manifest import Manifest, TensorSpec


class Chunk:
    """A piece of a transfer, in a receive slot that the sender gets back on `release`.

    Everything that `parts` returns is borrowed: after `release` the memory holds other bytes.
    """

    def __init__(
        self, offset: int, view: memoryview, *, is_direct: bool, release: Callable[[], None] | None
    ) -> None:
        self.offset = offset
        """Position of its first byte in the transfer's data."""
        self.nbytes = view.nbytes
        self.is_direct = is_direct
        """Whether it is in its final place already."""
        self._view = view
        self._release = release
        self._manifest: Manifest | None = None

    @property
    def view(self) -> memoryview:
        """The bytes, borrowed until `release`."""
        return self._view

    def parts(self) -> list[tuple[TensorSpec, int, np.ndarray]]:
        """The tensors that the chunk touches: (spec, index of the first element, borrowed 1-D view).

        Tied tensors come once, under the first one's spec. BF16 and F8 are raw bits (uint16, uint8) unless
        ml_dtypes is there.
        """
        if self._manifest is None:
            raise Busy("the chunk was released: its slot may hold other bytes by now")
        found = self._manifest.parts(self.offset, self.nbytes)
        return [
            (spec, element, typed_view(spec, self._view[start - self.offset :][:nbytes]))
            for spec, element, start, nbytes in found
        ]

    def lend(self, manifest: Manifest, on_release: Callable[[], None]) -> Chunk:
        """Hand the chunk to the user, who releases it."""
        self._manifest = manifest
        give_back = self._release

        def release() -> None:
            if give_back is not None:
                give_back()
            on_release()

        self._release = release
        return self

    def release(self) -> None:
        """Give the slot back, which is the sender's credit. Doing it twice does no harm."""
        release, self._release = self._release, None
        self._manifest = None
        if release is not None:
            release()

    def move_aside(self) -> int:
        """Copy the bytes to memory of their own, and give the slot back. Bytes copied."""
        if self._release is None:
            return 0
        self._view = memoryview(bytearray(self._view))
        self.release()
        return self.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
