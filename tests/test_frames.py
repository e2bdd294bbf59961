"""Lane frames: whatever 64 bytes come, they are a header that we could have sent, or an error."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import xxhash
from hypothesis import given, strategies as st

from aiordma.errors import RemoteProtocolError
from aiordma.wire.frames import (
    HEADER_BYTES,
    ChunkHeader,
    CreditHeader,
    WindowHeader,
    decode,
    encode_chunk,
    encode_credit,
    encode_window,
    payload_check,
)

words = st.integers(0, (1 << 64) - 1)
chunks = st.builds(
    ChunkHeader,
    slot=st.integers(0, 0xFFFF),
    length=st.integers(0, 0xFFFFFFFF),
    transfer=words,
    offset=words,
    check=st.none() | words,
    is_in_place=st.booleans(),
)
windows = st.builds(
    WindowHeader,
    number=st.integers(0, 0xFFFF),
    key=st.integers(0, 0xFFFFFFFF),
    transfer=words,
    offset=words,
    nbytes=words,
    address=words,
)
slot_sets = st.sets(st.integers(0, 255)) | st.sampled_from([set(), set(range(256))])


def bitmap_of(slots: set[int]) -> int:
    return sum(1 << slot for slot in slots)


frames = st.one_of(
    st.tuples(chunks, words).map(lambda pair: (encode_chunk(*pair), pair[1])),
    st.tuples(slot_sets, words).map(
        lambda pair: (encode_credit(bitmap_of(pair[0]), pair[1]), pair[1])
    ),
    st.tuples(windows, words).map(lambda pair: (encode_window(*pair), pair[1])),
)


@given(chunks, words, st.sampled_from([bytes, bytearray, memoryview]))
def test_a_chunk_header_survives_the_wire(header: Any, sequence: Any, kind: Any) -> None:
    frame = encode_chunk(header, sequence)
    assert len(frame) == HEADER_BYTES
    assert decode(kind(frame), sequence) == header


@given(windows, words)
def test_a_window_header_survives_the_wire(window: Any, sequence: Any) -> None:
    frame = encode_window(window, sequence)
    assert len(frame) == HEADER_BYTES
    assert decode(frame, sequence) == window


@given(slot_sets, words)
def test_a_credit_names_any_subset_of_256_slots(slots: Any, sequence: Any) -> None:
    frame = encode_credit(bitmap_of(slots), sequence)
    assert len(frame) == HEADER_BYTES
    credit = decode(frame, sequence)
    assert isinstance(credit, CreditHeader)
    assert {slot for slot in range(256) if credit.slots >> slot & 1} == slots
    assert credit.slots >> 256 == 0


def test_the_layout_is_the_documented_one() -> None:
    chunk = encode_chunk(ChunkHeader(0x0102, 0x03040506, 7, 8, 9), 10)
    head = b"aior" + bytes([1, 1, 0x02, 0x01, 0x06, 0x05, 0x04, 0x03, 0, 0, 0, 0])
    body = head + struct.pack("<5Q", 7, 8, 9, 0, 10)
    assert chunk == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    credit = encode_credit(1 << 0 | 1 << 65 | 1 << 130 | 1 << 195, 11)
    body = b"aior" + bytes([2] + [0] * 11) + struct.pack("<5Q", 1, 2, 4, 8, 11)
    assert credit == body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@given(frames, st.data())
def test_a_damaged_frame_is_never_taken_for_another(frame: Any, data: Any) -> None:
    encoded, sequence = frame
    damaged = bytearray(encoded)
    for at in data.draw(st.sets(st.integers(0, 63), min_size=1, max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError, match=f"lane frame {sequence} is damaged"):
        decode(damaged, sequence)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), words)
def test_random_bytes_are_an_error(frame: Any, sequence: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="damaged"):
        decode(frame, sequence)


@given(
    st.sampled_from([0, 1, 2, 3, 4, 255]),
    st.sampled_from([0, 1, 2, 3, 4, 255]),
    st.binary(min_size=42, max_size=42) | st.just(bytes(42)),
    words,
)
def test_a_forged_frame_is_one_that_we_could_have_sent_or_an_error(
    kind: Any, flags: Any, rest: Any, sequence: Any
) -> None:
    body = b"aior" + bytes([kind, flags]) + rest + struct.pack("<Q", sequence)
    frame = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    try:
        header = decode(frame, sequence)
    except RemoteProtocolError:
        return
    if isinstance(header, ChunkHeader):
        assert encode_chunk(header, sequence) == frame
    elif isinstance(header, WindowHeader):
        assert encode_window(header, sequence) == frame
    else:
        assert encode_credit(header.slots, sequence) == frame


@pytest.mark.parametrize(
    ("kind", "flags", "at", "text"),
    [
        (4, 0, None, "of kind 4 with flags"),
        (0, 0, None, "of kind 0 with flags"),
        (1, 4, None, "of kind 1 with flags"),
        (1, 2, 32, "of kind 1 with flags"),
        (1, 1, 12, "of kind 1 with flags"),
        (1, 1, 40, "of kind 1 with flags"),
        (1, 0, 32, "of kind 1 with flags"),
        (2, 1, None, "of kind 2 with flags"),
        (2, 0, 6, "of kind 2 with flags"),
        (2, 0, 8, "of kind 2 with flags"),
        (2, 0, 12, "of kind 2 with flags"),
        (3, 1, None, "of kind 3 with flags"),
        (3, 0, 12, "of kind 3 with flags"),
    ],
)
def test_kinds_and_bits_of_other_versions_are_refused(
    kind: int, flags: int, at: int | None, text: str
) -> None:
    body = bytearray(b"aior" + bytes([kind, flags]) + bytes(50))
    if at is not None:
        body[at] = 1
    with pytest.raises(RemoteProtocolError, match=text):
        decode(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)), 0)


@given(frames, words)
def test_another_sequence_number_is_an_error(frame: Any, due: Any) -> None:
    encoded, sequence = frame
    if due == sequence:
        due ^= 1
    with pytest.raises(
        RemoteProtocolError, match=f"lane frame {due} was due, frame {sequence} came"
    ):
        decode(encoded, due)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_the_check_of_the_parts_is_the_check_of_the_whole(parts: Any) -> None:
    whole = xxhash.xxh3_64_intdigest(b"".join(parts))
    assert payload_check([memoryview(part) for part in parts]) == whole
