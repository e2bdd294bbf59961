"""Folders that appear whole: written under a `.part` name, then moved into place."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """Give a fresh folder `<directory>.part` to write into; on success move its files into place.

    Each file is moved by one rename (`rename(2)` is atomic within a file system), so a reader never
    sees half of one. After an error, or a kill, only the `.part` folder is left; the next call
    removes it.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    directory.mkdir(exist_ok=True)
    for file in sorted(part.iterdir()):
        file.replace(directory / file.name)
    part.rmdir()
