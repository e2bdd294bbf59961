"""`python -m fedllm serve`: average what silos train, round by round, and write the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from aiordma import ChannelError
from fedllm import (
    Aligned,
    CheckpointError,
    Checkpoints,
    EarlyStop,
    Evaluation,
    FedAvg,
    Federation,
    RoundResult,
    RunConfig,
    Staged,
)
from fedllm.checkpoint import make_folder
from fedllm.demo.events import Listening, Report, RoundDone, Said, SiloRow, Wrote
from fedllm.demo.learner import Learner, Mode, prepare_learner
from fedllm.demo.model import load_base, silence
from fedllm.demo.training import Assignment, Recipe
from fedllm.interrupt import run_interruptibly


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `serve` is told; deadlines and timeouts in seconds."""

    base: str
    mode: Mode
    out: Path
    host: str
    port: int
    insecure: bool
    rounds: int
    min_silos: int
    fraction: float
    train_deadline: float | None
    upload_deadline: float | None
    absence_timeout: float | None
    evaluate_every: int | None
    patience: int | None
    resume: bool
    keep: int
    steps: int
    batch: int
    lr: float
    seed: int
    keep_local: Sequence[str] = ()
    aggregate: Literal["staged", "aligned"] = "staged"


def serve(options: ServeOptions, report: Report) -> None:
    """Serve a run, and write the averaged adapter (or model) to `out/federated` when it ends.

    Also when it ends early, by SIGINT, SIGTERM or an error, if a round had succeeded. As each
    round ends, the weights are saved in `out/checkpoints`, and `out/metrics.jsonl` gets a line.
    """
    silence()
    learner = prepare_learner(
        load_base(options.base), options.mode, seed=options.seed, keep_local=options.keep_local
    )
    make_folder(options.out)
    run_interruptibly(_serve(options, learner, report))


async def _serve(options: ServeOptions, learner: Learner, report: Report) -> None:
    metrics = options.out / "metrics.jsonl"

    def on_round(result: RoundResult) -> None:
        event = round_done(result, options.rounds)
        with metrics.open("a") as lines:
            lines.write(metrics_line(event))
        report(event)
        for silo, outcome in result.outcomes.items():
            # One whose channel broke is told of by on_silo.
            if outcome.reason and not isinstance(outcome.error, ChannelError):
                report(
                    Said(f"{silo} is {outcome.status} in round {result.round}: {outcome.reason}")
                )

    def on_evaluation(evaluation: Evaluation) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        report(Said(f"round {evaluation.round} as the silos judge it: {figures or 'nobody did'}"))

    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        block_tokens=learner.base.block_tokens,
        learning_rate=options.lr,
    )
    async with Federation(
        learner.arrays(),
        settings(options),
        fingerprint=learner.fingerprint,
        arguments=msgspec.to_builtins(Assignment(recipe=recipe, seed=options.seed)),
        strategy=FedAvg(aggregate=Aligned if options.aggregate == "aligned" else Staged),
        checkpoints=Checkpoints(options.out / "checkpoints", keep=options.keep),
        on_round=on_round,
        on_evaluation=on_evaluation,
        on_silo=lambda silo, what: report(Said(f"{silo} {what}")),
    ) as server:
        if options.resume:
            report(Said(f"{await server.resume()} of {options.rounds} rounds are done"))
        host, port = await server.start(options.host, options.port, insecure=options.insecure)
        if not server.round:
            metrics.write_text("")
        report(Listening(host, port))
        try:
            await server.run()
        except BaseException:
            try:
                _save(options, learner, server, report)
            except CheckpointError as exc:  # the same full disk, say: what ended the run is raised
                report(Said(str(exc)))
            raise
        _save(options, learner, server, report)


def settings(options: ServeOptions) -> RunConfig:
    """The run's settings. Raises `SettingError`."""
    patience = options.patience
    return RunConfig(
        min_silos=options.min_silos,
        rounds=options.rounds,
        fraction=options.fraction,
        seed=options.seed,
        train_deadline_s=options.train_deadline,
        upload_deadline_s=options.upload_deadline,
        absence_timeout_s=options.absence_timeout,
        evaluate_every=options.evaluate_every,
        stop=None if patience is None else EarlyStop(metric="loss", patience=patience),
    )


def _save(options: ServeOptions, learner: Learner, server: Federation, report: Report) -> None:
    rounds = server.round
    if not rounds:
        return
    learner.load(server.history.weights)
    learner.save(options.out / "federated")
    after = "" if rounds == options.rounds else f", after only {rounds} of {options.rounds} rounds,"
    report(Wrote(f"the federated model{after}", str(options.out / "federated")))


def round_done(result: RoundResult, rounds: int) -> RoundDone:
    """A round's result as an event: what each silo uploaded, in which time, and its loss."""
    silos = tuple(
        SiloRow(
            silo=silo,
            status=str(outcome.status),
            bytes=outcome.bytes,
            seconds=outcome.seconds,
            loss=outcome.metrics.get("loss"),
        )
        for silo, outcome in result.outcomes.items()
    )
    return RoundDone(round=result.round, rounds=rounds, seconds=result.seconds, silos=silos)


def metrics_line(event: RoundDone) -> str:
    """One line of `metrics.jsonl`: the round and, by silo, status, bytes, seconds, GB/s and loss."""
    silos = {
        row.silo: {
            "status": row.status,
            "bytes": row.bytes,
            "seconds": row.seconds,
            "gb_per_s": row.gb_per_s,
            "loss": row.loss,
        }
        for row in event.silos
    }
    line = {"round": event.round, "seconds": event.seconds, "silos": silos}
    return msgspec.json.encode(line).decode() + "\n"  # a loss that is no number becomes null
