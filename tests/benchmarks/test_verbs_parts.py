"""`bench --lane verbs` and `bench --fedrdma`: what needs no device. tests/softroce runs them whole."""

import asyncio
import math
from contextlib import asynccontextmanager

import msgspec
import pytest

from aiordma.__main__ import main
from aiordma.bench import far, fedrdma, fedrdma_report, lane_report, perftest
from aiordma.bench.errors import BenchError, CorruptTransfer
from aiordma.bench.far import Open, verify_part
from aiordma.bench.fedrdma import FedFindings, FedPlan, FedRow
from aiordma.bench.lane import LaneFindings, LanePlan, LaneRow
from aiordma.bench.meter import Usage
from aiordma.bench.near import far_end
from aiordma.bench.payload import source
from aiordma.bench.perftest import DevicePort
from aiordma.bench.plan import Spread
from tests.conftest import no_verbs

pytestmark = pytest.mark.usefixtures("no_leaks")

REASON = "verbs: rxe0/1, RoCE v2 10.77.0.1, MTU 4096"
OUTPUT = """\
************************************
 local address: LID 0000 QPN 0x0011 PSN 0x39aebe
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[{unit}]    BW average[{unit}]   MsgRate[Mpps]
 65536      256              80.25              76.50             0.001224
---------------------------------------------------------------------------------------
"""
TOY = FedPlan(scale=96, chunk_bytes=4096, rounds=1, presets=("tcp",), stall_s=30)


@pytest.mark.parametrize("unit", ["MB/sec", "MiB/sec"])
def test_the_average_of_ib_write_bw_is_read(unit):
    assert perftest.bytes_per_s(OUTPUT.format(unit=unit), 65536) == 76.5 * (1 << 20)


@pytest.mark.parametrize("output", ["", OUTPUT.format(unit="Gb/sec"), " Couldn't connect\n"])
def test_output_without_an_average_is_an_error(output):
    with pytest.raises(BenchError, match="printed no average"):
        perftest.bytes_per_s(output, 65536)


def test_ib_write_bw_runs_where_the_lane_does(tmp_path, monkeypatch):
    port = tmp_path / "rxe0/ports/1"
    for index, (kind, gid) in enumerate(
        [("RoCE v2", "fe80::1"), ("RoCE v1", "::ffff:10.77.0.1"), ("RoCE v2", "::ffff:10.77.0.1")]
    ):
        for folder, text in (("gids", gid), ("gid_attrs/types", kind)):
            (port / folder).mkdir(parents=True, exist_ok=True)
            (port / folder / str(index)).write_text(text + "\n")
    (port / "gids/3").write_text("::\n")  # not in use: it has no type
    found = perftest.port_of(REASON, tmp_path)
    assert found == DevicePort("rxe0", 1, 2)
    monkeypatch.setattr(perftest, "require_tool", lambda: "ib_write_bw")
    line = perftest.command(found, 65536, 16, 4321, "10.77.0.2")
    options = "-F -d rxe0 -i 1 -p 4321 -s 65536 -n 16 -x 2 10.77.0.2"
    assert line == ["ib_write_bw", *options.split()]
    with pytest.raises(BenchError, match=r"no RoCE v2 address 10\.0\.0\.9"):
        perftest.port_of(REASON.replace("10.77.0.1", "10.0.0.9"), tmp_path)


def test_infiniband_needs_no_address():
    assert perftest.port_of("verbs: mlx5_0/2, InfiniBand fe80::1, MTU 4096").gid_index is None
    with pytest.raises(BenchError, match="does not name its device"):
        perftest.port_of("tcp")


def test_without_perftest_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BenchError, match="install perftest"):
        perftest.require_tool()


@pytest.mark.parametrize("wrong", [0, 500, 996, 999])
def test_a_wrong_byte_in_a_slot_is_noticed(wrong):
    expected = source(5000)
    part = expected[64:1064].copy()
    verify_part(expected, 64, part.data)
    part[wrong] ^= 1
    for start, view in ((64, part.data), (63, expected[64:1064].data), (4001, part.data)):
        with pytest.raises(CorruptTransfer):
            verify_part(expected, start, view)


async def test_a_wrong_byte_ends_the_measurement():
    wrong = source(100_000)
    wrong[77_777] ^= 1

    async def send(link):
        await link.channel.send_tensor(wrong, meta=0, confirm=True)

    async def deliver():
        async with far_end(None, 30) as there:
            async with there.channel(Open(wrong.nbytes, 1 << 12, 8, False, True)) as link:
                await link.deliver(send)

    with pytest.raises(CorruptTransfer, match="not those that were sent"):
        await deliver()


