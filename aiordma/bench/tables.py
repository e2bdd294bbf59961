"""Figures, sizes and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiordma.bench.plan import GiB, KiB, MiB, Spread


def size(nbytes: int) -> str:
    """A size as people write it: 64 B, 512 MiB."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def spread(values: Spread, scale: float = 1) -> str:
    """The median, and between what it lies."""
    median, low, high = (
        figure(value * scale) for value in (values.median, values.low, values.high)
    )
    return f"{median} ({low}..{high})"


def figure(value: float) -> str:
    """Three digits that mean something, or two decimals."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines, in columns."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, ["-" * width for width in widths], *rows):
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
