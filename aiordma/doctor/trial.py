"""What is found out by doing it: a transfer on one port of this host, and a channel to a peer."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

import aiordma
from aiordma import AiordmaError, Channel, ChannelConfig
from aiordma.doctor.findings import Finding, Level

_TRIAL_BYTES: Final = 1 << 20
_TRIAL_S: Final = 30.0
_SLOT_BYTES: Final = 1 << 16
"""Small, so that a low RLIMIT_MEMLOCK, which is a finding of its own, leaves room for both ends."""
_PROBE_S: Final = 10.0
"""Enough for an emulated processor."""


async def self_test(port: str) -> Finding:
    """Move bytes from this process to itself, over a verbs lane on this port, and compare them."""
    subject = f"{port} self-test"
    verbs = importlib.import_module("aiordma.lanes.verbs")
    try:
        with verbs.refused(f"{port} fails"):
            async with asyncio.timeout(_TRIAL_S):
                return Finding("ok", subject, await _loop_back(port))
    except (AiordmaError, OSError) as exc:  # among these the timeout's
        text = str(exc) or f"nothing came of it within {_TRIAL_S:g} s"
    remedy = "mend what is found above it first; then see dmesg, and ibv_rc_pingpong of the ibverbs-utils"
    return Finding("wrong", subject, text, remedy)


async def _loop_back(port: str) -> str:
    config = ChannelConfig(device=port, slot_bytes=_SLOT_BYTES, probe_s=_PROBE_S)
    sent = np.random.default_rng(0).integers(0, 256, _TRIAL_BYTES, np.uint8)
    got = np.zeros_like(sent)
    async with (
        aiordma.listen(config=config) as listener,
        aiordma.connect(
            *listener.address, config=config, require="verbs", timeout_s=_TRIAL_S
        ) as near,
        await listener.accept() as far,
    ):
        began = time.perf_counter()
        await asyncio.gather(near.send_tensor(sent), far.recv_tensor(into=got))
        took_s = time.perf_counter() - began
        moved = far.stats().received_bytes
    if not np.array_equal(got, sent):
        raise OSError(f"{int(np.count_nonzero(got != sent))} of {_TRIAL_BYTES} bytes are wrong")
    return f"{moved >> 20} MiB over {near.lanes[0].reason}; every byte is right; {moved / took_s / 1e6:.3g} MB/s"


async def path_test(host: str, port: int, *, is_able: bool) -> list[Finding]:
    """Open a channel to an aiordma listener; `is_able`: this host could use RDMA, so TCP would be wrong."""
    subject = f"to {host}:{port}"
    try:
        async with aiordma.connect(host, port) as channel:
            round_trip_s = await channel.ping()
            return list(_path(subject, channel, round_trip_s, is_able))
    except (AiordmaError, OSError) as exc:  # their texts have the remedy
        return [Finding("wrong", subject, str(exc))]


def _path(subject: str, channel: Channel, round_trip_s: float, is_able: bool) -> Iterator[Finding]:
    yield Finding("ok", subject, f"answers; round trip {1e3 * round_trip_s:.3g} ms")
    lane = channel.lanes[0]
    if lane.kind == "verbs":
        text = f"{lane.reason}; small packets and full ones get through, both ways"
        yield Finding("ok", f"{subject}, path", text)
    else:
        level: Level = "wrong" if is_able else "note"
        yield Finding(level, f"{subject}, path", f"no RDMA, so channels use {lane.reason}")
