"""The handshake's bytes: what both ends say first, and whatever else may come instead."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from aiordma.errors import ForeignPeer, RemoteProtocolError, VersionMismatch
from aiordma.wire import hello
from aiordma.wire.hello import Answer, Hello, LaneProof, Limits, Refusal

counts = st.integers(0, (1 << 62) - 1)
limits = st.builds(Limits, *[counts] * 6)
bodies = st.one_of(
    st.builds(Hello, limits, counts, st.lists(st.text(max_size=9), max_size=3).map(tuple)),
    st.builds(
        Answer, limits, counts, st.text(max_size=9), st.binary(max_size=40), st.binary(max_size=40)
    ),
    st.builds(LaneProof, st.binary(max_size=40), st.integers(0, 0xFFFF), st.binary(max_size=40)),
    st.builds(Refusal, st.text(max_size=80)),
)
SANE = Limits(8, 1 << 20, 256, 1 << 22, 256, 1 << 23)
PREFACE = b"aiordma" + b"C" + b"\x01\x00" + b"\x00\x00" + b"\x07\x00\x00\x00"


@given(st.sampled_from([hello.CONTROL, hello.LANE]), bodies)
def test_a_message_survives_the_wire(kind: Any, body: Any) -> None:
    data = hello.encode(kind, body)
    found, length = hello.decode_preface(data[: hello.PREFACE_BYTES])
    assert found == kind
    assert length == len(data) - hello.PREFACE_BYTES
    assert hello.decode_body(data[hello.PREFACE_BYTES :]) == body


def test_the_preface_is_the_documented_one() -> None:
    data = hello.encode(hello.LANE, Refusal("no"))
    body = msgspec.msgpack.encode(["refusal", "no"])
    assert data == struct.pack("<7scHHI", b"aiordma", b"L", 1, 0, len(body)) + body


@given(st.integers(0, len(PREFACE)))
def test_every_beginning_of_a_preface_may_become_one(n: Any) -> None:
    hello.check_start(PREFACE[:n])


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"SSH-2.0-OpenSSH_9.2p1",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"aiordMA and more",
        b"b",
        b"aiordm!",
    ],
)
def test_something_else_is_known_by_its_first_bytes(data: bytes) -> None:
    with pytest.raises(ForeignPeer, match="check host and port"):
        hello.check_start(data)
    with pytest.raises(ForeignPeer, match="check host and port"):
        hello.decode_preface(data.ljust(16, b"\0")[:16])


@given(st.integers(0, 0xFFFF).filter(lambda version: version != hello.WIRE_VERSION))
def test_another_version_is_named(version: Any) -> None:
    with pytest.raises(
        VersionMismatch, match=f"the peer speaks wire version {version}, this end 1"
    ):
        hello.decode_preface(PREFACE[:8] + version.to_bytes(2, "little") + PREFACE[10:])


@pytest.mark.parametrize(
    ("preface", "text"),
    [
        (PREFACE[:7] + b"X" + PREFACE[8:], "unknown kind b'X'"),
        (PREFACE[:12] + struct.pack("<I", 16385), "a body of 16385 bytes"),
        (PREFACE[:12] + b"\xff" * 4, "a body of 4294967295 bytes"),
    ],
)
def test_a_preface_that_cannot_be(preface: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        hello.decode_preface(preface)


def test_the_largest_body_is_16384_bytes() -> None:
    assert hello.decode_preface(PREFACE[:12] + struct.pack("<I", 16384)) == (b"C", 16384)


@given(
    st.binary(min_size=16, max_size=16) | st.binary(max_size=9, min_size=9).map(PREFACE[:7].__add__)
)
def test_random_prefaces_are_one_or_an_error(data: Any) -> None:
    try:
        kind, length = hello.decode_preface(data)
    except (ForeignPeer, VersionMismatch, RemoteProtocolError):
        return
    assert kind in (b"C", b"L")
    assert length <= 16384


BAD_BODIES = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "unknown tag": msgspec.msgpack.encode(["howdy", "x"]),
    "no tag": msgspec.msgpack.encode([]),
    "wrong type": msgspec.msgpack.encode(["refusal", 1]),
    "too few fields": msgspec.msgpack.encode(["hello", list(range(6))]),
    "text that is no UTF-8": b"\x92" + msgspec.msgpack.encode("refusal") + b"\xa1\xff",
    "deep nesting": b"\x93" + msgspec.msgpack.encode("refusal") + b"\xa1x" + b"\x91" * 4000,
    "a negative lane": msgspec.msgpack.encode(["lane", b"s", -1, b"p"]),
    "a lane beyond 16 bits": msgspec.msgpack.encode(["lane", b"s", 1 << 16, b"p"]),
    "bytes after the body": msgspec.msgpack.encode(["refusal", "no"]) + b"\0",
}


@pytest.mark.parametrize("data", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_cannot_be(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="a malformed handshake"):
        hello.decode_body(data)


@given(
    st.binary(max_size=60)
    | st.tuples(bodies, st.integers(0, 99), st.binary(max_size=3)).map(
        lambda row: _patched(hello.encode(b"C", row[0])[16:], row[1], row[2])
    )
)
def test_random_bodies_are_one_or_an_error(data: Any) -> None:
    try:
        body = hello.decode_body(data)
    except RemoteProtocolError:
        return
    assert isinstance(body, Hello | Answer | LaneProof | Refusal)
    if isinstance(body, LaneProof):
        hello.lane_proof(b"key", body.session, body.lane, "client")


def _patched(data: bytes, at: int, patch: bytes) -> bytes:
    at %= len(data)
    return data[:at] + patch + data[at + len(patch) :]


def test_a_proof_is_an_hmac_of_side_session_and_lane() -> None:
    proof = hello.lane_proof(b"key", b"session", 0x0102, "client")
    message = b"aiordma lane, client" + b"session" + b"\x02\x01"
    assert proof == hmac.new(b"key", message, hashlib.sha256).digest()
    others = [
        hello.lane_proof(b"KEY", b"session", 0x0102, "client"),
        hello.lane_proof(b"key", b"SESSION", 0x0102, "client"),
        hello.lane_proof(b"key", b"session", 0x0103, "client"),
        hello.lane_proof(b"key", b"session", 0x0102, "server"),
    ]
    assert len({proof, *others}) == 5


BORDERS = {
    "slots": (4, 256),
    "slot_bytes": (64, 1 << 30),
    "messages": (1, 1 << 20),
    "message_bytes": (1, 1 << 30),
    "open_transfers": (1, 1 << 20),
    "manifest_bytes": (1, 1 << 30),
}


@pytest.mark.parametrize(("name", "low", "high"), [(n, *b) for n, b in BORDERS.items()])
def test_limits_are_taken_up_to_their_borders(name: str, low: int, high: int) -> None:
    for value in (low, high):
        hello.check_limits(msgspec.structs.replace(SANE, **{name: value}))
    for value in (low - 1, high + 1, -high, 1 << 62):
        with pytest.raises(RemoteProtocolError, match="limits that cannot be"):
            hello.check_limits(msgspec.structs.replace(SANE, **{name: value}))


def test_slots_are_multiples_of_64_bytes() -> None:
    with pytest.raises(RemoteProtocolError, match="limits that cannot be"):
        hello.check_limits(msgspec.structs.replace(SANE, slot_bytes=96))


@given(limits)
def test_any_limits_are_sane_or_an_error(offered: Any) -> None:
    inside = (
        all(low <= getattr(offered, name) <= high for name, (low, high) in BORDERS.items())
        and not offered.slot_bytes % 64
    )
    if inside:
        hello.check_limits(offered)
    else:
        with pytest.raises(RemoteProtocolError):
            hello.check_limits(offered)
