"""Weights and what belongs to them on disk: one safetensors and one JSON file a checkpoint.

A crash at any moment leaves the earlier checkpoints whole, and either all or nothing of the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedllm.aggregate import Arrays
from fedllm.errors import FedError

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]


class CheckpointError(FedError):
    """A checkpoint that cannot be written or read. Says which file."""


def save_checkpoint(folder: Path, name: str, weights: Arrays, state: Mapping[str, Any]) -> Path:
    """Write ``name.safetensors``, then ``name.json`` with `state`; the JSON's path.

    Both are written aside, flushed to the disk (fsync(2)) and renamed (rename(2) is atomic). The JSON comes last:
    where it is, the checkpoint is complete. Blocks: call it in a thread. Raises `CheckpointError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{name}.safetensors", lambda path: save_file(dict(weights), path))
        text = json.dumps(dict(state), indent=2) + "\n"
        _replace(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError, TypeError, ValueError) as exc:
        raise CheckpointError(f"checkpoint {name!r} cannot be written to {folder}: {exc}") from exc
    return folder / f"{name}.json"


def load_checkpoint(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The weights and the state that `save_checkpoint` wrote. Raises `CheckpointError`."""
    try:
        state = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        weights = load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError, ValueError) as exc:
        raise CheckpointError(f"checkpoint {name!r} in {folder} cannot be read: {exc}") from exc
    return weights, state


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        write(Path(aside))
        os.fsync(handle)
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
