"""One channel's protocol, without I/O: control bytes in, events and control bytes out.

Each side numbers the transfers that it sends from 1. A transfer's life, as its two ends see it::

    sender    OPEN ─▶ chunks, once claimed ─▶ ACKED (buffers free) ─▶ DONE (consumed)
    receiver  open ─▶ claimed ─▶ complete, says ACKED ─▶ consumed, says DONE
    either    ABORT at any point ends it

The session decides; the lanes and the memory belong to `aiordma.link`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from aiordma.errors import (
    AiordmaError,
    ChecksumError,
    ManifestError,
    RemoteProtocolError,
    TransferAborted,
    TransferError,
    TransferRefused,
    TransferTimeout,
)
from aiordma.wire import control, manifest as manifests
from aiordma.wire.control import Abort, Bye, Claim, ControlStream, Frame, Message, Open, Pong
from aiordma.wire.credit import GrantWindow, SendWindow
from aiordma.wire.hello import Limits
from aiordma.wire.manifest import MAX_META_BYTES
from aiordma.wire.receiving import Incoming, Receiver
from aiordma.wire.sending import Sender

_OPEN_OVERHEAD_BYTES = 64
_SPARE_BACKLOG_BYTES = 8 << 20
_MAX_REASON_CHARS = 1000
_SLACK_BYTES = 1 << 20

_CAUSES: dict[str, type[TransferError]] = {
    "aborted": TransferAborted,
    "refused": TransferRefused,
    "timeout": TransferTimeout,
    "checksum": ChecksumError,
    "manifest": ManifestError,
}
_CAUSE_OF = {error: cause for cause, error in _CAUSES.items()}


class Refused(NamedTuple):
    """An OPEN that this end does not accept; the peer was told."""

    transfer: int


Event = Incoming | Refused | Frame
"""What happened: an OPEN becomes an `Incoming` or `Refused`; the other frames stand for themselves."""


def error_of(abort: Abort) -> TransferError:
    """The error that an ABORT of the peer's means at this end."""
    if abort.cause == "manifest":
        return TransferRefused(f"the peer refused the transfer: {abort.reason}")
    return _CAUSES.get(abort.cause, TransferAborted)(f"the peer {_verb(abort)}: {abort.reason}")


def _verb(abort: Abort) -> str:
    return {
        "refused": "refused the transfer",
        "timeout": "gave up waiting",
        "checksum": "received damaged bytes",
    }.get(abort.cause, "aborted the transfer")