def test_the_model_is_gpt2():
    shapes = fedrdma.shapes(1)
    assert sum(math.prod(shape) for shape in shapes.values()) == 124_439_808
    assert len(shapes) == 148
    model = fedrdma.make_model(48)
    assert b"".join(tensor.tobytes() for tensor in model.tensors.values()) == model.flat.tobytes()


@asynccontextmanager
async def serving():
    """A far end in this process, as `bench --serve` is elsewhere; its port."""
    said: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(far.serve(("127.0.0.1", 0), stall_s=30, say=said.put_nowait))
    try:
        yield int((await said.get()).rpartition(":")[2])
        await task  # it ends with its one measurement
    finally:
        task.cancel()


@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_tcp_is_measured_without_a_device(is_elsewhere):
    if is_elsewhere:
        async with serving() as port:
            plan = msgspec.structs.replace(TOY, peer=("127.0.0.1", port))
            findings = await fedrdma.measure(plan, lambda line: None)
    else:
        findings = await fedrdma.measure(TOY, lambda line: None)
    (row,) = findings.rows
    assert not row.error
    assert row.seconds is not None
    assert row.seconds.median > 0
    for usage in (row.sender, row.receiver):
        assert usage is not None
        assert usage.cpu_s > 0
        assert usage.pinned_bytes == usage.copied_bytes == 0
    assert msgspec.json.decode(msgspec.json.encode(findings), type=FedFindings) == findings
    assert "no RDMA lane" in fedrdma_report.text(findings)


async def test_a_way_that_fails_has_its_reason_in_the_report(monkeypatch):
    async def fail(*_):
        raise BenchError("it broke")

    monkeypatch.setattr(fedrdma, "_deliver", fail)
    findings = await fedrdma.measure(TOY, lambda line: None)
    assert findings.rows == [FedRow("tcp", "it broke")]
    assert "tcp failed: it broke" in fedrdma_report.text(findings)


def test_the_tables_have_every_figure():
    spread = Spread(40e0, 30e0, 50e0)
    row = LaneRow(1 << 16, "ring", spread, Spread(80, 70, 90), Spread(0.5, 0.4, 0.6), 3, 4, 0, 0, 9)
    findings = LaneFindings(LanePlan(), {"cpus": "2"}, REASON, [row], ["1 byte: it broke"])
    text = lane_report.text(findings)
    assert "Failed: 1 byte: it broke" in text
    ours = (
        "64 KiB   ring  40.00 (30.00..50.00)  80.00 (70.00..90.00)  0.50 (0.40..0.60)  3.00 + 4.00"
    )
    assert ours in text
    assert "without -e: perftest" in text

    usage = Usage(1, 2, 3 << 20, 4 << 20, 5 << 20)
    rows = [
        FedRow("naive", "", Spread(2, 1, 3), usage, usage, (1 << 20, 1 << 20)),
        FedRow("tcp", "", Spread(4, 4, 4), usage, usage),
    ]
    text = fedrdma_report.text(FedFindings(FedPlan(), {}, REASON, 8_000_000, 148, rows))
    assert "naive  2.00 (1.00..3.00)  4.00  2.00" in text
    assert "1.00 / 1.00  2.00 / 2.00    3.0 / 3.0   1.0 / 1.0   4.0 / 4.0  5.0 / 5.0" in text


@pytest.mark.skipif(no_verbs() is None, reason="this host has an RDMA device")
@pytest.mark.parametrize("what", [["--lane", "verbs"], ["--fedrdma"]])
def test_without_a_device_it_says_so(what, capsys):
    assert main(["bench", "--quick", *what]) == 1
    captured = capsys.readouterr()
    assert "RDMA device" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--lane verbs --lanes 2", "--lanes has no meaning with --lane verbs"),
        ("--lane verbs --sizes 96K", "no whole number of messages"),
        ("--fedrdma --total 1M", "--total has no meaning with --fedrdma"),
        ("--fedrdma --sizes 1M,2M", "one size of chunks"),
        ("--fedrdma --scale 5", "scale must divide 768"),
        ("--peer 10.0.0.1", "--peer goes with"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, complaint, capsys):
    assert main(["bench", *arguments.split()]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("address", ["", ":1", "a:70000"])
def test_a_wrong_address_is_refused(address, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--lane", "verbs", "--peer", address])
    assert "is not HOST or HOST:PORT" in capsys.readouterr().err
