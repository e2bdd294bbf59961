"""What the facts mean: a function for each thing, and nothing but the facts goes in."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from aiordma import ChannelConfig
from aiordma.doctor.facts import Facts, Library, Pyverbs
from aiordma.doctor.findings import Finding, Level
from aiordma.errors import LaneRefused
from aiordma.lanes.choice import SOFT_ROCE, DeviceFacts, Port, choose
from aiordma.lanes.needs import COMPLETIONS, Needs, needs

RUN_WITH: Final = (44, 59)
"""The versions of rdma-core, with its pyverbs, that this library is run on."""

_UNITS: Final = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_NO_LIMIT: Final = 1 << 60
"""Beyond that a device sets no limit."""

_DRIVERS: Final = (
    "install libibverbs with its drivers (Debian, Ubuntu: apt install ibverbs-providers; RHEL, Fedora: dnf install "
    "libibverbs)"
)
_PAIR: Final = (
    "take pyverbs and libibverbs from one rdma-core, best the distribution's (Debian, Ubuntu: apt install "
    "python3-pyverbs ibverbs-providers; RHEL, Fedora: dnf install python3-pyverbs libibverbs)"
)
_PYVERBS: Final = (
    "install the distribution's (Debian, Ubuntu: apt install python3-pyverbs ibverbs-providers; RHEL, Fedora: dnf "
    "install python3-pyverbs) for its own Python or a venv made with --system-site-packages; pip install "
    "'aiordma[verbs]' builds one for rdma-core 59 alone"
)
_LOCK: Final = (
    "raise it (ulimit -l unlimited; memlock in /etc/security/limits.conf; LimitMEMLOCK=infinity of systemd; --ulimit "
    "memlock=-1 of Docker), or use fewer or smaller slots"
)


def check(facts: Facts) -> list[Finding]:
    """All that the facts say, in the order in which it is best mended."""
    software = [*check_library(facts.library), *check_pyverbs(facts.pyverbs, facts.library)]
    if not facts.devices:
        return [check_absence(), *map(_unneeded, software)]
    return [
        *software,
        *check_nodes(facts),
        *check_lock_limit(facts),
        *check_fork(facts),
        *check_devices(facts),
        *check_ports(facts),
    ]


def usable_ports(facts: Facts) -> list[Port]:
    """The ports that lanes could use."""
    return [port for port in _ports(facts) if _fault(port) is None]


def check_absence() -> Finding:
    """There is no device, which is fine."""
    text = "no RDMA device here: channels use TCP, with the same calls and the same guarantees"
    return Finding("note", "device", text, SOFT_ROCE)


def _unneeded(finding: Finding) -> Finding:
    if finding.level != "wrong":
        return finding
    return Finding(
        "note", finding.subject, f"{finding.text} (and without a device, no need for it)"
    )


def check_library(library: Library | None) -> Iterator[Finding]:
    """libibverbs, and of which rdma-core it is."""
    if library is None:
        yield Finding(
            "wrong",
            "rdma-core",
            "libibverbs.so.1 cannot be loaded",
            _DRIVERS,
        )
    else:
        yield Finding("ok", "rdma-core", f"{library.version or 'unknown version'}, {library.path}")


def check_pyverbs(pyverbs: Pyverbs | None, library: Library | None) -> Iterator[Finding]:
    """pyverbs: present, for this interpreter, for this libibverbs, and of a version that was run."""
    if pyverbs is None:
        yield Finding("wrong", "pyverbs", "not installed for this Python", _PYVERBS)
        return
    name, tag = f"in {pyverbs.folder}", sys.implementation.cache_tag
    if pyverbs.error and pyverbs.built_for and tag not in pyverbs.built_for:
        text = f"{name} is built for {', '.join(pyverbs.built_for)}, and this is {tag}"
        yield Finding("wrong", "pyverbs", text, "run the Python that it is built for")
    elif library is not None and not pyverbs.interfaces <= library.interfaces:
        wanted, offered = _numbers(pyverbs.interfaces), _numbers(library.interfaces)
        text = f"{name} needs libibverbs' private interface {wanted}, and rdma-core {library.version} has {offered}"
        yield Finding("wrong", "pyverbs", text, _PAIR)
    elif pyverbs.error:
        yield Finding("wrong", "pyverbs", f"{name} cannot be imported ({pyverbs.error})", _PAIR)
    else:
        yield _fit(pyverbs, library)


def _fit(pyverbs: Pyverbs, library: Library | None) -> Finding:
    """It can be imported: is it one that was run?"""
    core = "" if library is None else library.version
    version = pyverbs.version or core
    text = pyverbs.version or "the distribution's"
    text += f", {pyverbs.folder}; it fits rdma-core {core or 'of unknown version'}"
    run = " and ".join(map(str, RUN_WITH))
    if _major(version) != _major(core) or _major(core) not in RUN_WITH:
        return Finding(
            "note",
            "pyverbs",
            f"{text}, untested: aiordma is run on {run}, each with its own pyverbs",
        )
    return Finding("ok", "pyverbs", f"{text}, a pair that aiordma is run on")


def _major(version: str) -> int:
    number = version.partition(".")[0]
    return int(number) if number.isdecimal() else 0


def _numbers(interfaces: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(interfaces))) or "none"


def check_nodes(facts: Facts) -> Iterator[Finding]:
    """The files by which devices are reached."""
    for device in facts.devices:
        nodes = [node for node in facts.nodes if node.device == device]
        if not nodes:
            text = f"the kernel offers {device} to no program"
            yield Finding(
                "wrong", "permissions", text, "load the module that does: modprobe ib_uverbs"
            )
        for node in nodes:
            if not node.is_there:
                remedy = f"in a container: --device={node.path}; else let udev make it (rdma-core)"
                yield Finding(
                    "wrong", "permissions", f"{node.path} ({device}) is not there", remedy
                )
            elif not node.is_ours:
                remedy = f"chmod 666 {node.path}, or a udev rule that does (rdma-core has one)"
                text = f"{node.path} ({device}) may not be opened by this user"
                yield Finding("wrong", "permissions", text, remedy)
            else:
                yield Finding("ok", "permissions", f"{node.path} ({device}) may be opened")


def check_lock_limit(facts: Facts) -> Iterator[Finding]:
    """RLIMIT_MEMLOCK, which bounds what is registered."""
    limit, pinned = facts.lock_limit, _needs().pinned_bytes
    asked = f"a lane of the default settings registers {_size(pinned)}"
    if limit.limit_bytes is None:
        yield Finding("ok", "memlock", f"unlimited; {asked}")
    elif limit.is_exempt:
        yield Finding("ok", "memlock", f"unlimited by CAP_IPC_LOCK; {asked}")
    elif limit.limit_bytes < pinned:
        yield Finding(
            "wrong", "memlock", f"RLIMIT_MEMLOCK is {_size(limit.limit_bytes)}, and {asked}", _LOCK
        )
    else:
        lanes = limit.limit_bytes // pinned
        text = f"{_size(limit.limit_bytes)}, enough for {lanes} lane{'s' * (lanes > 1)}; {asked}"
        yield Finding("ok", "memlock", text)


def check_fork(facts: Facts) -> Iterator[Finding]:
    """What a fork does to registered memory."""
    remedy = "use Linux 5.13 or later, which copies registered memory at a fork; or fork before"
    if facts.fork == "unneeded":
        text = "the kernel copies registered memory at a fork, and a child may use its copy"
        yield Finding("ok", "fork", text)
    elif facts.fork == "enabled":
        text = "a forked child has no registered memory, nor what else lies on its pages (SIGSEGV)"
        yield Finding("note", "fork", text, remedy)
    elif facts.fork:
        text = "after a fork a device may go on with pages that the program no longer has"
        yield Finding("wrong", "fork", text, remedy)


def check_devices(facts: Facts) -> Iterator[Finding]:
    """What the devices can do."""
    reachable = {node.device for node in facts.nodes if node.is_ours}
    for name in facts.driverless:
        text = "libibverbs has no driver for it, or one that it cannot load"
        yield Finding("wrong", name, text, _DRIVERS)
    for name, reason in facts.failures.items():
        if name in reachable:
            yield Finding("wrong", name, reason, "see dmesg, and whether `rdma dev` still shows it")
    for device in facts.described:
        yield from _abilities(device, _needs())


def _abilities(device: DeviceFacts, asked: Needs) -> Iterator[Finding]:
    region = "any size" if device.max_region_bytes >= _NO_LIMIT else _size(device.max_region_bytes)
    yield Finding(
        "ok",
        device.name,
        f"firmware {device.firmware or 'unknown'}; regions of {region}, {device.max_queue_pairs} queue pairs of "
        f"{device.max_work_requests} work requests, completion queues of {device.max_completions}",
    )
    if device.has_windows:
        yield Finding(
            "ok", device.name, "memory windows of type 2: a ring is open to its own peer alone"
        )
    else:
        text = "no memory windows of type 2: each lane has a protection domain of its own, and all is sent by copy"
        yield Finding("note", device.name, text)
    largest = max(asked.ring_bytes, asked.stages_bytes)
    limits = (
        ("the largest region", device.max_region_bytes, largest, "lower slots or slot_bytes"),
        ("queues of work requests", device.max_work_requests, asked.sends, "lower slots"),
        ("completion queues", device.max_completions, COMPLETIONS, "use another device"),
        ("queue pairs", device.max_queue_pairs, 1, "use another device"),
    )
    for what, limit, need, remedy in limits:
        if limit < need:
            text = f"{what}: {limit}, and a lane of the default settings needs {need}"
            yield Finding("wrong", device.name, text, remedy)


def check_ports(facts: Facts) -> Iterator[Finding]:
    """State, link layer, MTU and addresses; a port that cannot be used is wrong if no other can."""
    blame: Level = "note" if usable_ports(facts) else "wrong"
    for port in _ports(facts):
        link = "Ethernet" if port.is_ethernet else f"InfiniBand, LID {port.lid}"
        text, fault = f"{port.state}, {link}, MTU {port.mtu_bytes}", _fault(port)
        if fault is None:
            yield Finding("ok", port.name, text)
        else:
            yield Finding(blame, port.name, text + fault.text, fault.remedy)
        for gid in port.gids:
            address = gid.ipv4 or ipaddress.IPv6Address(gid.text).compressed
            yield Finding("ok", f"{port.name} GID {gid.number}", f"{gid.kind}, {address}")


def _ports(facts: Facts) -> Sequence[Port]:
    return [port for device in facts.described for port in device.ports]


class _Fault(NamedTuple):
    text: str
    remedy: str


def _fault(port: Port) -> _Fault | None:
    """Why lanes cannot use the port."""
    if port.state != "ACTIVE":
        remedy = "bring its link up (rdma link; ip link set ... up)"
        if not port.is_ethernet:
            remedy = "look at its cable, and whether a subnet manager runs (opensm)"
        return _Fault("", remedy)
    try:
        choose([port])
    except LaneRefused:
        kinds = ", ".join(sorted({gid.kind for gid in port.gids})) or "none at all"
        remedy = (
            "give its network interface an IP address (ip address add ...), and the port RoCE v2"
        )
        return _Fault(f", without a RoCE v2 address ({kinds})", remedy)
    return None


def _needs() -> Needs:
    default = ChannelConfig()
    return needs(default.slots, default.slot_bytes, default.slots, default.slot_bytes)


def _size(nbytes: int) -> str:
    """As "20.1 MiB"."""
    unit = next((unit for unit in _UNITS if nbytes >= _UNITS[unit]), "B")
    return f"{nbytes / _UNITS.get(unit, 1):.3g} {unit}"
