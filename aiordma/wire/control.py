"""Frames of the control connection, and the stream that numbers, acknowledges and keeps them.

A frame is a header of 24 bytes, little-endian, and a body::

    length   4 bytes  of the body
    kind     1 byte   the frame's type; 0 is a bare acknowledgement
    reserved 3 bytes  0
    sequence 8 bytes  rises by one from 1; 0 for what need not be sent again (PING, PONG, bare ack)
    ack      8 bytes  the highest sequence that came in order

The body is the msgpack array of the frame's fields; a MESSAGE's body is the user's own msgpack.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import Annotated, ClassVar

import msgspec

from aiordma.errors import RemoteProtocolError

_HEADER = struct.Struct("<IB3xQQ")
_ACK_EVERY_FRAMES = 32
_ACK_EVERY_BYTES = 256 * 1024

Whole = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Frame(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A control frame."""

    kind: ClassVar[int] = 0
    sequenced: ClassVar[bool] = True


class Open(Frame):
    """A transfer begins: what it carries, and in chunks of which size."""

    kind: ClassVar[int] = 1
    transfer: Whole
    chunk_bytes: Whole
    manifest: bytes
    meta: bytes


class Claim(Frame):
    """The receiver wants this transfer; it may name one that is not open yet."""

    kind: ClassVar[int] = 2
    transfer: Whole


class Unclaim(Frame):
    """The receiver takes its claim back: the transfer stays open, no more chunks now."""

    kind: ClassVar[int] = 3
    transfer: Whole


class Acked(Frame):
    """Every chunk of the transfer is here and its check was right."""

    kind: ClassVar[int] = 4
    transfer: Whole


class Done(Frame):
    """The transfer is consumed."""

    kind: ClassVar[int] = 5
    transfer: Whole


class Abort(Frame):
    """One end gives the transfer up."""

    kind: ClassVar[int] = 6
    transfer: Whole
    by_sender: bool
    cause: str
    reason: str


class Message(Frame):
    """A small message of the user's, encoded."""

    kind: ClassVar[int] = 7
    payload: bytes


class MessageCredit(Frame):
    """Cumulative limits for messages."""

    kind: ClassVar[int] = 8
    count_limit: Whole
    bytes_limit: Whole


class OpenCredit(Frame):
    """Cumulative limits for OPEN frames."""

    kind: ClassVar[int] = 9
    count_limit: Whole
    bytes_limit: Whole


class Ping(Frame):
    """Answer this at once."""

    kind: ClassVar[int] = 10
    sequenced: ClassVar[bool] = False
    token: Whole


class Pong(Frame):
    """The answer to a PING."""

    kind: ClassVar[int] = 11
    sequenced: ClassVar[bool] = False
    token: Whole


class Bye(Frame):
    """The peer closes the channel; nothing follows."""

    kind: ClassVar[int] = 12
    reason: str
    is_fault: bool = False
    """Whether it does so because of what we sent, and not on purpose."""


_ENCODED = (Open, Claim, Unclaim, Acked, Done, Abort, MessageCredit, OpenCredit, Ping, Pong, Bye)
_DECODERS = {frame.kind: msgspec.msgpack.Decoder(frame) for frame in _ENCODED}
_encoder = msgspec.msgpack.Encoder()


class ControlStream:
    """One control connection: frames out, frames in, each in order and exactly once.

    Sent frames are kept until they are acknowledged, so that a later resume can send them again; the
    windows of what they carry bound how many these can be.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._sent = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._out: list[bytes] = []
        self._in = bytearray()
        self._received = 0
        self._acked = 0
        self._unacked_bytes = 0
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """The size of these frames."""
        return self._kept_bytes

    @property
    def kept(self) -> int:
        """Frames sent and not acknowledged yet."""
        return len(self._kept)

    def send(self, frame: Frame) -> None:
        """Queue a frame for `data_to_send`."""
        body = frame.payload if isinstance(frame, Message) else _encoder.encode(frame)
        sequence = 0
        if frame.sequenced:
            self._sent += 1
            sequence = self._sent
        data = _HEADER.pack(len(body), frame.kind, sequence, self._received) + body
        self._acked, self._unacked_bytes = self._received, 0
        if sequence:
            self._kept.append((sequence, data))
            self._kept_bytes += len(data)
        self._out.append(data)

    def data_to_send(self) -> bytes:
        """All queued bytes, with a bare acknowledgement if one is due."""
        due = self._received - self._acked
        if due >= _ACK_EVERY_FRAMES or (due and self._unacked_bytes >= _ACK_EVERY_BYTES):
            self._out.append(_HEADER.pack(0, 0, 0, self._received))
            self._acked, self._unacked_bytes = self._received, 0
        data = b"".join(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> Iterator[Frame]:
        """Take bytes in; yields the frames that became complete.

        Raises `RemoteProtocolError` for an oversized, malformed or unknown frame, a gap in the sequence, or
        an acknowledgement of what was never sent. A frame that came before is dropped.
        """
        self._in += data
        start = 0
        try:
            while len(self._in) - start >= _HEADER.size:
                length, kind, sequence, ack = _HEADER.unpack_from(self._in, start)
                if length > self._max_body_bytes:
                    raise RemoteProtocolError(
                        f"a control frame of {length} bytes, over the {self._max_body_bytes} agreed on"
                    )
                if not kind and (sequence or length):
                    raise RemoteProtocolError("an acknowledgement with a sequence number or a body")
                end = start + _HEADER.size + length
                if len(self._in) < end:
                    return
                body = bytes(self._in[start + _HEADER.size : end])
                start = end
                self._acknowledge(ack)
                if self._is_new(sequence, len(body)) and kind:
                    yield _decode(kind, bool(sequence), body)
        finally:
            del self._in[:start]

    def _is_new(self, sequence: int, body_bytes: int) -> bool:
        if not sequence:
            return True
        if sequence > self._received + 1:
            raise RemoteProtocolError(
                f"control frame {self._received + 1} was due, frame {sequence} came"
            )
        if sequence <= self._received:
            return False
        self._received = sequence
        self._unacked_bytes += _HEADER.size + body_bytes
        return True

    def _acknowledge(self, ack: int) -> None:
        if ack > self._sent:
            raise RemoteProtocolError(f"the peer acknowledges frame {ack}; {self._sent} were sent")
        while self._kept and self._kept[0][0] <= ack:
            self._kept_bytes -= len(self._kept.popleft()[1])


def _decode(kind: int, sequenced: bool, body: bytes) -> Frame:
    if kind == Message.kind:
        frame: Frame = Message(body)
    elif kind in _DECODERS:
        try:
            frame = _DECODERS[kind].decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise RemoteProtocolError(f"a malformed control frame of kind {kind}: {exc}") from exc
    else:
        raise RemoteProtocolError(f"a control frame of unknown kind {kind}")
    if frame.sequenced != sequenced:
        raise RemoteProtocolError(
            f"a control frame of kind {kind} with or without a sequence number"
        )
    return frame
