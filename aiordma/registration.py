"""A tensor whose memory a device may read: what `Channel.register` returns."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self


class Registration:
    """Lasts as long as the tensor does, or until `release`. As a context manager it releases."""

    def __init__(self, nbytes: int, release: Callable[[], None] | None) -> None:
        """Made by `Channel.register`. `release`: None where nothing was pinned."""
        self._nbytes = nbytes
        self._release = release

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self._nbytes

    @property
    def is_pinned(self) -> bool:
        """Whether it makes a difference: lanes over TCP send from any memory without a copy."""
        return self._release is not None

    def release(self) -> None:
        """Unpin the memory, now or when what is under way is done with it, unless others have registered it too.
        Twice is once."""
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()
