"""What `bench --fedrdma` prints: how long each way takes, and what it costs."""

from __future__ import annotations

from typing import Final

from aiordma.bench.fedrdma import FedFindings, FedRow
from aiordma.bench.plan import MiB, Spread
from aiordma.bench.tables import figure, size, spread, table

_HOW: Final = """\
How: the ways take turns round by round, in changing order, each over a channel that is new; opening it is not timed.
time: from the sender's call until the receiver has compared every byte with what it must be, and said so; median of
  the rounds (least..greatest). x tcp: how many times as fast as TCP, by the medians.
naive: the whole model is registered, sent by one WRITE into one slot, and released.
fedrdma: chunk by chunk: registered, sent by one WRITE, acknowledged by the receiver, released; then the next.
fedrdma-e: what send_tensors() does: the tensors as they are, copied into a small ring that was registered once,
  as many chunks under way as it has slots.
tcp: the same call over a TCP lane.
CPU: of the process; machine: busy seconds of the whole machine that it runs on, the kernel's RoCE in software included
  (on one machine both ends are in both figures).
pinned: the most that the end has registered at once, as the kernel counts it (VmPin).
  needed: of that, what the way itself needs at each end: a ring of aiordma has at least 4 slots, and
  a sender half as many again to copy to, of which naive and fedrdma use one and none.
peak: the most memory of the process beyond the model that it holds anyway: VmHWM less VmRSS before the channel.
All pairs: sender / receiver."""

_TIME_HEAD: Final = ("way", "time s", "MB/s", "x tcp")
_COST_HEAD: Final = (
    "way",
    "CPU s",
    "machine CPU s",
    "pinned MiB",
    "needed MiB",
    "peak MiB",
    "copied MiB",
)


def text(findings: FedFindings) -> str:
    """Both tables, and how each figure was got."""
    plan = findings.plan
    tcp = next((row.seconds for row in findings.rows if row.preset == "tcp"), None)
    done = [row for row in findings.rows if row.seconds is not None]
    lines = [
        ", ".join(f"{name} {value}" for name, value in findings.host.items()),
        f"{findings.path or 'no RDMA lane'}; far end: {plan.peer[0] if plan.peer else 'this machine'}",
        (
            f"GPT-2 (124M) scaled by {plan.scale}: {findings.tensors} tensors, {findings.model_bytes / 1e6:.1f} MB; "
            f"chunks of {size(plan.chunk_bytes)}, {plan.slots} slots, rounds {plan.rounds}, "
            f"aiordma's checksums {'on' if plan.checksum else 'off'}"
        ),
        "",
        *table(_TIME_HEAD, [_time_cells(row, findings.model_bytes, tcp) for row in done]),
        "",
        *table(_COST_HEAD, [_cost_cells(row) for row in done]),
        "",
        *(f"{row.preset} failed: {row.error}" for row in findings.rows if row.error),
        _HOW,
    ]
    return "\n".join(lines) + "\n"


def _time_cells(row: FedRow, nbytes: int, tcp: Spread | None) -> tuple[str, ...]:
    assert row.seconds is not None
    faster = "" if tcp is None else figure(tcp.median / row.seconds.median)
    return row.preset, spread(row.seconds), figure(nbytes / 1e6 / row.seconds.median), faster


def _cost_cells(row: FedRow) -> tuple[str, ...]:
    near, far = row.sender, row.receiver
    assert near is not None
    assert far is not None
    return (
        row.preset,
        f"{figure(near.cpu_s)} / {figure(far.cpu_s)}",
        f"{figure(near.machine_cpu_s)} / {figure(far.machine_cpu_s)}",
        _mib(near.pinned_bytes, far.pinned_bytes),
        _mib(*row.needed_bytes),
        _mib(near.extra_bytes, far.extra_bytes),
        _mib(near.copied_bytes, far.copied_bytes),
    )


def _mib(near: int, far: int) -> str:
    return f"{near / MiB:.1f} / {far / MiB:.1f}"
