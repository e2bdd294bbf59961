"""Tensors and messages between asyncio programs: chunk by chunk, zero-copy where it can be.

async with aiordma.connect(host, port) as channel:
    await channel.send_tensor(t)
"""

from aiordma.channel import Channel, Received
from aiordma.chunk import Chunk
from aiordma.config import ChannelConfig
from aiordma.endpoint import connect, listen, serve
from aiordma.errors import (
    AiordmaError,
    Busy,
    ChannelBroken,
    ChannelClosed,
    ChannelError,
    ChecksumError,
    ConfigError,
    ConnectError,
    ConnectTimeout,
    ForeignPeer,
    LaneRefused,
    LocalError,
    ManifestError,
    MessageError,
    PeerTimeout,
    ProxyError,
    ProxyRefused,
    RegistrationError,
    RemoteProtocolError,
    TensorError,
    TransferAborted,
    TransferError,
    TransferRefused,
    TransferTimeout,
    VersionMismatch,
)
from aiordma.listener import Listener, Server
from aiordma.outgoing import Outgoing, prepare
from aiordma.registration import Registration
from aiordma.ring import set_memory_budget
from aiordma.stats import ChannelStats, LaneInfo, LaneStats
from aiordma.transfer import Transfer
from aiordma.wire.manifest import Manifest, TensorSpec

__version__ = "0.1.0"

__all__ = [
    "AiordmaError",
    "Busy",
    "Channel",
    "ChannelBroken",
    "ChannelClosed",
    "ChannelConfig",
    "ChannelError",
    "ChannelStats",
    "ChecksumError",
    "Chunk",
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "ForeignPeer",
    "LaneInfo",
    "LaneRefused",
    "LaneStats",
    "Listener",
    "LocalError",
    "Manifest",
    "ManifestError",
    "MessageError",
    "Outgoing",
    "PeerTimeout",
    "ProxyError",
    "ProxyRefused",
    "Received",
    "Registration",
    "RegistrationError",
    "RemoteProtocolError",
    "Server",
    "TensorError",
    "TensorSpec",
    "Transfer",
    "TransferAborted",
    "TransferError",
    "TransferRefused",
    "TransferTimeout",
    "VersionMismatch",
    "connect",
    "listen",
    "prepare",
    "serve",
    "set_memory_budget",
]