class Session:
    """Both directions of one channel."""

    def __init__(
        self,
        ours: Limits,
        peers: Limits,
        *,
        lanes: int,
        max_tensors: int,
        max_transfer_bytes: int,
    ) -> None:
        """`ours` and `peers`: what the handshake agreed on; every lane has a ring of its own."""
        self._limits = ours
        self._max_tensors = max_tensors
        self._max_transfer_bytes = max_transfer_bytes
        self._opens_in = GrantWindow(
            ours.open_transfers, ours.manifest_bytes, "OPEN", is_prompt=True
        )
        self._messages_in = GrantWindow(ours.messages, ours.message_bytes, "message")
        self.opens_out = SendWindow(peers.open_transfers, peers.manifest_bytes)
        self.messages_out = SendWindow(peers.messages, peers.message_bytes)
        self.sender = Sender([peers.slots] * lanes)
        self.receiver = Receiver(self._opens_in)
        self._chunk_bytes = peers.slot_bytes
        self._max_backlog_bytes = (
            2 * (peers.message_bytes + peers.manifest_bytes) + _SPARE_BACKLOG_BYTES
        )
        self._most_unread_bytes = 2 * (peers.message_bytes + peers.manifest_bytes) + _SLACK_BYTES
        self._control = ControlStream(
            max(ours.message_bytes, ours.manifest_bytes) + _OPEN_OVERHEAD_BYTES
        )

    @property
    def unread_messages(self) -> tuple[int, int]:
        """Messages, and bytes of them, that came and were not taken."""
        return self._messages_in.outstanding

    @property
    def most_unread_bytes(self) -> int:
        """The most control bytes that can wait for a peer that reads: its windows, and as much for the rest."""
        return self._most_unread_bytes

    @property
    def kept_frames(self) -> int:
        """Control frames that the peer has not acknowledged yet."""
        return self._control.kept

    def check_backlog(self, unsent_bytes: int) -> None:
        """Raise `RemoteProtocolError` if more waits for the peer than the windows and their answers can explain.

        A peer that makes us answer, and reads or acknowledges nothing, would fill our memory. `unsent_bytes`: what
        the connection has not sent yet.
        """
        backlog_bytes = max(unsent_bytes, self._control.kept_bytes)
        if backlog_bytes > self._max_backlog_bytes:
            raise RemoteProtocolError(
                f"the peer goes on sending, and reads or acknowledges nothing: {backlog_bytes} bytes wait for it"
            )

    def data_to_send(self) -> bytes:
        """Control bytes for the peer."""
        return self._control.data_to_send()

    # Sending

    def open(self, manifest: bytes, meta: bytes, total_bytes: int) -> int:
        """Begin a transfer; spend its `open_cost` in `opens_out` first."""
        transfer = self.sender.open(total_bytes, self._chunk_bytes)
        self._control.send(Open(transfer, self._chunk_bytes, manifest, meta))
        return transfer

    def abort_sending(self, transfer: int, error: AiordmaError | None, reason: str) -> None:
        """Give up a transfer of ours."""
        self.sender.finish(transfer)
        self._control.send(_abort(transfer, by_sender=True, error=error, reason=reason))

    def message(self, payload: bytes) -> None:
        """Send a message; spend its size in `messages_out` first."""
        self._control.send(Message(payload))

    def ping(self, token: int) -> None:
        """Ask for a PONG with this token."""
        self._control.send(control.Ping(token))

    def bye(self, reason: str, *, is_fault: bool = False) -> None:
        """Say goodbye; nothing may be sent after it."""
        self._control.send(Bye(reason[:_MAX_REASON_CHARS], is_fault))

    # Receiving

    def claim(self, transfer: int) -> None:
        """Let an open transfer's chunks come."""
        incoming = self.receiver.get(transfer)
        if incoming is None or incoming.is_claimed:
            return
        incoming.is_claimed = incoming.was_claimed = True
        if not incoming.is_complete:
            self._control.send(Claim(transfer))

    def unclaim(self, transfer: int) -> None:
        """Take a claim back; chunks that are on their way still come."""
        incoming = self.receiver.get(transfer)
        if incoming is not None and incoming.is_claimed:
            incoming.is_claimed = False
            self._control.send(control.Unclaim(transfer))

    def claim_next(self, count: int) -> None:
        """Claim the next `count` transfers before they are open, and take back older claims beyond these."""
        for transfer, is_wanted in self.receiver.claim_next(count):
            self._control.send(Claim(transfer) if is_wanted else control.Unclaim(transfer))

    def chunk_came(self, incoming: Incoming, nbytes: int) -> None:
        """A chunk that was admitted is here and right."""
        incoming.came_bytes += nbytes
        if incoming.is_complete:
            self._control.send(control.Acked(incoming.id))

    def done(self, incoming: Incoming) -> None:
        """The transfer is consumed."""
        if self.receiver.forget(incoming.id):
            self._control.send(control.Done(incoming.id))
            self._settle_open(incoming.open_bytes)

    def abort_receiving(self, incoming: Incoming, error: AiordmaError | None, reason: str) -> None:
        """Give up a transfer of the peer's."""
        if self.receiver.forget(incoming.id):
            self._control.send(_abort(incoming.id, by_sender=False, error=error, reason=reason))
            self._settle_open(incoming.open_bytes)

    def message_taken(self, nbytes: int) -> None:
        """The user received a message: the peer may send another."""
        limits = self._messages_in.settle(nbytes)
        if limits:
            self._control.send(control.MessageCredit(*limits))

    # Events

    def receive(self, data: bytes) -> Iterator[Event]:
        """Take control bytes in; yields what happened. Raises `RemoteProtocolError`."""
        for frame in self._control.receive(data):
            event = self._handle(frame)
            if event is not None:
                yield event

    def _handle(self, frame: Frame) -> Event | None:
        match frame:
            case Open():
                return self._opened(frame)
            case Claim():
                self.sender.claim(frame.transfer, self.opens_out.count_limit)
            case control.Unclaim():
                self.sender.unclaim(frame.transfer)
            case control.Acked():
                if not self.sender.acknowledged(frame.transfer):
                    return None
            case control.Done():
                if not self.sender.is_over(frame.transfer):
                    raise RemoteProtocolError(
                        f"the peer says that it consumed transfer {frame.transfer}, which it never acknowledged"
                    )
            case Abort(by_sender=True):
                incoming = self.receiver.forget(frame.transfer)
                if incoming is None:
                    return None
                self._settle_open(incoming.open_bytes)
            case Abort():
                self.sender.finish(frame.transfer)
            case Message():
                self._messages_in.charge(len(frame.payload))
            case control.MessageCredit():
                _grant(self.messages_out, frame, "messages")
            case control.OpenCredit():
                _grant(self.opens_out, frame, "OPENs")
            case control.Ping():
                self._control.send(Pong(frame.token))
        return frame

    def _opened(self, frame: Open) -> Incoming | Refused:
        cost = open_cost(frame.manifest, frame.meta)
        self._opens_in.charge(cost)
        ahead = self.receiver.next_id(frame.transfer)
        if frame.chunk_bytes % 64 or not 0 < frame.chunk_bytes <= self._limits.slot_bytes:
            raise RemoteProtocolError(
                f"chunks of {frame.chunk_bytes} bytes do not fit slots of {self._limits.slot_bytes}"
            )
        try:
            _check_meta(frame.meta)
            manifest = manifests.decode(
                frame.manifest,
                max_tensors=self._max_tensors,
                max_total_bytes=self._max_transfer_bytes,
            )
        except ManifestError as exc:
            self._control.send(_abort(frame.transfer, by_sender=False, error=exc, reason=str(exc)))
            self._settle_open(cost)
            return Refused(frame.transfer)
        incoming = Incoming(
            id=frame.transfer,
            manifest=manifest,
            meta=frame.meta,
            chunk_bytes=frame.chunk_bytes,
            open_bytes=cost,
            is_claimed=bool(ahead),
            was_claimed=ahead is not None,
        )
        self.receiver.add(incoming)
        if incoming.is_complete:
            self._control.send(control.Acked(incoming.id))
        return incoming

    def _settle_open(self, nbytes: int) -> None:
        limits = self._opens_in.settle(nbytes)
        if limits:
            self._control.send(control.OpenCredit(*limits))


