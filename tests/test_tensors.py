"""Arrays to bytes and back: every dtype and source, without copies."""

from __future__ import annotations

import array
import mmap
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from aiordma import tensors as tensors_module
from aiordma.errors import TensorError
from aiordma.outgoing import prepare
from aiordma.tensors import allocate, destination
from aiordma.wire.manifest import ITEM_BYTES, Manifest
from tests.arrays import NUMPY, TORCH, move, numpy_of, round_trip, torch_of

SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 129)]


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


def test_torch_and_ml_dtypes_are_not_imported() -> None:
    program = (
        "import sys, numpy, aiordma.outgoing as t\n"
        "t.prepare({'a': numpy.zeros(2), 'b': b'x'})\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=50).returncode == 0
