"""Which port of which RDMA device, and which of its addresses (GIDs), a lane uses."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final, NamedTuple

from aiordma.errors import LaneRefused

SOFT_ROCE: Final = (
    "where there is no RDMA adapter, Linux has one in software: modprobe rdma_rxe; "
    "rdma link add rxe0 type rxe netdev eth0"
)


class Gid(NamedTuple):
    """An address of a port."""

    number: int
    """Its index in the port's table."""
    kind: str
    """ "RoCE v2", "RoCE v1" or "InfiniBand"."""
    text: str
    """As an IPv6 address."""

    @property
    def ipv4(self) -> str | None:
        """The IPv4 address that it stands for, if it does."""
        mapped = ipaddress.IPv6Address(self.text).ipv4_mapped
        return None if mapped is None else str(mapped)


class Port(NamedTuple):
    """What is known of a port."""

    device: str
    number: int
    state: str
    """ "ACTIVE", or else."""
    is_ethernet: bool
    lid: int
    """The local identifier on InfiniBand."""
    mtu_bytes: int
    gids: tuple[Gid, ...]

    @property
    def name(self) -> str:
        """As "rxe0/1"."""
        return f"{self.device}/{self.number}"


class DeviceFacts(NamedTuple):
    """What is known of a device: its ports, and its limits as ibv_query_device(3) has them."""

    name: str
    firmware: str
    ports: tuple[Port, ...]
    has_windows: bool
    """Whether it has memory windows of type 2."""
    max_region_bytes: int
    """The largest memory region."""
    max_queue_pairs: int
    max_work_requests: int
    """In each queue of a queue pair."""
    max_completions: int
    """In a completion queue."""


class Choice(NamedTuple):
    """A port, and the address of it to use."""

    port: Port
    gid: Gid


def choose(
    ports: Sequence[Port],
    *,
    device: str | None = None,
    gid_index: int | None = None,
    near: str | None = None,
) -> Choice:
    """The device as configured, else the first active port; the best address of it.

    `near`: this end's IP address on the way to the peer; a port that has it is preferred. Raises `LaneRefused`
    with what is wrong, and the remedy.
    """
    if not ports:
        raise LaneRefused(f"this host has no RDMA device ({SOFT_ROCE})")
    named = [port for port in ports if device in (None, port.device, port.name)]
    if not named:
        raise LaneRefused(
            f"there is no RDMA device {device!r} here: there are {', '.join(port.name for port in ports)}"
        )
    active = [port for port in named if port.state == "ACTIVE"]
    if not active:
        states = ", ".join(f"{port.name} is {port.state}" for port in named)
        raise LaneRefused(
            f"no RDMA port is active ({states}): bring its link up (rdma link; ip link)"
        )
    near_text = None if near is None else _as_gid(near)
    choices = [
        Choice(port, gid)
        for port in active
        for gid in port.gids
        if gid_index in (None, gid.number) and _rank(port, gid, near_text) is not None
    ]
    if not choices:
        raise LaneRefused(_no_gid(active, gid_index))
    return min(choices, key=lambda choice: _rank(choice.port, choice.gid, near_text) or 0)


def _as_gid(address: str) -> str:
    """The text of the GID that stands for an IP address."""
    host = address.partition("%")[0]
    return ipaddress.IPv6Address(host if ":" in host else f"::ffff:{host}").exploded


def _rank(port: Port, gid: Gid, near: str | None) -> int | None:
    """Lower is better; None: it cannot be used. `near`: as a GID's text."""
    if not port.is_ethernet:
        return 3 if gid.number == 0 else 9
    if gid.kind != "RoCE v2":
        return None
    if gid.text == near and gid.ipv4 is not None:
        return 0
    # Both ends must choose of one family: IPv4 comes first, whichever the way to the peer is.
    farther = near not in [other.text for other in port.gids]
    if gid.ipv4 is not None:
        return 1 + farther
    return 5 + farther if not ipaddress.IPv6Address(gid.text).is_link_local else 7 + farther


def _no_gid(ports: Sequence[Port], gid_index: int | None) -> str:
    names = ", ".join(port.name for port in ports)
    if gid_index is None:
        return f"{names} has no RoCE v2 address: give its network interface an IP address (ip address add ...)"
    found = [f"{g.kind} {g.text}" for port in ports for g in port.gids if g.number == gid_index]
    return (
        f"gid_index={gid_index} of {names} is {found[0] if found else 'empty'}: it must be a RoCE v2 address; leave "
        "it out to have one chosen"
    )
