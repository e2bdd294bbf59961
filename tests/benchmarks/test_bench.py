"""`python -m aiordma bench` at toy size: every figure is there, and a wrong byte is never counted."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from aiordma.__main__ import main
from aiordma.bench import report
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.orders import Order, Setup
from aiordma.bench.ours import ChannelSide
from aiordma.bench.pair import open_pair
from aiordma.bench.payload import digest, message, scrubbed, source, verify_message
from aiordma.bench.peer import Peer, Side
from aiordma.bench.plan import (
    AIM_BYTES,
    AIM_EXTRA_BYTES,
    Contender,
    Findings,
    Plan,
    Spread,
    TransferRow,
    default_congestion,
)
from aiordma.bench.raw import RawSide
from aiordma.bench.run import measure

pytestmark = pytest.mark.usefixtures("no_leaks")

NBYTES = 10_000
SIDES: dict[str, Callable[[Setup], Side]] = {"raw": RawSide, "asyncio": ChannelSide}


def setup(kind, nbytes=NBYTES):
    return Setup(kind, "sender", nbytes, 1, default_congestion(), True)


def test_the_command_measures_every_contender_and_writes_all_of_it(tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--quick", "--rounds=1", "--sizes=64,3M", "--lanes=1,2", f"--json={file}"]
    assert main(["bench", *options]) == 0
    findings = msgspec.json.decode(file.read_bytes(), type=Findings)
    raw = ["raw sockets x1", "raw sockets x2"]
    one = ["aiordma asyncio, 1 lane", "aiordma uvloop, 1 lane"]
    two = ["aiordma asyncio, 2 lanes", "aiordma uvloop, 2 lanes"]
    measured = [(row.nbytes, row.contender.name) for row in findings.transfers]
    assert measured == [
        *((64, name) for name in raw + one),  # one chunk has no use for a second lane
        *((3 << 20, name) for name in raw + one + raw + two),
    ]
    assert [row.contender.name for row in findings.messages] == [raw[0], *one]
    assert capsys.readouterr().out == report.text(findings)


async def test_figures_agree_with_each_other():
    plan = Plan(sizes=(3 << 20,), lanes=(2,), rounds=3, round_trips=20)
    findings = await measure(plan, lambda line: None)
    assert not findings.left_out
    for row in findings.transfers:
        assert row.transfers == plan.rounds * plan.repeats(row.nbytes)
        assert 0 < row.gb_per_s.low <= row.gb_per_s.median <= row.gb_per_s.high
        assert row.sender_cpu_s_per_gb > 0
        assert row.receiver_cpu_s_per_gb > 0
        raw = findings.transfers[0].gb_per_s.median
        assert row.raw_ratios[0].median == pytest.approx(row.gb_per_s.median / raw)
    for message_row in findings.messages:
        assert message_row.round_trips == 60
        assert 0 < message_row.p50_s.median <= message_row.p99_s.median


@pytest.mark.parametrize("kind", SIDES)
async def test_a_wrong_byte_is_noticed(kind):
    receiver, sender = SIDES[kind](setup(kind)), SIDES[kind](setup(kind))
    peer = Peer(receiver, scrubbed(NBYTES), lambda: None)
    good = source(NBYTES)
    order = Order("receive", digest=digest(good))
    try:
        port = await receiver.listen()
        if kind == "raw":  # its calls block: the backlog takes the connections meanwhile
            await sender.connect(port)
            await receiver.accept()
        else:
            await asyncio.gather(receiver.accept(), sender.connect(port))
        for wrong in (None, 0, NBYTES // 2, NBYTES - 1, None):
            sent = good.copy()
            if wrong is None:
                await asyncio.gather(sender.send(sent, 1), peer.carry_out(order))
                continue
            sent[wrong] ^= 1
            with pytest.raises(CorruptTransfer):
                await asyncio.gather(sender.send(sent, 1), peer.carry_out(order))
    finally:
        await asyncio.gather(sender.aclose(), receiver.aclose())


async def test_what_a_transfer_left_does_not_pass_for_the_next_one():
    class Idle(RawSide):
        async def receive(self, destination, connections, ready):
            """Receives nothing."""

    right = source(NBYTES)
    peer = Peer(Idle(setup("raw")), right.copy(), lambda: None)
    with pytest.raises(CorruptTransfer):
        await peer.carry_out(Order("receive", digest=digest(right)))


def test_a_wrong_message_is_noticed():
    verify_message(7, message(7))
    with pytest.raises(CorruptTransfer):
        verify_message(7, message(8))


@pytest.mark.parametrize("kind", ["raw", "asyncio", "uvloop"])
async def test_a_wrong_byte_ends_the_benchmark_and_its_processes(kind):
    async def transfer_twice():
        async with open_pair(setup(kind), stall_s=30) as pair:
            await pair.transfer()
            pair._digest ^= 1  # as if the sender had sent something else
            await pair.transfer()

    with pytest.raises(CorruptTransfer, match="not those that were sent"):
        await transfer_twice()


async def test_a_process_that_dies_is_an_error(capfd):
    broken = msgspec.structs.replace(setup("raw"), kind="nonsense")
    with pytest.raises(BenchError, match="died"):
        async with open_pair(broken, stall_s=30):
            pass


async def test_a_process_that_stalls_is_an_error():
    async def wait_for_an_echo_of_nothing():
        async with open_pair(setup("raw"), stall_s=30) as pair:
            pair._receiver._stall_s = 0.05
            pair._receiver.order(Order("echo", count=1))
            await pair._receiver.ready()
            await pair._receiver.answer()

    with pytest.raises(BenchError, match="stalled"):
        await wait_for_an_echo_of_nothing()


def row(ratio, beyond_ring_bytes):
    contender = Contender("asyncio", 1)
    spread = Spread(ratio, ratio, ratio)
    extra_bytes = contender.ring_bytes + beyond_ring_bytes
    return TransferRow(AIM_BYTES, contender, spread, (spread, spread), 1, 1, 0, extra_bytes, 0, 1)


@pytest.mark.parametrize(
    ("ratio", "beyond_ring_bytes", "missed"),
    [(0.8, AIM_EXTRA_BYTES, 0), (0.79, 0, 1), (1.0, AIM_EXTRA_BYTES + 1, 1)],
)
def test_a_missed_aim_is_said(ratio, beyond_ring_bytes, missed):
    findings = Findings(Plan(), {}, [row(ratio, beyond_ring_bytes)], [], [])
    verdicts = list(report.aims(findings))
    assert len(verdicts) == 2
    assert sum("MISSED" in verdict for verdict in verdicts) == missed


def test_a_tensor_that_does_not_fit_is_left_out_and_named():
    findings = asyncio.run(
        measure(Plan(sizes=(1 << 50,), lanes=(1,), rounds=1, round_trips=1), lambda line: None)
    )
    assert findings.transfers == []
    assert "GB of memory" in report.text(findings)


@pytest.mark.parametrize(
    "arguments", [["--sizes=0"], ["--sizes=4X"], ["--lanes=0"], ["--loops=trio"], ["--rounds=-1"]]
)
def test_a_wrong_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["bench", *arguments])
    assert refused.value.code == 2
    assert "error: argument" in capsys.readouterr().err
