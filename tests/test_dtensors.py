"""A silo of two processes that share one model by FSDP2, over gloo, in a run with a silo that has it whole.

Its ranks also look at weights without training on them, which leaves what FSDP gathered where it is.
"""

import asyncio
import json
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fedllm import EvaluationTask, Federation, RunConfig, SettingError, join
from fedllm.adapters import (
    AdapterError,
    fingerprint,
    full_arrays,
    full_on_trial,
    full_shard,
    load_full,
    load_lora,
    lora_arrays,
    lora_on_trial,
    lora_shard,
    save_lora,
)
from fedllm.dtensors import held, shard_of
from tests.harness import program
from tests.playing import bits
from tests.tiny_models import adapted, snapshot, tiny_gpt2


class Model(nn.Module):
    """Rows that two ranks share evenly, unevenly, or that only one has; bfloat16; and what is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even = nn.Linear(5, 6)
        self.uneven = nn.Linear(6, 7, dtype=torch.bfloat16)
        self.single = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.uneven(self.even(x).bfloat16()).float()
        single: torch.Tensor = self.single(hidden)
        return self.scale * single


def look(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(2, 5)).sum())  # FSDP gathers the parameters for this


def train(model: nn.Module, by: float) -> float:
    """The same for every element, wherever it is, so that sharded and whole models come to the same bits."""
    loss = look(model)
    for part in full_arrays(model).values():
        np.multiply(part, part.dtype.type(by), out=part)
        np.add(part, part.dtype.type(0.25), out=part)
    return loss


async def take_part(port: int, model: nn.Module, name: str, by: float, **options: Any) -> None:
    async def judge(task: EvaluationTask) -> tuple[int, dict[str, float]]:
        with full_on_trial(model, task.weights):
            return 2, {"loss": await asyncio.to_thread(look, model)}

    async with join("127.0.0.1", port, name=name, fingerprint={}, backoff=None, **options) as silo:
        async for task in silo.rounds(judge):
            mine = await asyncio.to_thread(look, model)
            with full_on_trial(model, task.weights):
                theirs = await asyncio.to_thread(look, model)
            load_full(model, task.weights)
            said = {
                "loss": await asyncio.to_thread(train, model, by),
                "mine": mine,
                "theirs": theirs,
            }
            assert said["loss"] == theirs
            assert (mine == theirs) is (task.round == 1)
            report = await task.submit(full_arrays(model), weight=2, metrics=said)
            assert report.accepted, report
        assert silo.final is not None
        load_full(model, silo.final)


RANK = """
import asyncio, json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.fsdp import fully_shard
from fedllm.adapters import full_arrays, full_shard
from tests.test_dtensors import Model, take_part

