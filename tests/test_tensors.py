"""Arrays to bytes and back: every dtype and source, no copies, and a clear error for the rest."""

from __future__ import annotations

import array
import mmap
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st

from aiordma import tensors as tensors_module
from aiordma.errors import ManifestError, TensorError
from aiordma.tensors import (
    Destination,
    Outgoing,
    allocate,
    destination,
    prepare,
    typed_view,
)
from aiordma.wire.manifest import ITEM_BYTES, Manifest, TensorSpec, lay_out

NAMES = tensors_module._DTYPES
NUMPY = {d: np.dtype(getattr(np, n, None) or getattr(ml_dtypes, n)) for d, n in NAMES.items()}
TORCH = {d: getattr(torch, n) for d, n in NAMES.items()}
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 129)]


def chunks_of(total: int, length: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, total, length):
        yield offset, min(length, total - offset)


def move(outgoing: Outgoing, target: Destination, chunk_bytes: int = 128) -> None:
    """Send in chunks, last chunk first: by view where there is one, else by scatter."""
    for offset, length in reversed(list(chunks_of(outgoing.manifest.total_bytes, chunk_bytes))):
        data = b"".join(outgoing.views(offset, length))
        assert len(data) == length
        place = target.view(offset, length)
        if place is None:
            assert target.scatter(offset, memoryview(data)) == length
        else:
            place[:] = data
    target.finish()


def round_trip(tensors: dict[str, Any], framework: Any = "numpy") -> dict[str, Any]:
    outgoing = prepare(tensors)
    buffer, arrays = allocate(outgoing.manifest, framework)
    move(outgoing, Destination(outgoing.manifest, buffer))
    return arrays


def random_bytes(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).integers(0, 2, n, np.uint8)  # 0 and 1 suit BOOL, too


