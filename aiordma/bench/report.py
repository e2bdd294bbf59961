"""Findings as a plain table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from aiordma.bench.payload import MESSAGE_BYTES
from aiordma.bench.plan import (
    AIM_BYTES,
    AIM_EXTRA_BYTES,
    AIM_RATIO,
    Findings,
    MessageRow,
    MiB,
    TransferRow,
)
from aiordma.bench.tables import figure, size, spread, table

_HOW = """\
How: two processes a contender, over loopback; the contenders take turns round by round, in changing order.
time, GB/s: from the sender's call until the last byte is in its place at the receiver, in memory that was
  there before; GB are 10^9 bytes; median of the rounds (least..greatest). After each transfer, outside that
  time, xxh3 of all bytes is compared with the sender's, and the destination is wiped.
x raw: ratio of the medians to blocking sockets with 1 and 2 connections (one sendall, recv_into the final
  place, the same congestion control), in brackets its spread round by round.
CPU: user and system seconds a GB of the whole process, from its call to its return; sender + receiver.
extra: VmHWM at the end less VmRSS after set-up with the tensor touched, before the connection; sender / receiver.
ring: the receive slots, which are part of the extra as far as they were touched.
round trip: a small message and its echo, one at a time; p50 and p99 of a round, median of the rounds."""


def text(findings: Findings) -> str:
    """The tables, the aims, and how each figure was got."""
    plan = findings.plan
    host = ", ".join(f"{name} {value}" for name, value in findings.host.items())
    checksum = "on" if plan.checksum else "off"
    lines = [
        host,
        f"rounds {plan.rounds}, congestion control {plan.congestion}, aiordma's checksums {checksum}",
        "",
        *table(_TRANSFER_HEAD, [_transfer_cells(row) for row in findings.transfers]),
        "",
        *table(_MESSAGE_HEAD, [_message_cells(row) for row in findings.messages]),
        "",
        *(f"Left out: {reason}" for reason in findings.left_out),
        *aims(findings),
        "",
        _HOW,
    ]
    return "\n".join(lines) + "\n"


def as_json(findings: msgspec.Struct) -> bytes:
    """Everything, indented."""
    return msgspec.json.format(msgspec.json.encode(findings), indent=2) + b"\n"


def aims(findings: Findings) -> Iterator[str]:
    """What the project aims at, and whether this run got there."""
    ours = [row for row in findings.transfers if row.contender.kind != "raw"]
    for row in ours:
        if row.nbytes == AIM_BYTES:
            reached = row.raw_ratios[0].median
            yield (
                f"Aim: {size(AIM_BYTES)} at >= {AIM_RATIO} of raw sockets x1: "
                f"{row.contender.name} {reached:.2f}, {_met(reached >= AIM_RATIO)}"
            )
    if ours:
        worst = max(ours, key=_beyond_ring)
        yield (
            f"Aim: a process's memory over the tensor <= ring + {size(AIM_EXTRA_BYTES)}: at most ring "
            f"{_beyond_ring(worst) / MiB:+.1f} MiB ({worst.contender.name}, {size(worst.nbytes)}), "
            f"{_met(_beyond_ring(worst) <= AIM_EXTRA_BYTES)}"
        )


def _beyond_ring(row: TransferRow) -> int:
    return max(row.sender_extra_bytes, row.receiver_extra_bytes) - row.contender.ring_bytes


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


_TRANSFER_HEAD = (
    "tensor",
    "contender",
    "time ms",
    "GB/s",
    "x raw x1",
    "x raw x2",
    "CPU s/GB",
    "extra MiB",
    "ring MiB",
)


def _transfer_cells(row: TransferRow) -> tuple[str, ...]:
    return (
        size(row.nbytes),
        row.contender.name,
        figure(row.nbytes / row.gb_per_s.median / 1e6),
        spread(row.gb_per_s),
        spread(row.raw_ratios[0]),
        figure(row.raw_ratios[1].median),
        f"{figure(row.sender_cpu_s_per_gb)} + {figure(row.receiver_cpu_s_per_gb)}",
        f"{row.sender_extra_bytes / MiB:.1f} / {row.receiver_extra_bytes / MiB:.1f}",
        str(row.contender.ring_bytes // MiB),
    )


_MESSAGE_HEAD = (f"{MESSAGE_BYTES} B message", "round trip p50 us", "p99 us", "x raw x1 (p50)")


def _message_cells(row: MessageRow) -> tuple[str, ...]:
    return (
        row.contender.name,
        spread(row.p50_s, 1e6),
        spread(row.p99_s, 1e6),
        spread(row.raw_ratio),
    )
