"""`bench --lane verbs` and `bench --fedrdma` on a real device, at toy size: all figures, every byte verified."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aiordma.__main__ import main
from aiordma.bench import fedrdma
from aiordma.bench.errors import CorruptTransfer
from aiordma.bench.far import Open
from aiordma.bench.fedrdma import FedFindings
from aiordma.bench.lane import WAYS, LaneFindings
from aiordma.bench.near import far_end
from aiordma.bench.payload import source
from tests.softroce.lanes import resources

pytestmark = pytest.mark.verbs


def test_a_lane_is_measured_against_ib_write_bw(tmp_path, capsys, record_property):
    before, file = resources(), tmp_path / "bench.json"
    assert main(["bench", "--lane", "verbs", "--quick", f"--json={file}"]) == 0
    findings = msgspec.json.decode(file.read_bytes(), type=LaneFindings)
    assert findings.path.startswith("verbs: rxe0/1, RoCE v2 10.77.0.1")
    plan = findings.plan
    assert [(row.size, row.way) for row in findings.rows] == [
        (size, way) for size in plan.sizes for way in WAYS
    ]
    for row in findings.rows:
        assert row.deliveries == plan.rounds
        assert row.ratio.low > 0
        # Before the sender hears of the window it fills the ring.
        ring_bytes = plan.slots * row.size if row.way == "in place" else 0
        assert row.receiver_copied_bytes <= 2 * ring_bytes < plan.total_bytes
        assert row.sender_copied_bytes == (plan.total_bytes if row.way == "ring" else 0)
    assert "without -e: perftest" in capsys.readouterr().out
    assert resources() == before
    record_property("lane_bytes", plan.total_bytes * plan.rounds * len(findings.rows))


def test_the_ways_of_fedrdma_are_compared_with_a_far_end_elsewhere(
    tmp_path, capsys, record_property
):
    before, file = resources(), tmp_path / "bench.json"
    serve = [sys.executable, "-m", "aiordma", "bench", "--serve", "10.77.0.1:0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stdout is not None
        peer = process.stdout.readline().split()[-1]
        arguments = ["--fedrdma", "--quick", "--peer", peer, f"--json={file}"]
        assert main(["bench", *arguments]) == 0
        assert process.wait(30) == 0
    findings = msgspec.json.decode(file.read_bytes(), type=FedFindings)
    assert [row.preset for row in findings.rows] == list(fedrdma.PRESETS)
    assert not any(row.error for row in findings.rows)
    for row in findings.rows:
        assert row.sender is not None
        assert row.receiver is not None
        for end, needed in zip((row.sender, row.receiver), row.needed_bytes, strict=True):
            assert end.pinned_bytes >= needed
            assert (end.pinned_bytes > 0) == (row.preset != "tcp")
        assert row.receiver.copied_bytes == 0
        copies = findings.model_bytes if row.preset == "fedrdma-e" else 0
        assert row.sender.copied_bytes == copies
    assert "fedrdma-e  " in capsys.readouterr().out
    assert resources() == before
    record_property("lane_bytes", findings.model_bytes * 3)


async def test_a_wrong_byte_is_noticed_in_the_ring():
    wrong = source(200_000)
    wrong[150_001] ^= 1

    async def send(link):
        with link.channel.register(wrong):
            await link.channel.send_tensor(wrong, meta=0, confirm=True)

    async def deliver():
        async with far_end(None, 60) as there:
            async with there.channel(Open(wrong.nbytes, 1 << 16, 4, True, False)) as link:
                await link.deliver(send)

    with pytest.raises(CorruptTransfer, match="not those that were sent"):
        await deliver()
