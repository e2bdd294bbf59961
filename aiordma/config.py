"""What a user may set on a channel; everything is checked on creation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiordma.errors import ConfigError

MIN_SLOTS = 4
"""Fewer slots a lane would not keep a pipeline busy."""
MAX_SLOTS = 256
"""A CREDIT frame names slots in a bitmap of 256 bits."""
MAX_LANES = 64
MAX_KEEPALIVE_S = 32767
"""What the kernel takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """Settings of one channel's end. Each end has its own; nothing has to be equal on both.

    Sizes are bytes, times are seconds. A setting that cannot work raises `ConfigError`.
    """

    slot_bytes: int = 1 << 20
    """Size of one receive slot, which is the largest chunk that the peer may send: a multiple of 64."""
    slots: int = 8
    """Receive slots a lane. Fewer, but at least 4, are granted when the memory budget runs low."""
    lanes: int = 1
    """Lanes (parallel bulk connections) wanted; the smaller number of the two ends is opened."""
    idle_timeout_s: float = 120.0
    """An open transfer that makes no progress for so long fails. An idle channel never does."""
    connect_timeout_s: float = 10.0
    """How long a listener waits for a peer that has connected to complete its handshake; `probe_s` more where the
    path between two devices is tried."""
    close_timeout_s: float = 5.0
    """How long `aclose` waits for the peer's goodbye before it closes the connection regardless."""
    keepalive_s: int = 60
    """How long a connection is idle before the kernel asks whether the peer is there (tcp(7), TCP_KEEPIDLE). Shorter
    than the shortest memory of a NAT or firewall on the way: some forget a connection after four minutes."""
    heartbeat_s: float | None = None
    """Send a few bytes so often on every TCP connection, for what ends idle ones and sees no keepalives: proxies,
    tunnels, load balancers. None: none; through a proxy, every `keepalive_s`."""
    checksum: bool = True
    """Send an xxh3_64 check with each chunk; a receiver verifies whatever it is sent."""
    congestion: str | None = None
    """TCP congestion control of the lanes (tcp(7), TCP_CONGESTION), e.g. "cubic"; None: the host's."""
    verbs: bool = True
    """Use RDMA lanes where both ends can; `Channel.lanes` says what became of it."""
    device: str | None = None
    """RDMA device ("mlx5_0"), or a port of it ("mlx5_0/1"); None: the one that has this end's IP address, else
    the first that is active."""
    gid_index: int | None = None
    """Index of the port's address to use; None: the best RoCE v2 one."""
    probe_s: float = 2.0
    """How long the path between the devices may take to prove itself, before TCP lanes are used."""
    registered_bytes: int = 1 << 32
    """The most memory that `Channel.register` keeps pinned on a device, beside the rings. What the first of the
    channels says that share the device counts for all."""
    messages: int = 256
    """How many messages the peer may send that nobody has received yet."""
    message_bytes: int = 4 << 20
    """How many bytes these may have together; a single message, three quarters of it."""
    open_transfers: int = 256
    """How many unfinished transfers the peer may have open."""
    manifest_bytes: int = 8 << 20
    """How many bytes of manifest and `meta` these may have together; a single one, three quarters of it."""
    max_tensors: int = 100_000
    """The most tensors in one transfer that is accepted."""
    max_transfer_bytes: int = 1 << 42
    """The largest transfer that is accepted (4 TiB)."""

    def __post_init__(self) -> None:
        _within("slot_bytes", self.slot_bytes, 64, 1 << 30)
        if self.slot_bytes % 64:
            raise ConfigError(
                f"slot_bytes must be a multiple of 64 (chunk borders are), not {self.slot_bytes}"
            )
        _within("slots", self.slots, MIN_SLOTS, MAX_SLOTS)
        _within("lanes", self.lanes, 1, MAX_LANES)
        _within("messages", self.messages, 1, 1 << 20)
        _within("message_bytes", self.message_bytes, 1 << 10, 1 << 30)
        _within("open_transfers", self.open_transfers, 1, 1 << 20)
        _within("manifest_bytes", self.manifest_bytes, 1 << 17, 1 << 30)
        _within("max_tensors", self.max_tensors, 1, 1 << 31)
        _within("max_transfer_bytes", self.max_transfer_bytes, 0, 1 << 60)
        _within("registered_bytes", self.registered_bytes, 0, 1 << 60)
        _within("keepalive_s", self.keepalive_s, 1, MAX_KEEPALIVE_S)
        names = ["idle_timeout_s", "connect_timeout_s", "close_timeout_s", "probe_s"]
        for name in (*names, *(["heartbeat_s"] if self.heartbeat_s is not None else [])):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number of seconds, not {value!r}")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
