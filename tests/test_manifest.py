"""The manifest: layout, chunk parts, limits, and whatever a peer may send instead of one."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
import safetensors.torch
from hypothesis import given, strategies as st

from aiordma.errors import ManifestError
from aiordma.wire.manifest import (
    CHUNK_ALIGN_BYTES,
    ITEM_BYTES,
    Manifest,
    Part,
    TensorSpec,
    check,
    decode,
    encode,
    lay_out,
)

LIMITS = {"max_tensors": 1000, "max_total_bytes": 1 << 40}


def manifest_of(*specs: tuple[str, str, tuple[int, ...], int], total: int) -> Manifest:
    return Manifest(tuple(TensorSpec(*spec) for spec in specs), total)


def chunks_of(total: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Cut [0, total) into chunks of the sizes, repeated as needed."""
    chunks: list[tuple[int, int]] = []
    offset = 0
    while offset < total:
        length = min(sizes[len(chunks) % len(sizes)], total - offset)
        chunks.append((offset, length))
        offset += length
    return chunks


entries = st.lists(
    st.tuples(
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 7), max_size=4).map(tuple),
        st.none() | st.integers(0, 3),
    ),
    max_size=12,
).map(lambda rows: [(f"t{i}", *row) for i, row in enumerate(rows)])
chunk_sizes = st.lists(
    st.integers(1, 12).map(lambda n: n * CHUNK_ALIGN_BYTES), min_size=1, max_size=4
)


@given(entries, chunk_sizes)
def test_any_layout_is_sound_and_any_chunking_covers_it_once(entries: Any, sizes: Any) -> None:
    manifest = lay_out(entries)
    check(manifest, **LIMITS)
    assert [spec.name for spec in manifest.tensors] == [entry[0] for entry in entries]
    assert manifest.total_bytes == sum(
        {spec.offset: spec.nbytes for spec in manifest.tensors if spec.nbytes}.values()
    )
    covered = 0
    for offset, length in chunks_of(manifest.total_bytes, sizes):
        parts = list(manifest.parts(offset, length))
        assert sum(part.nbytes for part in parts) == length
        for spec, element_offset, start, nbytes in parts:
            assert start == covered
            assert start == spec.offset + element_offset * spec.item_bytes
            assert nbytes > 0
            assert nbytes % spec.item_bytes == 0
            assert start + nbytes <= spec.end
            covered += nbytes
    assert covered == manifest.total_bytes


@given(entries)
def test_the_layout_shares_just_what_has_one_alias_dtype_and_shape(entries: Any) -> None:
    tensors = lay_out(entries).tensors
    for (_, *one, alias), a in zip(entries, tensors, strict=True):
        for (_, *other, other_alias), b in zip(entries, tensors, strict=True):
            if a.nbytes and b.nbytes and a is not b:
                tied = one == other and alias is not None and alias == other_alias
                assert (a.offset == b.offset) == tied


@given(entries)
def test_a_manifest_survives_the_wire(entries: Any) -> None:
    manifest = lay_out(entries)
    assert decode(encode(manifest), **LIMITS) == manifest


def test_layout_by_falling_item_size_keeps_the_order_of_the_caller() -> None:
    manifest = lay_out(
        [
            ("flag", "BOOL", (3,), None),
            ("half", "BF16", (5,), None),
            ("one", "F32", (), None),
            ("none", "F64", (0, 4), None),
            ("two", "F32", (2,), None),
        ]
    )
    assert [(spec.name, spec.offset) for spec in manifest.tensors] == [
        ("flag", 22),
        ("half", 12),
        ("one", 0),
        ("none", 0),
        ("two", 4),
    ]
    assert manifest.total_bytes == 25
    one, two, half, flag = manifest.parts(0, 25)
    assert one == Part(manifest.tensors[2], 0, 0, 4)
    assert (two.start, half.start, flag.start) == (4, 12, 22)


def test_parts_of_a_chunk_in_the_midst_of_a_huge_tensor() -> None:
    manifest = lay_out([("big", "F32", (1 << 40,), None), ("b", "U8", (64,), None)])
    (part,) = manifest.parts(1 << 41, 1 << 20)
    assert part == Part(manifest.tensors[0], 1 << 39, 1 << 41, 1 << 20)
    assert [part.spec.name for part in manifest.parts((1 << 42) - 64, 128)] == ["big", "b"]


