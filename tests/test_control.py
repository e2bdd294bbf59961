"""The control stream: frames in order and exactly once, or `RemoteProtocolError`; and nothing else."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from aiordma.errors import RemoteProtocolError
from aiordma.wire import control
from aiordma.wire.control import (
    Abort,
    Acked,
    Bye,
    Claim,
    ControlStream,
    Done,
    Frame,
    Message,
    MessageCredit,
    Open,
    OpenCredit,
    Ping,
    Pong,
    Unclaim,
)

MAX_BODY = 4096
wholes = st.integers(0, (1 << 62) - 1)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Open, wholes, wholes, st.binary(max_size=80), st.binary(max_size=80)),
    *(st.builds(kind, wholes) for kind in (Claim, Unclaim, Acked, Done, Ping, Pong)),
    *(st.builds(kind, wholes, wholes) for kind in (MessageCredit, OpenCredit)),
    st.builds(Abort, wholes, st.booleans(), st.text(max_size=9), st.text(max_size=40)),
    st.builds(Message, st.binary(max_size=80)),
    st.builds(Bye, st.text(max_size=20)),
)


def stream() -> ControlStream:
    return ControlStream(MAX_BODY)


def raw(kind: int, sequence: int, body: bytes = b"", *, ack: int = 0) -> bytes:
    """A frame as its header's table says, written by hand."""
    return struct.pack("<IB3xQQ", len(body), kind, sequence, ack) + body


def packed(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


@given(st.lists(frames, max_size=12), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_split_gives_the_same_frames(sent: Any, cuts: Any) -> None:
    out, into = stream(), stream()
    for frame in sent:
        out.send(frame)
    data = out.data_to_send()
    assert out.data_to_send() == b""
    assert [f for piece in pieces(data, cuts) for f in into.receive(piece)] == sent


@given(st.lists(frames, min_size=1, max_size=4))
def test_byte_by_byte_gives_the_same_frames(sent: Any) -> None:
    out, into = stream(), stream()
    for frame in sent:
        out.send(frame)
    data = out.data_to_send()
    assert [f for i in range(len(data)) for f in into.receive(data[i : i + 1])] == sent


@given(st.lists(frames, min_size=1, max_size=8), st.data())
def test_frames_that_come_again_are_dropped(sent: Any, data: Any) -> None:
    out, into = stream(), stream()
    batches = []
    for frame in sent:
        out.send(frame)
        batches.append(out.data_to_send())
    cut = data.draw(st.integers(0, len(sent)))
    back = data.draw(st.integers(0, cut))
    got = list(into.receive(b"".join(batches[:cut])))
    # What a resume sends: the sequenced frames that may not have come, once more.
    again = [b for b, f in zip(batches[back:cut], sent[back:cut], strict=True) if f.sequenced]
    assert list(into.receive(b"".join(again))) == []
    got += into.receive(b"".join(batches[cut:]))
    assert got == sent


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(frames, max_size=3), st.integers(0, 600)), max_size=20
    )
)
def test_two_streams_that_talk_keep_only_what_is_not_acknowledged(turns: Any) -> None:
    ends = stream(), stream()
    pipes = bytearray(), bytearray()
    sent: tuple[list[Frame], list[Frame]] = [], []
    got: tuple[list[Frame], list[Frame]] = [], []
    for side, batch, take in turns:
        for frame in batch:
            ends[side].send(frame)
            sent[side].append(frame)
        pipes[side].extend(ends[side].data_to_send())
        piece = bytes(pipes[1 - side][:take])
        del pipes[1 - side][:take]
        got[1 - side].extend(ends[side].receive(piece))
    for side in (0, 1):
        got[side].extend(ends[1 - side].receive(bytes(pipes[side])))
        assert got[side] == sent[side]
    for side in (0, 1):  # a word to the other end acknowledges all that came
        ends[side].send(Bye(""))
        list(ends[1 - side].receive(ends[side].data_to_send()))
    assert ends[0].kept == 0
    assert ends[1].kept == 1  # its own last word


def test_unsequenced_frames_are_not_kept() -> None:
    out = stream()
    out.send(Ping(1))
    out.send(Pong(1))
    assert out.kept == 0
    out.send(Claim(1))
    assert out.kept == 1


def test_a_listener_acknowledges_every_32_frames() -> None:
    out, into = stream(), stream()
    acks = 0
    for i in range(1, 1001):
        out.send(Claim(i))
        assert list(into.receive(out.data_to_send())) == [Claim(i)]
        answer = into.data_to_send()
        assert bool(answer) == (i % 32 == 0)
        acks += bool(answer)
        assert list(out.receive(answer)) == []
        assert out.kept == i % 32
    assert acks == 1000 // 32


