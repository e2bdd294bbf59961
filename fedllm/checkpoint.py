"""Weights and what belongs to them on disk: one JSON file a checkpoint, which names one safetensors file.

A crash at any moment leaves either the old checkpoint of a name or the new one, and both whole: each file is
written aside, flushed (fsync(2)) and renamed; rename(2) is atomic, and that of the JSON is what makes the
checkpoint. Weights that no JSON names are of no account, and are removed by the next checkpoint of that name.
One process at a time writes to a folder. All of this blocks: call it in a thread.

The weights are in the format of safetensors (github.com/huggingface/safetensors, "Format"), written and read
here block by block, since its own `save_file` holds a copy of all of them in memory.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from aiordma import Outgoing, TensorError, prepare
from fedllm.aggregate import Arrays, tie, ties_of
from fedllm.errors import CheckpointError, SettingError

__all__ = ["Checkpoints", "load_checkpoint", "read_state", "save_checkpoint", "write_json"]

BLOCK_BYTES: Final = 1 << 24
MAX_HEADER_BYTES: Final = 100_000_000
"""As in safetensors."""


class Checkpoints:
    """The rounds of one run in a folder, of which the last `keep` stay: ``round-000012.json`` and its weights."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        """Raises `SettingError` unless `keep` is at least 1. The folder is made by the first `save`."""
        if keep < 1:
            raise SettingError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self._keep = keep

    def rounds(self) -> list[int]:
        """The rounds that are there, rising."""
        names = (re.fullmatch(r"round-(\d{6,})\.json", p.name) for p in self.folder.glob("round-*"))
        return sorted(int(name[1]) for name in names if name)

    def save(self, round: int, weights: Arrays, state: Mapping[str, Any]) -> Path:
        """Write what a round came to, then remove what is older than the last `keep`; the path of the JSON.

        Raises `CheckpointError`, and nothing that was there is touched.
        """
        written = save_checkpoint(self.folder, _name(round), weights, state)
        kept = {_name(one) for one in self.rounds()[-self._keep :]}
        # By their files, not by `rounds`: a process that was killed may have removed a JSON, and not the weights.
        there = (re.match(r"\.?(round-\d{6,})\.", path.name) for path in self.folder.iterdir())
        for old in sorted({found[1] for found in there if found} - kept):
            try:
                _remove(self.folder, old)
            except OSError as exc:
                raise CheckpointError(f"{old} in {self.folder} cannot be removed: {exc}") from exc
        return written

    def amend(self, round: int, state: Mapping[str, Any]) -> None:
        """Replace a saved round's state; its weights stay. Raises `CheckpointError`, as `save` does."""
        try:
            document = _read_json(self.folder, _name(round))
            write_json(self.folder, _name(round), {**document, "state": dict(state)})
        except (OSError, TypeError, ValueError) as exc:
            raise _unwritten(self.folder, _name(round), exc) from exc

    def state(self, round: int) -> dict[str, Any]:
        """A saved round's state alone. Raises `CheckpointError`."""
        return read_state(self.folder, _name(round))

    def load(self, round: int, like: Arrays) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """See `load_checkpoint`."""
        return load_checkpoint(self.folder, _name(round), like)


def save_checkpoint(
    folder: Path, name: str, weights: Mapping[str, object], state: Mapping[str, Any]
) -> Path:
    """Write the weights to ``name.*.safetensors``, then `state` to ``name.json``, the path of which it returns.

    `weights` are arrays of any kind that aiordma sends; no copy of them is made. Raises `CheckpointError`, and
    the checkpoint of that name, if there was one, is as it was.
    """
    file = f"{name}.{secrets.token_hex(4)}.safetensors"
    try:
        try:
            make_folder(folder)
            check = _replace(folder / file, lambda out: _write_weights(out, weights))
            document = {"weights": file, "xxh3_128": check, "state": dict(state)}
            written = write_json(folder, name, document)
        finally:
            _clear(folder, name)
    except (OSError, TensorError, TypeError, ValueError) as exc:
        raise _unwritten(folder, name, exc) from exc
    return written