def test_parts_name_the_first_of_tied_tensors() -> None:
    manifest = lay_out([("wte", "F32", (4, 2), 7), ("lm_head", "F32", (4, 2), 7)])
    assert manifest.total_bytes == 32
    assert [part.spec.name for part in manifest.parts(0, 32)] == ["wte"]


@pytest.mark.parametrize(
    ("offset", "length", "text"),
    [
        (-64, 64, "not within"),
        (0, -64, "not within"),
        (64, 128, "not within"),
        (32, 64, "split an element"),
        (0, 63, "split an element"),
    ],
)
def test_what_is_no_chunk_is_refused(offset: int, length: int, text: str) -> None:
    manifest = lay_out([("a", "F64", (16,), None)])
    with pytest.raises(ManifestError, match=text):
        manifest.parts(offset, length)


def test_a_frozen_manifest_is_equal_by_value_whatever_it_has_cached() -> None:
    one, other = (lay_out([("a", "F32", (16,), None)]) for _ in range(2))
    assert list(one.parts(0, 64))
    assert one == other
    assert encode(one) == encode(other)


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        (lay_out([(f"t{i}", "U8", (), None) for i in range(1001)]), "1001 tensors.*limit of 1000"),
        (lay_out([("a", "U8", (1 << 41,), None)]), "more than the limit of.*max_transfer_bytes"),
        (lay_out([("", "U8", (), None)]), "empty name"),
        (lay_out([("n" * 1025, "U8", (), None)]), r"1025 bytes.*limit of 1024: shorten"),
        (lay_out([("é" * 513, "U8", (), None)]), "1026 bytes"),
        (lay_out([("\ud800", "U8", (), None)]), "not Unicode text"),
        (lay_out([("a", "U8", (), None)] * 2), "'a' appears twice"),
        (manifest_of(("a", "F4", (2,), 0), total=1), "'a' has the unknown dtype 'F4'.*as U8"),
        (manifest_of(("a", "", (2,), 0), total=1), "unknown dtype ''"),
        (lay_out([("a", "U8", (1,) * 65, None)]), "65 dimensions, more than 64: reshape"),
        (lay_out([("a", "U8", (2, -1), None)]), r"negative dimension in its shape \(2, -1\)"),
        (manifest_of(("a", "F32", (1 << 31, 1 << 31), 0), total=4), "overflows 63 bits"),
        (manifest_of(("a", "F32", (1 << 62, 4, 0), 0), total=0), "overflows 63 bits"),
        (manifest_of(("a", "U8", (1 << 63,), 0), total=1), "overflows 63 bits"),
        (
            manifest_of(("b", "U8", (2,), 0), ("a", "F32", (1,), 2), total=6),
            "'a' is misaligned: its offset 2 .*item size 4",
        ),
        (
            manifest_of(("a", "F32", (4,), 0), ("b", "F32", (2,), 8), total=16),
            "'a' and 'b' overlap",
        ),
        (
            manifest_of(("a", "F32", (4,), 0), ("b", "U32", (4,), 0), total=16),
            "'a' and 'b' overlap",
        ),
        (manifest_of(("a", "F32", (4,), 0), ("b", "F32", (2, 2), 0), total=16), "overlap"),
        (manifest_of(("a", "U8", (4,), 4), total=8), r"hole.*\[0, 4\)"),
        (manifest_of(("a", "U8", (4,), 0), ("b", "U8", (1,), 6), total=7), r"hole.*\[4, 6\)"),
        (manifest_of(("a", "U8", (4,), 0), total=8), r"hole.*\[4, 8\)"),
        (manifest_of(total=8), r"hole.*\[0, 8\)"),
        (manifest_of(total=-8), "hole"),
        (manifest_of(("a", "U8", (9,), 0), total=8), r"bytes \[0, 9\), beyond the manifest's 8"),
        (manifest_of(("a", "U8", (0,), 9), total=8), "beyond the manifest's 8"),
        (manifest_of(("a", "U8", (8,), -8), total=8), "beyond"),
        (manifest_of(("a", "U8", (1,), (1 << 64) - 1), total=1), "beyond"),
    ],
)
def test_check_says_what_is_wrong(manifest: Manifest, text: str) -> None:
    with pytest.raises(ManifestError, match=text) as caught:
        check(manifest, **LIMITS)
    assert type(caught.value) is ManifestError
    assert len(str(caught.value)) < 1000


