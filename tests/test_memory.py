"""Memory that is used again: it comes back when nobody sees it any more, and never before."""

import asyncio
from functools import partial

import numpy as np
import pytest

import fedllm.memory
from fedllm import Aligned, FedAvg, Memory, Silo, Staged, run_round
from tests.harness import until
from tests.playing import WEIGHTS, A, B, bits, pairs, play, takes_part


def address_of(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "look",
    [
        lambda piece: piece[:1],
        lambda piece: piece.view(np.float32).reshape(2, -1)[1],
        lambda piece: np.ndarray((4,), np.float64, piece.data, 64)[1:],
        lambda piece: piece.data,
    ],
)
def test_a_piece_comes_back_with_the_last_array_in_it(look):
    memory = Memory()
    piece = memory.take(4096)
    first = address_of(piece)
    seen = look(piece)
    del piece
    assert memory.spare_bytes == 0
    del seen
    assert memory.spare_bytes == 4096
    again = memory.take(4096)
    assert address_of(again) == first
    assert memory.spare_bytes == 0


def test_pieces_of_another_size_are_given_up():
    memory = Memory()
    held = [memory.take(4096), memory.take(4096)]
    held.clear()
    assert memory.spare_bytes == 8192
    assert memory.take(8192).size == 8192
    assert memory.spare_bytes == 8192  # the new one alone
    assert memory.take(0).size == 0


def test_arrays_outlive_the_memory_that_they_are_of():
    piece = Memory().take(4096)
    piece[:] = 7
    assert piece.sum() == 7 * 4096


@pytest.mark.parametrize(("aggregate", "models"), [(Staged, 3), (Aligned, 2)])
async def test_rounds_take_the_memory_of_those_before(monkeypatch, aggregate, models):
    taken: list[int] = []

    def take_from_the_system(nbytes):
        taken.append(nbytes)
        return map_fresh(nbytes)

    map_fresh = fedllm.memory._map
    monkeypatch.setattr(fedllm.memory, "_map", take_from_the_system)
    memory = Memory()
    strategy = FedAvg(aggregate=partial(aggregate, memory=memory))
    weights = WEIGHTS
    async with pairs("a", "b") as ends:
        for _ in range(4):
            silos = {"a": takes_part(A), "b": takes_part(B)}
            plain, _ = await play(silos, weights=weights, ends=ends)
            result, _ = await play(silos, weights=weights, ends=ends, strategy=strategy)
            assert bits(result.weights) == bits(plain.weights)
            weights = result.weights
            del result
            # All is back but the new weights. The thread that folded lets go of the old a moment after.
            await until(lambda: memory.spare_bytes == sum(taken[1:]), "the round is gone")
    assert len(taken) == models


async def test_a_silo_receives_into_the_memory_of_the_round_before():
    places: list[int] = []

    async def take_part(channel):
        silo = Silo(channel, "a")
        silo.memory = Memory()
        async for task in silo.rounds():
            assert bits(task.weights) == bits(WEIGHTS)
            places.append(address_of(task.weights["w"]))
            # The weights of the round before are gone with their task, once this one is there.
            await task.submit(A, weight=1.0)
            if len(places) == 4:
                await silo.aclose()
                return

    async with pairs("a") as (servers, silos):
        acting = asyncio.ensure_future(take_part(silos["a"]))
        for number in range(1, 5):
            await run_round(servers, WEIGHTS, round=number, strategy=FedAvg(), min_silos=1)
        await acting
    assert places[2:] == places[:2]
    assert len(set(places)) == 2
