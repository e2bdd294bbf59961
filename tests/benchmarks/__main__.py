"""`python -m tests.benchmarks`: chunks a second through a channel over queue pairs that cost nothing."""

import asyncio
import statistics

from tests.benchmarks.chunks import AIM_CHUNKS_A_SECOND, measure

RUNS = 5
CHUNKS = 20_000


async def main() -> None:
    """Print the medians."""
    print(f"chunks a second on one core, both ends; aim {AIM_CHUNKS_A_SECOND:,}")
    for slots in (8, 64):
        for chunk_bytes in (64, 4096):
            runs = [await measure(chunk_bytes, CHUNKS, slots=slots) for _ in range(RUNS)]
            chunks_a_second = statistics.median(run.chunks_a_second for run in runs)
            ratio = statistics.median(run.ratio for run in runs)
            print(
                f"{slots:3} slots of {chunk_bytes:5} bytes: {chunks_a_second:9,.0f} chunks/s, "
                f"{ratio:.1f} x the bare calls"
            )


if __name__ == "__main__":
    asyncio.run(main())
