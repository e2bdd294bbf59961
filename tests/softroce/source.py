"""pyverbs from PyPI: a source build of all rdma-core, which runs only with its own libibverbs.

It is built as rdma-core's own developers do, in place, and kept in the cache: `pip install` would keep the Python
modules and throw away the library that they need.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from tests.softroce import debian
from tests.softroce.errors import SoftRoceError

VERSION: Final = "59.0"
PACKAGES: Final = (
    *("cmake", "ninja-build", "gcc", "libc6-dev", "pkg-config"),
    *("libnl-3-dev", "libnl-route-3-dev", "libudev-dev"),
)
_TOOLS: Final = ("cython==3.0.12", "scikit-build-core", "setuptools-scm", "setuptools")
"""Cython 3.2 and later do not compile it."""


class Pyverbs(NamedTuple):
    """A build of it, and its version."""

    folder: Path
    version: str

    def share(self, _out: Path) -> dict[str, str]:
        """The environment in which a node finds it, and its libibverbs; nodes see the host's files."""
        return {
            "PYTHONPATH": str(self.folder / "python"),
            "LD_LIBRARY_PATH": str(self.folder / "lib"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def build(cache: Path) -> Pyverbs:
    """Build it, unless the cache has it: about four minutes on two cores."""
    folder = cache / f"pyverbs-{VERSION}-{sys.implementation.cache_tag}"
    stamp = (
        folder / "built"
    )  # the build has its own path in it, and cannot be moved when it is done
    if not stamp.exists():
        debian.install(debian.missing_packages(PACKAGES))
        with tempfile.TemporaryDirectory() as scratch:
            tools = Path(scratch, "tools")
            _run(sys.executable, "-m", "venv", str(tools))
            _run(str(tools / "bin/pip"), "install", "--quiet", *_TOOLS)
            source = _download(tools, Path(scratch), folder)
            options = [f"-DPYTHON_EXECUTABLE={sys.executable}", "-DIN_PLACE=1", "-DNO_MAN_PAGES=1"]
            _run(
                "cmake",
                "-GNinja",
                "-S",
                str(source),
                "-B",
                str(folder / "build"),
                *options,
                path=tools / "bin",
            )
            _run("ninja", "-C", str(folder / "build"))
        stamp.touch()
    return Pyverbs(folder / "build", f"{VERSION}, from source")


def _download(tools: Path, scratch: Path, folder: Path) -> Path:
    """The folder of rdma-core's sources within pyverbs' archive, unpacked in `folder`, where the build needs it."""
    wanted = ["--no-deps", "--no-binary", "pyverbs", "--no-build-isolation", f"pyverbs=={VERSION}"]
    _run(str(tools / "bin/pip"), "download", "--quiet", "--dest", str(scratch), *wanted)
    with tarfile.open(scratch / f"pyverbs-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"pyverbs-{VERSION}" / "rdma-core"


def _run(*command: str, path: Path | None = None) -> None:
    """`path` comes before PATH: CMake finds Cython there, and nowhere else."""
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else None
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stdout + done.stderr)[-4000:]
        raise SoftRoceError(f"`{' '.join(command)}` failed:\n{last}")
