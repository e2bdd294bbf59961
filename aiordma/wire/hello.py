"""The handshake: how a connection says what it is, and what both ends can do.

Every connection, control or lane, begins on either side with a preface of 16 bytes, then a msgpack body::

    magic "aiordma"   7 bytes
    kind              1 byte   b"C" control connection, b"L" lane
    wire version      2 bytes  little-endian
    reserved          2 bytes  0
    body length       4 bytes  little-endian, at most 16384

The side that connected speaks first: HELLO (or a lane's proof); the other answers, or refuses with a reason. Where
both can do RDMA they go on, until one of them names a reason not to, and lanes over TCP are opened instead::

    connecting end   HELLO           PATH (its queue pairs)            VERDICT
    listening end           ANSWER                          VERDICT             VERDICT
                        (its queue pairs)            both probe the path

A lane proves that it belongs to a session by an HMAC-SHA256 (RFC 2104) under the key of the ANSWER.
"""

from __future__ import annotations

import hmac
import struct
from typing import Annotated, Final

import msgspec

from aiordma.errors import ForeignPeer, RemoteProtocolError, VersionMismatch

WIRE_VERSION: Final = 1
PREFACE_BYTES: Final = 16
CONTROL, LANE = b"C", b"L"
_MAGIC = b"aiordma"
_PREFACE = struct.Struct("<7scHHI")
_MAX_BODY_BYTES = 16384
_PROOF_CONTEXT = {"client": b"aiordma lane, client", "server": b"aiordma lane, server"}


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """What one end accepts from the other."""

    slots: int
    slot_bytes: int
    messages: int
    message_bytes: int
    open_transfers: int
    manifest_bytes: int


class LaneAddress(msgspec.Struct, frozen=True, array_like=True):
    """A queue pair, and the ring behind it that its peer may write to."""

    gid: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{4}(:[0-9a-f]{4}){7}\Z")]
    lid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    queue_pair: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    start_psn: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    mtu_bytes: Annotated[int, msgspec.Meta(ge=256, le=4096)]
    ring: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    key: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """What the connecting end wants and accepts."""

    limits: Limits
    lanes: int
    lane_kinds: tuple[str, ...]
    reason: str = ""
    """Why there is no "verbs" among them."""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """What the listening end grants: a session and so many lanes."""

    limits: Limits
    lanes: int
    lane_kind: str
    session: bytes
    key: bytes
    reason: str = ""
    """Why not "verbs"."""
    addresses: tuple[LaneAddress, ...] = ()
    """Of the lanes, if they are "verbs"."""


class Path(msgspec.Struct, frozen=True, array_like=True, tag="path"):
    """The connecting end's queue pairs, ready to receive; or why there are none."""

    addresses: tuple[LaneAddress, ...]
    reason: str = ""


class Verdict(msgspec.Struct, frozen=True, array_like=True, tag="verdict"):
    """Whether one end's part is well; a reason says that it is not."""

    reason: str = ""


class LaneProof(msgspec.Struct, frozen=True, array_like=True, tag="lane"):
    """A lane's proof that it belongs to a session."""

    session: bytes
    lane: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    proof: bytes


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """No, and why."""

    reason: str


Body = Hello | Answer | Path | Verdict | LaneProof | Refusal
_decoder: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(Body)


def lane_proof(key: bytes, session: bytes, lane: int, side: str) -> bytes:
    """What `side` ("client" or "server") shows to prove that it holds the session's key."""
    return hmac.digest(key, _PROOF_CONTEXT[side] + session + lane.to_bytes(2, "little"), "sha256")


def encode(kind: bytes, body: Body) -> bytes:
    """Preface and body of one handshake message."""
    encoded = msgspec.msgpack.encode(body)
    return _PREFACE.pack(_MAGIC, kind, WIRE_VERSION, 0, len(encoded)) + encoded


def check_start(data: bytes) -> None:
    """Raise `ForeignPeer` as soon as the first bytes cannot become a preface."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise ForeignPeer(
            f"something else than aiordma answers there (its first bytes: {data[:16]!r}): check host and port"
        )


def decode_preface(preface: bytes) -> tuple[bytes, int]:
    """Kind and body length of a 16-byte preface."""
    check_start(preface)
    _, kind, version, _, length = _PREFACE.unpack(preface)
    if version != WIRE_VERSION:
        raise VersionMismatch(
            f"the peer speaks wire version {version}, this end {WIRE_VERSION}: install the same aiordma on both"
        )
    if kind not in (CONTROL, LANE) or length > _MAX_BODY_BYTES:
        raise RemoteProtocolError(
            f"a preface of unknown kind {kind!r} or with a body of {length} bytes"
        )
    return kind, length


def decode_body(data: bytes) -> Body:
    """Decode a body; anything else raises `RemoteProtocolError`."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"a malformed handshake: {exc}") from exc


def check_limits(limits: Limits) -> None:
    """Refuse limits that no aiordma would offer."""
    sane = (
        4 <= limits.slots <= 256
        and 64 <= limits.slot_bytes <= 1 << 30
        and limits.slot_bytes % 64 == 0
        and 1 <= limits.messages <= 1 << 20
        and 0 < limits.message_bytes <= 1 << 30
        and 1 <= limits.open_transfers <= 1 << 20
        and 0 < limits.manifest_bytes <= 1 << 30
    )
    if not sane:
        raise RemoteProtocolError(f"the peer offers limits that cannot be: {limits}")
