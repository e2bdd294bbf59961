"""Arrays <-> specs and bytes, without a copy.

numpy arrays, torch tensors, objects with the buffer protocol or `__dlpack__` become `TensorSpec`s and borrowed byte
views, and back. bfloat16 and the float8 dtypes go by byte view, since plain numpy has none. torch is looked up among
the loaded modules: who passes a tensor has loaded it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from aiordma.errors import TensorError
from aiordma.wire import manifest as wire
from aiordma.wire.manifest import Manifest, TensorSpec

Array: TypeAlias = Any
"""A numpy.ndarray or a torch.Tensor, as the caller asked for."""
Framework: TypeAlias = Literal["numpy", "torch"]
Take: TypeAlias = Callable[[int], np.ndarray[Any, Any]]

# numpy (with ml_dtypes) and torch call their dtypes by the same names: F8_E5M2 is float8_e5m2.
_KINDS = {"U": "uint", "I": "int", "F": "float", "C": "complex"}
_DTYPES = {d: _KINDS[d[0]] + d[1:].lower() for d in wire.ITEM_BYTES if d[0] in _KINDS}
_DTYPES |= {"BOOL": "bool", "BF16": "bfloat16"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
_WIRE_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_CONVERT = f"convert it to one of {', '.join(_WIRE_NAMES)}"
_FORMATS = {"?": "BOOL", "Zf": "C64"}
_FORMATS |= {f"{char}{n}": f"I{8 * n}" for char in "bhilqn" for n in (1, 2, 4, 8)}
_FORMATS |= {f"{char}{n}": f"U{8 * n}" for char in "BHILQN" for n in (1, 2, 4, 8)}
_FORMATS |= {f"{char}{n}": f"F{8 * n}" for char, n in (("e", 2), ("f", 4), ("d", 8))}


class Memory(NamedTuple):
    """One array, seen as the bytes that it holds."""

    dtype: str
    shape: tuple[int, ...]
    device: str
    address: int
    data: Any
    """On the host: a memoryview of bytes. Elsewhere: a flat torch.uint8 tensor on the device."""


def allocate(
    manifest: Manifest, framework: Framework, take: Take | None = None
) -> tuple[memoryview, dict[str, Array]]:
    """One uninitialised, 64-byte aligned buffer for a checked manifest's data, and arrays in it.

    Returns the buffer as a writable view of `total_bytes` bytes, and the arrays by name in the manifest's order; they
    are views of what `take` gives, and tied tensors share their memory. Raises `TensorError`, before anything is
    allocated, for a dtype that the framework does not have."""
    if framework not in ("numpy", "torch"):
        raise TensorError(f"unknown framework {framework!r}: use 'numpy' or 'torch'")
    try:
        torch: Any = importlib.import_module("torch") if framework == "torch" else None
    except ImportError as exc:
        raise TensorError("framework='torch' needs torch: install it, or use 'numpy'") from exc
    dtypes = [_dtype_in(torch, spec) for spec in manifest.tensors]
    size = manifest.total_bytes
    try:
        raw_bytes = size + wire.CHUNK_ALIGN_BYTES
        raw = np.empty(raw_bytes, np.uint8) if take is None else take(raw_bytes)
    except MemoryError as exc:
        raise TensorError(f"no memory for these {size} bytes: take them by chunks()") from exc
    first = -raw.ctypes.data % wire.CHUNK_ALIGN_BYTES
    buffer = raw[first : first + size]
    flat: Any = buffer if torch is None else torch.from_numpy(raw)[first : first + size]
    arrays = {
        spec.name: flat[spec.offset : spec.end].view(dtype).reshape(spec.shape)
        for spec, dtype in zip(manifest.tensors, dtypes, strict=True)
    }
    return buffer.data, arrays


class Destination:
    """Where a transfer's data goes: the one buffer of `allocate`, or the caller's own arrays.

    It holds undefined bytes until the transfer has succeeded and `finish` was called.
    """

    def __init__(
        self,
        manifest: Manifest,
        memory: Mapping[int, memoryview] | memoryview,
        ties: Iterable[tuple[memoryview, memoryview]] = (),
    ) -> None:
        """`memory`: one buffer, or a range's first byte -> its memory. `ties`: (source, target)."""
        self._manifest = manifest
        self._whole = memory if isinstance(memory, memoryview) else None
        self._memory = {} if isinstance(memory, memoryview) else memory
        self._ties = tuple(ties)

    def view(self, offset: int, length: int) -> memoryview | None:
        """The final place of the chunk [offset, offset + length), unless it lies in several arrays.

        Raises `ManifestError` for what is no chunk of this data.
        """
        parts = self._manifest.parts(offset, length)
        if self._whole is not None:
            return self._whole[offset : offset + length]
        first = next(parts, None)
        if first is None or first.nbytes != length:
            return None
        begin = offset - first.spec.offset
        return self._memory[first.spec.offset][begin : begin + length]

    def parts(self) -> list[tuple[int, memoryview]]:
        """All of it in pieces of contiguous memory, each with where it begins in the data."""
        return [(0, self._whole)] if self._whole is not None else list(self._memory.items())

    def scatter(self, offset: int, data: memoryview) -> int:
        """Copy a chunk's bytes, the first of which is byte `offset`, to where they belong.

        Returns how many bytes were copied. Raises `ManifestError` for what is no chunk.
        """
        whole = self.view(offset, data.nbytes)
        if whole is not None:
            whole[:] = data
            return data.nbytes
        for spec, _, start, nbytes in self._manifest.parts(offset, data.nbytes):
            first = start - spec.offset
            source = data[start - offset : start - offset + nbytes]
            self._memory[spec.offset][first : first + nbytes] = source
        return data.nbytes

    def finish(self) -> int:
        """Fill the further arrays of tied tensors, which travelled once. Returns bytes copied."""
        for source, target in self._ties:
            target[:] = source
        return sum(target.nbytes for _, target in self._ties)


