"""Federated rounds of language models over aiordma: a thin layer of coroutines.

    history = await Server(weights, fingerprint=f, min_silos=2, rounds=10).run(host, port)

    async with join(host, port, name="bank", fingerprint=f) as silo:
        async for task in silo.rounds():
            update = await asyncio.to_thread(train, task.weights)
            await task.submit(update, weight=examples)

`run_round` and `exchange` are the same for those who own the loop and the channels.
"""

from fedllm.aggregate import Aggregation, Contribution
from fedllm.aligned import Aligned
from fedllm.config import RunConfig
from fedllm.errors import (
    FedError,
    JoinRefused,
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
from fedllm.participation import Outcome, Participation, Ready, Status, Task, exchange
from fedllm.rounds import RoundResult, run_round
from fedllm.server import History, RoundRecord, Server
from fedllm.silo import Report, RoundTask, Silo, join
from fedllm.staged import Staged
from fedllm.strategy import FedAvg, Strategy

__all__ = [
    "Aggregation",
    "Aligned",
    "Contribution",
    "FedAvg",
    "FedError",
    "History",
    "JoinRefused",
    "Outcome",
    "Participation",
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
    "Server",
    "ServerLost",
    "SettingError",
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
    "run_round",
]
