"""What takes part in the comparison: a program with a class for the server and one for a silo.

fedllm itself is one (`ours`). Any other is a file of Python that defines `Server` and `Silo` like these protocols; both
are made with a `Setup` alone. The benchmark calls their methods, one at a time, in processes of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from fedllm.bench.content import Arrays
from fedllm.bench.errors import BenchError

__all__ = ["SLOT_BYTES", "Contender", "ServerSide", "Setup", "SiloSide", "Train", "load"]

Train: TypeAlias = Callable[[Arrays], None]

SLOT_BYTES: Final = 1 << 20


class Contender(msgspec.Struct, frozen=True):
    """One row of the comparison."""

    program: str = ""
    """Path of a file of Python; empty: fedllm."""
    aggregate: Literal["staged", "aligned"] = "staged"
    """How fedllm gathers updates."""
    lanes: int = 1
    """Lanes of fedllm's channels."""
    slot_bytes: int = SLOT_BYTES
    """Size of their receive slots, and so of its chunks."""

    @property
    def name(self) -> str:
        """As the table has it."""
        if self.program:
            return Path(self.program).stem
        name = f"fedllm, {self.aggregate}" + f", {self.lanes} lanes" * (self.lanes > 1)
        return name + f", {self.slot_bytes >> 10} KiB slots" * (self.slot_bytes != SLOT_BYTES)


class Setup(msgspec.Struct, frozen=True):
    """What one process of a contender is told."""

    contender: Contender
    layout: str
    """What `layouts.layout_of` takes."""
    silos: int
    host: str
    """The address that the server listens at."""
    congestion: str
    """TCP congestion control; empty: the host's."""
    number: int = -1
    """Which of the silos this is, from 0; the server is -1."""
    port: int = 0
    """The server's; 0 for the server itself."""


class ServerSide(Protocol):
    """The server of a round: sends the weights to all silos, and makes new ones of what they send back."""

    def listen(self) -> int:
        """Listen at the setup's host; the port."""

    def gather(self) -> None:
        """Return when all silos are connected."""

    def round(self, weights: Arrays) -> Arrays:
        """One round: returns the silos' mean, each by its part of `content.weights_of`; it may be the same arrays."""

    def close(self) -> None:
        """Close all connections."""


class SiloSide(Protocol):
    """One silo."""

    def join(self) -> None:
        """Connect to the setup's host and port."""

    def round(self, train: Train) -> None:
        """One round: receive the weights, `train` them in place, send them back."""

    def close(self) -> None:
        """Close the connection."""


def load(path: str) -> ModuleType:
    """The contender of this file. Raises `BenchError`."""
    if not Path(path).is_file():
        raise BenchError(
            f"there is no {path}: fedllm's own yardsticks come with a copy of its sources, not with the installed "
            "package; run the command there, or give --against a file"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise BenchError(f"{path} is no file of Python: give --against a contender's")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as exc:
        raise BenchError(
            f"{Path(path).name} cannot be run: {exc} (what fedllm's own yardsticks need: pip install 'aiordma[bench]')"
        ) from exc
    missing = [name for name in ("Server", "Silo") if not hasattr(module, name)]
    if missing:
        raise BenchError(f"{path} is no contender: it defines no {' and no '.join(missing)}")
    return module