def test_a_listener_acknowledges_every_256_kib() -> None:
    out, into = ControlStream(1 << 20), ControlStream(1 << 20)
    kept_bytes = 0
    for _ in range(50):
        out.send(Message(bytes(100_000)))
        data = out.data_to_send()
        list(into.receive(data))
        kept_bytes += len(data)
        answer = into.data_to_send()
        assert bool(answer) == (kept_bytes >= 256 * 1024)
        list(out.receive(answer))
        if answer:
            kept_bytes = 0
        assert bool(out.kept) == bool(kept_bytes)


def test_a_frame_sent_back_carries_the_acknowledgement() -> None:
    out, into = stream(), stream()
    out.send(Claim(1))
    list(into.receive(out.data_to_send()))
    into.send(Ping(1))
    assert list(out.receive(into.data_to_send())) == [Ping(1)]
    assert out.kept == 0


BAD = {
    "a gap": (raw(2, 2, packed(1)), "frame 1 was due, frame 2 came"),
    "ack of the future": (raw(0, 0, ack=1), "acknowledges frame 1; 0 were sent"),
    "oversized": (raw(7, 1, bytes(MAX_BODY + 1)), "4097 bytes, over the 4096"),
    "oversized, header only": (raw(7, 1, bytes(MAX_BODY + 1))[:24], "4097 bytes, over the 4096"),
    "unknown kind": (raw(13, 1, packed(1)), "unknown kind 13"),
    "unknown kind, unsequenced": (raw(255, 0, packed(1)), "unknown kind 255"),
    "no msgpack": (raw(2, 1, b"\xc1"), "malformed control frame of kind 2"),
    "empty body": (raw(2, 1, b""), "malformed"),
    "bytes after the body": (raw(2, 1, packed(1) + b"\x01"), "malformed"),
    "too few fields": (raw(8, 1, packed(1)), "malformed"),
    "too many fields": (raw(2, 1, packed(1, 2)), "malformed"),
    "not an array": (raw(2, 1, msgspec.msgpack.encode({"transfer": 1})), "malformed"),
    "negative": (raw(2, 1, packed(-1)), "malformed"),
    "huge": (raw(2, 1, packed(1 << 62)), "malformed"),
    "beyond 64 bits": (raw(2, 1, packed((1 << 64) - 1)), "malformed"),
    "float": (raw(2, 1, packed(1.0)), "malformed"),
    "text that is no UTF-8": (raw(12, 1, b"\x91\xa1\xff"), "malformed"),
    "deep nesting": (raw(2, 1, b"\x91" * MAX_BODY), "malformed"),
    "CLAIM without a number": (raw(2, 0, packed(1)), "with or without a sequence number"),
    "MESSAGE without a number": (raw(7, 0, b"x"), "with or without a sequence number"),
    "PING with a number": (raw(10, 1, packed(1)), "with or without a sequence number"),
    "a numbered acknowledgement": (raw(0, 1), "acknowledgement with a sequence number"),
    "an acknowledgement with a body": (
        raw(0, 0, b"x"),
        "acknowledgement with a sequence number or a body",
    ),
}


@pytest.mark.parametrize(("data", "text"), BAD.values(), ids=BAD)
def test_what_no_peer_sends_is_an_error(data: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        list(stream().receive(data))


@pytest.mark.parametrize(("data", "text"), BAD.values(), ids=BAD)
def test_frames_before_the_bad_one_are_told(data: bytes, text: str) -> None:
    frames = stream().receive(raw(10, 0, packed(5)) + data)
    assert next(frames) == Ping(5)
    with pytest.raises(RemoteProtocolError, match=text):
        next(frames)


def test_the_largest_body_is_taken() -> None:
    out, into = stream(), stream()
    out.send(Message(bytes(MAX_BODY)))
    assert list(into.receive(out.data_to_send())) == [Message(bytes(MAX_BODY))]


def survives(data: bytes) -> None:
    into = stream()
    try:
        for frame in into.receive(data):
            assert isinstance(frame, Frame)
    except RemoteProtocolError:
        pass
    assert into.kept == 0


@given(st.binary(max_size=200))
def test_random_bytes_are_frames_or_an_error(data: Any) -> None:
    survives(data)


@given(st.lists(st.tuples(st.integers(0, 14), st.booleans(), st.binary(max_size=24)), max_size=4))
def test_random_bodies_are_frames_or_an_error(rows: Any) -> None:
    survives(b"".join(raw(kind, (i + 1) * odd, body) for i, (kind, odd, body) in enumerate(rows)))


@given(st.lists(frames, min_size=1, max_size=4), st.data())
def test_a_damaged_stream_is_frames_or_an_error(sent: Any, data: Any) -> None:
    out = stream()
    for frame in sent:
        out.send(frame)
    damaged = bytearray(out.data_to_send())
    for at in data.draw(st.sets(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    survives(bytes(damaged))


def test_kinds_are_distinct_and_none_is_the_bare_acknowledgement() -> None:
    kinds = [cls.kind for cls in vars(control).values() if _is_kind(cls)]
    assert sorted(kinds) == list(range(1, 13))


def _is_kind(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Frame) and value is not Frame
