"""What goes wrong with verbs lanes, on the kernel's RDMA device: the error, and that nothing is left."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import Channel, ChannelBroken, ChannelConfig, LaneRefused, RegistrationError
from tests.harness import noise, program, until, usable
from tests.softroce.lanes import CONFIG, SIZE, pair, resources

pytestmark = [pytest.mark.verbs, pytest.mark.usefixtures("clean_device")]

_PR_CAPBSET_DROP, _CAP_IPC_LOCK = 24, 14


# Before there is a channel


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"verbs": False}, r"ChannelConfig\(verbs=False\)"),
        ({"device": "mlx5_7"}, r"there is no RDMA device 'mlx5_7' here: there are \S+/\d"),
        ({"gid_index": 200}, r"gid_index=200 of \S+/\d is empty: it must be a RoCE v2 address"),
    ],
)
@pytest.mark.parametrize("side", ["client", "server"])
async def test_what_cannot_be_is_done_over_tcp_and_says_why(settings, reason, side):
    odd = ChannelConfig(slot_bytes=1 << 16, **settings)
    left, right = (odd, CONFIG) if side == "client" else (CONFIG, odd)
    await over_tcp(left, right, f"^tcp: the {side}: .*{reason}")
    with pytest.raises(LaneRefused, match=reason):
        async with pair(left, right, require="verbs"):
            pass


async def over_tcp(left: ChannelConfig, right: ChannelConfig, reason: str) -> None:
    """It connects, both ends say why it is over TCP, and it works."""
    async with pair(left, right) as (near, far):
        for channel in (near, far):
            assert channel.lanes[0].kind == "tcp"
            assert re.search(reason, channel.lanes[0].reason), channel.lanes[0].reason
        await usable(near, far)


async def test_a_device_that_cannot_be_opened_does_not_stand_against_the_others(monkeypatch):
    """As in a container that was given one of its host's."""
    from aiordma.lanes.verbs import device

    real = device.names()
    monkeypatch.setattr(device, "names", lambda: ["ghost0", *real])
    async with pair(require="verbs") as (near, far):
        await usable(near, far)
    wanted = ChannelConfig(slot_bytes=1 << 16, device="ghost0")
    await over_tcp(
        wanted, CONFIG, "^tcp: the client: cannot open the RDMA device ghost0: .*aiordma doctor"
    )
    monkeypatch.setattr(device, "names", lambda: ["ghost0"])
    await over_tcp(
        CONFIG, CONFIG, "^tcp: the client: cannot open the RDMA device ghost0: .*aiordma doctor"
    )


async def test_a_port_that_is_down(node):
    set_link("down")
    try:
        await over_tcp(CONFIG, CONFIG, "no RDMA port is active .rxe0/1 is DOWN.: bring its link up")
    finally:
        set_link("up")
        await until(lambda: "ACTIVE" in run_quietly("rdma", "link", "show", "rxe0/1"))


def set_link(state: str) -> None:
    run_quietly("ip", "link", "set", "v0", state)


