"""Findings as a plain table, with how each figure was got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from fedllm.bench.layouts import layout_of
from fedllm.bench.run import Findings, Plan, Row, Spread
from fedllm.bench.session import Sample

__all__ = ["AIM_MEMORY", "AIM_SECONDS", "aims", "text"]

AIM_SECONDS: Final = 1.3
AIM_MEMORY: Final = 2.0
_MIB: Final = 1 << 20

_HOW: Final = """\
How: a server and its silos are processes of their own, connected once a turn; the contenders take turns in changing
order. A round: the weights go to every silo, each changes one number in 16 KiB and sends all of them back, the server
makes their weighted mean. Outside its time every number is made another one before it, and every bit of the mean is
compared after it.
s: on the server, from its start of the round until it has the mean; the median of a turn's rounds, of which the first
  tenth (at least one) does not count; of the turns' medians the median (least..greatest).
x: the turns' ratios of these medians to the other contender's: their median (least..greatest); below 1 is faster.
CPU s: user and system seconds for a round, all threads, of the server's process + those of the silos together.
server MiB: the most that RssAnon + RssShmem of the server were (looked at from outside, each 10 ms), less what they
  were after its imports, before it had weights: the most of all turns. Pages of files are not among them: updates that
  Staged keeps in files beyond its memory_bytes."""

_HOW_LINK: Final = """\
link: two network namespaces, tbf on the way out of both. Without a delay they are a veth pair. For one they are TUN
  devices and a process between them, the relay, that holds each IP packet for the delay: TCP's windows and round trips
  are real, but it takes its time from the same cores.
relay CPU s: its user and system seconds for a round. Where these and the others' come near the cores x s a round, it
  is the machine that is measured and not the link, which would let a round pass in {least_s} s."""


def text(findings: Findings) -> str:
    """The table, the aims, and how each figure was got."""
    plan, rows = findings.plan, findings.rows
    done = [row for row in rows if not row.error]
    rivals = [row for row in done if row.contender.program] or done[:1]
    head = (
        *("contender", "s a round", "GB/s"),
        *(f"x {rival.contender.name}" for rival in rivals),
        *("CPU s", "server MiB", "models"),
        *(["relay CPU s"] if plan.shape else []),
    )
    lines = [
        ", ".join(f"{name} {value}" for name, value in findings.host.items()),
        _describe(plan),
        "",
        *_table(head, [_cells(plan, row, rivals) for row in done]),
        "",
        *(f"Left out: {row.contender.name}: {row.error}" for row in rows if row.error),
        *aims(findings),
        "",
        _HOW,
        *_how_link(plan),
    ]
    return "\n".join(lines) + "\n"


def aims(findings: Findings) -> Iterator[str]:
    """What the project aims at over loopback, and whether this run got there: against the first other program."""
    done = [row for row in findings.rows if not row.error]
    yardstick = next((row for row in done if row.contender.program), None)
    if yardstick is None or findings.plan.shape or findings.plan.layout != "gpt2":
        return
    for row in done:
        if not row.contender.program:
            name = f"{row.contender.name} against {yardstick.contender.name}"
            seconds = row.ratio(yardstick, _seconds).median
            memory = row.peak_bytes / yardstick.peak_bytes
            yield f"Aim: <= {AIM_SECONDS} x the time: {name} {seconds:.2f}, {_met(seconds <= AIM_SECONDS)}"
            yield f"Aim: <= {AIM_MEMORY:g} x the memory: {name} {memory:.2f}, {_met(memory <= AIM_MEMORY)}"


def _how_link(plan: Plan) -> Iterator[str]:
    if plan.shape is not None:
        # Both ways one after the other, as no silo sends before it has the weights.
        least_s = 2 * plan.silos * plan.nbytes * 8 / plan.shape.rate_bits
        yield _HOW_LINK.format(least_s=_figure(least_s))


def _describe(plan: Plan) -> str:
    tensors = len(layout_of(plan.layout))
    path = "loopback"
    if plan.shape is not None:
        path = f"a link of {plan.shape.rate_bits / 1e9:g} Gbit/s and {plan.shape.delay_s * 1e3:g} ms each way"
    return (
        f"{plan.layout}: {tensors} tensors, {plan.nbytes / 1e6:.1f} MB of float32; {plan.silos} silos over {path}; "
        f"{plan.turns} turns of {plan.counted_rounds} rounds; congestion control {plan.congestion or 'the host has'}"
    )


def _cells(plan: Plan, row: Row, rivals: Sequence[Row]) -> tuple[str, ...]:
    seconds = row.spread(_seconds)
    server, silos = row.spread(_server_cpu_s).median, row.spread(_silos_cpu_s).median
    return (
        row.contender.name,
        _spread(seconds),
        _figure(2 * plan.silos * plan.nbytes / seconds.median / 1e9),
        *("1" if row is rival else _spread(row.ratio(rival, _seconds)) for rival in rivals),
        f"{_figure(server)} + {_figure(silos)}",
        f"{row.peak_bytes / _MIB:.0f}",
        f"{row.peak_bytes / plan.nbytes:.2f}",
        *([_figure(row.relay_cpu_s.median)] if plan.shape else []),
    )


def _seconds(sample: Sample) -> float:
    return sample.seconds


def _server_cpu_s(sample: Sample) -> float:
    return sample.server_cpu_s


def _silos_cpu_s(sample: Sample) -> float:
    return sample.silos_cpu_s


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def _spread(values: Spread) -> str:
    return f"{_figure(values.median)} ({_figure(values.low)}..{_figure(values.high)})"


def _figure(value: float) -> str:
    """Two decimals, or two digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
