"""Weighted means: exact enough, blind to the order of arrival, and without a trace of who aborted."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from fedllm import fold as folding
from fedllm.aggregate import check_layout, wire_dtype
from fedllm.errors import FedError, UpdateError, WeightsError
from fedllm.staged import _MOVES, Stage, Staged
from fedllm.strategy import FedAvg

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32), np.dtype(np.float64)]
LARGEST = {np.dtype(np.float16): 65504.0, BF16: float(ml_dtypes.finfo(BF16).max)}
LARGEST |= {np.dtype(np.float32): float(np.finfo(np.float32).max), np.dtype(np.float64): 1e300}
WEIGHTS = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 0.7]), st.floats(1e-9, 1e12))
SHAPES = st.sampled_from([(), (0,), (1,), (33,), (8, 5)])

Update = dict[str, NDArray[Any]]


def spacing(array: NDArray[Any]) -> NDArray[np.float64]:
    """The distance to the next number of the array's dtype."""
    wide = np.abs(array).astype(np.float64)
    mantissa_bits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[array.dtype.name]
    lowest = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}[array.dtype.name]
    exponent = np.maximum(np.frexp(wide)[1] - 1, lowest)
    return np.asarray(np.ldexp(1.0, exponent - mantissa_bits))


@st.composite
def rounds(draw: st.DrawFn) -> tuple[dict[str, tuple[float, Update]], list[str]]:
    """Silos with their weights and updates, and an order of arrival."""
    layout = {
        f"t{i}": (draw(SHAPES), draw(st.sampled_from(DTYPES)))
        for i in range(draw(st.integers(1, 3)))
    }
    silos = {}
    for i in range(draw(st.integers(1, 9))):
        seed, scale = (
            draw(st.integers(0, 2**32 - 1)),
            draw(st.sampled_from([1e-30, 1e-3, 1.0, 0.0, -1.0])),
        )
        rng = np.random.default_rng(seed)
        update = {}
        for name, (shape, dtype) in layout.items():
            # scale 0 stands for the dtype's largest numbers, which a careless sum takes beyond it
            values = (
                rng.standard_normal(shape) * scale
                if scale
                else rng.uniform(0.999, 1, shape) * LARGEST[dtype]
            )
            update[name] = np.asarray(values).astype(dtype)
        silos[f"silo-{i}"] = (draw(WEIGHTS), update)
    return silos, draw(st.permutations(sorted(silos)))


def fold(silos: dict[str, tuple[float, Update]], order: list[str]) -> Update:
    staged = Staged(next(iter(silos.values()))[1])
    begun = {name: staged.begin(name, silos[name][0]) for name in order}
    for name in reversed(order):
        for tensor, array in silos[name][1].items():
            begun[name].buffers[tensor][...] = array
        begun[name].add()
    staged.commit()
    return staged.result()


def bits(update: Update) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in update.items()}


@given(rounds())
def test_mean_is_within_1e_6_of_a_float64_reference(case: tuple[dict[str, Any], list[str]]) -> None:
    silos, order = case
    mean = fold(silos, order)
    total = math.fsum(weight for weight, _ in silos.values())
    for name, array in mean.items():
        terms = [(w / total) * u[name].astype(np.float64) for w, u in silos.values()]
        reference = np.sum(terms, axis=0)
        magnitude = np.sum(np.abs(terms), axis=0)
        assert array.dtype == silos[order[0]][1][name].dtype
        assert np.isfinite(array.astype(np.float64)).all()
        # Half a step of the output's dtype is the cast's own; float32 sums may be subnormal besides.
        slack = 1e-6 * magnitude + 0.5 * spacing(array) + len(silos) * 2.0**-149
        assert (np.abs(array.astype(np.float64) - reference) <= slack).all()


