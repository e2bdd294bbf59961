"""What a process has used so far."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Stopwatch:
    """The clock and the CPU seconds (user and system, all threads) of this process since it began."""

    def __init__(self) -> None:
        self.started_at_s = clock_s()
        self._cpu_s = time.process_time()

    def cpu_s(self) -> float:
        """CPU seconds since the start."""
        return time.process_time() - self._cpu_s


def clock_s() -> float:
    """CLOCK_MONOTONIC (clock_gettime(2)): one clock for all processes of this machine."""
    return time.monotonic()


def resident_bytes() -> int:
    """VmRSS of this process; see proc(5)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """VmHWM: the most that VmRSS ever was."""
    return _status_bytes("VmHWM")


def forget_peak() -> None:
    """Let `peak_resident_bytes` begin anew; see proc(5), /proc/[pid]/clear_refs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def pinned_bytes() -> int:
    """VmPin: what this process has pinned for devices. The kernel counts what is registered twice twice."""
    return _status_bytes("VmPin")


def machine_cpu_s() -> float:
    """CPU seconds of all processes and of the kernel, interrupts included, since boot; /proc/stat, proc(5)."""
    _, user, nice, system, _, _, irq, softirq, *_ = (
        Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    )
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def available_bytes() -> int:
    """Memory that this machine can give without swapping: MemAvailable, proc(5)."""
    return _field_bytes(Path("/proc/meminfo"), "MemAvailable")


def _status_bytes(field: str) -> int:
    return _field_bytes(Path("/proc/self/status"), field)


def _field_bytes(path: Path, field: str) -> int:
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{path} has no field {field}")
