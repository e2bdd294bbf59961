"""Registered memory: found by its address, for as long as that means the same memory."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest

from aiordma.errors import RegistrationError
from aiordma.lanes.registry import Registry, address_of


class Pinned:
    """A region, which knows nothing but its key."""

    lkey = 7


class Owner:
    """Whose memory may be swapped under it, as a torch parameter's."""


@pytest.fixture
def pinned() -> list[weakref.ref[Pinned]]:
    return []


@pytest.fixture
def registry(pinned) -> Registry:
    def pin(address: int, nbytes: int, is_writable: bool) -> Pinned:
        region = Pinned()
        pinned.append(weakref.ref(region))
        return region

    return Registry(pin, 1000)


def test_what_lies_within_is_found_and_nothing_else(registry):
    array = np.zeros(300, np.uint8)
    registry.add(array, array[100:200].data)
    for first, last, is_found in (
        (100, 200, True),
        (150, 151, True),
        (99, 101, False),
        (150, 201, False),
    ):
        piece = registry.find(array[first:last].data)
        assert (piece is not None) == is_found
        if piece is not None:
            assert piece[:3] == (address_of(array.data) + first, last - first, 7)


def test_the_end_of_an_owner_ends_it_unless_work_is_under_way(registry, pinned):
    array = np.zeros(100, np.uint8)
    release = registry.add(array, array.data)
    registry.add(array, array.data)
    assert len(pinned) == 1
    piece = registry.find(array.data)
    del array
    assert registry.nbytes == len(registry) == 0
    assert pinned[0]() is not None
    del piece
    assert pinned[0]() is None
    release()


def test_it_lasts_until_all_who_asked_for_it_have_released_it(registry):
    """As two tasks do that send one tensor over two channels."""
    array = np.zeros(100, np.uint8)
    releases = [registry.add(array, array.data) for _ in range(2)]
    releases[0]()
    assert registry.find(array.data) is not None
    releases[1]()
    assert registry.find(array.data) is None


def test_a_release_that_comes_late_ends_nothing_else(registry):
    """The memory, and even the owner's identity, may be another's by then."""
    array = np.zeros(600, np.uint8)
    release = registry.add(array, array.data)
    other = np.zeros(600, np.uint8)
    registry.add(other, other.data)  # the first one made room
    registry.add(array, array.data)
    release()
    assert registry.find(array.data) is not None


def test_memory_that_its_owner_lets_go_of_is_kept_until_the_owner_goes(registry, pinned):
    """Else other memory could come to lie at its address, and the device would read the old pages."""
    owner, array = Owner(), np.zeros(100, np.uint8)
    memory = weakref.ref(array)
    registry.add(owner, array.data)
    del array
    assert memory() is not None
    del owner
    assert memory() is None
    assert pinned[0]() is None


def test_a_torch_parameter_whose_data_is_swapped():
    torch = pytest.importorskip("torch")
    registry = Registry(lambda *_: Pinned(), 1000)
    parameter = torch.nn.Parameter(torch.zeros(10))
    registry.add(parameter, parameter.detach().view(torch.uint8).numpy().data)
    old = parameter.detach().data_ptr()
    parameter.data = torch.ones(10)
    assert old not in [torch.zeros(10).data_ptr() for _ in range(100)]
    assert registry.find(parameter.detach().view(torch.uint8).numpy().data) is None
    del parameter
    assert not len(registry)


def test_what_was_asked_for_least_recently_makes_room(registry):
    arrays = [np.zeros(400, np.uint8) for _ in range(3)]
    for array in (arrays[0], arrays[1], arrays[0], arrays[2]):
        registry.add(array, array.data)
    assert [registry.find(array.data) is not None for array in arrays] == [True, False, True]
    with pytest.raises(RegistrationError, match="registered_bytes=1000"):
        registry.add(arrays[0], memoryview(bytearray(1001)))
    with pytest.raises(RegistrationError, match="a bytearray cannot be registered"):
        registry.add(bytearray(10), memoryview(bytearray(10)))


def test_parts_that_are_registered_too_do_not_hide_the_whole(registry):
    """As a state dict's tensors do that lie in one piece of memory."""
    whole = np.zeros(500, np.uint8)
    registry.add(whole, whole.data)
    parts = [whole[20 * i : 20 * i + 20] for i in range(20)]
    for part in parts:
        registry.add(part, part.data)
    for first, last in ((0, 500), (395, 405), (450, 500)):
        assert registry.find(whole[first:last].data) is not None
    assert registry.find(np.zeros(1, np.uint8).data) is None


def test_any_order_of_coming_and_going():
    registry = Registry(lambda *_: Pinned(), 1 << 20)
    rng = random.Random(5)
    live: list[np.ndarray] = []
    for _ in range(500):
        if live and rng.random() < 0.4:
            live.pop(rng.randrange(len(live)))
        else:
            live.append(np.zeros(rng.randint(1, 500), np.uint8))
            registry.add(live[-1], live[-1].data)
        assert len(registry) == len(live)
        assert all(registry.find(array.data) is not None for array in live)
