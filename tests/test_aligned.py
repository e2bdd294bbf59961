"""Updates that are folded as they pass by: the same bits as staged ones, whatever the order, and never a deadlock."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from aiordma import TransferTimeout
from fedllm import Aligned, FedError, Staged, UpdateError, WeightsError
from tests.harness import run
from tests.uplinks import Update, Uplink, bits, committed, staged, turns, update, upload, weight_of


class Playing:
    """Silos that upload side by side; whoever has chunks in flight may be next."""

    def __init__(
        self, silos: dict[str, tuple[float, Update]], uplinks: dict[str, Uplink], order: Random
    ):
        self.silos, self.uplinks, self._order = silos, uplinks, order
        self.aligned = Aligned(next(iter(silos.values()))[1])
        names = order.sample(sorted(silos), len(silos))
        self.places = {name: self.aligned.begin(name, silos[name][0]) for name in names}
        self.acts = {
            name: asyncio.ensure_future(upload(uplinks[name], self.places[name])) for name in names
        }

    @property
    def is_over(self) -> bool:
        return all(act.done() for act in self.acts.values())

    def deliver(self, *names: str) -> None:
        """One chunk that is in flight, of one of these silos."""
        flying = [
            (uplink, index)
            for name in names or self.uplinks
            if not self.acts[name].done()
            for uplink in [self.uplinks[name]]
            for index in range(len(uplink.in_flight))
        ]
        assert flying, "deadlock: nothing is in flight, and nobody may send"
        uplink, index = self._order.choice(flying)
        uplink.deliver(index)

    async def finish(self) -> None:
        await turns()
        while not self.is_over:
            self.deliver()
            await turns()


@st.composite
def casts(draw: st.DrawFn) -> tuple[dict[str, tuple[float, Update]], dict[str, Uplink], Random]:
    silos = {
        f"silo-{i}": (weight_of(draw(st.integers(0, 5))), update(draw(st.integers(0, 99)), 21))
        for i in range(draw(st.integers(1, 4)))
    }
    sizes = st.integers(1, 6).map(lambda n: 64 * n)
    uplinks = {
        name: Uplink(arrays, draw(sizes), draw(st.integers(2, 4)))
        for name, (_, arrays) in silos.items()
    }
    return silos, uplinks, Random(draw(st.integers(0, 2**32 - 1)))


@given(casts())
def test_any_order_and_any_chunks_give_the_bits_of_staged(case: Any) -> None:
    silos, uplinks, order = case

    async def play() -> None:
        playing = Playing(silos, uplinks, order)
        await playing.finish()
        assert {act.result() for act in playing.acts.values()} == {1}
        assert committed(playing.aligned) == staged(silos)
        assert playing.aligned.restarts == 0

    run(play())


@given(casts(), st.data())
def test_who_falls_out_at_any_point_leaves_no_trace(case: Any, data: st.DataObject) -> None:
    silos, uplinks, order = case
    names = sorted(silos)
    fates = dict.fromkeys(names[1:], "") | {
        name: data.draw(st.sampled_from(["", "dies", "is no number", "breaks off"]))
        for name in names[1:]
    }
    for name, fate in fates.items():
        if fate == "is no number":
            tensor = data.draw(st.sampled_from(["float64", "bfloat16", "float16", "one"]))
            arrays = {key: array.copy() for key, array in silos[name][1].items()}
            arrays[tensor].reshape(-1)[-1] = np.nan
            uplinks[name] = Uplink(arrays, uplinks[name].chunk_bytes, uplinks[name].slots)

    async def play() -> None:
        playing = Playing(silos, uplinks, order)
        coming = [name for name, fate in fates.items() if fate in ("dies", "breaks off")]
        await turns()
        while not playing.is_over:
            if coming and order.random() < 0.1:
                name = coming.pop()
                if fates[name] == "dies":
                    playing.acts[name].cancel()
                elif not playing.acts[name].done():
                    uplinks[name].break_off()
            else:
                playing.deliver()
            await turns()
        counting = {}
        for name in names:
            act = playing.acts[name]
            if not act.cancelled() and act.exception() is None:
                counting[name] = silos[name]
        for name, fate in fates.items():
            if fate == "is no number":
                with pytest.raises(UpdateError, match="holds nan at"):
                    playing.acts[name].result()
            elif fate != "dies":
                assert name in counting
        assert committed(playing.aligned) == staged(counting)

    run(play())


# By hand


def two(**options: Any) -> tuple[dict[str, tuple[float, Update]], dict[str, Uplink]]:
    silos = {name: (weight_of(i), update(i)) for i, name in enumerate("ab")}
    return silos, {name: Uplink(arrays, 128, 2) for name, (_, arrays) in silos.items()}


async def test_the_fast_one_fills_its_slots_and_waits():
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(1))
    await turns()
    for _ in range(2):
        playing.deliver("a")
        await turns()
    assert not uplinks["a"].in_flight
    assert (playing.places["a"].is_awaited, playing.places["b"].is_awaited) == (False, True)
    await playing.finish()
    assert committed(playing.aligned) == staged(silos)


async def test_who_is_awaited_and_idle_is_out_and_the_others_begin_anew():
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(2))
    playing.aligned.idle_timeout_s = 0.05
    await turns()
    while not playing.aligned.folded_bytes:
        playing.deliver()
        await turns()
    while uplinks["a"].in_flight:
        playing.deliver("a")
        await turns()
    assert not playing.places["a"].is_awaited
    with pytest.raises(TransferTimeout, match=r"sent nothing for 0\.05 s, and all others waited"):
        await playing.acts["b"]
    playing.aligned.idle_timeout_s = 10
    await playing.finish()
    assert playing.acts["a"].result() == 2
    assert playing.aligned.restarts == 1
    assert committed(playing.aligned) == staged({"a": silos["a"]})


async def test_a_silo_is_not_idle_while_the_server_is_stopped():
    """What it sent meanwhile is read only when the timers have had their turn."""
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(6))
    playing.aligned.idle_timeout_s = 0.05
    loop = asyncio.get_running_loop()

    def stop() -> None:
        time.sleep(0.1)
        for uplink in uplinks.values():
            loop.call_soon(uplink.deliver, 0)

    loop.call_soon(stop)
    await turns()
    playing.aligned.idle_timeout_s = 10
    await playing.finish()
    assert [act.result() for act in playing.acts.values()] == [1, 1]
    assert committed(playing.aligned) == staged(silos)


async def test_nobody_sends_twice_for_who_falls_out_before_anything_was_folded():
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(3))
    await turns()
    playing.deliver("a")
    await turns()
    playing.acts["b"].cancel()
    await playing.finish()
    assert (playing.acts["a"].result(), playing.aligned.restarts) == (1, 0)
    assert committed(playing.aligned) == staged({"a": silos["a"]})


async def test_what_comes_after_the_end_of_folding_is_too_late():
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(4))
    await turns()
    while not playing.aligned.folded_bytes:
        playing.deliver()
        await turns()
    with pytest.raises(FedError, match="the fold has begun"):
        playing.aligned.begin("c", 1.0)
    with pytest.raises(WeightsError, match="no update"):
        playing.aligned.commit()
    with pytest.raises(FedError, match="commit"):
        playing.aligned.result()
    await playing.finish()
    playing.places["b"].abort()  # whole already, and stays
    assert committed(playing.aligned) == staged(silos)
    with pytest.raises(FedError, match="the fold has begun"):
        playing.aligned.begin("c", 1.0)


async def test_an_upload_that_fails_after_its_last_byte_was_folded_counts():
    """It was repeated, and what lacks is what was folded the first time."""
    silos, uplinks = two()
    playing = Playing(silos, uplinks, Random(5))
    await turns()
    for uplink in uplinks.values():
        uplink.deliver(0)
    await turns()
    assert playing.aligned.folded_bytes == 128
    uplinks["b"].break_off()
    await turns()
    while not playing.acts["a"].done():
        for name, on_slow_lanes in (("a", 0), ("b", 1)):
            if len(uplinks[name].in_flight) > on_slow_lanes:
                uplinks[name].deliver(on_slow_lanes)
        await turns()
    assert not playing.acts["b"].done()
    playing.aligned.idle_timeout_s = 0.05
    uplinks["b"].break_off()
    await playing.acts["b"]
    assert uplinks["b"].attempts == 2
    assert committed(playing.aligned) == staged(silos)


async def test_places_and_weights_are_checked_as_by_staged():
    aligned = Aligned(update(0))
    first = aligned.begin("a", 1.0)
    with pytest.raises(UpdateError, match="'a' takes part in this round already"):
        aligned.begin("a", 1.0)
    with pytest.raises(UpdateError, match="weight nan"):
        aligned.begin("b", float("nan"))
    first.abort()
    first.abort()
    with pytest.raises(WeightsError, match="no update"):
        aligned.commit()
    second = aligned.begin("a", 1.0)
    first.abort()
    assert second.is_awaited
    with pytest.raises(FedError, match="was aborted"):
        await first.receive(Uplink(update(0), 64, 2).begin())
    for wrong, says in (({}, "no weights"), ({"n": np.zeros(2, np.int64)}, "tensor 'n'")):
        with pytest.raises(WeightsError, match=says):
            Aligned(wrong)


async def test_another_order_of_the_tensors_is_refused_by_name():
    aligned = Aligned({"x": np.zeros(4, np.float32), "y": np.zeros(4, np.float32)})
    place = aligned.begin("a", 1.0)
    turned = Uplink({"y": np.ones(4, np.float32), "x": np.ones(4, np.float32)}, 64, 2)
    with pytest.raises(UpdateError, match="'x' lies at byte 16 of the update, not at 0: send"):
        await place.receive(turned.begin())
    missing = Uplink({"x": np.ones(4, np.float32)}, 64, 2)
    with pytest.raises(UpdateError, match=r"lacks \['y'\]"):
        await place.receive(missing.begin())


async def test_tied_tensors_come_once_and_stay_tied():
    table = np.arange(6, dtype=np.float32)
    tied = {"wte": table, "head": table, "b": np.ones(3, np.float32)}
    aligned = Aligned(tied)
    uplink = Uplink(tied, 64, 2)
    assert len(uplink.data) == 36
    act = asyncio.ensure_future(upload(uplink, aligned.begin("a", 1.0)))
    await turns()
    uplink.deliver(0)
    await act
    aligned.commit()
    result = aligned.result()
    assert list(result) == ["wte", "head", "b"]
    assert np.shares_memory(result["wte"], result["head"])
    assert bits(result) == bits(tied)


async def test_weights_without_a_number_come_through():
    empty = {"none": np.zeros((0, 3), np.float16)}
    aligned = Aligned(empty)
    assert await upload(Uplink(empty, 64, 2), aligned.begin("a", 1.0)) == 1
    assert committed(aligned) == bits(empty)


def largest(rows: Any, shares: Any, out: Any) -> None:
    out[...] = np.maximum.reduce([np.array(row) for row in rows])


async def test_another_reduction_fits_into_the_seam():
    silos, uplinks = two()
    like = silos["a"][1]
    aligned, whole = Aligned(like, reduce=largest), Staged(like, reduce=largest)
    acts = []
    for name, (weight, arrays) in silos.items():
        acts.append(asyncio.ensure_future(upload(uplinks[name], aligned.begin(name, weight))))
        contribution = whole.begin(name, weight)
        for key, array in arrays.items():
            contribution.buffers[key][...] = array
        contribution.add()
    await turns()
    while not all(act.done() for act in acts):
        next(u for u in uplinks.values() if u.in_flight).deliver(0)
        await turns()
    expected = {key: np.maximum(silos["a"][1][key], silos["b"][1][key]) for key in like}
    assert committed(aligned) == committed(whole) == bits(expected)