def load_checkpoint(
    folder: Path, name: str, like: Arrays
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The weights and the state that `save_checkpoint` wrote, in new arrays of the layout of `like`: what is tied
    there is tied, if it was saved as the same.

    Raises `CheckpointError` for what is not there, is damaged, or has another layout.
    """
    try:
        document = _read_json(folder, name)
        weights = {key: np.empty_like(array, order="C") for key, array in like.items()}
        with (folder / Path(document["weights"]).name).open("rb") as file:
            check = _read_weights(file, weights)
        if check != document["xxh3_128"]:
            raise ValueError("its bytes are not those that were written")
        tie(weights, ties_of(like))
        return weights, document["state"]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as exc:
        raise _unread(folder, name, exc) from exc


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """The state alone of what `save_checkpoint` wrote. Raises `CheckpointError`."""
    try:
        return dict(_read_json(folder, name)["state"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise _unread(folder, name, exc) from exc


def write_json(folder: Path, name: str, document: Mapping[str, Any]) -> Path:
    """Write ``name.json``, all of it or none; its path. Raises `OSError`, or what json does."""
    text = json.dumps(document, indent=2) + "\n"
    path = folder / f"{name}.json"
    _replace(path, lambda out: out.write(text.encode()))
    return path


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    return document


def _unread(folder: Path, name: str, cause: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name!r} in {folder} cannot be read: {cause}; remove it to go on without it"
    )


def _unwritten(folder: Path, name: str, cause: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name!r} cannot be written to {folder}: {cause}; what was there before is whole: mend that, "
        "and resume from it"
    )


def _name(round: int) -> str:
    return f"round-{round:06}"


def _write_weights(out: BinaryIO, weights: Mapping[str, object]) -> str:
    """The weights as safetensors; the xxh3_128 of their bytes."""
    # One by one: tensors that share memory travel once, but each has its own bytes in a file.
    tensors = {name: prepare({name: value}) for name, value in weights.items()}
    ordered = sorted(tensors, key=lambda name: -_spec(tensors[name]).item_bytes)
    header, offset = {}, 0
    for name in ordered:
        spec, size = _spec(tensors[name]), tensors[name].manifest.total_bytes
        offsets = [offset, offset + size]
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    check = xxh3_128()
    block = memoryview(bytearray(min(BLOCK_BYTES, offset)))
    for name in ordered:
        for piece in _staged(tensors[name], block):
            out.write(piece)
            check.update(piece)
    return check.hexdigest()


def _spec(one: Outgoing) -> Any:
    return one.manifest.tensors[0]


def _staged(tensor: Outgoing, block: memoryview) -> Iterator[memoryview]:
    """Its bytes, through the block: it may lie on a device."""
    total = tensor.manifest.total_bytes
    for start in range(0, total, BLOCK_BYTES):
        piece = block[: min(BLOCK_BYTES, total - start)]
        tensor.stage(start, len(piece), piece)
        yield piece


def _read_weights(file: BinaryIO, into: Mapping[str, NDArray[Any]]) -> str:
    """Fill the arrays; the xxh3_128 of what was read. Raises ValueError for another layout."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header cannot have {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    wanted = {spec.name: spec for spec in prepare(into).manifest.tensors}
    if header.keys() != wanted.keys():
        raise ValueError(f"it holds other tensors: {sorted(header.keys() ^ wanted.keys())[:5]}")
    check, end = xxh3_128(), 0
    for name, found in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        spec = wanted[name]
        if (found["dtype"], tuple(found["shape"])) != (spec.dtype, spec.shape):
            theirs, ours = (found["dtype"], found["shape"]), (spec.dtype, list(spec.shape))
            raise ValueError(f"{name!r} is {theirs} in it, not {ours}")
        if found["data_offsets"] != [end, end + spec.nbytes]:
            raise ValueError(f"{name!r} does not lie where the one before it ends")
        target = memoryview(into[name].reshape(-1).view(np.uint8).data)
        if file.readinto(target) != spec.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"it ends within {name!r}")
        check.update(target)
        end += spec.nbytes
    return check.hexdigest()


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """Put a file that `write` fills in the place of `path`, whole; what `write` returned."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as out:
            answer = write(out)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)
        flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    return answer


def flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a new file is there only with its name. fsync(2)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, on the disk, unless they are there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def _remove(folder: Path, name: str) -> None:
    """Remove a checkpoint: its JSON first, without which it is none."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    _clear(folder, name)


def _clear(folder: Path, name: str) -> None:
    """Remove what is of no account: weights that the JSON does not name, what a killed process wrote aside."""
    named = _read_json(folder, name)["weights"] if (folder / f"{name}.json").exists() else None
    weights, document = f"{glob.escape(name)}.????????.safetensors", f"{glob.escape(name)}.json"
    for pattern in (weights, f".{weights}.????????", f".{document}.????????"):
        for path in folder.glob(pattern):
            if path.name != named:
                path.unlink()
