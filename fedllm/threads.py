"""What blocks, in a thread that is waited for when its coroutine is cancelled: nobody works on after that."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["finish_in_thread", "run_in_thread"]

T = TypeVar("T")


async def finish_in_thread(call: Callable[..., T], *args: object) -> T:
    """``call(*args)`` in a thread of the loop's default executor; what it returns or raises.

    Cancelled, however often, this waits for the call's end, and drops what came of it.
    """
    return await _finish(call, *args)


async def run_in_thread(train: Callable[[threading.Event], T]) -> T:
    """``train(stop)`` in a thread of the loop's default executor; what it returns or raises.

    A thread cannot be cancelled. So `train` looks at `stop` between its steps, and ends when it is set, by
    returning or by raising: cancelled, this sets it and waits for that end, however often it is cancelled
    meanwhile. When it returns nobody trains any more, and the model's memory is the caller's again: somewhere
    between its start and its end. What `train` made of being stopped is dropped.
    """
    stop = threading.Event()
    return await _finish(train, stop, when_cancelled=stop.set)


async def _finish(
    call: Callable[..., T], *args: object, when_cancelled: Callable[[], object] = lambda: None
) -> T:
    # No task, which the end of the loop would cancel, and not the thread.
    doing: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(
        None, contextvars.copy_context().run, call, *args
    )
    try:
        await asyncio.wait({doing})
    except asyncio.CancelledError:
        when_cancelled()
        while not doing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({doing})
        doing.exception()  # seen, or asyncio would complain of it
        raise
    return doing.result()
