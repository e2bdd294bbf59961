"""Training that blocks, in a thread that is told to stop, and waited for, when its coroutine is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_in_thread"]

T = TypeVar("T")


async def run_in_thread(train: Callable[[threading.Event], T]) -> T:
    """``train(stop)`` in a thread of the loop's default executor; what it returns or raises.

    A thread cannot be cancelled. So `train` looks at `stop` between its steps, and ends when it is set, by
    returning or by raising: cancelled, this sets it and waits for that end, however often it is cancelled
    meanwhile. When it returns nobody trains any more, and the model's memory is the caller's again: somewhere
    between its start and its end. What `train` made of being stopped is dropped.
    """
    stop = threading.Event()
    training = asyncio.ensure_future(asyncio.to_thread(train, stop))
    try:
        await asyncio.wait({training})
    except asyncio.CancelledError:
        stop.set()
        while not training.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({training})
        training.exception()  # seen, or asyncio would complain of it
        raise
    return training.result()
