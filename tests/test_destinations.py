"""Where tensors arrive: in the caller's arrays, in fresh ones, or in views of a chunk."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from aiordma import ChannelConfig, Chunk, tensors as tensors_module
from aiordma.errors import ManifestError, TensorError
from aiordma.outgoing import prepare
from aiordma.tensors import Destination, allocate, destination, typed_view
from aiordma.wire.manifest import ITEM_BYTES, TensorSpec, lay_out
from tests.arrays import NUMPY, TORCH, move, numpy_of, torch_of
from tests.harness import channel_pair


@pytest.fixture
def no_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tensors_module._numpy_dtype.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    yield
    tensors_module._numpy_dtype.cache_clear()


@pytest.mark.usefixtures("no_ml_dtypes")
@pytest.mark.parametrize("dtype", [d for d in ITEM_BYTES if d == "BF16" or "F8" in d])
def test_without_ml_dtypes(dtype: str) -> None:
    manifest = lay_out([("fine", "F16", (2,), None), ("w", dtype, (4,), None)])
    text = f"'w' is {dtype}, .*pass framework='torch' or install ml_dtypes"
    with pytest.raises(TensorError, match=text):
        allocate(manifest, "numpy")
    assert allocate(manifest, "torch")[1]["w"].dtype == TORCH[dtype]
    raw = typed_view(manifest.tensors[1], memoryview(bytes(range(4))))
    assert raw.dtype == np.dtype(f"u{ITEM_BYTES[dtype]}")
    assert raw.tobytes() == bytes(range(4))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_typed_view_is_flat_borrowed_and_read_only(dtype: str) -> None:
    spec = TensorSpec("a", dtype, (2, 2), 0)
    memory = bytearray(3 * spec.item_bytes)
    view = typed_view(spec, memoryview(memory))
    assert (view.dtype, view.shape) == (NUMPY[dtype], (3,))
    assert not view.flags.writeable
    memory[0] = 1
    assert view.tobytes() == memory
    assert typed_view(spec, memoryview(b"")).shape == (0,)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_allocated_arrays_are_aligned_views_into_one_buffer(framework: Any) -> None:
    manifest = lay_out([("b", "U8", (3,), None), ("a", "F64", (2, 2), None)])
    buffer, arrays = allocate(manifest, framework)
    assert np.frombuffer(buffer, np.uint8).ctypes.data % 64 == 0
    assert (buffer.nbytes, buffer.readonly, buffer.format) == (35, False, "B")
    buffer[:] = bytes(32) + b"\1\2\3"
    assert list(arrays) == ["b", "a"]
    assert arrays["b"].tolist() == [1, 2, 3]
    assert arrays["a"].tolist() == [[0, 0], [0, 0]]
    target = Destination(manifest, buffer)
    assert target.view(0, 35) == buffer
    assert target.finish() == 0


def test_allocate_refuses_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = lay_out([("a", "U8", (1 << 60,), None)])
    with pytest.raises(TensorError, match="unknown framework 'jax': use 'numpy' or 'torch'"):
        allocate(manifest, "jax")  # type: ignore[arg-type]
    with pytest.raises(TensorError, match=r"no memory for these \d+ bytes: take them by chunks"):
        allocate(manifest, "numpy")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TensorError, match="needs torch"):
        allocate(manifest, "torch")


def test_an_older_torch_lacks_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(TensorError, match="'a' is F8_E8M0, which this torch has not: upgrade"):
        allocate(lay_out([("a", "F8_E8M0", (1,), None)]), "torch")


def test_a_chunk_in_one_array_has_a_place_and_one_in_several_is_scattered() -> None:
    manifest = lay_out([("a", "F32", (32,), None), ("b", "U8", (100,), None)])
    a, b = np.zeros(32, np.float32), np.zeros(100, np.uint8)
    target = destination(manifest, {"b": b, "a": a})
    place = target.view(64, 64)
    assert place is not None
    place[:] = np.full(16, 2.0, np.float32).tobytes()
    assert a.tolist() == [0.0] * 16 + [2.0] * 16
    assert target.view(64, 128) is None
    assert target.scatter(64, memoryview(bytes([1] * 128))) == 128
    assert a[16:].tobytes() == bytes([1] * 64)
    assert b.tolist() == [1] * 64 + [0] * 36
    assert target.scatter(192, memoryview(bytes([5] * 36))) == 36
    assert b.tolist() == [1] * 64 + [5] * 36
    with pytest.raises(ManifestError, match="not within"):
        target.view(192, 64)
    with pytest.raises(ManifestError, match="not within"):
        target.scatter(192, memoryview(bytes(64)))


F32 = np.float32
BACK = np.zeros(8, F32)


@pytest.mark.parametrize(
    ("into", "text"),
    [
        ([BACK], "`into` must be a mapping"),
        ({"a": BACK[:4]}, r"exactly the transfer's names: it lacks \['b'\], and has \[\]"),
        ({"a": BACK[:4], "b": BACK[4:], "c": BACK}, r"lacks \[\], and has \['c'\] besides"),
        (
            {"a": BACK[:4], "b": np.zeros(4)},
            r"'b' is F32 of shape \(4,\), but `into` has F64 of shape \(4,\)",
        ),
        ({"a": BACK[:4], "b": np.zeros((2, 2), F32)}, r"`into` has F32 of shape \(2, 2\)"),
        ({"a": BACK[:4], "b": np.zeros(8, F32)[::2]}, "'b' is not contiguous"),
        ({"a": BACK[:4], "b": np.frombuffer(bytes(16), F32)}, "'b' is read-only in `into`"),
        ({"a": BACK[:4], "b": memoryview(bytes(16)).cast("f")}, "'b' is read-only"),
        ({"a": BACK[:4], "b": [0.0] * 4}, "'b' is a builtins.list"),
        ({"a": BACK[:4], "b": BACK[:4]}, "'a' overlaps 'b' in the memory of `into`"),
        ({"a": BACK[3:7], "b": BACK[:4]}, "'b' overlaps 'a'"),
    ],
)
def test_a_destination_that_does_not_fit_is_named(into: Any, text: str) -> None:
    manifest = lay_out([("a", "F32", (4,), None), ("b", "F32", (4,), None)])
    with pytest.raises(TensorError, match=text):
        destination(manifest, into)
    destination(manifest, {"a": BACK[:4], "b": BACK[4:]})


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.integers(0, 70), st.booleans()),
        max_size=8,
    ),
    st.integers(1, 5).map(lambda n: 64 * n),
)
def test_any_mixture_arrives_whole_in_the_callers_arrays(rows: Any, chunk_bytes: int) -> None:
    sent = {
        f"t{i}": torch_of(dtype, (n,)) if use_torch else numpy_of(dtype, (n,))
        for i, (dtype, n, use_torch) in enumerate(rows)
    }
    outgoing = prepare(sent)
    into = {f"t{i}": np.zeros(n, NUMPY[dtype]) for i, (dtype, n, _) in enumerate(rows)}
    move(outgoing, destination(outgoing.manifest, into), chunk_bytes)
    got = prepare(into)
    total = outgoing.manifest.total_bytes
    assert b"".join(got.views(0, total)) == b"".join(outgoing.views(0, total))


@pytest.mark.parametrize("way", ["arrays", "into"])
async def test_what_is_looked_at_is_what_is_kept_though_the_peer_writes_on(way: str) -> None:
    """Its device can write to the slot at any time, and so it does here amid the look."""
    async with channel_pair("rdma", ChannelConfig(slot_bytes=4096, slots=8)) as (near, far):
        sent = {"a": np.full(300, np.nan, np.float32), "b": np.full(700, np.nan, np.float32)}
        ring = far._link.ports[0].ring
        looked_at: list[Any] = []

        def look(chunk: Chunk) -> None:
            for slot in range(ring.slots):
                ring.view(slot, 4096)[:] = bytes(4096)
            looked_at.extend(view.copy() for _, _, view in chunk.parts())

        sending = asyncio.create_task(near.send_tensors(sent))
        transfer = await anext(far.incoming())
        into = {name: np.zeros_like(array) for name, array in sent.items()}
        if way == "arrays":
            into = await transfer.arrays(on_chunk=look)
        else:
            await transfer.into(into, on_chunk=look)
        await sending
        kept = [into[name] for name in sent]
        assert np.array_equal(np.concatenate(looked_at), np.concatenate(kept), equal_nan=True)
