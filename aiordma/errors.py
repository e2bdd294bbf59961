"""Every error that aiordma raises, and whose fault it is.

::

    AiordmaError
    ├── LocalError                    the caller's to mend; nothing was sent
    │   ├── ConfigError               a setting that cannot work (also a ValueError)
    │   ├── MessageError              a message that cannot travel (also a ValueError)
    │   ├── TensorError               an array that cannot travel, or cannot be received so (also a ValueError)
    │   ├── RegistrationError         memory that cannot be registered with an RDMA device
    │   └── Busy                      somebody else holds it: a queue's consumer, the memory budget
    ├── ChannelError                  the channel is of no more use
    │   ├── ChannelClosed             one of the ends closed it on purpose
    │   ├── ChannelBroken             the connection is gone: a dead peer, a cut link
    │   │   ├── PeerTimeout           the peer said nothing for too long (also a TimeoutError)
    │   │   └── RemoteProtocolError   the peer broke the protocol
    │   └── ConnectError              there never was a channel
    │       ├── ForeignPeer           something that is not aiordma answers at that port
    │       ├── VersionMismatch       an aiordma of another wire version answers
    │       ├── LaneRefused           the peer does not accept a lane, or `require=` cannot be met
    │       ├── ProxyError            what `proxy=` names cannot be reached, or speaks no HTTP
    │       │   └── ProxyRefused      the proxy does not open a way to the server: its `status` says why
    │       └── ConnectTimeout        no channel within `timeout_s` (also a TimeoutError)
    └── TransferError                 one transfer failed; its channel stays usable
        ├── TransferAborted           one of the ends gave it up
        ├── TransferRefused           the receiver does not want it
        ├── TransferTimeout           no progress for `idle_timeout_s` (also a TimeoutError)
        ├── ChecksumError             a chunk arrived with other bytes than were sent
        └── ManifestError             its manifest is malformed or beyond the limits
"""

from typing import TypeVar

__all__ = [
    "AiordmaError",
    "Busy",
    "ChannelBroken",
    "ChannelClosed",
    "ChannelError",
    "ChecksumError",
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "ForeignPeer",
    "LaneRefused",
    "LocalError",
    "ManifestError",
    "MessageError",
    "PeerTimeout",
    "ProxyError",
    "ProxyRefused",
    "RegistrationError",
    "RemoteProtocolError",
    "TensorError",
    "TransferAborted",
    "TransferError",
    "TransferRefused",
    "TransferTimeout",
    "VersionMismatch",
    "again",
]


class AiordmaError(Exception):
    """The root of all errors of this library."""


class LocalError(AiordmaError):
    """The caller's to mend; nothing was sent."""


class ConfigError(LocalError, ValueError):
    """A setting that cannot work."""


class MessageError(LocalError, ValueError):
    """A message that cannot be encoded, is too large for the peer, or is not of the type asked for."""


class TensorError(LocalError, ValueError):
    """An array that cannot travel, or cannot be received as asked. Names the tensor."""


class RegistrationError(LocalError):
    """Memory cannot be registered with an RDMA device: a limit of the device or of the process."""


class Busy(LocalError):
    """Somebody else holds it: the one consumer of a queue, or the process's memory budget."""


class ChannelError(AiordmaError):
    """The channel is of no more use; open a new one."""


class ChannelClosed(ChannelError):
    """One of the ends closed the channel on purpose."""


class ChannelBroken(ChannelError):
    """The connection is gone: a dead peer, a cut link."""


class PeerTimeout(ChannelBroken, TimeoutError):
    """The peer said nothing for too long while a transfer was open."""


class RemoteProtocolError(ChannelBroken):
    """The peer broke the protocol; the bytes that follow cannot be trusted."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()} (the peer's aiordma is broken, or the bytes were altered on the way: install "
            "the same version on both ends, and connect again)"
        )


class ConnectError(ChannelError):
    """There never was a channel."""


class ForeignPeer(ConnectError):
    """Something that is not aiordma answers at that port."""


class VersionMismatch(ConnectError):
    """An aiordma of another wire version answers."""


class LaneRefused(ConnectError):
    """The peer does not accept a lane, or `require=` cannot be met."""


class ProxyError(ConnectError):
    """The HTTP proxy on the way cannot be reached, hangs up, or is none."""


class ProxyRefused(ProxyError):
    """The HTTP proxy does not open a way to the server.

    `status` is the answer's: 407 wants other credentials, 403 is its policy, 502 to 504 say that it did not reach the
    server either.
    """

    def __init__(self, reason: str, *, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class ConnectTimeout(ConnectError, TimeoutError):
    """No channel came up within `timeout_s`."""


class TransferError(AiordmaError):
    """One transfer failed. Its channel stays usable; its destination holds undefined bytes."""


class TransferAborted(TransferError):
    """One of the ends gave the transfer up."""


class TransferRefused(TransferError):
    """The receiver does not want the transfer, and says why."""


class TransferTimeout(TransferError, TimeoutError):
    """The transfer made no progress for `idle_timeout_s`."""


class ChecksumError(TransferError):
    """A chunk arrived with other bytes than were sent."""


class ManifestError(TransferError):
    """A manifest that is malformed or beyond the limits."""


E = TypeVar("E", bound=AiordmaError)


def again(error: E) -> E:
    """The same error for one more waiter: a shared instance would collect every waiter's traceback, and keep
    alive whatever lives in these frames."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
