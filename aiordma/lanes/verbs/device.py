"""RDMA devices: what there are, and what each event loop has open of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiordma.lanes.verbs.api as api
from aiordma.errors import LaneRefused, RegistrationError
from aiordma.lanes.choice import DeviceFacts, Gid, Port
from aiordma.lanes.completion import Completion, CompletionPump
from aiordma.lanes.needs import COMPLETIONS
from aiordma.lanes.registry import Registry
from aiordma.lanes.verbs.api import enums
from aiordma.lanes.verbs.fork import fork_support, leave_to_children

_GID_KINDS: Final = ("InfiniBand", "RoCE v1", "RoCE v2")
_PORT_STATES: Final = ("NOP", "DOWN", "INIT", "ARMED", "ACTIVE", "ACTIVE_DEFER")

_open: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Device]] = (
    weakref.WeakKeyDictionary()
)
"""Each loop's devices that are in use, by name."""
_inherited: list[Any] = []
"""In a forked process: its parent's. To destroy an object here is to destroy it there, for the descriptor is shared."""

_descriptors = threading.Lock()
"""Held while one is opened or closed, since a completion channel's is known by being new: loops have threads."""


def names() -> list[str]:
    """The devices that libibverbs has a driver for, in its order. Raises `LaneRefused`."""
    with api.refused("cannot look at the RDMA devices"):
        return [device.name.decode() for device in api.get_device_list()]


def survey(wanted: str | None = None) -> list[Port]:
    """The ports of all devices that can be opened, in the order of libibverbs.

    Raises `LaneRefused` if none can, or not the one that is `wanted` (or a port of which is).
    """
    ports: list[Port] = []
    failure: LaneRefused | None = None
    for name in names():
        try:
            ports += describe(name).ports
        except LaneRefused as exc:
            failure = failure or exc
            if wanted is not None and name == wanted.partition("/")[0]:
                raise
    if failure is not None and not ports:
        raise failure
    return ports


def describe(name: str) -> DeviceFacts:
    """One device and its ports. Raises `LaneRefused` if it cannot be opened, or vanishes."""
    with (
        api.refused(f"cannot open the RDMA device {name}"),
        _context(name) as context,
    ):
        found = context.query_device()
        return DeviceFacts(
            name=name,
            firmware=found.fw_version,
            ports=tuple(
                _port(context, name, number) for number in range(1, found.phys_port_cnt + 1)
            ),
            has_windows=_has_windows(found),
            max_region_bytes=found.max_mr_size,
            max_queue_pairs=found.max_qp,
            max_work_requests=found.max_qp_wr,
            max_completions=found.max_cqe,
        )


@contextlib.contextmanager
def _context(name: str) -> Iterator[Any]:
    with _descriptors:
        context = api.Context(name=name)
    try:
        yield context
    finally:
        with _descriptors:
            context.close()


def _has_windows(found: Any) -> bool:
    windows = enums.IBV_DEVICE_MEM_WINDOW_TYPE_2A | enums.IBV_DEVICE_MEM_WINDOW_TYPE_2B
    return bool(found.device_cap_flags & windows)


def _port(context: Any, device: str, number: int) -> Port:
    found = context.query_port(number)
    gids = tuple(
        Gid(entry.gid_index, _GID_KINDS[entry.gid_type], entry.gid_str())
        for entry in context.query_gid_table(max(1, found.gid_tbl_len))
        if entry.port_num == number
    )
    return Port(
        device=device,
        number=number,
        state=_PORT_STATES[found.state],
        is_ethernet=found.link_layer == enums.IBV_LINK_LAYER_ETHERNET,
        lid=found.lid,
        mtu_bytes=api.MTU_BYTES.get(found.active_mtu, 0),
        gids=gids,
    )


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_keep_inherited)


def _keep_inherited() -> None:
    devices = [device for opened in _open.values() for device in opened.values()]
    _inherited.extend((device, *device.regions) for device in devices)