def test_no_limit_lets_sizes_overflow() -> None:
    with pytest.raises(ManifestError, match="more than the limit"):
        check(
            manifest_of(("a", "U8", (8,), 0), total=1 << 63), max_tensors=1, max_total_bytes=1 << 70
        )


def test_the_names_limit_is_the_callers() -> None:
    manifest = lay_out([("name", "U8", (), None)])
    with pytest.raises(ManifestError, match="limit of 3"):
        decode(encode(manifest), **LIMITS, max_name_bytes=3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"\x92\xdd\x3b\x9a\xca\x00" + b"\x00" * 14, "1000000000 tensors.*limit of 1000"),
        (b"\x92\xdc\xff\xff", "65535 tensors"),
        (b"\x92\x91\x94\xa1a\xa2U8\xdd\x3b\x9a\xca\x00" + b"\x00" * 8, "malformed"),
        (b"\x92\x91\x94\xdb\xff\xff\xff\xff", "malformed"),
        (b"\x92\x91\x94\xa1\xff\xa2U8\x90\x00\x01", "malformed.*utf-8"),
        (b"\x93\x90\x00" + b"\x91" * 100_000, "malformed"),
        (b"\x91" * 100_000, "malformed"),
        (b"\x92\x90\x00\x00", "trailing"),
        (b"\x92\x90\xcb" + b"\x00" * 8, "Expected `int`, got `float`"),
        (encode(lay_out([("n" * 10_000_000, "U8", (), None)])), "10000000 bytes.*limit of 1024"),
        (encode(lay_out([("a", "U8", (1,) * 65, None)])), "malformed.*length <= 64"),
    ],
)
def test_decode_allocates_little_for_what_is_no_manifest(data: bytes, text: str) -> None:
    tracemalloc.start()
    with pytest.raises(ManifestError, match=text):
        decode(data, **LIMITS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024 + 3 * len(data)


def test_a_manifest_beyond_64_bits_is_not_encoded() -> None:
    with pytest.raises(ManifestError, match="cannot be encoded"):
        encode(manifest_of(total=1 << 64))
    with pytest.raises(ManifestError, match="cannot be encoded"):
        encode(lay_out([("\ud800", "U8", (), None)]))


def is_sound_or_refused(data: bytes | bytearray) -> bool:
    """Any other exception than ManifestError fails the test."""
    try:
        manifest = decode(data, **LIMITS)
    except ManifestError:
        return True
    covered = sum(part.nbytes for part in manifest.parts(0, manifest.total_bytes))
    return covered == manifest.total_bytes


@given(st.binary(max_size=80))
def test_random_bytes_are_a_manifest_or_a_manifest_error(data: bytes) -> None:
    assert is_sound_or_refused(data)


@given(entries, st.data())
def test_a_mutated_manifest_is_a_manifest_or_a_manifest_error(entries: Any, data: Any) -> None:
    encoded = bytearray(encode(lay_out(entries)))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    assert is_sound_or_refused(encoded[: data.draw(st.integers(0, len(encoded)))])
    assert is_sound_or_refused(encoded)


numbers = st.integers(-70, 70) | st.integers(-(1 << 63), (1 << 64) - 1)


@given(
    st.lists(
        st.tuples(
            st.text(max_size=3),
            st.sampled_from([*ITEM_BYTES, "F4", ""]),
            st.lists(numbers, max_size=5),
            numbers,
        ),
        max_size=5,
    ),
    numbers,
)
def test_any_numbers_are_a_manifest_or_a_manifest_error(tensors: Any, total: int) -> None:
    assert is_sound_or_refused(msgspec.msgpack.encode([tensors, total]))


def test_every_safetensors_dtype_of_whole_bytes_is_known() -> None:
    sizes = {name: dtype.itemsize for name, dtype in safetensors.torch._TYPES.items() if dtype}
    assert sizes.items() <= ITEM_BYTES.items()
    assert ITEM_BYTES.keys() - sizes.keys() == {"F8_E8M0"}
    assert ITEM_BYTES["F8_E8M0"] == 1
