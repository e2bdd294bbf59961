"""What one rank of a sharded model holds: DTensors (FSDP2's `fully_shard`, `distribute_tensor`) <-> rows of the whole.

With `fedllm.adapters`, which is how to use it, the only home of torch.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import tensor as dtensor
from torch.distributed.fsdp import FSDPModule

from fedllm.errors import SettingError
from fedllm.messages import Shard

Tensors = dict[str, torch.Tensor]


def reshard(model: nn.Module) -> None:
    """Have FSDP give up what it gathered: until then the model's parameters are copies, of the whole and no DTensors.

    A backward ends with that; a forward alone leaves the root's group gathered, for a backward that may not come.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: what this rank holds is a part, or a replica."""
    return isinstance(tensor, dtensor.DTensor)


def held(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors, and of each DTensor this rank's part, which shares its memory; without what it has no part of."""
    parts = {
        name: tensor.to_local() if isinstance(tensor, dtensor.DTensor) else tensor
        for name, tensor in tensors.items()
    }
    return {n: part for n, part in parts.items() if part.numel() or not tensors[n].numel()}


def shard_of(tensors: Mapping[str, torch.Tensor]) -> Shard:
    """Which rows of the tensors this rank holds, and which of them another rank uploads.

    Rows that several ranks hold (replicas, as of HSDP; tensors that are no DTensors) are uploaded by the first of them.
    Raises `SettingError` for a DTensor whose part is not one run of rows, or a pending sum.
    """
    if not dist.is_initialized():
        raise SettingError("a rank is one of torch.distributed's: init_process_group comes first")
    rank = dist.get_rank()
    rows: dict[str, tuple[int, int] | None] = {}
    replicas = set()
    for name, part in held(tensors).items():
        tensor = tensors[name]
        is_first = rank == 0
        rows[name] = None
        if isinstance(tensor, dtensor.DTensor):
            rows[name], is_first = _rows(name, tensor)
            start, stop = rows[name] or (0, len(tensor) if tensor.ndim else 0)
            if part.ndim and len(part) != stop - start:
                raise SettingError(f"{name} has {len(part)} rows here, and not {stop - start}")
        if not is_first:
            replicas.add(name)
    return Shard(rank, dist.get_world_size(), rows, frozenset(replicas))


def _rows(name: str, tensor: dtensor.DTensor) -> tuple[tuple[int, int] | None, bool]:
    """The rows of this rank, None for all; and whether it is the first that holds them."""
    mesh, rows, is_first = tensor.device_mesh, None, True
    for axis, (place, placement) in enumerate(
        zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    ):
        if isinstance(placement, dtensor.Replicate):
            is_first = is_first and place == 0
        # Not isinstance: FSDP over tensor parallelism has strided shards, which are no run of rows.
        elif type(placement) is dtensor.Shard and placement.dim == 0 and rows is None:
            step = -(-len(tensor) // mesh.size(axis))  # as torch.chunk
            rows = min(place * step, len(tensor)), min((place + 1) * step, len(tensor))
        else:
            raise SettingError(
                f"{name} is placed {tensor.placements}: a rank's part must be one run of rows, which is "
                "Shard(0) in one dimension of the mesh, and Replicate() in the others"
            )
    return rows, is_first