def destination(manifest: Manifest, into: Mapping[str, object]) -> Destination:
    """The caller's own arrays as the place for a checked manifest's data.

    `into` has exactly the manifest's names; each array is writable, C-contiguous host memory of the
    dtype and shape that the manifest says, and overlaps no other, except that tied tensors may be
    one array. Raises `TensorError`, which names the tensor, what is needed and what it got.
    """
    require_mapping("into", into)
    specs = {spec.name: spec for spec in manifest.tensors}
    missing = [name for name in specs if name not in into]
    unknown = [name for name in into if name not in specs]
    if missing or unknown:
        differing = f"it lacks {missing[:5]}, and has {unknown[:5]} besides"
        raise TensorError(f"`into` must have exactly the transfer's names: {differing}")
    memory: dict[int, Memory] = {}
    taken: list[tuple[int, TensorSpec]] = []
    ties: list[tuple[memoryview, memoryview]] = []
    for name, spec in specs.items():
        found = _describe_target(spec, into[name])
        if spec.nbytes:
            taken.append((found.address, spec))
            first = memory.setdefault(spec.offset, found)
            if first.address != found.address:
                ties.append((first.data, found.data))
    _check_disjoint(taken)
    return Destination(manifest, {offset: m.data for offset, m in memory.items()}, ties)


def typed_view(spec: TensorSpec, data: memoryview) -> np.ndarray[Any, Any]:
    """Whole elements of the tensor as a 1-D, read-only, borrowed numpy view of `data`.

    The dtype is the spec's. Without ml_dtypes, BF16 comes as uint16 and the F8 dtypes as uint8: the raw bits.
    """
    dtype = _numpy_dtype(spec.dtype) or np.dtype(f"uint{8 * spec.item_bytes}")
    return np.frombuffer(data.toreadonly(), dtype)


def describe(name: object, value: object) -> Memory:
    """The array as the bytes that it holds, without a copy. Raises `TensorError`, which names it and the remedy."""
    if not isinstance(name, str):
        raise TensorError(f"tensor name {name!r} is a {kind_of(name)}: names are str")
    torch = sys.modules.get("torch")
    if isinstance(value, getattr(torch, "Tensor", ())):  # none yet while a thread imports torch
        return _describe_torch(name, value, torch)
    if isinstance(value, np.ndarray | np.generic):
        return _describe_numpy(name, value)
    if hasattr(value, "__dlpack__"):
        try:
            shared = np.from_dlpack(cast(Any, value))
        except Exception as exc:
            # Foreign code: an AttributeError for want of __dlpack_device__, among others.
            why = f"({kind_of(value)}) cannot be shared by DLPack ({exc}): pass a numpy array of it"
            raise tensor_error(name, why) from exc
        return _describe_numpy(name, shared)
    return _describe_buffer(name, value)


def _describe_numpy(name: str, value: np.ndarray[Any, Any] | np.generic) -> Memory:
    if isinstance(value, np.ndarray) and hasattr(value, "mask"):
        raise tensor_error(name, "is masked, and its mask would be lost: pass .filled() of it")
    array = np.asarray(value)
    dtype = _WIRE_NAMES.get(array.dtype.name)
    if dtype is None:
        raise tensor_error(name, f"has the unsupported numpy dtype {array.dtype}: {_CONVERT}")
    if not array.dtype.isnative:
        order = f"has the foreign byte order {array.dtype.str!r}"
        raise tensor_error(name, f"{order}: pass .astype({array.dtype.name!r}) of it")
    if not array.flags.c_contiguous:
        raise tensor_error(name, "is not contiguous: pass np.ascontiguousarray of it")
    flat = array.reshape(-1).view(np.uint8)
    return Memory(dtype, array.shape, "cpu", flat.ctypes.data, flat.data)


