"""The way from one device to the other: RDMA lanes that two ends agree on during their handshake.

Each end opens its queue pairs, learns the other's, and sends a probe through each before they count: a queue pair is
"ready to send" without that a packet was exchanged, and firewalls drop what RoCE sends (UDP 4791).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from aiordma.config import ChannelConfig
from aiordma.errors import (
    AiordmaError,
    Busy,
    ChannelBroken,
    ConnectError,
    ForeignPeer,
    LaneRefused,
    RegistrationError,
    RemoteProtocolError,
)
from aiordma.handshake import MAX_REASON_CHARS, Parts, hear, say
from aiordma.lanes.base import close_all
from aiordma.lanes.choice import SOFT_ROCE, Choice, choose
from aiordma.lanes.rdma import RdmaLane
from aiordma.lanes.registry import Registry
from aiordma.ring import Ring
from aiordma.wire import hello
from aiordma.wire.hello import Answer, Hello, LaneAddress, Limits, Verdict

_DEVICES: Final = Path("/sys/class/infiniband")
_RTT_AT: Final = slice(68, 72)  # tcpi_rtt, microseconds, in struct tcp_info

_CANNOT = (LaneRefused, RegistrationError, Busy, ChannelBroken)
"""What stands against RDMA lanes, and not against the channel."""


def local_choice(config: ChannelConfig, control: socket.socket) -> Choice:
    """What this end would use for a channel. Raises `LaneRefused`, which says why not RDMA."""
    if not config.verbs:
        raise LaneRefused("ChannelConfig(verbs=False)")
    near: str = control.getsockname()[0]
    verbs = _verbs()
    with _see_doctor():
        ports = verbs.survey(config.device)
    return choose(ports, device=config.device, gid_index=config.gid_index, near=near)


def _verbs() -> Any:
    """`aiordma.lanes.verbs`, imported only where there is a device."""
    if not _DEVICES.is_dir() or not any(_DEVICES.iterdir()):
        raise LaneRefused(f"this host has no RDMA device ({SOFT_ROCE})")
    try:
        return importlib.import_module("aiordma.lanes.verbs")
    except ImportError as exc:
        raise LaneRefused(
            f"this host has an RDMA device, and pyverbs cannot be imported ({exc}): install it (Debian and Ubuntu: "
            "python3-pyverbs, for the distribution's own Python; else pip install 'aiordma[verbs]')"
        ) from exc


@contextlib.contextmanager
def _see_doctor() -> Iterator[None]:
    """What a device refuses may have many reasons."""
    try:
        yield
    except LaneRefused as exc:
        raise LaneRefused(f"{exc}: `python -m aiordma doctor` finds out why") from exc


B = TypeVar("B", hello.Path, Verdict)


class RdmaPath:
    """This end's half: one queue pair a lane, until they are handed over as `lanes`."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.lanes: list[RdmaLane] = []
        self._pairs: list[Any] = []
        self._large_bytes = choice.port.mtu_bytes
        self.registry: Registry | None = None

    async def open(self, config: ChannelConfig, rings: Sequence[Ring], peer: Limits) -> None:
        """Make a queue pair for each ring. Raises `LaneRefused`, or `Busy` beyond the memory budget."""
        verbs = _verbs()
        with _see_doctor():
            for ring in rings:
                await self._open(verbs, config, ring, peer)

    async def _open(self, verbs: Any, config: ChannelConfig, ring: Ring, peer: Limits) -> None:
        name = self.choice.port.device
        device = verbs.Device.open(name, registered_bytes=config.registered_bytes)
        self.registry = device.registry if device.has_windows else None
        try:
            pair, lane = verbs.open_lane(device, self.choice, ring, peer)
        except BaseException:
            await device.release()
            raise
        self._pairs.append(pair)
        self.lanes.append(lane)

    @property
    def addresses(self) -> tuple[LaneAddress, ...]:
        """What the peer must know."""
        return tuple(pair.address for pair in self._pairs)

    @property
    def description(self) -> str:
        """What the lanes run on."""
        port, gid = self.choice.port, self.choice.gid
        return f"{port.name}, {gid.kind} {gid.ipv4 or gid.text}, MTU {self._large_bytes}"

    async def connect(self, addresses: Sequence[LaneAddress], rtt_s: float) -> None:
        """Be ready for the peer to write, and to write. Raises `LaneRefused` or `ChannelBroken`."""
        if len(addresses) != len(self.lanes):
            raise LaneRefused(
                f"the peer has {len(addresses)} queue pairs for {len(self.lanes)} lanes"
            )
        for pair, lane, address in zip(self._pairs, self.lanes, addresses, strict=True):
            with _see_doctor():
                patience_s = pair.connect(address, rtt_s)
            await lane.expose(patience_s)
            self._large_bytes = min(self._large_bytes, address.mtu_bytes)

    async def probe(self, timeout_s: float) -> str:
        """Send frames of both sizes through every lane, and wait for the peer's. What is wrong, or nothing."""
        probes = [asyncio.ensure_future(lane.send_probe(self._large_bytes)) for lane in self.lanes]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*probes)
        except TimeoutError:
            return f"{self._verdict()} (within probe_s={timeout_s:g})"
        except AiordmaError as exc:
            return f"{self._verdict()} ({exc})"
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        return ""

    def _verdict(self) -> str:
        found = (lane.probe.verdict() for lane in self.lanes if not lane.probe.is_well)
        return next(found, "a queue pair failed")

    async def aclose(self) -> None:
        """Destroy the queue pairs."""
        lanes, self.lanes = self.lanes, []
        await close_all(lanes)