def run_quietly(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_path_on_which_packets_vanish(monkeypatch, side):
    """One end's probes are never sent: neither end has heard all, and both find out in time."""
    from aiordma.lanes.verbs import VerbsQueuePair

    submit = VerbsQueuePair.submit
    mute: list[Any] = []

    def lose(pair: VerbsQueuePair, batch: Any) -> None:
        mute.append(pair) if not mute else None
        if (pair is mute[0]) != (side == "server"):
            return
        submit(pair, batch)

    monkeypatch.setattr(VerbsQueuePair, "submit", lose)
    config = ChannelConfig(slot_bytes=1 << 16, probe_s=3, connect_timeout_s=3)
    began = asyncio.get_running_loop().time()
    await over_tcp(config, config, r"no packet got through .* UDP port 4791 .*probe_s=3\)")
    assert asyncio.get_running_loop().time() - began < 9


@pytest.fixture
def little_lockable_memory(node: None) -> Iterator[None]:
    """RLIMIT_MEMLOCK of a megabyte, for a process that may not exceed it as root may."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    kept = data[0]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    data[0] = kept & ~(1 << _CAP_IPC_LOCK)
    assert libc.capset(header, data) == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)
    data[0] = kept
    assert libc.capset(header, data) == 0


async def test_rlimit_memlock_is_too_small_for_the_rings(little_lockable_memory):
    reason = (
        "cannot be registered .Cannot allocate memory; RLIMIT_MEMLOCK is 1048576 bytes.: raise it"
    )
    await over_tcp(ChannelConfig(), ChannelConfig(), f"^tcp: the server: .*{reason}")


async def test_rlimit_memlock_is_too_small_for_a_tensor(little_lockable_memory):
    config = ChannelConfig(slot_bytes=4096, probe_s=10)
    async with pair(config, require="verbs") as (near, far):
        with pytest.raises(RegistrationError, match=r"RLIMIT_MEMLOCK is 1048576 bytes\): raise it"):
            near.register(np.ones(4 << 20, np.uint8))
        await usable(near, far)


async def test_more_than_the_device_registers_at_once(monkeypatch):
    from aiordma.lanes.verbs import Device

    config = ChannelConfig(slot_bytes=4096, probe_s=10)
    async with pair(config, require="verbs") as (near, far):
        device = queue_pair(near)._device
        assert isinstance(device, Device)
        monkeypatch.setattr(device, "max_region_bytes", 1 << 20)
        with pytest.raises(
            RegistrationError, match=r"registers at once \(1048576\): use smaller slots"
        ):
            near.register(np.ones((1 << 20) + 1, np.uint8))
        await usable(near, far)


async def test_what_cannot_be_registered():
    config = ChannelConfig(slot_bytes=4096, probe_s=10, registered_bytes=1 << 20)
    async with pair(config, require="verbs") as (near, far):
        with pytest.raises(RegistrationError, match="registered_bytes=1048576 allows: raise it"):
            near.register(np.ones((1 << 20) + 1, np.uint8))
        with pytest.raises(RegistrationError, match="a bytearray cannot be registered"):
            near.register(bytearray(100))
        with pytest.raises(RegistrationError, match=r"\(Bad address\): .* send a copy"):
            near.register(np.frombuffer(mmap.mmap(-1, 100, prot=0), np.uint8))
        with pytest.raises(aiordma.TensorError, match="not contiguous"):
            near.register(np.ones((4, 4))[:, 1])
        before = resources()["mr"]
        kept = [noise(1 << 19, seed=i) for i in range(3)]
        for array in kept:
            near.register(array)
        assert resources()["mr"] == before + 2  # the first one made room
        await usable(near, far)


# With a channel


def queue_pair(channel: Channel) -> Any:
    """Of its first lane."""
    return channel._link.ports[0].lane._qp  # type: ignore[attr-defined]


_BY_DEVICE = (
    r"lane 0 \(verbs\) is lost: \S+/\d, queue pair \d+ to \d+ at \S+: "
    r"work completion status \d+ \(\w+, vendor error 0x[0-9a-f]+\): \w+ .*; connect again"
)


async def broken(
    near: Channel, far: Channel, match: str, *, nbytes: int = SIZE, ends: int = 1
) -> None:
    """A transfer fails at both ends, with typed errors; so many of them say status and likely cause."""
    array = noise(nbytes)
    near.register(array)
    results = await asyncio.gather(
        near.send_tensor(array), far.recv_tensor(), return_exceptions=True
    )
    assert all(isinstance(result, ChannelBroken) for result in results), results
    assert sum(bool(re.match(_BY_DEVICE, str(result))) for result in results) >= ends, results
    assert any(match in str(result) for result in results), results


async def test_a_write_outside_of_the_window(monkeypatch):
    async with pair(require="verbs") as (near, far):
        theirs = queue_pair(near)._peer
        beyond = type(theirs)(
            theirs.gid, theirs.lid, theirs.queue_pair, 0, 4096, theirs.ring + (1 << 30), theirs.key
        )
        monkeypatch.setattr(queue_pair(near), "_peer", beyond)
        await broken(near, far, "REM_ACCESS_ERR", ends=2)
    async with pair(require="verbs") as (near, far):
        await usable(near, far)


async def test_a_queue_pair_that_has_no_right_to_the_window():
    """The window is open to its own queue pair alone, not to others of the same protection domain."""
    async with pair(require="verbs") as (near, far), pair(require="verbs") as (_, other):
        stolen = queue_pair(near)._peer.__class__
        mine, wanted = queue_pair(near)._peer, queue_pair(other).address
        queue_pair(near)._peer = stolen(
            mine.gid, mine.lid, mine.queue_pair, 0, 4096, wanted.ring, wanted.key
        )
        before = bytes(other._link.ports[0].ring.memory[:4096])
        await broken(near, far, "REM_ACCESS_ERR", ends=2)
        assert bytes(other._link.ports[0].ring.memory[:4096]) == before


async def test_a_peer_that_posts_no_receives(monkeypatch):
    async with pair(require="verbs") as (near, far):
        monkeypatch.setattr(queue_pair(far), "post_receives", lambda count: None)
        await broken(
            near, far, "RNR_RETRY_EXC_ERR", nbytes=3 * SIZE
        )  # more than were posted before


async def test_a_queue_pair_that_fails_by_itself():
    async with pair(require="verbs") as (near, far):
        asyncio.get_running_loop().call_later(0.02, queue_pair(near).fail, 1 << 40)
        await broken(near, far, "WR_FLUSH_ERR")


_PLACE = r"(without a goodbye: .*; lane 0 \(verbs\) was|lane 0 \(verbs\) is lost:) \S+/\d, queue pair \d+ to"
"""Whichever of the connections ended first; what was not under way has no status."""

_DOOMED = """
import asyncio, importlib, os, signal, sys
import numpy as np
import aiordma

port, module, name, after = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

async def main():
    owner, method = name.split(".")
    owner = getattr(importlib.import_module(module), owner)
    real = getattr(owner, method)
    calls = 0
    def die(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, method, die)
    config = aiordma.ChannelConfig(slot_bytes=1 << 16, probe_s=20)
    async with aiordma.connect("127.0.0.1", port, config=config, require="verbs", timeout_s=60) as channel:
        array = np.ones(8 << 20, np.uint8)
        channel.register(array)
        await channel.send_tensor(array)

asyncio.run(main())
"""


# Module, function, how many calls go well, and whether there was a channel by then.
DEATHS = {
    "HELLO": ("aiordma.path", "RdmaPath.open", 0, False),
    "INIT": ("aiordma.lanes.verbs", "VerbsQueuePair.connect", 0, False),
    "RTS": ("aiordma.lanes.rdma", "RdmaLane.expose", 0, False),
    "the probe": ("aiordma.path", "RdmaPath.probe", 0, False),
    "a transfer": ("aiordma.lanes.verbs", "VerbsQueuePair.submit", 4, True),
    "closing": ("aiordma.lanes.verbs", "VerbsQueuePair.fail", 0, True),
}


@pytest.mark.timeout(300)
async def test_peers_that_are_killed_in_every_state():
    """At once, since this kernel takes most of a minute to clean up after some of them."""
    await asyncio.gather(*(_outlive(*death) for death in DEATHS.values()))


async def _outlive(module: str, name: str, after: int, had_channel: bool) -> None:
    async with aiordma.listen(config=CONFIG) as listener:
        async with program(_DOOMED, listener.address[1], module, name, after) as doomed:
            if had_channel:
                async with await listener.accept() as far:
                    receiving = await asyncio.gather(far.recv_tensor(), return_exceptions=True)
                    if name != "VerbsQueuePair.fail":
                        assert isinstance(receiving[0], ChannelBroken)
                        assert re.search(_PLACE, str(receiving[0]))
            assert await doomed.wait() == -9
        async with aiordma.connect(*listener.address, config=CONFIG, timeout_s=30) as near:
            async with await listener.accept() as far:
                assert near.lanes[0].kind == "verbs"
                await usable(near, far)


_DOOMED_SERVER = """
import asyncio, importlib, os, signal, sys
import aiordma

async def main():
    owner, method = sys.argv[2].split(".")
    owner = getattr(importlib.import_module(sys.argv[1]), owner)
    setattr(owner, method, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    config = aiordma.ChannelConfig(slot_bytes=1 << 16, probe_s=20, connect_timeout_s=60)
    async with aiordma.listen(config=config) as listener:
        print(listener.address[1], flush=True)
        await listener.accept()

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["HELLO", "RTS"])
async def test_servers_that_are_killed_before_there_is_a_channel(state):
    module, name, _, _ = DEATHS[state]
    async with program(_DOOMED_SERVER, module, name) as doomed:
        assert doomed.stdout is not None
        port = int(await doomed.stdout.readline())
        with pytest.raises(aiordma.ConnectError, match=r"hung up .* connect again") as caught:
            await aiordma.connect("127.0.0.1", port, config=CONFIG, timeout_s=60)
        assert ("check host" in str(caught.value)) == (state == "HELLO")  # it had said nothing


async def test_other_programs_may_be_run_while_memory_is_registered():
    async with pair(require="verbs") as (near, far):
        array = noise(SIZE)
        near.register(array)
        run_quietly(sys.executable, "-c", "pass")
        await usable(near, far)