def _describe_torch(name: str, tensor: Any, torch: Any) -> Memory:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise tensor_error(name, "is sparse or nested: pass .to_dense() of it, or its parts")
    dtype = _WIRE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise tensor_error(name, f"has the unsupported dtype {tensor.dtype}: {_CONVERT}")
    if tensor.is_meta:
        raise tensor_error(name, "is on the meta device, without data: materialise it first")
    if tensor.is_conj() or tensor.is_neg():
        raise tensor_error(name, "is a lazy view: pass .resolve_conj().resolve_neg() of it")
    if not tensor.is_contiguous():
        raise tensor_error(name, "is not contiguous: pass .contiguous() of it")
    try:
        # .view refuses 0-d, and the stride 0 that a tensor of nothing may have.
        flat = tensor.detach().reshape(-1).as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        device, address = str(tensor.device), flat.data_ptr()
        data = flat.numpy().data if device == "cpu" else flat
    except (RuntimeError, TypeError) as exc:
        why = f"({kind_of(tensor)}) cannot be seen as bytes ({exc}): pass a plain tensor"
        raise tensor_error(name, why) from exc
    return Memory(dtype, tuple(tensor.shape), device, address, data)


def _describe_buffer(name: str, value: object) -> Memory:
    try:
        view = memoryview(cast(Any, value))
    except (BufferError, TypeError, ValueError) as exc:
        remedy = "pass a numpy array, a torch tensor, or what has __dlpack__ or the buffer protocol"
        raise tensor_error(name, f"is a {kind_of(value)} ({exc}): {remedy}") from exc
    if not view.c_contiguous:
        raise tensor_error(name, "is not contiguous: pass bytes() of it")
    if "O" in view.format:
        raise tensor_error(
            name, f"may hold Python objects (format {view.format!r}): pass its numbers"
        )
    char = view.format.lstrip("@=<" if sys.byteorder == "little" else "@=>!")
    dtype = _FORMATS.get(char) or _FORMATS.get(f"{char}{view.itemsize}")
    shape = (view.nbytes,) if dtype is None else tuple(view.shape or ())
    flat = np.frombuffer(view, np.uint8)
    return Memory(dtype or "U8", shape, "cpu", flat.ctypes.data, flat.data)


def _describe_target(spec: TensorSpec, value: object) -> Memory:
    found = describe(spec.name, value)
    if (found.dtype, found.shape) != (spec.dtype, spec.shape):
        got = f"{found.dtype} of shape {found.shape}"
        raise tensor_error(
            spec.name, f"is {spec.dtype} of shape {spec.shape}, but `into` has {got}"
        )
    if found.device != "cpu":
        raise tensor_error(spec.name, f"is on {found.device} in `into`: receive into host memory")
    if found.data.readonly:
        raise tensor_error(spec.name, "is read-only in `into`: pass a writable array")
    return found


def _check_disjoint(taken: list[tuple[int, TensorSpec]]) -> None:
    """Raise if two destinations overlap, unless they are one array for two tied tensors."""
    for (address, spec), (next_address, other) in pairwise(sorted(taken, key=lambda t: t[0])):
        is_tied = address == next_address and spec.offset == other.offset
        if next_address < address + spec.nbytes and not is_tied:
            raise tensor_error(
                spec.name, f"overlaps {other.name!r} in the memory of `into`: give each its own"
            )


def _dtype_in(torch: Any, spec: TensorSpec) -> Any:
    """The tensor's dtype in torch, or in numpy if `torch` is None."""
    if torch is None:
        dtype = _numpy_dtype(spec.dtype)
        lack = "which numpy alone has not: pass framework='torch' or install ml_dtypes"
    else:
        dtype = getattr(torch, _DTYPES[spec.dtype], None)
        lack = "which this torch has not: upgrade torch"
    if dtype is None:
        raise tensor_error(spec.name, f"is {spec.dtype}, {lack}")
    return dtype


@cache
def _numpy_dtype(dtype: str) -> np.dtype[Any] | None:
    """The numpy dtype of a wire dtype; None if it would take ml_dtypes, which is not there."""
    is_native = dtype != "BF16" and not dtype.startswith("F8_")
    try:
        module: Any = np if is_native else importlib.import_module("ml_dtypes")
        return cast("np.dtype[Any]", np.dtype(getattr(module, _DTYPES[dtype])))
    except (ImportError, AttributeError):
        return None


def require_mapping(what: str, value: object) -> None:
    """Raise `TensorError` for anything but a mapping."""
    if not isinstance(value, Mapping):
        raise TensorError(f"`{what}` must be a mapping from names to arrays, not {kind_of(value)}")


def tensor_error(name: str, why: str) -> TensorError:
    return TensorError(f"tensor {name!r} {why}")


def kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
