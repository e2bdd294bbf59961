"""Silos whose only way out is an HTTP proxy: a run through it, and what becomes of a silo that it does not let out."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from aiordma import ConfigError, ProxyRefused
from fedllm import Backoff, Silo
from tests.federation import Log, joining, running, weights_of
from tests.proxies import a_proxy

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")

AT_ONCE = Backoff(sleep=lambda _: asyncio.sleep(0))


async def take_part(silo: Silo) -> None:
    async for task in silo.rounds():
        update = {n: (a + np.ones((), a.dtype)).astype(a.dtype) for n, a in task.weights.items()}
        assert (await task.submit(update, weight=1)).accepted


async def test_a_run_goes_through_a_proxy_that_wants_a_password():
    log = Log()
    async with running(log, rounds=2) as (address, run), a_proxy() as proxy:
        way = proxy.url.replace("//", "//bank:secret@")
        async with joining(address, "a", proxy=way) as silo:
            await take_part(silo)
        history = await run
    assert history.weights["w"].tobytes() == weights_of(2)["w"].tobytes()
    assert len(proxy.heads) == 2, "the control connection, and its lane"
    assert all("Proxy-Authorization: Basic " in head for head in proxy.heads)
    moved = sum(array.nbytes for array in weights_of(0).values())
    assert sum(proxy.up_bytes) > 2 * moved


@pytest.mark.parametrize(("status", "attempts"), [(407, 1), (503, 3)])
async def test_a_password_that_is_not_taken_is_not_tried_again(status: int, attempts: int):
    """Wrong ones, sent often, lock accounts; whatever else a proxy says may change."""
    said: list[str] = []
    answer = f"HTTP/1.1 {status} No\r\n\r\n".encode()
    async with a_proxy(answer, opens=False) as proxy:

        def enough(what: str) -> None:
            said.append(what)
            if len(said) == 2:
                proxy.answer = b"HTTP/1.1 407 No\r\n\r\n"

        way = proxy.url.replace("//", "//bank:wrong@")
        with pytest.raises(ProxyRefused, match="does not take this user and password"):
            async with joining(("h", 1), "a", proxy=way, backoff=AT_ONCE, on_event=enough):
                pass
        assert len(proxy.heads) == attempts


async def test_an_address_that_is_no_proxy_is_told_at_once():
    silo = joining(("h", 1), "a", proxy="socks5://h:1", backoff=AT_ONCE)
    with pytest.raises(ConfigError, match="does not begin with http://"):
        await silo.__aenter__()
