"""Channels on this machine's RDMA device, and what the device says of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiordma
from aiordma import Channel, ChannelConfig
from aiordma.endpoint import LaneKind

CONFIG = ChannelConfig(slot_bytes=1 << 16, probe_s=20, connect_timeout_s=60)
"""The probe's time is that of an emulated processor."""
SIZE = (2 << 20) + 100


@asynccontextmanager
async def pair(
    left: ChannelConfig = CONFIG,
    right: ChannelConfig | None = None,
    *,
    require: LaneKind | None = None,
) -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a channel, whichever lanes it gets; `right` has the left one's settings by default."""
    async with aiordma.listen(config=right or left) as listener:
        connecting = aiordma.connect(*listener.address, config=left, require=require, timeout_s=30)
        async with connecting as near, await listener.accept() as far:
            yield near, far


def resources() -> dict[str, int]:
    """How many PDs, CQs, QPs, MRs and contexts there are on the device; see rdma-resource(8)."""
    command = ["rdma", "resource", "show"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(pd|cq|qp|mr|ctx) (\d+)", shown)}