rank, port, file, layers = json.loads(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
model, mesh = Model(), init_device_mesh("cpu", (2,))
model.spare = nn.Parameter(distribute_tensor(model.spare.data, mesh, [Replicate()]))
for name in layers:
    fully_shard(getattr(model, name), mesh=mesh)
fully_shard(model, mesh=mesh, ignored_params={model.scale, model.spare})
shard = full_shard(model)
asyncio.run(take_part(port, model, "bank", 2, shard=shard))
held = {name: array.tobytes().hex() for name, array in full_arrays(model).items()}
print(json.dumps([shard.rows, sorted(shard.replicas), held]))
dist.destroy_process_group()
"""


async def run_of(*silos: Any) -> tuple[dict[str, np.ndarray[Any, Any]], list[Any]]:
    """Two rounds and evaluations: the final weights, and what the silos said of the losses."""
    rounds: list[Any] = []
    model = Model()
    server = Federation(
        {name: array.copy() for name, array in full_arrays(model).items()},
        RunConfig(min_silos=2, rounds=2, evaluate_every=1, farewell_s=1),
        fingerprint={},
        on_round=rounds.append,
        on_evaluation=rounds.append,
    )
    async with server:
        _, port = await server.start()
        acts = [asyncio.ensure_future(silo(port)) for silo in silos]
        history, *_ = await asyncio.gather(server.run(), *acts)
    losses = [{n: o.metrics for n, o in one.outcomes.items()} for one in rounds]
    return dict(history.weights), losses


def plain(name: str, by: float) -> Any:
    return lambda port: take_part(port, Model(), name, by)


@pytest.mark.slow
@pytest.mark.timeout(180)  # three processes import torch, on two shared cores perhaps
@pytest.mark.parametrize(
    "layers",
    [["even", "uneven", "single"], ["uneven"]],  # the others are in the root's group
    ids=["layers", "root"],
)
async def test_a_silo_sharded_by_fsdp_gives_the_bits_of_one_that_is_not(
    tmp_path: Path, layers: list[str]
):
    said: list[Any] = []

    async def sharded(port: int) -> None:
        async with AsyncExitStack() as stack:
            ranks = [
                await stack.enter_async_context(
                    program(RANK, json.dumps([rank, port, str(tmp_path / "store"), layers]))
                )
                for rank in range(2)
            ]
            for output, _ in await asyncio.gather(*(one.communicate() for one in ranks)):
                said.append(json.loads(output))

    expected, losses = await run_of(plain("bank", 2), plain("shop", 3))
    async with asyncio.timeout(150):
        found, sharded_losses = await run_of(sharded, plain("shop", 3))
    assert bits(found) == bits(expected) != bits(full_arrays(Model()))
    assert sharded_losses == losses
    (rows, replicas, parts), (other_rows, other_replicas, other_parts) = said
    assert rows["even.weight"] == [0, 3]
    assert (rows["uneven.bias"], other_rows["uneven.bias"]) == ([0, 4], [4, 7])
    assert rows["single.weight"] == [0, 1]
    assert "single.weight" not in other_rows
    assert rows["scale"] is other_rows["scale"] is None
    assert (replicas, other_replicas) == ([], ["scale", "spare"])
    # Each rank has its rows of the final weights, and between them all are there.
    for name, array in found.items():
        both = parts[name] + ("" if name in other_replicas else other_parts.get(name, ""))
        assert both == array.tobytes().hex()


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    dist.destroy_process_group()


def test_replicas_and_shards_of_a_mesh_of_two_dimensions(alone):
    whole = torch.arange(12.0).reshape(4, 3)
    placements = [dtensor.Replicate(), dtensor.Shard(0)]
    sharded = dtensor.distribute_tensor(whole, alone, placements)
    tensors = {"a": sharded, "b": torch.zeros(())}
    shard = shard_of(tensors)
    assert (shard.rank, shard.world) == (0, 1)
    assert shard.rows == {"a": (0, 4), "b": None}
    assert shard.replicas == frozenset()
    assert held(tensors)["a"].data_ptr() == sharded.to_local().data_ptr()


@pytest.mark.parametrize(
    "placements",
    [
        [dtensor.Replicate(), dtensor.Shard(1)],
        [dtensor.Shard(0), dtensor.Shard(0)],
        [dtensor.Partial(), dtensor.Shard(0)],
    ],
    ids=["columns", "twice", "partial"],
)
def test_parts_that_are_no_rows_are_refused(alone, placements):
    local = dtensor.DTensor.from_local(torch.zeros(4, 4), alone, placements, run_check=False)
    with pytest.raises(SettingError, match=r"^w is placed .*: a rank's part must be one run of"):
        shard_of({"w": local})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_a_sharded_model_is_what_it_was_of_the_whole(alone):
    whole, model = adapted(), adapted()
    fully_shard(model, mesh=alone["shards"])
    shard = lora_shard(model)
    assert bits(lora_arrays(model)) == bits(lora_arrays(whole))
    assert {rows for rows in shard.rows.values() if rows is None} == set()
    load_lora(model, lora_arrays(adapted(1)))
    assert bits(lora_arrays(model)) == bits(lora_arrays(adapted(1))) != bits(lora_arrays(whole))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("make", "arrays_of", "shard_of", "load"),
    [
        (tiny_gpt2, full_arrays, full_shard, load_full),
        (adapted, lora_arrays, lora_shard, load_lora),
    ],
    ids=["full", "lora"],
)
def test_a_look_at_a_sharded_model_does_not_hide_its_rows(alone, make, arrays_of, shard_of, load):
    model, other = make(0), make(1)
    fully_shard(model, mesh=alone["shards"])
    rows = shard_of(model).rows
    assert not torch.equal(seen(model), seen(other))
    load(model, arrays_of(other))
    assert shard_of(model).rows == rows
    assert torch.equal(seen(model), seen(other))
    assert bits(arrays_of(model)) == bits(arrays_of(other))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("layers", [[], ["h.0", "h.1"]], ids=["root", "layers"])
@pytest.mark.parametrize(
    ("make", "arrays_of", "on_trial"),
    [(tiny_gpt2, full_arrays, full_on_trial), (adapted, lora_arrays, lora_on_trial)],
    ids=["full", "lora"],
)
def test_on_trial_a_sharded_model_computes_with_other_weights(
    alone, make, arrays_of, on_trial, layers
):
    model, other = make(0), make(1)
    mine, theirs = seen(model), seen(other)
    candidate = snapshot(arrays_of(other))
    for name, layer in list(model.named_modules()):
        if name.endswith(tuple(layers)) and layers:
            fully_shard(layer, mesh=alone["shards"])
    fully_shard(model, mesh=alone["shards"])
    own = arrays_of(model)
    with suppress(ZeroDivisionError), on_trial(model, candidate):
        assert torch.equal(seen(model), theirs)
        assert torch.equal(seen(model), theirs)
        raise ZeroDivisionError
    assert torch.equal(seen(model), mine)
    assert bits(arrays_of(model)) == bits(own) == bits(arrays_of(make(0)))
    assert all(np.shares_memory(array, own[name]) for name, array in arrays_of(model).items())


def seen(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(12).reshape(1, 12)).logits
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_is_of_the_whole_model_says_so(alone, tmp_path: Path):
    model = adapted()
    fully_shard(model, mesh=alone["shards"])
    with pytest.raises(AdapterError, match="is sharded, and this is about the whole model"):
        fingerprint(model, None, None)
    with pytest.raises(AdapterError, match="is sharded, and this is about the whole model"):
        save_lora(model, tmp_path)


def test_who_is_in_no_process_group_has_no_rank():
    with pytest.raises(SettingError, match="init_process_group comes first"):
        full_shard(Model())
