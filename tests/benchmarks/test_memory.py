"""The memory of a round, at toy size: an aligned one takes no more for more silos."""

from pathlib import Path

from tests.benchmarks.memory import RINGS, aligned_limit_bytes, measure

MODEL_BYTES = 24 << 20
FEW, MANY = 2, 7


async def test_an_aligned_round_holds_no_update(tmp_path: Path):
    few, many = [await measure("aligned", silos, MODEL_BYTES, tmp_path) for silos in (FEW, MANY)]
    for figures in (few, many):
        assert figures.anonymous_bytes <= aligned_limit_bytes(figures.silos, MODEL_BYTES)
    rings = (MANY - FEW) * RINGS.slots * RINGS.slot_bytes
    assert many.anonymous_bytes - few.anonymous_bytes < rings + MODEL_BYTES / 2
    staged = await measure("staged", MANY, MODEL_BYTES, tmp_path)
    assert staged.anonymous_bytes > MANY * MODEL_BYTES


async def test_updates_in_files_are_no_anonymous_memory(tmp_path: Path):
    filed = await measure("filed", MANY, MODEL_BYTES, tmp_path)
    assert filed.anonymous_bytes <= aligned_limit_bytes(MANY, MODEL_BYTES)
    assert filed.anonymous_bytes < 3 * MODEL_BYTES + (MANY * RINGS.slots * RINGS.slot_bytes)
