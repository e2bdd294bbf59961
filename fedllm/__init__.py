"""Federated rounds of language models over aiordma: a thin layer of coroutines.

    settings = RunConfig(min_silos=2, rounds=10)
    history = await Federation(weights, settings, fingerprint=f).run(host, port)

    async with join(host, port, name="bank", fingerprint=f) as silo:
        async for task in silo.rounds():
            update = await run_in_thread(lambda stop: train(task.weights, stop))
            await task.submit(update, weight=examples)

`run_round` and `exchange` are the same for those who own the loop and the channels.
"""

from fedllm.aggregate import Aggregation, Contribution
from fedllm.aligned import Aligned
from fedllm.backoff import Backoff
from fedllm.checkpoint import Checkpoints
from fedllm.config import EarlyStop, RunConfig
from fedllm.errors import (
    CheckpointError,
    FedError,
    JoinRefused,
    JournalError,
    QuorumNotReached,
    RoundAbandoned,
    RoundError,
    RunFailed,
    ServerLost,
    SettingError,
    StagingError,
    UpdateError,
    WeightsError,
)
from fedllm.evaluation import Evaluation, run_evaluation
from fedllm.federation import Federation
from fedllm.history import History, RoundRecord
from fedllm.joining import join
from fedllm.memory import Memory
from fedllm.messages import Shard
from fedllm.participation import Outcome, Participation, Ready, Status, Task, exchange
from fedllm.policy import Between, OneOf, Policy
from fedllm.rounds import RoundResult, run_round
from fedllm.shards import Shards
from fedllm.silo import EvaluationTask, Report, RoundTask, Silo
from fedllm.staged import Staged
from fedllm.strategy import FedAvg, Strategy
from fedllm.threads import run_in_thread

__all__ = [
    "Aggregation",
    "Aligned",
    "Backoff",
    "Between",
    "CheckpointError",
    "Checkpoints",
    "Contribution",
    "EarlyStop",
    "Evaluation",
    "EvaluationTask",
    "FedAvg",
    "FedError",
    "Federation",
    "History",
    "JoinRefused",
    "JournalError",
    "Memory",
    "OneOf",
    "Outcome",
    "Participation",
    "Policy",
    "QuorumNotReached",
    "Ready",
    "Report",
    "RoundAbandoned",
    "RoundError",
    "RoundRecord",
    "RoundResult",
    "RoundTask",
    "RunConfig",
    "RunFailed",
    "ServerLost",
    "SettingError",
    "Shard",
    "Shards",
    "Silo",
    "Staged",
    "StagingError",
    "Status",
    "Strategy",
    "Task",
    "UpdateError",
    "WeightsError",
    "exchange",
    "join",
    "run_evaluation",
    "run_in_thread",
    "run_round",
]
