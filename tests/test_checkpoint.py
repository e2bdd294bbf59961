"""Weights and state on disk: whole, or as they were before."""

from pathlib import Path

import numpy as np
import pytest

from fedllm import CheckpointError
from fedllm.checkpoint import load_checkpoint, save_checkpoint
from tests.federation import weights_of


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    folder = tmp_path / "new"
    for value in (1, 2):
        written = save_checkpoint(folder, "round-1", weights_of(value), {"round": value})
    assert written == folder / "round-1.json"
    weights, state = load_checkpoint(folder, "round-1", weights_of(0))
    assert state == {"round": 2}
    for name, array in weights_of(2).items():
        assert (weights[name].dtype, weights[name].tobytes()) == (array.dtype, array.tobytes())
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    save_checkpoint(tmp_path, "a", weights_of(1), {"round": 1})
    for weights, state in ((weights_of(2), {"x": object()}), ({"w": np.array(["x"])}, {})):
        with pytest.raises(CheckpointError, match="'a' cannot be written"):
            save_checkpoint(tmp_path, "a", weights, state)
    weights, state = load_checkpoint(tmp_path, "a", weights_of(0))
    assert (state, weights["w"][0, 0]) == ({"round": 1}, 1)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"'b' in .* cannot be read"):
        load_checkpoint(tmp_path, "b", weights_of(0))
