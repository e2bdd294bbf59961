"""Two virtual machines and the network between them; what a run leaves behind."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from fedllm.adapters import lora_arrays
from tests import softroce
from tests.softroce import debian, machine
from tests.softroce.round_across import PROBE_S

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


def test_registered_memory_to_registered_memory_while_packets_are_lost(tmp_path):
    softroce.run(
        [sys.executable, "-m", "tests.softroce.into_across"],
        nodes=2,
        netem="delay 5ms loss 0.5%",
        environment=debian.pyverbs().share(tmp_path),
        out=tmp_path,
        timeout_s=240,
    ).check()
    result = json.loads((tmp_path / "into.json").read_text())
    assert result["copied"] < result["bytes"] / 2


@pytest.fixture
def start(tmp_path):
    """A LoRA state dict as peft makes it, for silos that have neither torch nor peft."""
    base = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=1024))
    settings = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    arrays: Any = lora_arrays(get_peft_model(base, settings))
    np.savez(tmp_path / "start.npz", **arrays)
    return tmp_path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_round_over_verbs_equals_the_same_over_tcp_bit_for_bit(start):
    """Across a slow and lossy network."""
    results = rounds_across(start, netem="delay 10ms loss 0.1%")
    assert results["tcp"]["digest"] == results["any"]["digest"]
    assert results["tcp"]["bytes"] == results["any"]["bytes"] > 500_000
    assert all(
        reason.startswith("verbs: rxe0/1, RoCE v2 10.77.0.") for reason in results["any"]["lanes"]
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_where_roce_is_blocked_it_comes_up_over_tcp_and_says_why(start):
    results = rounds_across(start, environment={"BLOCK": "1"})
    assert results["tcp"]["digest"] == results["any"]["digest"]
    for reason in results["any"]["lanes"]:
        assert reason.startswith("tcp: the ")
        assert re.search(r"no packet got through .* UDP port 4791", reason)
    *_, probed_s = json.loads((start / "connected.json").read_text())
    assert probed_s < 2 * PROBE_S, "all of the handshake, on an emulated processor"


def rounds_across(out, netem="", environment=None):
    softroce.run(
        [sys.executable, "-m", "tests.softroce.round_across"],
        nodes=2,
        netem=netem,
        environment={**debian.pyverbs().share(out), **(environment or {})},
        out=out,
        timeout_s=240,
    ).check()
    return json.loads((out / "rounds.json").read_text())


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
