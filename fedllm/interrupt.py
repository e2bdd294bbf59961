"""`asyncio.run` that takes SIGINT and SIGTERM alike, and always lets the work clean up."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptibly(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end; SIGINT and SIGTERM cancel it and wait until it has cleaned up.

    Then they raise `KeyboardInterrupt`, or `SystemExit` with code 143, whatever the work itself
    raised meanwhile: its children's complaints about being ended are no news.
    """
    received: list[signal.Signals] = []
    try:
        return asyncio.run(_cancelled_by_signals(work, received))
    finally:
        if received:
            raise KeyboardInterrupt if received[0] is signal.SIGINT else SystemExit(143)


async def _cancelled_by_signals(work: Coroutine[Any, Any, T], received: list[signal.Signals]) -> T:
    task = asyncio.create_task(work)

    def stop(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return await task
