"""What one end of a measured channel takes: CPU, pinned memory, memory in all, copies."""

from __future__ import annotations

import msgspec

from aiordma import Channel
from aiordma.bench import gauge
from aiordma.bench.gauge import Stopwatch


class Usage(msgspec.Struct, frozen=True):
    """What one end took for one measurement."""

    cpu_s: float
    """User and system seconds of the process."""
    machine_cpu_s: float
    """Busy seconds of the whole machine meanwhile: much of RoCE in software is the kernel's own work."""
    pinned_bytes: int
    """The most that was registered at once, as the kernel counts it."""
    extra_bytes: int
    """The most memory that was resident, beyond what was before the channel was opened."""
    copied_bytes: int
    """Payload bytes that the channel copied in user space."""


class Meter:
    """Begins before the channel is opened, so that its rings count."""

    def __init__(self) -> None:
        gauge.forget_peak()
        self._resident_bytes = gauge.resident_bytes()
        self._pinned_bytes = 0

    def start(self, channel: Channel) -> None:
        """From here on CPU seconds and copies count."""
        self._copied_bytes = channel.stats().copied_bytes
        self._machine_cpu_s = gauge.machine_cpu_s()
        self._watch = Stopwatch()

    def look(self) -> None:
        """Take note of what is pinned now."""
        self._pinned_bytes = max(self._pinned_bytes, gauge.pinned_bytes())

    def usage(self, channel: Channel) -> Usage:
        """Since `start`; memory since the beginning."""
        self.look()
        return Usage(
            cpu_s=self._watch.cpu_s(),
            machine_cpu_s=gauge.machine_cpu_s() - self._machine_cpu_s,
            pinned_bytes=self._pinned_bytes,
            extra_bytes=max(0, gauge.peak_resident_bytes() - self._resident_bytes),
            copied_bytes=channel.stats().copied_bytes - self._copied_bytes,
        )