class Device:
    """A device that one event loop has open, while lanes use it."""

    def __init__(self, name: str, registered_bytes: int) -> None:
        """Use `open`."""
        self.name = name
        self.regions: weakref.WeakSet[Any] = weakref.WeakSet()
        self._users = 0
        with contextlib.ExitStack() as undo, api.refused(f"cannot open the RDMA device {name}"):
            _watch_forks()
            self._does_kernel_copy = fork_support() == "unneeded"
            self.context = undo.enter_context(_context(name))
            attributes = self.context.query_device()
            self.has_windows = _has_windows(attributes)
            self.max_region_bytes: int = attributes.max_mr_size
            self.pd = api.PD(self.context)
            undo.callback(self.pd.close)
            self.pump = CompletionPump(
                lambda entries: _Queue(self.context, entries), queue_entries=COMPLETIONS
            )
            self.registry = Registry(self._register, registered_bytes)
            self._owned = undo.pop_all()

    @classmethod
    def open(cls, name: str, *, registered_bytes: int) -> Device:
        """The running loop's device of this name. Whoever opens it lets go of it by `release`."""
        opened = _open.setdefault(asyncio.get_running_loop(), {})
        if name not in opened:
            opened[name] = cls(name, registered_bytes)
        opened[name]._users += 1
        return opened[name]

    def pin(self, pd: Any, address: int, nbytes: int, access: int) -> Any:
        """Register memory. Raises `RegistrationError`."""
        if nbytes > self.max_region_bytes:
            raise RegistrationError(
                f"{nbytes} bytes are more than {self.name} registers at once ({self.max_region_bytes}): use smaller "
                "slots, or send the tensor unregistered, through the ring"
            )
        region = api.pin(pd, address, nbytes, access)
        self.regions.add(region)
        if self._does_kernel_copy:
            leave_to_children(address, nbytes)
        return region

    def _register(self, address: int, nbytes: int, is_writable: bool) -> Any:
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_MW_BIND if is_writable else 0
        return self.pin(self.pd, address, nbytes, access)

    async def release(self) -> None:
        """The last user closes it, and with it goes what is registered."""
        self._users -= 1
        if self._users:
            return
        del _open[asyncio.get_running_loop()][self.name]
        self.registry.clear()
        try:
            with self._owned:
                await self.pump.aclose()
        except api.PyverbsError as exc:  # a device that is gone has let go of all of it
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"{self.name} could not be closed", "exception": exc}
            )


class _Queue:
    """A CQ with a completion channel of its own, as the completion pump wants it."""

    def __init__(self, context: Any, entries: int) -> None:
        with api.refused(f"no completion queue of {entries} entries"):
            self._channel, self._fd = _completion_channel(context)
            self.cq = api.CQ(context, entries, None, self._channel, 0)
            self.capacity: int = self.cq.cqe

    def fileno(self) -> int:
        return self._fd

    def get_events(self) -> int:
        events = 0
        try:
            while True:
                self._channel.get_cq_event(self.cq)
                events += 1
        except api.PyverbsRDMAError as exc:
            if exc.error_code != errno.EAGAIN:
                raise OSError(exc.error_code, str(exc)) from exc
        return events

    def ack(self, events: int) -> None:
        self.cq.ack_events(events)

    def arm(self) -> None:
        with api.as_os_error():
            self.cq.req_notify()

    def poll(self, count: int) -> Sequence[Completion]:
        with api.as_os_error():
            found: Sequence[Completion] = self.cq.poll(count)[1]
        return found

    def close(self) -> None:
        self.cq.close()
        with _descriptors:
            self._channel.close()


def _completion_channel(context: Any) -> tuple[Any, int]:
    """A completion channel and its descriptor, which has been `CompChannel.fd` since version 57."""
    with _descriptors:
        before = _event_files()
        channel = api.CompChannel(context)
        found = {channel.fd} if hasattr(channel, "fd") else _event_files() - before
        if len(found) != 1:
            channel.close()
            raise OSError(
                "other threads use RDMA devices meanwhile, and not through aiordma: connect again"
            )
    (fd,) = found
    os.set_blocking(fd, False)  # get_cq_event would block, and hold the interpreter
    return channel, fd


def _event_files() -> set[int]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            if os.readlink(entry) == "anon_inode:[infinibandevent]":
                found.add(int(entry.name))
    return found
