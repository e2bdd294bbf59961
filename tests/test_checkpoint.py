"""Weights and state on disk: whole, or as they were before, whatever happens while they are written."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from aiordma import prepare
from fedllm import CheckpointError, Checkpoints, SettingError
from fedllm.checkpoint import load_checkpoint, read_state, save_checkpoint
from fedllm.kept import Kept
from tests.federation import Weights, weights_of

LIKE = weights_of(0)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    folder = tmp_path / "new"
    for value in (1, 2):
        written = save_checkpoint(folder, "round-1", weights_of(value), {"round": value})
    assert written == folder / "round-1.json"
    weights, state = load_checkpoint(folder, "round-1", LIKE)
    assert state == read_state(folder, "round-1") == {"round": 2}
    for name, array in weights_of(2).items():
        assert (weights[name].dtype, weights[name].tobytes()) == (array.dtype, array.tobytes())
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_the_weights_are_what_safetensors_reads(tmp_path: Path):
    tied = np.arange(6, dtype=np.float32).reshape(2, 3)
    weights: dict[str, np.ndarray[Any, Any]] = {
        "half": np.full((), 2, np.float16),
        "one": tied,
        "none": np.zeros((0, 4)),
        "two": tied,
    }
    tensors = {**weights, "torch": torch.arange(3, dtype=torch.float64)}
    save_checkpoint(tmp_path, "a", tensors, {})
    (file,) = tmp_path.glob("a.*.safetensors")
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, array in weights.items():
        assert (read[name].shape, read[name].tobytes()) == (array.shape, array.tobytes())
    assert read["torch"].tolist() == [0, 1, 2]
    again, _ = load_checkpoint(tmp_path, "a", read)
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in read.items()}


def test_what_is_tied_comes_back_tied_if_it_is_still_the_same(tmp_path: Path):
    table, other = np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float16)
    like: Weights = {"wte": table, "b": np.zeros(6), "head": table, "half": other, "0": other[:0]}
    save_checkpoint(tmp_path, "a", {name: array + 1 for name, array in like.items()}, {})
    weights, _ = load_checkpoint(tmp_path, "a", like)
    assert list(weights) == list(like)
    assert weights["wte"] is weights["head"]
    assert prepare(weights).manifest == prepare(like).manifest
    changed = {**like, "head": table.copy()}
    changed["head"][5] = -0.0
    save_checkpoint(tmp_path, "a", changed, {})
    weights, _ = load_checkpoint(tmp_path, "a", like)
    assert weights["wte"].tobytes() == changed["wte"].tobytes()
    assert weights["head"].tobytes() == changed["head"].tobytes()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    save_checkpoint(tmp_path, "a", weights_of(1), {"round": 1})
    for weights, state in ((weights_of(2), {"x": object()}), ({"w": np.array(["x"])}, {})):
        with pytest.raises(CheckpointError, match="'a' cannot be written"):
            save_checkpoint(tmp_path, "a", weights, state)
    weights, state = load_checkpoint(tmp_path, "a", LIKE)
    assert (state, weights["w"][0, 0]) == ({"round": 1}, 1)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"'b' in .* cannot be read"):
        load_checkpoint(tmp_path, "b", LIKE)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """setrlimit(2), RLIMIT_FSIZE: writing beyond it fails, like on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_whole(tmp_path: Path):
    large = {"w": np.zeros(1 << 18, np.float32)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, large, {"n": 1})
    with files_of_at_most(1 << 19):
        with pytest.raises(
            CheckpointError, match=r"'round-000002' .* File too large; what was there"
        ):
            checkpoints.save(2, large, {"n": 2})
    assert checkpoints.rounds() == [1]
    assert checkpoints.load(1, large)[1] == {"n": 1}
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.save(2, large, {"n": 2})
    assert checkpoints.rounds() == [2]


