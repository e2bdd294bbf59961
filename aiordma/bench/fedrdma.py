"""`bench --fedrdma`: ways to move a model that FedRDMA compares, by name, and what each costs.

FedRDMA: Communication-Efficient Cross-Silo Federated LLM via Chunked RDMA Transmission (arXiv 2403.00881).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from aiordma import AiordmaError, ConfigError
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.far import Open
from aiordma.bench.meter import Usage
from aiordma.bench.near import Address, Link, Sample, far_end
from aiordma.bench.payload import Buffer, source
from aiordma.bench.plan import MiB, Spread
from aiordma.bench.run import Progress, describe_host, in_turn

Preset = Literal["naive", "fedrdma", "fedrdma-e", "tcp"]
PRESETS: Final[tuple[Preset, ...]] = ("naive", "fedrdma", "fedrdma-e", "tcp")

_LEAST_SLOTS: Final = 4
"""`ChannelConfig` takes no fewer."""
_WIDTH, _LAYERS, _WORDS, _POSITIONS = 768, 12, 50257, 1024
"""GPT-2 with 124 million parameters."""


class FedPlan(msgspec.Struct, frozen=True):
    """What to measure."""

    scale: int = 4
    """GPT-2's width, vocabulary and positions are divided by it: 4 makes 7.8 million parameters, 31 MB."""
    chunk_bytes: int = MiB
    slots: int = 8
    rounds: int = 3
    """Each round measures every preset, in turn; one more round before them warms up."""
    presets: tuple[Preset, ...] = PRESETS
    checksum: bool = True
    peer: Address | None = None
    """Where `bench --serve` runs; None: a process of this machine."""
    stall_s: float = 600.0


class FedRow(msgspec.Struct, frozen=True):
    """One preset."""

    preset: Preset
    error: str
    """Why there are no figures, or nothing."""
    seconds: Spread | None = None
    sender: Usage | None = None
    """Medians of the rounds; of memory, the most."""
    receiver: Usage | None = None
    needed_bytes: tuple[int, int] = (0, 0)
    """What must be pinned at each end for the way itself: of `pinned_bytes`, naive uses one slot of four."""


class FedFindings(msgspec.Struct, frozen=True):
    """All that was measured."""

    plan: FedPlan
    host: dict[str, str]
    path: str
    """What the RDMA lanes ran on; empty if none was measured."""
    model_bytes: int
    tensors: int
    rows: list[FedRow]


class Model(NamedTuple):
    """Random bytes in the shapes of GPT-2, float32, in one piece of memory."""

    flat: Buffer
    tensors: Mapping[str, NDArray[np.float32]]


def shapes(scale: int) -> dict[str, tuple[int, ...]]:
    """GPT-2's state dict, scaled down. Raises `ConfigError` if the scale does not divide its width."""
    if scale < 1 or _WIDTH % scale:
        raise ConfigError(f"scale must divide {_WIDTH}, the width of GPT-2, not {scale}")
    width = _WIDTH // scale
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (max(1, _WORDS // scale), width),
        "wpe.weight": (max(1, _POSITIONS // scale), width),
    }
    for layer in range(_LAYERS):
        name = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            found |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
        for block, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            found |= {
                f"{name}.{block}.weight": (rows, columns),
                f"{name}.{block}.bias": (columns,),
            }
    return found | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def make_model(scale: int) -> Model:
    """Of these shapes."""
    wanted = shapes(scale)
    flat = source(4 * sum(math.prod(shape) for shape in wanted.values()))
    tensors, start = {}, 0
    for name, shape in wanted.items():
        stop = start + 4 * math.prod(shape)
        tensors[name] = flat[start:stop].view(np.float32).reshape(shape)
        start = stop
    return Model(flat, tensors)


async def measure(plan: FedPlan, progress: Progress) -> FedFindings:
    """Carry the plan out; `progress` gets a line now and then.

    Raises an `AiordmaError` that says why there are no RDMA lanes, and `CorruptTransfer` if a single byte arrived
    wrong. A preset that fails on the way has its reason in its row.
    """
    model = make_model(plan.scale)
    samples: dict[Preset, list[Sample]] = {preset: [] for preset in plan.presets}
    errors: dict[Preset, str] = {}
    path = ""
    async with far_end(plan.peer, plan.stall_s) as far:
        for number in range(1 + plan.rounds):
            progress(f"round {number} of {plan.rounds}" + " (to warm up)" * (not number))
            for preset in in_turn(plan.presets, number):
                if preset in errors:
                    continue
                async with far.channel(ring_of(preset, plan, model.flat.nbytes)) as link:
                    path = link.channel.lanes[0].reason if preset != "tcp" else path
                    try:
                        samples[preset].append(await _deliver(preset, plan, model, link))
                    except CorruptTransfer:
                        raise
                    except (AiordmaError, BenchError) as exc:
                        errors[preset] = str(exc)
    rows = [
        _row(preset, plan, model, samples[preset][1:], errors.get(preset, ""))
        for preset in plan.presets
    ]
    tensors = len(model.tensors)
    return FedFindings(plan, describe_host(), path, model.flat.nbytes, tensors, rows)


def ring_of(preset: Preset, plan: FedPlan, model_bytes: int) -> Open:
    """The receiver's."""
    slot_bytes, slots = plan.chunk_bytes, plan.slots
    if preset == "naive":
        slot_bytes, slots = -(-model_bytes // 64) * 64, _LEAST_SLOTS
    elif preset == "fedrdma":
        slots = _LEAST_SLOTS
    return Open(model_bytes, slot_bytes, slots, preset != "tcp", plan.checksum)


async def _deliver(preset: Preset, plan: FedPlan, model: Model, link: Link) -> Sample:
    match preset:
        case "naive":
            step = model.flat.nbytes
        case "fedrdma":
            step = plan.chunk_bytes
        case _:
            step = 0

    async def send(link: Link) -> None:
        if not step:
            await link.channel.send_tensors(model.tensors, meta=0, confirm=True)
            return
        for start in range(0, model.flat.nbytes, step):
            piece = model.flat[start : start + step]
            with link.channel.register(piece):
                link.meter.look()
                await link.channel.send_tensor(piece, meta=start, confirm=True)

    return await link.deliver(send)


def _row(
    preset: Preset, plan: FedPlan, model: Model, samples: Sequence[Sample], error: str
) -> FedRow:
    if error or not samples:
        return FedRow(preset, error)
    sender = _middle([sample.sender for sample in samples])
    receiver = _middle([sample.receiver for sample in samples])
    needed_bytes = {
        "naive": (model.flat.nbytes, model.flat.nbytes),
        "fedrdma": (plan.chunk_bytes, plan.chunk_bytes),
        "fedrdma-e": (sender.pinned_bytes, receiver.pinned_bytes),
        "tcp": (0, 0),
    }
    seconds = Spread.of([sample.seconds for sample in samples])
    return FedRow(preset, "", seconds, sender, receiver, needed_bytes[preset])


def _middle(usages: Sequence[Usage]) -> Usage:
    return Usage(
        cpu_s=statistics.median(usage.cpu_s for usage in usages),
        machine_cpu_s=statistics.median(usage.machine_cpu_s for usage in usages),
        pinned_bytes=max(usage.pinned_bytes for usage in usages),
        extra_bytes=max(usage.extra_bytes for usage in usages),
        copied_bytes=max(usage.copied_bytes for usage in usages),
    )
