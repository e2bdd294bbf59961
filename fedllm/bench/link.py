"""A slow, long link between two network namespaces of this machine, for kernels without netem.

Each end has a token bucket (tc-tbf(8)) on its way out, with a queue of bandwidth x delay and 32 MiB. Without a delay
the ends are a veth pair, and all is the kernel's. For a delay they are TUN devices (Linux:
Documentation/networking/tuntap.rst) and a relay: a process that reads the packets at one end, keeps them for the delay,
and writes them to the other. These are TCP's own packets, up to 64 KiB at a time since the devices offer segmentation
offload, so that its round trips and windows are those of such a path. Nothing is lost but what overflows a queue.

`python -m fedllm.bench.link RATE_BITS DELAY_S` is the process that makes both, and needs root. It writes a line when
the link is there, and ends with its standard input; the namespaces, which have no names, end with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedllm.bench.errors import BenchError

__all__ = ["SERVER_HOST", "Link", "Shape", "open_link"]

SERVER_HOST: Final = "10.83.0.1"
_SILOS_HOST: Final = "10.83.0.2"
_DEVICE: Final = "link0"

# linux/sched.h, linux/if_tun.h
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4

_PACKET_BYTES: Final = 10 + (1 << 16)
"""The most that is read at once: a virtio_net_hdr and a packet."""
_BATCH: Final = 64
_BURST_BYTES: Final = 1 << 19
_QUEUE_BYTES: Final = 32 << 20


class Shape(msgspec.Struct, frozen=True):
    """A link, the same both ways."""

    rate_bits: int
    """A second."""
    delay_s: float
    """One way."""


class Link(NamedTuple):
    """What comes before a command to run it at one end or the other."""

    server_prefix: list[str]
    silos_prefix: list[str]
    pid: int
    """Of the relay."""

    def relay_cpu_s(self) -> float:
        """User and system seconds of the relay so far; proc_pid_stat(5)."""
        stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        ticks = stat.rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def open_link(shape: Shape) -> AsyncIterator[Link]:
    """A link as long as the context lasts. Raises `BenchError` where there can be none."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedllm.bench.link", str(shape.rate_bits), str(shape.delay_s)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = await process.stdout.readline()
        if not line:
            why = (await process.stderr.read()).decode(errors="replace").strip()
            raise BenchError(
                f"no link between network namespaces: {why.splitlines()[-1]}; it takes root, iproute2, "
                "and a kernel with TUN devices and tbf"
            )
        server, silos = (
            ["nsenter", f"--net=/proc/{process.pid}/fd/{fd}"] for fd in line.decode().split()
        )
        yield Link(server, silos, process.pid)
    finally:
        process.stdin.close()
        await process.wait()


# In the link's own process


def _enter_new_namespace() -> int:
    """A network namespace of its own, for what this process opens from now on; its descriptor."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def _open_tun() -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    return device


def _set_up(namespace: int, own: str, peer: str, shape: Shape) -> None:
    queue_bytes = _QUEUE_BYTES + int(shape.rate_bits / 8 * shape.delay_s)
    for command in (
        f"ip address add {own} peer {peer} dev {_DEVICE}",
        "ip link set lo up",
        f"ip link set {_DEVICE} txqueuelen 10000 up",
        f"tc qdisc add dev {_DEVICE} root tbf rate {shape.rate_bits}bit burst {_BURST_BYTES} limit {queue_bytes}",
    ):
        _run(f"nsenter --net=/proc/{os.getpid()}/fd/{namespace} {command}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def _carry(devices: Sequence[int], delay_s: float, until: int) -> None:
    """Carry packets both ways, if there are devices, until there is something to read at `until`."""
    pairs = zip(devices, reversed(devices), strict=True)
    ways = [(source, target, deque[tuple[float, bytes]]()) for source, target in pairs]
    while True:
        next_at_s = min((waiting[0][0] for _, _, waiting in ways if waiting), default=None)
        left_s = None if next_at_s is None else max(0.0, next_at_s - time.monotonic())
        readable, _, _ = select.select((*devices, until), (), (), left_s)
        if until in readable:
            return
        now_s = time.monotonic()
        for source, target, waiting in ways:
            if source in readable:
                waiting.extend((now_s + delay_s, packet) for packet in _read(source))
            while waiting and waiting[0][0] <= now_s:
                os.write(target, waiting.popleft()[1])


def _read(device: int) -> list[bytes]:
    packets: list[bytes] = []
    try:
        while len(packets) < _BATCH:
            packets.append(os.read(device, _PACKET_BYTES))
    except BlockingIOError:
        pass
    return packets


def main() -> int:
    """Be the link; ends with standard input."""
    shape = Shape(int(sys.argv[1]), float(sys.argv[2]))
    first = _enter_new_namespace()
    devices = [_open_tun()] if shape.delay_s else []
    second = _enter_new_namespace()
    if shape.delay_s:
        devices.append(_open_tun())
    else:
        other = f"/proc/{os.getpid()}/fd/{first}"
        _run(f"ip link add {_DEVICE} type veth peer name {_DEVICE} netns {other}")
    _set_up(first, SERVER_HOST, _SILOS_HOST, shape)
    _set_up(second, _SILOS_HOST, SERVER_HOST, shape)
    sys.stdout.write(f"{first} {second}\n")
    sys.stdout.flush()
    _carry(devices, shape.delay_s, sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
