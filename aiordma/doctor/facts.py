"""What there is on this host: devices, their files, libibverbs, pyverbs, the memory that may be locked.

Nothing is judged here, and whatever is missing is a fact too. sysfs(5), getrlimit(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import resource
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from aiordma.errors import LaneRefused
from aiordma.lanes.choice import DeviceFacts

_LIBRARY: Final = "libibverbs.so.1"
_CAP_IPC_LOCK: Final = 14
_INITIAL_USERS: Final = ["0", "0", "4294967295"]
"""/proc/self/uid_map where there is no user namespace, in which capabilities would not count."""


class Node(NamedTuple):
    """The file by which programs reach a device."""

    device: str
    path: str
    is_there: bool
    is_ours: bool
    """Whether this process may read and write it."""


class Library(NamedTuple):
    """The libibverbs that this process loads."""

    path: str
    version: str
    """Of the rdma-core that it is from, "44.0"; "" if the file's name does not say."""
    interfaces: frozenset[int]
    """The versions of the private interface that it offers pyverbs."""


class Pyverbs(NamedTuple):
    """The pyverbs that this process would import, or does."""

    folder: str
    version: str
    """"" if nothing says: a distribution's package has no metadata."""
    interfaces: frozenset[int]
    """The versions of the private interface of libibverbs that it must have."""
    built_for: tuple[str, ...]
    """The tags of the interpreters that it is built for, "cpython-311"."""
    error: str
    """Why it cannot be imported; "" if it can."""


class LockLimit(NamedTuple):
    """How much memory this process may lock."""

    limit_bytes: int | None
    """RLIMIT_MEMLOCK; None: no limit."""
    is_exempt: bool
    """CAP_IPC_LOCK lifts the limit."""


class Facts(NamedTuple):
    """All of it."""

    devices: tuple[str, ...]
    """As the kernel knows them."""
    nodes: tuple[Node, ...]
    library: Library | None
    pyverbs: Pyverbs | None
    lock_limit: LockLimit
    fork: str
    """As `fork_support` has it; "" without pyverbs."""
    described: tuple[DeviceFacts, ...]
    driverless: tuple[str, ...]
    """Devices that libibverbs does not know."""
    failures: dict[str, str]
    """Devices that could not be described, and why."""


def gather(root: Path = Path("/")) -> Facts:
    """Look at this host. `root` is where its files are."""
    devices = _names(root / "sys/class/infiniband")
    pyverbs, verbs = _pyverbs()
    return Facts(
        devices=devices,
        nodes=_nodes(root),
        library=_library(),
        pyverbs=pyverbs,
        lock_limit=_lock_limit(root),
        **_describe(verbs, devices),
    )


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(entry.name for entry in folder.iterdir()))
    except OSError:
        return ()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _nodes(root: Path) -> tuple[Node, ...]:
    """One for each device that the module ib_uverbs serves."""
    folder = root / "sys/class/infiniband_verbs"
    nodes = []
    for name in _names(folder):
        device, path = _text(folder / name / "ibdev"), root / "dev/infiniband" / name
        if device:
            is_ours = os.access(path, os.R_OK | os.W_OK)
            nodes.append(Node(device, f"/dev/infiniband/{name}", path.exists(), is_ours))
    return tuple(nodes)


def _library() -> Library | None:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    mapped = re.search(r"/\S*/libibverbs\.so\S*", _text(Path("/proc/self/maps")))
    path = mapped[0] if mapped else ""
    version = re.search(r"\.so\.\d+\.\d+\.(\d+\.\d+)$", path)
    return Library(path, version[1] if version else "", _interfaces([Path(path)]))


def _interfaces(files: Iterable[Path]) -> frozenset[int]:
    """The symbol versions of the private interface that these shared objects name."""
    found: set[int] = set()
    for file in files:
        try:
            names = re.findall(rb"IBVERBS_PRIVATE_(\d+)", file.read_bytes())
        except OSError:
            continue
        found.update(map(int, names))
    return frozenset(found)


def _pyverbs() -> tuple[Pyverbs | None, Any]:
    """What is known of pyverbs; and `aiordma.lanes.verbs`, if it can be imported."""
    spec = find_spec("pyverbs")
    if spec is None or not spec.submodule_search_locations:
        return None, None
    folder = Path(spec.submodule_search_locations[0]).resolve()
    verbs, error = None, ""
    try:
        verbs = importlib.import_module("aiordma.lanes.verbs")
    except ImportError as exc:
        error = str(exc)
    try:
        version = metadata.version("pyverbs")
    except metadata.PackageNotFoundError:
        version = ""
    built_for = (re.match(r"device\.(\w+-\d+)", file.name) for file in folder.glob("device.*.so"))
    ours = {file for suffix in EXTENSION_SUFFIXES for file in folder.glob(f"*{suffix}")}
    found = Pyverbs(
        folder=str(folder),
        version=version,
        interfaces=_interfaces(ours),
        built_for=tuple(sorted(tag[1] for tag in built_for if tag)),
        error=error,
    )
    return found, verbs


def _lock_limit(root: Path) -> LockLimit:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    effective = re.search(r"^CapEff:\s*(\w+)$", _text(root / "proc/self/status"), re.MULTILINE)
    is_capable = effective is not None and bool(int(effective[1], 16) >> _CAP_IPC_LOCK & 1)
    is_initial = _text(root / "proc/self/uid_map").split() == _INITIAL_USERS
    return LockLimit(None if soft == resource.RLIM_INFINITY else soft, is_capable and is_initial)


def _describe(verbs: Any, devices: Iterable[str]) -> dict[str, Any]:
    """The facts that libibverbs has."""
    fork, described, driverless, failures = "", [], [], {}
    if verbs is not None:
        fork = verbs.fork_support()
        for device in devices:
            try:
                if device in verbs.names():
                    described.append(verbs.describe(device))
                else:
                    driverless.append(device)
            except LaneRefused as exc:
                failures[device] = str(exc)
    return {
        "fork": fork,
        "described": tuple(described),
        "driverless": tuple(driverless),
        "failures": failures,
    }
