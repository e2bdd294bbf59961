"""What a caller may get wrong, and a peer that dies: the exact error, its cause and its remedy, and nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import (
    Busy,
    Channel,
    MessageError,
    TensorError,
)
from aiordma.ring import SlotState
from tests.foreign import CONFIG, nothing_left


@pytest.fixture(autouse=True)
async def untouched() -> AsyncIterator[None]:
    async with nothing_left():
        yield


@pytest.fixture
async def pair(untouched: None) -> AsyncIterator[tuple[Channel, Channel]]:
    async with aiordma.listen(config=CONFIG) as listener:
        async with aiordma.connect(*listener.address, config=CONFIG) as near:
            async with await listener.accept() as far:
                yield near, far


async def fits(near: Channel, far: Channel) -> None:
    """The transfer that is next, and messages, still come."""
    got = await far.recv_tensors()
    assert {name: array.tolist() for name, array in got.arrays.items()} == {
        "a": [1, 2],
        "b": [[3.0]],
    }
    await near.send(1)
    assert await far.recv() == 1
    await near.ping()
    (port,) = far._link.ports
    assert port.ring.count(SlotState.FILLED) == 0


def frozen() -> Any:
    array = np.zeros(2, np.int32)
    array.flags.writeable = False
    return array


A, B = np.zeros(2, np.int32), np.zeros((1, 1), np.float32)
INTO = [
    pytest.param(
        {"a": np.zeros(3, np.int32), "b": B},
        "tensor 'a' is I32 of shape (2,), but `into` has I32 of shape (3,)",
        id="shape",
    ),
    pytest.param(
        {"a": np.zeros(2, np.int64), "b": B},
        "tensor 'a' is I32 of shape (2,), but `into` has I64",
        id="dtype",
    ),
    pytest.param(
        {"a": frozen(), "b": B},
        "tensor 'a' is read-only in `into`: pass a writable array",
        id="read-only",
    ),
    pytest.param(
        {"a": A},
        "`into` must have exactly the transfer's names: it lacks ['b'], and has []",
        id="missing",
    ),
    pytest.param({"a": A, "b": B, "c": A}, "it lacks [], and has ['c'] besides", id="unknown"),
    pytest.param(
        {"a": np.zeros(4, np.int32)[::2], "b": B},
        "tensor 'a' is not contiguous: pass",
        id="strided",
    ),
    pytest.param({"a": [0, 0], "b": B}, "tensor 'a' is a builtins.list", id="a list"),
    pytest.param(
        {"a": A, "b": A.view(np.float32)[:1].reshape(1, 1)},
        "overlaps 'b' in the memory of `into`",
        id="overlap",
    ),
    pytest.param(
        [A, B], "`into` must be a mapping from names to arrays, not builtins.list", id="no mapping"
    ),
]


@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize(("into", "text"), INTO)
async def test_a_destination_that_does_not_fit(pair, into, text, is_waiting):
    near, far = pair
    receiving = asyncio.ensure_future(far.recv_tensors(into=into)) if is_waiting else None
    if is_waiting:
        await asyncio.gather(near.ping(), far.ping())
    tensors = {"a": np.array([1, 2], np.int32), "b": np.array([[3]], np.float32)}
    sending = asyncio.create_task(near.send_tensors(tensors, confirm=True))
    with pytest.raises(TensorError) as caught:
        await (receiving or far.recv_tensors(into=into))
    assert text in str(caught.value)
    await fits(near, far)
    await sending


class HalfShared:
    """Has one half of the DLPack protocol, of which numpy makes an AttributeError."""

    def __dlpack__(self, **options):
        raise NotImplementedError


class Failing(dict[str, object]):
    def __getitem__(self, name):
        raise ZeroDivisionError(name)


@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize(
    ("into", "error"),
    [({"a": HalfShared(), "b": B}, TensorError), (Failing(a=A, b=B), ZeroDivisionError)],
    ids=["half of DLPack", "a mapping that fails"],
)
async def test_a_destination_that_raises_harms_its_own_call_only(pair, into, error, is_waiting):
    near, far = pair
    receiving = asyncio.ensure_future(far.recv_tensors(into=into)) if is_waiting else None
    if is_waiting:
        await asyncio.gather(near.ping(), far.ping())
    tensors = {"a": np.array([1, 2], np.int32), "b": np.array([[3]], np.float32)}
    sending = asyncio.create_task(near.send_tensors(tensors, confirm=True))
    with pytest.raises(error):
        await (receiving or far.recv_tensors(into=into))
    await fits(near, far)
    await sending


async def test_a_request_that_can_never_be_met_does_not_wait_for_a_transfer(pair):
    _, far = pair
    with pytest.raises(TensorError, match="unknown framework 'jax': use 'numpy' or 'torch'"):
        await far.recv_tensor(framework="jax")
    with pytest.raises(TensorError, match="unknown framework 'jax'"):
        await far.recv_tensors(framework="jax")
    with pytest.raises(TensorError, match="`into` must be a mapping"):
        await far.recv_tensors(into=A)


async def test_several_tensors_where_one_was_asked_for(pair):
    near, far = pair
    tensors = {"a": np.array([1, 2], np.int32), "b": np.array([[3]], np.float32)}
    sending = asyncio.create_task(near.send_tensors(tensors))
    with pytest.raises(TensorError, match=r"has 2 tensors: receive it with recv_tensors\(\)"):
        await far.recv_tensor()
    await fits(near, far)
    await sending


async def test_a_transfer_is_taken_once(pair):
    near, far = pair
    sending = asyncio.create_task(near.send_tensors({"a": np.arange(3)}))
    async with aclosing(far.incoming()) as transfers:
        transfer = await anext(transfers)
        for call in (far.recv_tensor(), far.recv_tensors(), anext(far.incoming())):
            with pytest.raises(Busy):
                await call
        await transfer.arrays()
        for again in (transfer.arrays(), anext(transfer.chunks())):
            with pytest.raises(Busy, match="transfer 1 is over: it is received only once"):
                await again
    await sending


WRONG = "the message is not of the type that recv() was asked for"


@pytest.mark.parametrize(
    ("sent", "type_", "texts"),
    [
        pytest.param(
            "one",
            int,
            (WRONG, "(Expected `int`, got `str`)", "ask for the type that the peer sends"),
            id="type",
        ),
        pytest.param({"a": 1}, dict[str, str], (WRONG, "Expected `str`, got `int`"), id="generic"),
        pytest.param(b"\xff", str, (WRONG,), id="bytes"),
    ],
)
async def test_a_message_of_another_type(pair, sent, type_, texts):
    near, far = pair
    await near.send(sent)
    with pytest.raises(MessageError) as caught:
        await far.recv(type_)
    for text in texts:
        assert text in str(caught.value)
    await near.send(5)
    assert await far.recv(int) == 5


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        pytest.param(
            object(), "cannot be encoded by msgspec: Encoding objects of type object", id="type"
        ),
        pytest.param(1 << 70, "cannot be encoded by msgspec", id="large number"),
        pytest.param("\ud800", "cannot be encoded by msgspec", id="no Unicode"),
        pytest.param(
            bytes(1 << 15),
            "has 32771 bytes, and the peer takes 12288: send tensors with",
            id="large",
        ),
    ],
)
async def test_a_message_that_cannot_travel(pair, obj, text):
    near, far = pair
    with pytest.raises(MessageError, match=text):
        await near.send(obj)
    await near.send("fine")
    assert await far.recv() == "fine"


@pytest.mark.parametrize(
    ("tensors", "meta", "text"),
    [
        pytest.param(
            {"t": A},
            bytes(65534),
            "`meta` takes 65537 bytes.*of 65536: send it as a tensor",
            id="meta",
        ),
        pytest.param({"t": A}, object(), "`meta` cannot be encoded as msgpack", id="meta's type"),
        pytest.param(
            {"t": np.zeros((2, 2))[:, 1]}, None, "tensor 't' is not contiguous", id="strided"
        ),
        pytest.param(
            {"n" * 1025: A}, None, "has 1025 bytes, more than the limit of 1024: shorten", id="name"
        ),
        pytest.param({"t": [1]}, None, "tensor 't' is a builtins.list", id="a list"),
        pytest.param(
            {f"{i:>1000}": A for i in range(140)},
            None,
            "140 tensors has .* several transfers",
            id="manifest",
        ),
    ],
)
async def test_tensors_that_cannot_travel(pair, tensors, meta, text):
    near, far = pair
    with pytest.raises(TensorError, match=text):
        await near.send_tensors(tensors, meta=meta)
    sending = asyncio.create_task(near.send_tensor(A))
    assert (await far.recv_tensor()).tolist() == [0, 0]
    await sending
