"""`python -m tests.benchmarks chunks|memory`: what Python costs a chunk, and what a round costs in memory."""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks import chunks, memory

RUNS = 5
CHUNKS = 20_000
SILOS = (2, 4, 8, 16, 32)
MODEL_MIB = 32


async def count_chunks() -> None:
    """Chunks a second through a channel over queue pairs that cost nothing: medians."""
    print(f"chunks a second on one core, both ends; aim {chunks.AIM_CHUNKS_A_SECOND:,}")
    for slots in (8, 64):
        for chunk_bytes in (64, 4096):
            runs = [await chunks.measure(chunk_bytes, CHUNKS, slots=slots) for _ in range(RUNS)]
            chunks_a_second = statistics.median(run.chunks_a_second for run in runs)
            ratio = statistics.median(run.ratio for run in runs)
            print(
                f"{slots:3} slots of {chunk_bytes:5} bytes: {chunks_a_second:9,.0f} chunks/s, "
                f"{ratio:.1f} x the bare calls"
            )


async def draw_memory(model_mib: int, flower: Path | None) -> None:
    """A server's anonymous memory above that after its imports, by silos."""
    model_bytes = model_mib << 20
    ways: list[memory.Way] = ["aligned", "filed", "staged"]
    if flower is not None:
        ways.append("flower")
    print(f"MiB above what was there after the imports (and seconds); a model of {model_mib} MiB")
    print(f"{'silos':>5} {'limit, aligned':>15}", *(f"{way:>15}" for way in ways))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for silos in SILOS:
            limit = memory.aligned_limit_bytes(silos, model_bytes)
            print(f"{silos:>5} {limit >> 20:>15}", end="", flush=True)
            for way in ways:
                if way == "flower" and flower is not None:
                    figures = await memory.measure_flower(flower, silos, model_bytes)
                else:
                    figures = await memory.measure(way, silos, model_bytes, Path(folder))
                cell = f"{figures.anonymous_bytes >> 20}"
                cell += "" if figures.seconds is None else f" ({figures.seconds:.1f})"
                print(f" {cell:>15}", end="", flush=True)
            print()


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    which = parser.add_subparsers(dest="which", required=True)
    which.add_parser("chunks", help=count_chunks.__doc__)
    drawing = which.add_parser("memory", help=draw_memory.__doc__)
    drawing.add_argument("--model", type=int, default=MODEL_MIB, metavar="MIB")
    drawing.add_argument(
        "--flower", type=Path, metavar="PYTHON", help="an interpreter that has flwr: measure it too"
    )
    options = parser.parse_args()
    if options.which == "chunks":
        asyncio.run(count_chunks())
    else:
        asyncio.run(draw_memory(options.model, options.flower))


if __name__ == "__main__":
    main()
