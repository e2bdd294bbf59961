"""Weights and what belongs to them on disk: one JSON file a checkpoint, which names one safetensors file.

A crash at any moment leaves either the old checkpoint of a name or the new one, and both whole.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
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
    """Write the weights to ``name.*.safetensors``, then `state` to ``name.json``, the path of which it returns.

    Each file is written aside, flushed (fsync(2)) and renamed; rename(2) is atomic, and that of the JSON is what
    makes the checkpoint: weights that no JSON names are of no account, and removed by the next one. One writer at
    a time. Blocks: call it in a thread. Raises `CheckpointError`.
    """
    file = f"{name}.{secrets.token_hex(4)}.safetensors"
    try:
        text = json.dumps({"weights": file, "state": dict(state)}, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / file, lambda path: save_file(dict(weights), path))
        _replace(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
        for old in folder.glob(f"{glob.escape(name)}.????????.safetensors"):
            if old.name != file:
                old.unlink()
    except (OSError, SafetensorError, TypeError, ValueError) as exc:
        raise CheckpointError(f"checkpoint {name!r} cannot be written to {folder}: {exc}") from exc
    return folder / f"{name}.json"


def load_checkpoint(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The weights and the state that `save_checkpoint` wrote. Raises `CheckpointError`."""
    try:
        written = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        weights = load_file(folder / Path(written["weights"]).name)
        return weights, written["state"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"checkpoint {name!r} in {folder} cannot be read: {exc}") from exc


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(aside)
        _sync(
            aside, os.O_RDONLY
        )  # opened anew: save_file puts another file in the place of one that is there
        aside.replace(path)
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
