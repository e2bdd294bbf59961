"""The benchmark of what Python costs a chunk, at toy size."""

import pytest

from tests.benchmarks.chunks import measure
from tests.foreign import nothing_left

pytestmark = pytest.mark.usefixtures("loop_kind")


@pytest.mark.parametrize("chunk_bytes", [64, 4096])
async def test_it_runs_and_verifies_every_byte(chunk_bytes):
    async with nothing_left():
        figures = await measure(chunk_bytes, 100)
        assert figures.chunk_bytes == chunk_bytes
        assert figures.chunks_a_second > 0
        assert figures.ratio > 0
