"""Training that holds the interpreter lock, in the loop's own thread, is no death: however long, its silo is in."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from aiordma import ChannelConfig
from fedllm import Status
from tests.federation import FINGERPRINT, Log, joining, running
from tests.harness import program

pytestmark = pytest.mark.usefixtures("no_leaks")

IDLE_S = 0.4
"""What a minute is to the idle timeout of two that channels have if nobody says otherwise: a little too short."""
LOCKED_S = 4 * IDLE_S
CONFIG = ChannelConfig(slot_bytes=1 << 14, slots=4, idle_timeout_s=IDLE_S, close_timeout_s=1.0)

SILO = """
import asyncio, ctypes, json, sys
import aiordma, fedllm

port, fingerprint, idle_s, locked_s = json.loads(sys.argv[1])
libc = ctypes.PyDLL(None)  # which, other than CDLL, keeps the lock during a call

def fit(weights):
    libc.usleep(int(locked_s * 1e6))
    return {name: array + array.dtype.type(1) for name, array in weights.items()}

async def main():
    config = aiordma.ChannelConfig(slot_bytes=1 << 14, slots=4, idle_timeout_s=idle_s)
    joining = fedllm.join(
        "127.0.0.1", port, name="locked", fingerprint=fingerprint, config=config, backoff=None
    )
    async with joining as silo:
        async for task in silo.rounds():
            assert (await task.submit(fit(task.weights), weight=1)).accepted

asyncio.run(main())
"""


async def test_a_fit_that_holds_the_lock_is_no_death():
    log = Log()
    # Far more than the slots hold: the last acknowledgements are due when the silo begins to train.
    weights = {"w": np.zeros(1 << 18, np.float32)}
    options: dict[str, Any] = {"rounds": 2, "min_silos": 2, "config": CONFIG, "weights": weights}

    async def wait_for_it(address: tuple[str, int]) -> None:
        async with joining(address, "waits", config=CONFIG) as silo:
            async for task in silo.rounds():
                assert (await task.submit(task.weights, weight=1)).accepted

    async with running(log, **options) as (address, run), asyncio.timeout(30):
        words = [address[1], FINGERPRINT, IDLE_S, LOCKED_S]
        async with program(SILO, json.dumps(words)) as silo:
            await asyncio.gather(wait_for_it(address), run)
            assert await silo.wait() == 0
    for result in log.rounds:
        assert [outcome.status for outcome in result.outcomes.values()] == [Status.COMMITTED] * 2
        assert result.seconds > LOCKED_S
    assert [line for line in log.lines if "joined" not in line] == []