def numpy_of(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    result = np.empty(shape, NUMPY[dtype])
    result.reshape(-1).view(np.uint8)[:] = random_bytes(result.nbytes)
    return result


def torch_of(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    raw = random_bytes(int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype])
    result = torch.empty(shape, dtype=TORCH[dtype])
    result.untyped_storage().copy_(torch.from_numpy(raw).untyped_storage())
    return result


def test_an_empty_tensor_of_stride_0_travels() -> None:
    value = torch.from_numpy(np.zeros(0, np.float32))
    assert round_trip({"a": value}, "torch")["a"].shape == (0,)
    assert round_trip({"a": value.reshape(3, 0)})["a"].shape == (3, 0)


def test_each_wire_dtype_has_a_counterpart_of_its_size() -> None:
    assert {d: n.itemsize for d, n in NUMPY.items()} == ITEM_BYTES
    assert {d: n.itemsize for d, n in TORCH.items()} == ITEM_BYTES


def test_the_wire_means_by_each_dtype_what_safetensors_means() -> None:
    # safetensors' torch side has no F8_E8M0 yet; its Rust side names it so.
    assert TORCH == {**safetensors.torch._TYPES, "F8_E8M0": torch.float8_e8m0fnu}


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_numpy_round_trip(dtype: str) -> None:
    sent = {f"t{i}": numpy_of(dtype, shape) for i, shape in enumerate(SHAPES)}
    assert {spec.dtype for spec in prepare(sent).manifest.tensors} == {dtype}
    got = round_trip(sent)
    assert list(got) == list(sent)
    for name, value in sent.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert got[name].tobytes() == value.tobytes()
        assert not np.shares_memory(got[name], value)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_torch_round_trip(dtype: str) -> None:
    sent = {f"t{i}": torch_of(dtype, shape) for i, shape in enumerate(SHAPES)}
    assert {spec.dtype for spec in prepare(sent).manifest.tensors} == {dtype}
    got = round_trip(sent, "torch")
    for name, value in sent.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert torch.equal(
            got[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_torch_and_numpy_mean_the_same_by_a_dtype(dtype: str) -> None:
    # Code 1 is a small positive number in each float format, so a swap of two formats would show.
    ones = np.ones(1, f"u{ITEM_BYTES[dtype]}").view(NUMPY[dtype])
    (got,) = round_trip({"a": ones}, "torch").values()
    (back,) = round_trip({"a": got}).values()
    assert back.dtype == ones.dtype
    assert got.to(torch.complex128).item() == ones.astype(np.complex128).item()


def test_mixed_dtypes_travel_together_in_the_callers_order() -> None:
    sent = {f"{d}{i}": numpy_of(d, (i, 3)) for i, d in zip(cycle([1, 0, 5, 40]), ITEM_BYTES)}
    got = round_trip(sent)
    assert list(got) == list(sent)
    assert all(got[name].tobytes() == sent[name].tobytes() for name in sent)


def test_nothing_travels_in_an_empty_mapping() -> None:
    outgoing = prepare({})
    assert outgoing.manifest == Manifest((), 0)
    assert outgoing.views(0, 0) == []
    buffer, arrays = allocate(outgoing.manifest, "torch")
    assert (buffer.nbytes, arrays) == (0, {})


def test_a_parameter_travels_without_its_gradient_and_is_received_in_place() -> None:
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    outgoing = prepare(dict(layer.named_parameters()))
    move(outgoing, destination(outgoing.manifest, dict(other.named_parameters())))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    assert other.weight.requires_grad


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        (b"abc", "U8", (3,)),
        (b"", "U8", (0,)),
        (bytearray(70), "U8", (70,)),
        (array.array("f", [1, 2]), "F32", (2,)),
        (array.array("d", []), "F64", (0,)),
        (array.array("l", [1, 2]), "I64", (2,)),
        (array.array("H", [1, 2]), "U16", (2,)),
        (array.array("w" if sys.version_info >= (3, 13) else "u", "ab"), "U8", (8,)),
        (memoryview(array.array("i", range(6))).cast("B").cast("i", (2, 3)), "I32", (2, 3)),
        (np.zeros((2, 1), np.complex64).data, "C64", (2, 1)),
        (np.zeros((), np.float16).data, "F16", ()),
        (np.zeros(2, bool).data, "BOOL", (2,)),
        (np.zeros(2, ">f8").data, "U8", (16,)),
        (np.zeros(2, [("x", "f4"), ("y", "i1")]).data, "U8", (10,)),
        (np.float32(3), "F32", ()),
        (mmap.mmap(-1, 64), "U8", (64,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_buffers_travel_by_their_format_or_as_bytes(value: Any, dtype: str, shape: Any) -> None:
    outgoing = prepare({"a": value})
    (spec,) = outgoing.manifest.tensors
    assert (spec.dtype, spec.shape) == (dtype, shape)
    sent = b"".join(outgoing.views(0, spec.nbytes))
    assert sent == (value.tobytes() if hasattr(value, "tobytes") else bytes(value))


class Shared:
    """Has DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_is_shared_not_copied() -> None:
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    outgoing = prepare({"a": Shared(source), "b": source})
    assert outgoing.manifest.total_bytes == source.nbytes  # the same memory: tied
    source[:] = 7
    assert outgoing.views(0, 48)[0].tobytes() == source.tobytes()
    target = np.empty_like(source)
    into = {"a": Shared(target), "b": np.empty_like(source)}
    move(outgoing, destination(outgoing.manifest, into))
    assert np.array_equal(target, source)


def test_dlpack_of_a_dtype_that_numpy_lacks_is_a_clear_error() -> None:
    with pytest.raises(TensorError, match=r"'a' .*Shared.* cannot be shared by DLPack"):
        prepare({"a": Shared(torch.zeros(2, dtype=torch.bfloat16))})


@pytest.mark.parametrize(
    "value", [np.arange(64.0), torch.arange(64.0), bytearray(64), array.array("q", range(8))]
)
def test_views_are_the_arrays_own_memory(value: Any) -> None:
    outgoing = prepare({"a": value})
    assert outgoing.is_host
    (view,) = outgoing.views(0, 64)
    value[0] = 77
    source = value.numpy() if isinstance(value, torch.Tensor) else value
    assert view.tobytes() == np.asarray(source).tobytes()[:64]


def test_outgoing_holds_the_arrays() -> None:
    outgoing = prepare({"a": np.full(1000, 3.0)})
    np.full(1000, 4.0)
    assert np.frombuffer(b"".join(outgoing.views(0, 8000))).tolist() == [3.0] * 1000


def gpt2_like() -> dict[str, Any]:
    wte = torch.randn(50, 8)
    return {"wte": wte, "ln": torch.randn(8), "lm_head": wte, "head_flat": wte.view(-1)}


def test_tied_weights_travel_once_and_share_the_memory_they_arrive_in() -> None:
    sent = gpt2_like()
    outgoing = prepare(sent)
    wte, ln, lm_head, head_flat = outgoing.manifest.tensors
    assert wte.offset == lm_head.offset
    assert head_flat.offset != wte.offset  # another shape: a tensor of its own
    assert outgoing.manifest.total_bytes == 2 * wte.nbytes + ln.nbytes
    got = round_trip(sent, "torch")
    assert got["wte"].data_ptr() == got["lm_head"].data_ptr()
    assert all(torch.equal(got[name], sent[name]) for name in sent)


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_arrive_in_one_array_or_in_two(is_tied: bool) -> None:
    sent = gpt2_like()
    outgoing = prepare(sent)
    into = {name: torch.zeros_like(value) for name, value in sent.items()}
    if is_tied:
        into["lm_head"] = into["wte"]
    target = destination(outgoing.manifest, into)
    move(outgoing, target)
    assert all(torch.equal(into[name], sent[name]) for name in sent)
    assert target.finish() == (0 if is_tied else sent["wte"].nbytes)


def test_beyond_4_gib_without_touching_a_page(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(6 << 30)
        pages = np.memmap(file, np.uint8)
        big = pages.view(np.float32)
        outgoing = prepare({"flag": np.ones(3, bool), "big": big})
        target = destination(outgoing.manifest, {"flag": np.zeros(3, bool), "big": big})
        (view,) = outgoing.views(5 << 30, 1 << 20)
        place = target.view(5 << 30, 1 << 20)
        assert place is not None
        big[5 << 28] = 1.5  # the one page
        assert view[:4] == place[:4] == np.float32(1.5).tobytes()
        assert [v.nbytes for v in outgoing.views((6 << 30) - 64, 67)] == [64, 3]


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop these
        return torch.empty(1, dtype=torch.qint8)


NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((4, 4))[:, ::2], "'w' is not contiguous: pass np.ascontiguousarray"),
        (np.zeros((4, 4)).T[:3], "'w' is not contiguous"),
        (np.broadcast_to(np.zeros(1), (3,)), "'w' is not contiguous"),
        (torch.zeros(4, 3).t(), r"'w' is not contiguous: pass \.contiguous\(\)"),
        (torch.zeros(1).expand(3), "'w' is not contiguous"),
        (memoryview(b"abcdef")[::2], "'w' is not contiguous: pass bytes"),
        (np.zeros(2, ">f4"), r"'w' has the foreign byte order '>f4': pass .astype\('float32'\)"),
        (np.array([object()]), "'w' has the unsupported numpy dtype object: convert"),
        (np.array(["a"]), "'w' has the unsupported numpy dtype <U1"),
        (np.zeros(1, "M8[s]"), "'w' has the unsupported numpy dtype datetime64"),
        (np.zeros(1, np.longdouble), "'w' has the unsupported numpy dtype float128"),
        (np.zeros(1, complex), "'w' has the unsupported numpy dtype complex128"),
        (np.zeros(1, "i4,f4"), "'w' has the unsupported numpy dtype"),
        (np.zeros(1, ml_dtypes.float8_e4m3), "'w' has the unsupported numpy dtype float8_e4m3:"),
        (np.ma.array([1.0, 2.0], mask=[False, True]), "'w' is masked"),
        (np.array([object()]).data, "'w' may hold Python objects"),
        (torch.zeros(1, dtype=torch.complex128), "'w' has the unsupported dtype torch.complex128"),
        (quantized(), "'w' has the unsupported dtype torch.qint8"),
        (torch.ones(2, 2).to_sparse(), r"'w' is sparse or nested: pass \.to_dense"),
        (NESTED, "'w' is sparse or nested"),
        (torch.zeros(2, dtype=torch.complex64).conj(), r"'w' is a lazy view: pass \.resolve_conj"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, "'w' is a lazy view"),
        (torch.empty(2, device="meta"), "'w' is on the meta device"),
        ([1.0, 2.0], "'w' is a builtins.list .*pass a numpy array, a torch tensor"),
        (3.5, "'w' is a builtins.float"),
        ("text", "'w' is a builtins.str"),
        (None, "'w' is a builtins.NoneType"),
        (torch.zeros((1,) * 65), "'w' has 65 dimensions"),
    ],
)
def test_what_cannot_travel_is_named(value: Any, text: str) -> None:
    with pytest.raises(TensorError, match=text):
        prepare({"fine": np.zeros(1), "w": value})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([np.zeros(1)], "`tensors` must be a mapping from names to arrays, not builtins.list"),
        (np.zeros(1), "must be a mapping.*ndarray"),
        ({1: np.zeros(1)}, "tensor name 1 is a builtins.int: names are str"),
        ({"": np.zeros(1)}, "empty name"),
        ({"n" * 1025: np.zeros(1)}, "1025 bytes"),
        ({"\ud800": np.zeros(1)}, "not Unicode text"),
    ],
)
def test_bad_mappings_are_refused(tensors: Any, text: str) -> None:
    with pytest.raises(TensorError, match=text):
        prepare(tensors)


def test_meta_travels_as_msgpack() -> None:
    assert prepare({}).meta_bytes == b""
    meta = {"round": 3, "weight": 0.5, "names": ["a"]}
    assert msgspec.msgpack.decode(prepare({}, meta=meta).meta_bytes) == meta
    assert len(prepare({}, meta=b"x" * 65533).meta_bytes) == 65536


def test_one_description_takes_another_meta() -> None:
    outgoing = prepare({"a": np.arange(3.0)}, meta=1)
    other = outgoing.with_meta({"round": 2})
    assert msgspec.msgpack.decode(outgoing.meta_bytes) == 1
    assert msgspec.msgpack.decode(other.meta_bytes) == {"round": 2}
    assert other.manifest is outgoing.manifest
    assert other.views(0, 24) == outgoing.views(0, 24)
    with pytest.raises(TensorError, match="`meta` cannot be encoded"):
        outgoing.with_meta(object())


def endless() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        (b"x" * 65534, "`meta` takes 65537 bytes, more than the limit of 65536"),
        (object(), "`meta` cannot be encoded"),
        (1 << 70, "`meta` cannot be encoded"),
        ("\ud800", "`meta` cannot be encoded"),
        (endless(), "`meta` cannot be encoded"),
    ],
)
def test_bad_meta_is_refused(meta: Any, text: str) -> None:
    with pytest.raises(TensorError, match=text):
        prepare({}, meta=meta)


def test_stage_copies_host_memory() -> None:
    outgoing = prepare({"a": np.arange(20.0), "b": b"xyz"})
    slot = bytearray(200)
    outgoing.stage(64, 99, memoryview(slot))
    assert slot[:99] == b"".join(outgoing.views(64, 99))
    assert slot[99:] == bytes(101)


def test_a_device_tensor_is_staged_and_has_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = tensors_module._describe_torch

    def on_device(name: str, tensor: Any, module: Any) -> Any:
        flat = tensor.reshape(-1).view(torch.uint8)
        return describe(name, tensor, module)._replace(device="cuda:0", data=flat)

    monkeypatch.setattr(tensors_module, "_describe_torch", on_device)
    values = torch.arange(40.0)
    outgoing = prepare({"a": values, "b": np.ones(8, np.uint8)})
    assert not outgoing.is_host
    with pytest.raises(TensorError, match="'a' lives on cuda:0: use stage"):
        outgoing.views(0, 64)
    slot = bytearray(104)
    outgoing.stage(64, 104, memoryview(slot))
    assert slot == values.numpy().tobytes()[64:] + bytes([1] * 8)
    with pytest.raises(TensorError, match="'a' is on cuda:0 in `into`: receive into host memory"):
        destination(outgoing.manifest, {"a": values, "b": np.ones(8, np.uint8)})


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


def test_torch_and_ml_dtypes_are_not_imported() -> None:
    program = (
        "import sys, numpy, aiordma.tensors as t\n"
        "t.prepare({'a': numpy.zeros(2), 'b': b'x'})\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=50).returncode == 0