class Agreed(msgspec.Struct, frozen=True):
    """What became of it: RDMA lanes, or none of them; and why."""

    lanes: tuple[RdmaLane, ...]
    reason: str
    registry: Registry | None = None
    """What is registered with their device."""


async def propose(
    parts: Parts, greeting: Hello, answer: Answer, config: ChannelConfig
) -> tuple[RdmaPath | None, Answer]:
    """The listening end's ANSWER, with queue pairs in it if both ends could use them, else with the reason.

    Whoever is given a path closes it, unless a channel gets its lanes.
    """
    if "verbs" not in greeting.lane_kinds:
        return None, msgspec.structs.replace(answer, reason=_cut(f"the client: {greeting.reason}"))
    path = None
    try:
        path = RdmaPath(local_choice(config, parts.control))
        await path.open(config, parts.rings, greeting.limits)
    except _CANNOT as exc:
        if path is not None:
            await path.aclose()
        return None, msgspec.structs.replace(answer, reason=_cut(f"the server: {exc}"))
    return path, msgspec.structs.replace(answer, lane_kind="verbs", addresses=path.addresses)


async def agree_as_server(path: RdmaPath, parts: Parts, config: ChannelConfig) -> Agreed:
    """After an ANSWER with queue pairs: find out with the peer whether the path carries lanes."""
    theirs = await _hear(parts.control, hello.Path)
    if theirs.reason:
        return await _no(path, f"the client: {theirs.reason}")
    failure = await _failure(path.connect(theirs.addresses, _rtt_s(parts.control)))
    await _say(parts.control, Verdict(_cut(failure)))
    if failure:
        return await _no(path, f"the server: {failure}")
    mine = await path.probe(config.probe_s)
    verdict = await _hear(parts.control, Verdict)
    await _say(parts.control, Verdict(_cut(mine)))
    return await _conclude(path, client=verdict.reason, server=mine)


async def agree_as_client(
    path: RdmaPath, parts: Parts, answer: Answer, config: ChannelConfig
) -> Agreed:
    """The connecting end of the same."""
    failure = await _failure(path.open(config, parts.rings, answer.limits))
    if not failure:
        failure = await _failure(path.connect(answer.addresses, _rtt_s(parts.control)))
    await _say(parts.control, hello.Path(() if failure else path.addresses, _cut(failure)))
    if failure:
        return await _no(path, f"the client: {failure}")
    verdict = await _hear(parts.control, Verdict)
    if verdict.reason:
        return await _no(path, f"the server: {verdict.reason}")
    mine = await path.probe(config.probe_s)
    await _say(parts.control, Verdict(_cut(mine)))
    verdict = await _hear(parts.control, Verdict)
    return await _conclude(path, client=mine, server=verdict.reason)


async def _failure(step: Coroutine[Any, Any, None]) -> str:
    try:
        await step
    except _CANNOT as exc:
        return str(exc)
    return ""


async def _conclude(path: RdmaPath, *, client: str, server: str) -> Agreed:
    if client or server:
        return await _no(path, f"the client: {client}" if client else f"the server: {server}")
    return Agreed(tuple(path.lanes), path.description, path.registry)


async def _no(path: RdmaPath, reason: str) -> Agreed:
    await path.aclose()  # before anything else uses the rings
    return Agreed((), reason)


async def _say(sock: socket.socket, body: hello.Body) -> None:
    with _midway():
        await say(sock, hello.CONTROL, body)


async def _hear(sock: socket.socket, kind: type[B]) -> B:
    with _midway():
        _, body = await hear(sock)
    if not isinstance(body, kind):
        raise RemoteProtocolError(
            f"{kind.__name__} was due in the handshake, {type(body).__name__} came"
        )
    return body


@contextlib.contextmanager
def _midway() -> Iterator[None]:
    """One that has said HELLO, or an ANSWER, is no foreign peer."""
    try:
        yield
    except ForeignPeer as exc:
        raise ConnectError(
            "the peer hung up while RDMA lanes were tried: it died, or its time for a handshake "
            "(connect_timeout_s) was over; see its log, and connect again"
        ) from exc


def _cut(reason: str) -> str:
    return reason[:MAX_REASON_CHARS]


def _rtt_s(sock: socket.socket) -> float:
    """The round trip as the kernel has measured it (tcp(7), TCP_INFO)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT.stop)
    return int.from_bytes(info[_RTT_AT], "little") / 1e6
