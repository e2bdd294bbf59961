"""Fixtures that every test may use: both event loops, leak checks; and hypothesis' profiles."""

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import hypothesis
import pytest
import uvloop

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,  # a busy machine is slow now and then, which is no finding
    derandomize=True,
    max_examples=200,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS: Mapping[str, LoopFactory] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item):
    """Both loops for a test that asks for `loop_kind`, asyncio's own for any other."""
    if "loop_kind" in getattr(item, "fixturenames", ()):
        return LOOPS
    return {"asyncio": LOOPS["asyncio"]}


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--softroce", action="store_true", help="run what boots virtual machines")
    parser.addoption(
        "--kills", type=int, default=2, help="runs whose processes are killed at random"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Skip what this machine cannot run. In the machine that `make test-rdma` boots, a skip is a failure."""
    lacking = {"verbs": no_verbs(), "softroce": None}
    if not config.getoption("softroce"):
        lacking["softroce"] = "boots virtual machines: make test-rdma runs it"
    for item in items:
        for mark, reason in lacking.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def no_verbs() -> str | None:
    """Why tests that are marked `verbs` cannot run here; None if they can."""
    devices = Path("/sys/class/infiniband")
    if not devices.is_dir() or not any(devices.iterdir()):
        return "no RDMA device: make test-rdma runs it in a machine that has one"
    if importlib.util.find_spec("pyverbs") is None:
        return "an RDMA device, but no pyverbs in this environment: pip install 'aiordma[verbs]'"
    return None


@pytest.fixture
async def loop_kind() -> str:
    """The loop that the test runs on: once "asyncio", once "uvloop".

    A whole module asks for it with `pytestmark = pytest.mark.usefixtures("loop_kind")`.
    """
    kind = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    assert kind in LOOPS
    return kind


@pytest.fixture
async def no_leaks() -> AsyncIterator[None]:
    """Fails a test that leaves a task, a socket or a child process behind.

    It sees what is opened after it: name it before the fixtures that open things, or in
    `pytestmark = pytest.mark.usefixtures("no_leaks")`, which comes before all arguments.
    """
    async with leak_check():
        yield


@asynccontextmanager
async def leak_check() -> AsyncIterator[None]:
    """Raises AssertionError if its block leaves a task, a socket or a child process behind."""
    before = {*tasks(), *sockets(), *children()}
    yield
    # A transport that was closed closes its socket one turn of the loop later, uvloop's two.
    for _ in range(3):
        await asyncio.sleep(0)
    left = {*tasks(), *sockets(), *children()} - before
    assert not left, "left behind"


def tasks() -> set[asyncio.Task[object]]:
    """The running loop's tasks, but not the one that asks."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def sockets() -> set[str]:
    """This process's open sockets, as the kernel names them: `socket:[inode]`.

    Not the local ones: uvloop makes the pair by which it is woken anew each time that it runs.
    """
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith("socket:"):
            found.add(target)
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return found - {f"socket:[{line.split()[6]}]" for line in lines}


def children() -> set[str]:
    """Child processes that have not been waited for, zombies among them; see proc(5)."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {f"process {pid}" for pid in path.read_text().split()}
    return found
