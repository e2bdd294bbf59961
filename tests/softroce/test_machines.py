"""Two virtual machines and the network between them; what a run leaves behind."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import softroce
from tests.softroce import debian, machine

pytestmark = [pytest.mark.softroce, pytest.mark.timeout(300)]


def machines() -> set[Path]:
    """The QEMU processes of this machine."""
    return {
        path.parent
        for path in Path("/proc").glob("[0-9]*/comm")
        if path.read_text().startswith("qemu-system")
    }


def test_writes_cross_a_slow_and_lossy_network(tmp_path):
    before = machines()
    softroce.run(
        [sys.executable, "-m", "tests.softroce.across"],
        nodes=2,
        netem="delay 10ms loss 0.1%",
        environment=debian.pyverbs().share(tmp_path),
        out=tmp_path,
        timeout_s=200,
    ).check()
    result = json.loads((tmp_path / "across.json").read_text())
    assert result["bytes"] == 1 << 20
    assert 0.02 <= result["round_trip_s"]
    assert machines() == before


def test_a_command_that_fails_on_one_node_ends_both(monkeypatch):
    monkeypatch.setattr(machine, "GRACE_S", 1.0)
    before = machines()
    command = ["bash", "-c", 'echo "this is $NODE"; [ "$NODE" = 1 ] && exit 7; sleep 1000']
    with pytest.raises(softroce.SoftRoceError, match="1 s after the other node failed") as caught:
        softroce.run(command, nodes=2, timeout_s=200)
    assert "this is 1" in str(caught.value)
    assert machines() == before


def test_a_machine_that_takes_too_long_is_ended():
    before = machines()
    with pytest.raises(softroce.SoftRoceError, match="not done after 1 s"):
        softroce.run(["sleep", "1000"], timeout_s=1)
    assert machines() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_machine_outlives_the_process_that_booted_it(number):
    line = [
        sys.executable,
        "-m",
        "tests.softroce",
        "run",
        "--",
        "bash",
        "-c",
        "echo up; sleep 1000",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(text == "up\n" for text in process.stdout)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        machine_fd = os.pidfd_open(int(children))
        process.send_signal(number)
        process.wait(30)
    gone, _, _ = select.select([machine_fd], [], [], 30)
    os.close(machine_fd)
    assert gone
