"""The yardstick of RDMA lanes: ib_write_bw of perftest, one queue pair, plain WRITEs in a row.

It polls its completion queue without pause: its option for events (-e) is refused for WRITE.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import shutil
import socket
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from aiordma.bench.errors import BenchError

_TOOL: Final = "ib_write_bw"
_MiB: Final = 1 << 20
_LISTEN: Final = "0A"  # TCP_LISTEN of the kernel's net/tcp_states.h
_LOOK_S: Final = 0.02


class DevicePort(NamedTuple):
    """Where a lane runs, in the words of perftest's options."""

    device: str
    number: int
    gid_index: int | None
    """None on InfiniBand, which needs none."""


def port_of(reason: str, devices: Path = Path("/sys/class/infiniband")) -> DevicePort:
    """The port and address of a verbs lane, from its `LaneInfo.reason`."""
    found = re.match(r"verbs: ([^/ ]+)/(\d+), (RoCE v\d|InfiniBand) ([0-9a-f.:]+),", reason)
    if found is None:
        raise BenchError(f"the lane does not name its device: {reason!r}")
    device, number, kind, address = found.groups()
    if kind == "InfiniBand":
        return DevicePort(device, int(number), None)
    wanted = ipaddress.IPv6Address(f"::ffff:{address}" if "." in address else address)
    port = devices / device / "ports" / number
    for entry in sorted(port.glob("gids/*"), key=lambda path: int(path.name)):
        with suppress(OSError):  # an entry that is not in use
            gid_kind = (port / "gid_attrs/types" / entry.name).read_text(encoding="ascii").strip()
            gid = ipaddress.IPv6Address(entry.read_text(encoding="ascii").strip())
            if (gid, gid_kind) == (wanted, kind):
                return DevicePort(device, int(number), int(entry.name))
    raise BenchError(f"{device}/{number} has no {kind} address {address} any more")


def require_tool() -> str:
    """The path of ib_write_bw. Raises `BenchError` if it is not installed."""
    path = shutil.which(_TOOL)
    if path is None:
        raise BenchError(
            f"{_TOOL} is not there, which lanes over verbs are measured against: install perftest (the package "
            "has this name on Debian, Ubuntu, Fedora and RHEL), on both machines"
        )
    return path


def command(port: DevicePort, size: int, iterations: int, tcp_port: int, *host: str) -> list[str]:
    """Of the end that is written to; with `host`, of the one that writes to it."""
    line = [require_tool(), "-F", "-d", port.device, "-i", str(port.number), "-p", str(tcp_port)]
    line += ["-s", str(size), "-n", str(iterations)]
    if port.gid_index is not None:
        line += ["-x", str(port.gid_index)]
    return [*line, *host]


def bytes_per_s(output: str, size: int) -> float:
    """The average over all iterations that a finished run printed."""
    is_known = False
    for line in output.splitlines():
        is_known = is_known or re.search(r"BW average\[Mi?B/sec\]", line) is not None
        cells = line.split()
        if is_known and len(cells) == 5 and cells[0] == str(size):
            return float(cells[3]) * _MiB  # up to version 4.5 it wrote MB, and meant this too
    raise BenchError(f"{_TOOL} printed no average: {_last(output)}")


class Target:
    """The end that is written to."""

    def __init__(self, process: Process, tcp_port: int) -> None:
        """Use `serve`."""
        self._process = process
        self.tcp_port = tcp_port

    async def end(self, stall_s: float) -> None:
        """Wait until it has been written to. Raises `BenchError` if it failed."""
        await _finish(self._process, stall_s)

    async def kill(self) -> None:
        """End it, if it is not over."""
        await _kill(self._process)


async def serve(port: DevicePort, size: int, iterations: int, stall_s: float) -> Target:
    """Start the end that is written to; it listens when this returns."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        tcp_port: int = probe.getsockname()[1]
    process = await _start(command(port, size, iterations, tcp_port))
    try:
        async with asyncio.timeout(stall_s):
            while not _is_listening(tcp_port):
                if process.returncode is not None:
                    await _finish(process, stall_s)
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as exc:
        await _kill(process)
        raise BenchError(f"{_TOOL} does not listen after {stall_s:g} s") from exc
    except BaseException:
        await _kill(process)
        raise
    return Target(process, tcp_port)


async def write(
    port: DevicePort, size: int, iterations: int, target: tuple[str, int], stall_s: float
) -> float:
    """Write to the other end, by host and TCP port; bytes a second."""
    host, tcp_port = target
    process = await _start(command(port, size, iterations, tcp_port, host))
    return bytes_per_s(await _finish(process, stall_s), size)


async def _start(line: Sequence[str]) -> Process:
    return await asyncio.create_subprocess_exec(*line, stdout=PIPE, stderr=STDOUT)


async def _finish(process: Process, stall_s: float) -> str:
    try:
        async with asyncio.timeout(stall_s):
            output = (await process.communicate())[0].decode(errors="replace")
    except TimeoutError as exc:
        raise BenchError(f"{_TOOL} was not done after {stall_s:g} s") from exc
    finally:
        await _kill(process)
    if process.returncode:
        raise BenchError(f"{_TOOL} failed with exit status {process.returncode}: {_last(output)}")
    return output


async def _kill(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def _is_listening(tcp_port: int) -> bool:
    """Asking it by a connection would be taken for its client; proc(5), /proc/net/tcp."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == tcp_port:
                return True
    return False


def _last(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip(" -\t")]
    return " / ".join(lines[-3:]) or "it said nothing"