@given(rounds(), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_bits(
    case: tuple[dict[str, Any], list[str]], random: Any
) -> None:
    silos, order = case
    other = list(order)
    random.shuffle(other)
    assert bits(fold(silos, order)) == bits(fold(silos, other))


@given(rounds(), st.data())
def test_an_aborted_silo_leaves_no_trace(
    case: tuple[dict[str, Any], list[str]], data: st.DataObject
) -> None:
    silos, order = case
    out = data.draw(st.sets(st.sampled_from(order), max_size=len(order) - 1))
    staged = Staged(silos[order[0]][1])
    for name in order:
        contribution = staged.begin(name, silos[name][0])
        for tensor, array in silos[name][1].items():
            contribution.buffers[tensor][...] = array
        is_early = data.draw(st.booleans())
        if name not in out or not is_early:
            contribution.add()
        if name in out and data.draw(st.booleans()):
            contribution.abort()
            assert not contribution.buffers
        elif name in out and not is_early:
            contribution.abort()
    staged.commit()
    kept = [name for name in order if name not in out]
    assert bits(staged.result()) == bits(fold(silos, kept))


def test_every_permutation_of_five_silos_gives_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    silos = {
        f"silo-{i}": (1.0 + i, {d.name: rng.standard_normal(500).astype(d) for d in DTYPES})
        for i in range(5)
    }
    found = {str(bits(fold(silos, list(order)))) for order in itertools.permutations(silos)}
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_the_largest_numbers_is_finite(dtype: np.dtype[Any]) -> None:
    limit = LARGEST[dtype] if dtype != np.float64 else float(np.finfo(np.float64).max)
    update = {"w": np.array([limit, -limit]).astype(dtype)}
    for count in range(1, 33):
        silos = {f"silo-{i:02}": (1.0 + i % 3, update) for i in range(count)}
        mean = fold(silos, sorted(silos))["w"].astype(np.float64)
        assert np.allclose(mean / limit, [1, -1], rtol=1e-6, atol=0), count


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    silos = {
        f"silo-{i}": (1.0 + i, {d.name: rng.standard_normal(1000).astype(d) for d in DTYPES})
        for i in range(5)
    }
    whole = bits(fold(silos, sorted(silos)))
    monkeypatch.setattr(folding, "BLOCK_ITEMS", 64)
    assert bits(fold(silos, sorted(silos))) == whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_silo_alone_gets_its_own_bits_back(dtype: np.dtype[Any]) -> None:
    update = {"w": np.random.default_rng(1).standard_normal(77).astype(dtype)}
    assert bits(fold({"a": (3.0, update)}, ["a"])) == bits(update)


def test_bfloat16_rounds_to_nearest_even_as_ml_dtypes_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    every = every[np.isfinite(every.astype(np.float32))]
    other = np.roll(every, 1)
    with np.errstate(all="ignore"):
        halves = every.astype(np.float32) * np.float32(0.5) + other.astype(np.float32) * np.float32(
            0.5
        )
    mean = fold({"a": (1.0, {"w": every}), "b": (1.0, {"w": other})}, ["b", "a"])["w"]
    assert mean.tobytes() == halves.astype(BF16).tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_leaves_no_trace(
    dtype: np.dtype[Any], value: float
) -> None:
    good = {"w": np.ones((3, 4), dtype), "b": np.ones(2, dtype)}
    staged = Staged(good)
    bad = staged.begin("bad", 1)
    for array in bad.buffers.values():
        array[...] = 5
    bad.buffers["w"][1, 2] = value
    with pytest.raises(UpdateError, match=rf"tensor 'w' holds {value} at \[1, 2\]"):
        bad.add()
    fine = staged.begin("fine", 2)
    for name, array in good.items():
        fine.buffers[name][...] = array
    fine.add()
    staged.commit()
    assert bits(staged.result()) == bits(good)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, 1e30])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(UpdateError, match=r"weight .* is not above 0"):
        Staged({"w": np.ones(1)}).begin("a", weight)
    for strategy in (FedAvg(), FedAvg(weighted=False)):
        with pytest.raises(UpdateError, match=r"weight .* is not above 0"):
            strategy.weight(weight)


def test_fedavg_counts_by_examples_or_all_alike() -> None:
    assert (FedAvg().weight(7.0), FedAvg(weighted=False).weight(7.0)) == (7.0, 1.0)


@pytest.mark.parametrize("dtype", ["i8", "u1", "?", "c8", ">f4"])
def test_what_has_no_mean_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(WeightsError, match=r"tensor 'steps' is .* convert it, or keep it out"):
        Staged({"w": np.ones(1), "steps": np.zeros(2, dtype)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda u: u.pop("b"), r"lacks \['b'\]$"),
        (lambda u: u.update(x=np.ones(1)), r"it has \['x'\] besides"),
        (
            lambda u: u.update(w=np.ones((3, 2), np.float32)),
            r"tensor 'w' has shape \(3, 2\), not \(2, 3\)",
        ),
        (lambda u: u.update(w=np.ones((2, 3), np.float64)), "tensor 'w' is F64, not F32"),
        (lambda u: u.update(b=np.ones(4, np.float16)), "tensor 'b' is F16, not BF16"),
    ],
)
def test_another_layout_is_refused_by_name(change: Any, says: str) -> None:
    like: Update = {"w": np.ones((2, 3), np.float32), "b": np.ones(4, BF16)}
    got = dict(like)
    check_layout(like, [(n, wire_dtype(n, a), a.shape) for n, a in got.items()])
    change(got)
    with pytest.raises(UpdateError, match=says):
        check_layout(like, [(n, wire_dtype(n, a), a.shape) for n, a in got.items()])


def test_a_contribution_makes_only_the_moves_of_its_table() -> None:
    staged = Staged({"w": np.ones(1)})
    contribution = staged.begin("a", 1)
    with pytest.raises(UpdateError, match="'a' takes part in this round already"):
        staged.begin("a", 1)
    with pytest.raises(FedError, match="commit"):
        staged.result()
    contribution.abort()
    contribution.abort()
    with pytest.raises(FedError, match="aborted: it is too late to add"):
        contribution.add()
    with pytest.raises(WeightsError, match="no update was added"):
        staged.commit()
    again = staged.begin("a", 1)
    again.buffers["w"][...] = 2
    again.add()
    staged.commit()
    assert staged.result()["w"] == [2.0]
    with pytest.raises(FedError, match="folded: it is too late to abort"):
        again.abort()
    with pytest.raises(FedError, match="committed: begin a new one"):
        staged.begin("b", 1)


def test_who_aborts_while_a_thread_adds_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silo whose deadline comes while its update is checked: the thread cannot be cancelled."""
    aggregation = Staged({"w": np.zeros(2, np.float32)})
    late, good = aggregation.begin("late", 1.0), aggregation.begin("good", 1.0)
    for contribution, value in ((late, 9), (good, 1)):
        contribution.buffers["w"][...] = value
    aborting = threading.Thread(target=late.abort)

    class Moves(dict[Any, Any]):
        def get(self, move: Any, default: Any = None) -> Any:
            found = super().get(move, default)
            if move == (Stage.OPEN, "add"):
                aborting.start()
                aborting.join(0.1)  # between what `add` reads and what it writes, if it can
            return found

    with monkeypatch.context() as patch:
        patch.setattr("fedllm.staged._MOVES", Moves(_MOVES))
        late.add()
    aborting.join()
    good.add()
    aggregation.commit()
    assert aggregation.result()["w"].tolist() == [1, 1]


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(WeightsError, match="no weights"):
        Staged({})
