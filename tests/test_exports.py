"""The public surface as a list, and what importing it costs."""

import inspect
import os
import resource
import statistics
import subprocess
import sys
from importlib import metadata

import pytest

import aiordma
import aiordma.errors
import fedllm

AIORDMA = {
    "Channel",
    "ChannelConfig",
    "ChannelStats",
    "Chunk",
    "LaneInfo",
    "LaneStats",
    "Listener",
    "Manifest",
    "Outgoing",
    "Received",
    "Registration",
    "RegistrationError",
    "Server",
    "TensorSpec",
    "Transfer",
    "connect",
    "listen",
    "prepare",
    "serve",
    "set_memory_budget",
    # the error tree
    "AiordmaError",
    "Busy",
    "ChannelBroken",
    "ChannelClosed",
    "ChannelError",
    "ChecksumError",
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "ForeignPeer",
    "LaneRefused",
    "LocalError",
    "ManifestError",
    "MessageError",
    "PeerTimeout",
    "ProxyError",
    "ProxyRefused",
    "RemoteProtocolError",
    "TensorError",
    "TransferAborted",
    "TransferError",
    "TransferRefused",
    "TransferTimeout",
    "VersionMismatch",
}
FEDLLM = {
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
    "Federation",
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
}

IMPORT_RATIO = 1.4
IMPORT_PAIRS = 11


@pytest.mark.parametrize(("package", "names"), [(aiordma, AIORDMA), (fedllm, FEDLLM)])
def test_the_public_surface_is_this_list(package, names):
    assert set(package.__all__) == names
    assert len(package.__all__) == len(names)


@pytest.mark.parametrize("package", [aiordma, aiordma.errors, fedllm])
def test_every_public_name_exists_and_is_documented(package):
    assert package.__doc__
    for name in package.__all__:
        assert inspect.getdoc(getattr(package, name)), name


def test_every_error_is_public():
    errors = {
        name
        for name, value in vars(aiordma.errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert errors <= set(aiordma.__all__)


def test_public_classes_document_their_public_methods():
    undocumented = [
        f"{package.__name__}.{name}.{member}"
        for package in (aiordma, fedllm)
        for name in package.__all__
        if inspect.isclass(public := getattr(package, name))
        for member, value in vars(public).items()
        if not member.startswith("_")
        if inspect.isfunction(value) or isinstance(value, property)
        if not inspect.getdoc(value)
    ]
    assert undocumented == []


def test_the_version_is_the_distributions():
    assert aiordma.__version__ == metadata.version("aiordma")


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def test_importing_aiordma_brings_no_guest_and_touches_no_logger():
    out = run_python(
        "import logging, sys; before = logging.root.level, list(logging.root.handlers)\n"
        "import aiordma\n"
        "assert (logging.root.level, logging.root.handlers) == before\n"
        "print(sorted({'torch', 'pyverbs', 'peft', 'transformers', 'rich'} & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_importing_fedllm_brings_no_torch():
    out = run_python(
        "import fedllm, sys; print({'torch', 'peft', 'transformers', 'rich'} & set(sys.modules))"
    )
    assert out.strip() == "set()"


def cpu_seconds_of(code: str) -> float:
    """User and system seconds of a fresh interpreter: what else the machine does hardly shows."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_aiordma_costs_little_more_than_its_dependencies():
    ours, theirs = "import aiordma", "import numpy, asyncio, msgspec, xxhash"
    run_python(ours)  # the first import of a fresh checkout writes the bytecode
    pairs = [(cpu_seconds_of(ours), cpu_seconds_of(theirs)) for _ in range(IMPORT_PAIRS)]
    assert statistics.median(our / their for our, their in pairs) <= IMPORT_RATIO, pairs
