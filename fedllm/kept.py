"""A silo's last update on disk: a round that comes again, because the server or the silo was killed, needs no training.

It is handed in again only for the very same task: of the same run and round, with the same arguments, on the
same weights. Anything else is trained. A silo without a folder for it trains again in any case, to the same
update if its training is a function of its text, the round and the weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray
from xxhash import xxh3_128

from aiordma import prepare
from fedllm.aggregate import Arrays
from fedllm.checkpoint import (
    load_checkpoint,
    make_folder,
    read_state,
    save_checkpoint,
    write_json,
)
from fedllm.errors import CheckpointError
from fedllm.messages import Ready, Task

__all__ = ["Kept", "identify"]


def identify(run: str, task: Task, weights: Arrays) -> str:
    """What a task asks for, as a digest: equal for two tasks that differ in their tickets alone. Blocks."""
    outgoing = prepare(weights)
    asked = (run, task.round, task.arguments)
    digest = xxh3_128(msgspec.msgpack.encode(asked, order="deterministic"))
    digest.update(outgoing.manifest_bytes)
    for view in outgoing.views(0, outgoing.manifest.total_bytes):
        digest.update(view)
    return digest.hexdigest()


class Kept:
    """The last update of one silo, and the key by which the server knows the silo, in a folder. All calls block."""

    def __init__(self, folder: Path, silo: str) -> None:
        """Silos of other names may share the folder."""
        self._folder = folder
        self._silo = silo

    def key(self) -> str:
        """The silo's key: drawn once, the same ever after. Raises `CheckpointError`."""
        name = f"key-{self._silo}"
        try:
            make_folder(self._folder)
            if (self._folder / f"{name}.json").exists():
                return str(read_state(self._folder, name)["key"])
            key = secrets.token_hex(16)
            write_json(self._folder, name, {"state": {"key": key}})
        except (OSError, KeyError) as exc:
            raise CheckpointError(f"{name}.json in {self._folder}: {exc}") from exc
        return key

    def save(self, identity: str, update: Mapping[str, object], ready: Ready) -> None:
        """Keep the update to a task, in the place of the last one. Raises `CheckpointError`, and that one stays."""
        state = {"identity": identity, "ready": msgspec.to_builtins(ready)}
        save_checkpoint(self._folder, self._name, update, state)

    def find(
        self, identity: str, ticket: int, like: Arrays
    ) -> tuple[dict[str, NDArray[Any]], Ready] | None:
        """The update to this task and what goes before it, if it is kept. Raises `CheckpointError`."""
        if not (self._folder / f"{self._name}.json").exists():
            return None
        if read_state(self._folder, self._name).get("identity") != identity:
            return None
        update, state = load_checkpoint(self._folder, self._name, like)
        return update, msgspec.convert({**state["ready"], "ticket": ticket}, Ready)

    @property
    def _name(self) -> str:
        return f"silo-{self._silo}"
