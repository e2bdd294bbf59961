"""The shared fixtures notice what they promise to notice."""

import asyncio
import os
import socket

import hypothesis
import pytest

from tests.conftest import leak_check


async def test_each_loop_is_run(loop_kind, request):
    assert f"[{loop_kind}]" in request.node.name
    assert type(asyncio.get_running_loop()).__module__.startswith(loop_kind)


async def test_a_test_that_does_not_ask_runs_on_asyncio_once(request):
    assert "[" not in request.node.name
    assert isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)


async def test_what_is_closed_is_no_leak(loop_kind):
    async with leak_check():
        first, second = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=first)
        task = asyncio.create_task(asyncio.sleep(0))
        child = await asyncio.create_subprocess_exec("true")
        await asyncio.gather(task, child.wait())
        second.close()
        writer.close()
        await writer.wait_closed()


async def test_a_task_left_behind_is_seen(loop_kind):
    with pytest.raises(AssertionError, match="left behind"):
        async with leak_check():
            task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()


async def test_a_socket_left_behind_is_seen(loop_kind):
    with pytest.raises(AssertionError, match="left behind"):
        async with leak_check():
            forgotten = socket.socket()
    forgotten.close()


async def test_a_child_left_behind_is_seen(loop_kind):
    with pytest.raises(AssertionError, match="left behind"):
        async with leak_check():
            child = await asyncio.create_subprocess_exec("sleep", "60")
    child.kill()
    await child.wait()


def test_ci_draws_the_same_examples_each_time():
    profile = hypothesis.settings()
    assert profile.derandomize == bool(os.environ.get("CI"))
