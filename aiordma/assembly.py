"""Putting a channel together from its parts, once both ends have agreed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiordma.channel import Channel
from aiordma.config import ChannelConfig
from aiordma.control import Control, MemoryControl, TcpControl
from aiordma.handshake import Parts, limits_of, reserve
from aiordma.lanes.base import Lane
from aiordma.lanes.memory import MemoryLane
from aiordma.lanes.rdma import RdmaLane
from aiordma.lanes.registry import Registry
from aiordma.lanes.tcp import TcpLane
from aiordma.link import Link
from aiordma.path import Agreed
from aiordma.port import Port
from aiordma.ring import Ring
from aiordma.stats import LaneInfo
from aiordma.wire.hello import Limits
from aiordma.wire.session import Session


async def build(
    parts: Parts, agreed: Agreed, config: ChannelConfig, *, peer: str, rtt_s: float
) -> Channel:
    """A channel over the RDMA lanes that were agreed on, else over TCP; from here on it owns the parts."""
    loop = asyncio.get_running_loop()
    if parts.peer_limits is None:
        raise RuntimeError("a channel is built after its handshake")
    control = await TcpControl.open(parts.control)
    lanes: Sequence[Lane] = agreed.lanes or [
        TcpLane(sock, loop, heartbeat_s=config.heartbeat_s) for sock in parts.lanes
    ]
    reason = f"{lanes[0].kind}: {agreed.reason}"
    return join(
        control,
        lanes,
        parts.rings,
        parts.peer_limits,
        config,
        peer=peer,
        reason=reason,
        rtt_s=rtt_s,
        registry=agreed.registry,
    )


def join(
    control: Control,
    lanes: Sequence[Lane],
    rings: list[Ring],
    peer_limits: Limits,
    config: ChannelConfig,
    *,
    peer: str,
    reason: str,
    rtt_s: float,
    registry: Registry | None = None,
) -> Channel:
    """A channel over these lanes, each with its ring."""
    session = Session(
        limits_of(config, rings),
        peer_limits,
        lanes=len(lanes),
        max_tensors=config.max_tensors,
        max_transfer_bytes=config.max_transfer_bytes,
    )
    link = Link(session, control, config)
    link.counters.rtt_s = rtt_s
    ports = [
        Port(i, lane, ring, link, rdma=lane if isinstance(lane, RdmaLane) else None)
        for i, (lane, ring) in enumerate(zip(lanes, rings, strict=True))
    ]
    infos = tuple(LaneInfo(index=p.index, kind=p.lane.kind, reason=reason) for p in ports)
    channel = Channel(link, peer=peer, lanes=infos, registry=registry)
    link.start(ports)
    return channel


async def memory_pair(
    left: ChannelConfig | None = None, right: ChannelConfig | None = None
) -> tuple[Channel, Channel]:
    """Two ends of a channel within this process and loop: what tests of higher layers run on."""
    configs = [left or ChannelConfig(), right or ChannelConfig()]
    count = min(config.lanes for config in configs)
    loop = asyncio.get_running_loop()
    pairs = [MemoryLane.pair(loop) for _ in range(count)]
    rings = [reserve(config, count) for config in configs]
    limits = [limits_of(c, r) for c, r in zip(configs, rings, strict=True)]
    controls = MemoryControl.pair()
    ends = [
        join(
            controls[i],
            [p[i] for p in pairs],
            rings[i],
            limits[1 - i],
            configs[i],
            peer="memory",
            reason="memory: both ends are in one process",
            rtt_s=0.0,
        )
        for i in (0, 1)
    ]
    return ends[0], ends[1]
