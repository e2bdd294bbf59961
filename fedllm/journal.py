"""A silo's own record of what left it and when: lines of JSON, which are only ever added."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from aiordma import Outgoing
from fedllm.checkpoint import flush_folder
from fedllm.errors import JournalError

__all__ = ["Journal", "digest_of"]

_PIECE_BYTES: Final = 1 << 20


class Journal:
    """Each line is on the disk before that of which it tells is sent. All calls block."""

    def __init__(self, path: Path, silo: str, rank: int | None = None) -> None:
        """Silos, and the ranks of a sharded one, may write to the same file."""
        self._path = path
        self._who = {"silo": silo} if rank is None else {"silo": silo, "rank": rank}

    def write(self, event: str, **facts: Any) -> None:
        """Add a line: the time (UTC), the silo and rank, the event, its facts. Raises `JournalError`.

        What JSON has no word for, which a server may well send, is written as Python's `repr` has it.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": time, **self._who, "event": event, **facts}
        try:
            self._append(msgspec.json.encode(record, enc_hook=repr) + b"\n")
        except OSError as exc:
            raise JournalError(
                f"{self._path} cannot take the line on {event!r}, and so nothing more is sent: {exc.strerror or exc}; "
                "make room, or give the journal another place"
            ) from exc

    def _append(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # behind one that was cut short, by a full disk or a crash
            if os.write(file, line) < len(line):
                raise OSError("there was no room for all of it")
            os.fsync(file)
        finally:
            os.close(file)
        if not size:
            flush_folder(self._path.parent)


def digest_of(outgoing: Outgoing) -> str:
    """SHA-256 of an upload's bytes, tensor after tensor in the order of their offsets. Blocks."""
    digest, total = hashlib.sha256(), outgoing.manifest.total_bytes
    scratch = memoryview(bytearray(min(_PIECE_BYTES, total)))
    for offset in range(0, total, _PIECE_BYTES):
        length = min(_PIECE_BYTES, total - offset)
        outgoing.stage(offset, length, scratch)
        digest.update(scratch[:length])
    return digest.hexdigest()
