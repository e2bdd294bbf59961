"""What `bench --lane verbs` prints."""

from __future__ import annotations

from typing import Final

from aiordma.bench.lane import YARDSTICK, LaneFindings, LaneRow
from aiordma.bench.plan import MiB
from aiordma.bench.tables import figure, size, spread, table

_HOW: Final = """\
How: three ways of aiordma and ib_write_bw (perftest: plain WRITEs on one queue pair, no immediates) take turns
round by round, in changing order, over the same device, port and address. ib_write_bw runs without -e: perftest
refuses it for WRITE, so it polls without pause, where aiordma sleeps until the device tells.
MB/s: aiordma from the sender's call until the receiver has consumed the last byte and said so; ib_write_bw its own
  average, of which nobody looks at a byte. MB are 10^6 bytes; median of the rounds (least..greatest).
ratio: median of the rounds' ratios (least..greatest).
in place: from memory that was given to channel.register() to such memory, which is what ib_write_bw does; every byte
  is compared with what it must be after the time that counts.
registered: from such memory to the ring; ring: from any memory, by one copy. Both compare every byte where it lies in
  the ring, within the time that counts.
CPU: user and system seconds a GB of each process, sender + receiver, without what the kernel does on its own account.
copied: user-space copies of a delivery, sender + receiver."""

_HEAD: Final = (
    "message",
    "way",
    "MB/s",
    f"{YARDSTICK} MB/s",
    "ratio",
    "CPU s/GB",
    "copied MiB",
)


def text(findings: LaneFindings) -> str:
    """The table, and how each figure was got."""
    plan = findings.plan
    lines = [
        ", ".join(f"{name} {value}" for name, value in findings.host.items()),
        f"{findings.path}; far end: {plan.peer[0] if plan.peer else 'this machine'}",
        (
            f"rounds {plan.rounds}, {size(plan.total_bytes)} each, {plan.slots} slots, "
            f"aiordma's checksums {'on' if plan.checksum else 'off'}"
        ),
        "",
        *table(_HEAD, [_cells(row) for row in findings.rows]),
        "",
        *(f"Failed: {reason}" for reason in findings.failed),
        _HOW,
    ]
    return "\n".join(lines) + "\n"


def _cells(row: LaneRow) -> tuple[str, ...]:
    return (
        size(row.size),
        row.way,
        spread(row.mb_per_s),
        spread(row.yardstick_mb_per_s),
        spread(row.ratio),
        f"{figure(row.sender_cpu_s_per_gb)} + {figure(row.receiver_cpu_s_per_gb)}",
        f"{row.sender_copied_bytes / MiB:.1f} + {row.receiver_copied_bytes / MiB:.1f}",
    )
