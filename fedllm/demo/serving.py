"""`python -m fedllm serve`: average what silos train, round by round, and write the result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedllm import FedAvg, Outcome, RoundResult, Server
from fedllm.demo.events import Listening, Report, RoundDone, SiloRow, Wrote
from fedllm.demo.learner import Mode, prepare_learner
from fedllm.demo.model import load_base, silence
from fedllm.demo.training import Assignment, Recipe


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `serve` is told; times in seconds."""

    base: str
    mode: Mode
    out: Path
    host: str
    port: int
    rounds: int
    min_silos: int
    deadline: float | None
    steps: int
    batch: int
    lr: float
    seed: int


async def serve(options: ServeOptions, report: Report) -> None:
    """Serve a whole run; then write the averaged adapter (or model) and, all along, `metrics.jsonl`."""
    silence()
    base = load_base(options.base)
    learner = prepare_learner(base, options.mode, seed=options.seed)
    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        block_tokens=base.block_tokens,
        learning_rate=options.lr,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    metrics = options.out / "metrics.jsonl"
    metrics.write_text("")

    def on_round(result: RoundResult) -> None:
        event = _round_done(result, options.rounds)
        with metrics.open("a") as lines:
            lines.write(json.dumps(_metrics_line(event)) + "\n")
        report(event)

    server = Server(
        learner.arrays(),
        fingerprint=learner.fingerprint,
        strategy=FedAvg(),
        min_silos=options.min_silos,
        rounds=options.rounds,
        arguments=msgspec.to_builtins(Assignment(recipe=recipe, seed=options.seed)),
        deadline_s=options.deadline,
        on_round=on_round,
    )
    history = await server.run(options.host, options.port)
    learner.load(history.weights)
    learner.save(options.out / "federated")
    report(Wrote("the federated model", str(options.out / "federated")))