def test_the_last_rounds_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.rounds() == []
    for round in range(4):
        checkpoints.save(round, weights_of(round), {"round": round})
    assert checkpoints.rounds() == [2, 3]
    assert len(list(tmp_path.iterdir())) == 4
    checkpoints.amend(3, {"round": "3, amended"})
    weights, state = checkpoints.load(3, LIKE)
    assert (state, weights["w"][0, 0]) == ({"round": "3, amended"}, 3)
    with pytest.raises(CheckpointError, match="round-000001"):
        checkpoints.amend(1, {})
    with pytest.raises(SettingError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def damaged(folder: Path) -> Iterator[str]:
    """Spoil a checkpoint in one way after the other; what is then said of it."""
    (data,) = folder.glob("*.safetensors")
    good = data.read_bytes()
    for bad, says in (
        (good[:-1] + bytes([good[-1] ^ 1]), "its bytes are not those that were written"),
        (good[:-1], "it ends within"),
        (b"\xff" * 8 + good[8:], "its header cannot have"),
        (good.replace(b"F32", b"F16"), "in it, not"),
        (good.replace(b'"w"', b'"v"'), r"other tensors: \['v', 'w'\]"),
        (good.replace(b"[0, 60]", b"[4, 64]"), "does not lie where"),
        (b"", "requires a buffer"),
    ):
        assert bad != good
        data.write_bytes(bad)
        yield says
    data.write_bytes(good)
    for text in ("{", "[]", json.dumps({"weights": data.name})):
        (folder / "a.json").write_text(text)
        yield "'a' in .* cannot be read"


def test_what_is_damaged_is_not_taken(tmp_path: Path):
    save_checkpoint(tmp_path, "a", weights_of(1), {})
    for says in damaged(tmp_path):
        with pytest.raises(CheckpointError, match=says):
            load_checkpoint(tmp_path, "a", LIKE)


DYING = """
import os, sys
from pathlib import Path
from typing import Any
import fedllm.checkpoint as checkpoint
from tests.federation import weights_of

def dying_at(step):
    count = 0
    def trace(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(sys.argv[1]) in str(arguments[0]):
            count += 1
            if count == step:
                os._exit(1)
    sys.addaudithook(trace)
    checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), keep=1)
    checkpoints.save(2, weights_of(2), {"round": 2})
    os._exit(0)

step = 0
while True:
    step += 1
    if not (child := os.fork()):
        dying_at(step)
    if os.waitpid(child, 0)[1] == 0:
        break
    checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]))
    (*_, newest) = checkpoints.rounds()
    weights, state = checkpoints.load(newest, weights_of(0))
    assert state == {"round": newest} and weights["w"][0, 0] == newest, (step, newest)
    print(newest, end="")
"""


def test_a_death_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path):
    """`os._exit` at each call that opens, renames or removes a file, one after the other, by a fork each."""
    Checkpoints(tmp_path).save(1, weights_of(1), {"round": 1})
    child = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (0, "")
    before, after = child.stdout.count("1"), child.stdout.count("2")
    assert child.stdout == "1" * before + "2" * after
    assert before >= 4
    assert after >= 2
    assert Checkpoints(tmp_path).rounds() == [2]
    assert len(os.listdir(tmp_path)) == 2  # what the dead had written aside is gone


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And so is the folder, after; fsync(2)."""
    done: list[str] = []

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append("folder" if path == tmp_path else path.suffixes[-2])

    def replace(self: Path, target: Path) -> None:
        done.append(f"rename {target.suffix}")
        os.rename(self, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    Checkpoints(tmp_path).save(1, weights_of(1), {})
    steps = [[kind, f"rename {kind}", "folder"] for kind in (".safetensors", ".json")]
    assert done == [*steps[0], *steps[1]]


def test_a_new_folder_is_on_the_disk_with_all_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: list[Path] = []

    def fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr("os.fsync", fsync)
    folder = tmp_path / "run" / "checkpoints"
    Checkpoints(folder).save(1, weights_of(1), {})
    assert [path for path in flushed if path in folder.parents] == [tmp_path, tmp_path / "run"]
    Checkpoints(folder).save(2, weights_of(1), {})
    Kept(tmp_path / "kept", "a").key()
    assert [path for path in flushed if path in folder.parents][2:] == [tmp_path]
