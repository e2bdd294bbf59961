"""How verbs lanes call a device, where soft-RoCE takes what others do not. ibv_wr_post(3)."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from aiordma import Channel
from tests.harness import cancel, noise, until, usable
from tests.softroce.lanes import CONFIG, SIZE, pair

pytestmark = [pytest.mark.verbs, pytest.mark.usefixtures("clean_device")]

MOVES = {"wr_send", "wr_rdma_write", "wr_rdma_write_imm"}


class Watched:
    """A QPEx, and the work requests for which no data was set."""

    def __init__(self, qp: Any) -> None:
        vars(self).update(qp=qp, calls=[], incomplete=[])

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.qp, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("wr_"):
            if self.calls and self.calls[-1] in MOVES and not name.startswith("wr_set_"):
                self.incomplete.append(self.calls[-1])
            self.calls.append(name)
        return getattr(self.qp, name)


def watch(channel: Channel) -> Watched:
    """The queue pair of its only lane."""
    (port,) = channel._link.ports
    pair = port.lane._qp  # type: ignore[attr-defined]
    pair._qp = Watched(pair._qp)
    return pair._qp  # type: ignore[no-any-return]


async def test_each_work_request_is_complete(record_property: Any) -> None:
    """mlx5's is overwritten by the next one if no data is set, be it none."""
    async with pair(CONFIG, require="verbs") as (near, far):
        watched = [watch(channel) for channel in (near, far)]
        into = np.zeros(SIZE, np.uint8)
        far.register(into)
        for is_cancelled in (False, True):
            receiving = asyncio.create_task(far.recv_tensor(into=into))
            sending = asyncio.create_task(near.send_tensor(noise(SIZE)))
            if is_cancelled:
                await until(lambda: far._link.ports[0].windows._open)  # type: ignore[union-attr]
                await cancel(receiving)
                await cancel(sending)
            await asyncio.gather(receiving, sending, return_exceptions=True)
        await usable(near, far)
        for channel in (near, far):
            lane = channel._link.ports[0].lane
            lane._doorbell(lane._outbox._marker())  # type: ignore[attr-defined]
        await usable(near, far)
    calls = {call for qp in watched for call in qp.calls}
    assert calls >= MOVES | {"wr_bind_mw", "wr_local_inv", "wr_set_sge", "wr_set_inline_data"}
    assert [qp.incomplete for qp in watched] == [[], []]
    record_property("lane_bytes", SIZE)


async def test_the_queue_pair_says_how_long_the_device_may_take(record_property: Any) -> None:
    """All retries, each of which may take four times the timeout."""
    async with pair(CONFIG, require="verbs") as (near, _):
        lane = near._link.ports[0].lane
        attributes = lane._qp._qp.query(1 << 9 | 1 << 10)[0]  # type: ignore[attr-defined]
        timeout_s = 4.096e-6 * 2**attributes.timeout
        assert 0.25 <= timeout_s < 0.6
        expected_s = 4 * (attributes.retry_cnt + 1) * timeout_s
        assert lane._silence.patience_s == pytest.approx(expected_s)  # type: ignore[attr-defined]