def open_cost(manifest: bytes, meta: bytes) -> int:
    """What an OPEN costs of the window, in bytes."""
    return len(manifest) + len(meta)


def _check_meta(meta: bytes) -> None:
    if len(meta) > MAX_META_BYTES:
        raise ManifestError(
            f"meta of {len(meta)} bytes; {MAX_META_BYTES} are allowed: send it as a tensor"
        )
    try:
        if meta:
            msgspec.msgpack.decode(meta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ManifestError(f"`meta` is malformed ({exc}): the peer's encoder is broken") from exc


def _grant(
    window: SendWindow, limits: control.MessageCredit | control.OpenCredit, what: str
) -> None:
    if not window.may_grant(limits.count_limit, limits.bytes_limit):
        raise RemoteProtocolError(
            f"the peer allows {limits.count_limit} {what} of {limits.bytes_limit} bytes, which is more than were "
            "sent and one window"
        )
    window.grant(limits.count_limit, limits.bytes_limit)


def _abort(transfer: int, *, by_sender: bool, error: AiordmaError | None, reason: str) -> Abort:
    cause = "aborted"
    if isinstance(error, TransferError):
        cause = _CAUSE_OF.get(type(error), "aborted")
    # A reason with half a surrogate pair in it (a file's name, say) is no UTF-8, and must not keep the word back.
    text = reason[:_MAX_REASON_CHARS].encode(errors="backslashreplace").decode()
    return Abort(transfer, by_sender, cause, text)
