"""What cannot travel is named when it is prepared, and so is `meta`."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch

from aiordma.errors import TensorError
from aiordma.outgoing import prepare


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
