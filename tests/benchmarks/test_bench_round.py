"""`python -m fedllm bench-round` at toy size: every figure is there, and no round counts that came to wrong weights."""

import asyncio
import itertools
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedllm.__main__ import main
from fedllm.bench import content, report
from fedllm.bench.contender import Contender, Setup
from fedllm.bench.errors import BenchError, WrongWeights
from fedllm.bench.layouts import NAMED, layout_of, nbytes_of
from fedllm.bench.link import SERVER_HOST, Shape, open_link
from fedllm.bench.run import MAX_ROUNDS, MAX_SILOS, Findings, Plan, Row, Turn, measure
from fedllm.bench.session import Sample, open_session
from fedllm.errors import SettingError
from tests.demo.processes import running, session_of

PLAIN = Path(__file__).with_name("plain_sockets.py")
TOY = "300K"
HOST = "127.0.0.1"
OURS = (Contender(), Contender(aggregate="aligned", lanes=2))

can_link = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and TUN devices"
)


def setup(contender, silos=2):
    return Setup(contender, TOY, silos, HOST, "")


def contender(tmp_path, text):
    file = tmp_path / "other.py"
    file.write_text(f"from tests.benchmarks.plain_sockets import *\n{text}\n")
    return Contender(program=str(file))


def test_the_command_measures_every_contender_and_writes_all_of_it(tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = [
        "--layout",
        TOY,
        "--silos=2",
        "--turns=2",
        "--rounds=2",
        "--lanes=1,2",
        "--slots=64K",
    ]
    assert main(["bench-round", *options, f"--json={file}"]) == 0
    findings = msgspec.json.decode(file.read_bytes(), type=Findings)
    assert [row.contender.name for row in findings.rows] == [
        "plain_sockets",
        "fedllm, staged, 64 KiB slots",
        "fedllm, aligned, 64 KiB slots",
        "fedllm, staged, 2 lanes, 64 KiB slots",
        "fedllm, aligned, 2 lanes, 64 KiB slots",
    ]
    for row in findings.rows:
        assert [len(turn.samples) for turn in row.turns] == [2, 2]
        for sample in (sample for turn in row.turns for sample in turn.samples):
            assert min(sample.seconds, sample.server_cpu_s, sample.silos_cpu_s) > 0
        assert row.peak_bytes > findings.plan.nbytes
    assert capsys.readouterr().out == report.text(findings)


@pytest.mark.parametrize(
    "spoil",
    [
        "row_of(weights)[70_000] += 1",
        "row_of(weights)[-1] = float('nan')",
        "row_of(weights)[0] = -row_of(weights)[0]",
        "row_of(weights)[1:4097] = row_of(weights)[4097:8193].copy()",
        "weights.pop(next(iter(weights)))",
    ],
)
async def test_wrong_weights_end_the_benchmark(tmp_path, spoil):
    wrong = contender(
        tmp_path,
        f"class Server(Server):\n"
        f"    def round(self, weights):\n"
        f"        weights = super().round(weights)\n"
        f"        {spoil}\n"
        f"        return weights",
    )
    with pytest.raises(WrongWeights, match="other: the server"):
        await measure(Plan(contenders=(*OURS, wrong), layout=TOY, turns=1), lambda line: None)


async def test_a_round_that_did_not_take_place_is_noticed(tmp_path):
    idle = contender(
        tmp_path,
        "class Server(Server):\n"
        "    def round(self, weights):\n"
        "        if hasattr(self, 'seen'):\n"
        "            return weights\n"
        "        self.seen = True\n"
        "        return super().round(weights)",
    )
    async with open_session(setup(idle)) as (session, _):
        await session.round()
        with pytest.raises(WrongWeights, match="after 2 rounds"):
            await asyncio.wait_for(session.round(), 30)


async def test_numbers_that_did_not_travel_in_this_round_are_noticed(tmp_path):
    lazy = contender(
        tmp_path,
        "class Server(Server):\n"
        "    def round(self, weights):\n"
        "        row = row_of(super().round(weights))\n"
        "        if hasattr(self, 'before'):\n"
        "            row[1:70_000] = self.before[1:70_000]\n"
        "        self.before = row.copy()\n"
        "        return weights",
    )
    async with open_session(setup(lazy)) as (session, _):
        await session.round()
        with pytest.raises(WrongWeights, match="at item 1 after 2 rounds"):
            await session.round()


async def test_a_contender_that_cannot_run_is_left_out(tmp_path, capsys):
    broken = contender(tmp_path, "import nothing_of_this_name")
    plan = Plan(contenders=(broken, *OURS), layout=TOY, silos=2, turns=1, rounds=1)
    findings = await measure(plan, lambda line: None)
    assert "nothing_of_this_name" in findings.rows[0].error
    assert not any(row.error for row in findings.rows[1:])
    assert "Left out: other: the server: other.py cannot be run" in report.text(findings)
    with pytest.raises(BenchError, match="nothing_of_this_name"):
        await measure(Plan(contenders=(broken,), layout=TOY), lambda line: None)


def test_what_is_no_contender_is_one_line(tmp_path, capsys):
    file = tmp_path / "empty.py"
    file.write_text("")
    others = [f"--against={file}", f"--against={tmp_path}/none.py"]
    options = ["--layout", TOY, "--silos=1", "--turns=1", "--rounds=1", "--aggregate=staged"]
    assert main(["bench-round", *options, *others]) == 1
    told = capsys.readouterr().out
    assert "defines no Server and no Silo" in told
    assert "none.py: fedllm's own yardsticks come with a copy of its sources" in told
    assert main(["bench-round", "--delay=10ms"]) == 1
    assert "--delay goes with --rate" in capsys.readouterr().err
    assert main(["bench-round", "--layout=9000G"]) == 1
    assert "GiB of memory" in capsys.readouterr().err


# Content


@pytest.mark.parametrize("silos", [1, 2, 3, MAX_SILOS])
def test_means_are_exact_in_any_order(silos):
    layout = {"a": (3, 2_000), "b": (250_007,)}
    arrays = content.empty(layout)
    content.fill(arrays)
    parts = content.weights_of(silos)
    total = sum(parts)
    assert total & (total - 1) == 0
    for _ in range(MAX_ROUNDS // 20):
        rows = []
        for _ in range(20):
            content.renew(arrays)
        for number in range(silos):
            update = {name: array.copy() for name, array in arrays.items()}
            for _ in range(20):
                content.train(update, number, silos)
            rows.append(update)
        for name, array in arrays.items():
            one_way, other_way = (
                sum(rows[i][name] * np.float32(parts[i] / total) for i in order)
                for order in (range(silos), reversed(range(silos)))
            )
            assert np.array_equal(one_way, other_way)
            array[...] = one_way
    content.verify(arrays, layout, silos, MAX_ROUNDS)
    for name, at in itertools.product(layout, (0, 4096, -1)):
        spoilt = {name: array.copy() for name, array in arrays.items()}
        spoilt[name].reshape(-1)[at] += 0.5
        with pytest.raises(WrongWeights, match=f"tensor '{name}'"):
            content.verify(spoilt, layout, silos, MAX_ROUNDS)


def test_sizes_and_their_limits():
    assert [nbytes_of(layout_of(name)) for name in NAMED] == [497_759_232, 1_179_648, 4_718_592]
    assert [len(layout_of(name)) for name in NAMED] == [148, 24, 96]
    assert nbytes_of(layout_of("5G")) == 5 << 30
    for name in ("", "5", "0M", "gpt3"):
        with pytest.raises(SettingError):
            layout_of(name)
    for silos, rounds in ((0, 1), (MAX_SILOS + 1, 1), (1, MAX_ROUNDS + 1)):
        with pytest.raises(SettingError):
            Plan(contenders=OURS, silos=silos, rounds=rounds)


@pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
def test_the_shapes_are_those_of_transformers_and_peft():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        found = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert list(found.items()) == list(NAMED["gpt2"].items())
        for name, modules in (
            ("lora24", ["c_attn"]),
            ("lora96", ["c_attn", "c_proj", "c_fc"]),
        ):
            settings = peft.LoraConfig(r=8, target_modules=modules, fan_in_fan_out=True)
            adapted = peft.get_peft_model(
                transformers.GPT2LMHeadModel(transformers.GPT2Config()), settings
            )
            state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            assert {key: tuple(t.shape) for key, t in state.items()} == dict(NAMED[name])


# The link


@can_link
@pytest.mark.parametrize("delay_s", [0.0, 0.02])
async def test_a_link_has_its_delay_and_its_rate(delay_s):
    devices = socket.if_nameindex()
    shape = Shape(rate_bits=100_000_000, delay_s=delay_s)
    async with open_link(shape) as link:
        for one in (Contender(program=str(PLAIN)), Contender()):
            slow = msgspec.structs.replace(setup(one, silos=1), host=SERVER_HOST)
            async with open_session(slow, prefixes=(link.server_prefix, link.silos_prefix)) as (
                session,
                _,
            ):
                sample = await session.round()
                bits = 2 * 8 * nbytes_of(layout_of(TOY))
                # What fits the bucket goes out at once, each way.
                least_s = 2 * shape.delay_s + (bits - 2 * 8 * (1 << 19)) / shape.rate_bits
                assert sample.seconds >= least_s
        assert link.relay_cpu_s() > 0
    assert socket.if_nameindex() == devices
    with pytest.raises(ProcessLookupError):
        os.kill(link.pid, 0)


async def test_no_link_is_said():
    with pytest.raises(BenchError, match="no link between network namespaces"):
        async with open_link(Shape(rate_bits=0, delay_s=0.0)):
            pass


# Words


def row(program, seconds, peak_bytes):
    return Row(Contender(program=program), [Turn([Sample(seconds, 1, 1)], peak_bytes)])


@pytest.mark.parametrize(
    ("seconds", "peak_bytes", "missed"), [(1.3, 2000, 0), (1.31, 2000, 1), (1.0, 2001, 1)]
)
def test_a_missed_aim_is_said(seconds, peak_bytes, missed):
    rows = [row("plain.py", 1.0, 1000), row("", seconds, peak_bytes)]
    plan = Plan(contenders=tuple(one.contender for one in rows))
    verdicts = list(report.aims(Findings(plan, {}, rows)))
    assert len(verdicts) == 2
    assert sum("MISSED" in verdict for verdict in verdicts) == missed
    toy = Findings(msgspec.structs.replace(plan, layout=TOY), {}, rows)
    assert not list(report.aims(toy))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_ended_leaves_no_process(number):
    command = [sys.executable, "-m", "fedllm", "bench-round", "--layout", TOY, "--turns=10000"]
    with running(command) as bench:
        assert bench.stderr is not None
        assert bench.stderr.readline()  # the first turn begins
        bench.send_signal(number)
        bench.communicate(timeout=30)
        assert bench.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert session_of(bench.pid) == []
