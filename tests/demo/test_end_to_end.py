"""The commands as a user runs them: whole runs, and ends at any moment that leave no process behind."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from fedllm.adapters import full_arrays
from fedllm.demo import text
from fedllm.demo.model import Base, load_base, save_base
from fedllm.demo.training import encode, judge
from tests.demo.processes import ends_in_time, is_open, processes_of, read_until, started


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny: Base) -> dict[str, str]:
    """A base of one's own, saved on the spot, and two folders of text."""
    folder = tmp_path_factory.mktemp("own")
    save_base(tiny, folder / "base")
    for silo, words in (("prose", "the cat sat on the mat. "), ("code", "def f(x): return x\n")):
        (folder / silo).mkdir()
        for number in range(12):
            (folder / silo / f"{number}.txt").write_text(f"{number} {words * 30}{number}")
    return {
        "model": str(folder / "base"),
        "prose": f"prose={folder / 'prose'}",
        "code": f"code={folder / 'code'}",
    }


def assert_only_a_travelled(folder: Path) -> None:
    """The factors B of the personalised run are each silo's own; the server never touched its own."""
    server, topics, code = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in ("federated", "topics", "code")
    )
    for name, array in server.items():
        if "lora_B" in name:
            assert not array.any()
            assert topics[name].any()
            assert not np.array_equal(topics[name], code[name])
        else:
            np.testing.assert_array_equal(topics[name], array)
            np.testing.assert_array_equal(code[name], array)


def assert_all_that_left_is_told(out: Path, silos: set[str]) -> None:
    """Two runs of two rounds, and what the server took."""
    assert {path.stem for path in (out / "journals").iterdir()} == silos
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:2]
    for silo in silos:
        journal = [
            json.loads(line)
            for line in (out / "journals" / f"{silo}.jsonl").read_text().splitlines()
        ]
        sent = [line["bytes"] for line in journal if line["event"] == "upload"]
        assert sent[:2] == [line["silos"][silo]["bytes"] for line in rounds]
        assert len(sent) == 4
        assert sent[2] == sent[3] < sent[0]
        assert [line["weight"] for line in journal if line.get("message") == "Ready"] == [None] * 4


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
def test_a_small_demo_from_end_to_end(tmp_path: Path, own: dict[str, str]):
    out = tmp_path / "run"
    size = ("--pretrain-steps", "10", "--width", "16", "--layers", "1")
    short = ("--rounds", "2", "--steps", "2", "--batch", "2", "--eval-tokens", "2000")
    silos = ("--silos", "topics", own["code"])
    with started("demo", "--out", str(out), *size, *short, *silos) as demo:
        said, complaints = demo.communicate()
    assert demo.returncode in (0, 3), complaints

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("round") for line in lines] == [1, 2, None]
    for line in lines[:2]:
        assert set(line["silos"]) == {"topics", "code"}
        for silo in line["silos"].values():
            assert silo["status"] == "committed"
            assert silo["bytes"] > 0
            assert math.isfinite(silo["loss"])
    table = lines[2]["perplexity"]
    assert list(table) == ["base", "topics-alone", "code-alone", "federated", "personal"]
    best_alone = min(row["union"] for name, row in table.items() if name.endswith("-alone"))
    federated_wins = table["federated"]["union"] < best_alone
    assert demo.returncode == (0 if federated_wins else 3)
    assert ("On the union federated wins" in said) == federated_wins
    assert "round 2 of 2" in said
    assert "Personalised against shared, each silo on its own text: topics " in said
    assert_only_a_travelled(out / "personal")
    assert_all_that_left_is_told(out, {"topics", "code"})
    assert str(out / "federated") in said
    assert "\x1b" not in said  # plain lines in a pipe

    base = load_base(str(out / "base"))
    model = PeftModel.from_pretrained(base.model, str(out / "federated"))
    factors = load_file(out / "federated" / "adapter_model.safetensors")
    assert any(np.any(array) for name, array in factors.items() if "lora_B" in name)
    held_out = text.read_split(str(out / "text" / "topics.jsonl")).held_out
    tokens = encode(base.tokenizer, held_out)
    result = judge(model, tokens, block_tokens=base.block_tokens, limit_tokens=2000)
    assert math.exp(result.nats / result.tokens) == pytest.approx(
        table["federated"]["topics"], rel=1e-4
    )
    assert not list(processes_of(out))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_all_weights_of_a_base_of_ones_own(tmp_path: Path, own: dict[str, str], tiny: Base):
    out = tmp_path / "run"
    arguments = ("--mode", "full", "--lr", "0.01", "--model", own["model"], "--rounds", "1")
    with started(
        "demo", "--out", str(out), *arguments, "--steps", "4", "--silos", own["prose"], own["code"]
    ) as demo:
        _, complaints = demo.communicate()
    assert demo.returncode in (0, 3), complaints
    assert not (out / "base").exists()
    federated = load_base(str(out / "federated"))
    assert federated.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    after, before = full_arrays(federated.model), full_arrays(tiny.model)
    assert not any(np.array_equal(after[name], before[name]) for name in before)
    # One round's mean of two silos is the mean of what each alone makes of the same start.
    alone = [full_arrays(load_base(str(out / "alone" / silo)).model) for silo in ("prose", "code")]
    for name in after:
        mean = (alone[0][name] + alone[1][name]) / 2
        np.testing.assert_allclose(after[name], mean, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "end", "code"),
    [
        ("loading torch", lambda demo: demo.send_signal(signal.SIGINT), 130),
        ("loading torch", lambda demo: os.killpg(demo.pid, signal.SIGINT), 130),
        ("loading torch", lambda demo: demo.kill(), -signal.SIGKILL),
        ("listening", lambda demo: demo.send_signal(signal.SIGTERM), 143),
        ("round 1", lambda demo: demo.send_signal(signal.SIGINT), 130),
        ("round 1", lambda demo: demo.kill(), -signal.SIGKILL),
    ],
    ids=["load-int", "load-int-group", "load-kill", "listen-term", "round-int", "round-kill"],
)
def test_an_end_at_any_moment_leaves_nothing_behind(
    tmp_path: Path, own: dict[str, str], moment: str, end, code: int
):
    out = tmp_path / "run"
    arguments = ("--model", own["model"], "--silos", own["prose"], own["code"])
    with started("demo", "--out", str(out), *arguments, "--rounds", "500") as demo:
        port = read_until(demo, moment)
        children = [pid for pid in processes_of(out) if pid != demo.pid]
        assert len(children) >= (3 if moment == "round 1" else 1)
        with ends_in_time(demo.pid, *children):
            end(demo)
        demo.communicate()
    assert demo.returncode == code
    assert not list(processes_of(out))
    assert port is None or not is_open(port)
    for path in out.rglob("metrics.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_serve_and_join_stand_alone(tmp_path: Path, own: dict[str, str]):
    base = ("--base", own["model"])
    silo = ("--name", "me", "--text", own["prose"].partition("=")[2])
    out = ("--out", str(tmp_path / "out"))
    serving = ("serve", *base, *out, "--port", "0", "--rounds", "500", "--min-silos", "1")
    with started(*serving) as server:
        port = read_until(server, "listening")
        joining = ("join", *base, *silo, "--server", f"127.0.0.1:{port}")
        with started(*joining, "--mode", "full") as stranger:
            complaint = stranger.communicate()[1]
            assert stranger.returncode == 1
            assert complaint.startswith("fedllm: ")
            assert "adapter" in complaint
        with started(*joining) as member:
            read_until(member, "round 1, ")
            with ends_in_time(member.pid):
                member.send_signal(signal.SIGINT)
            assert member.communicate()[1] == "fedllm: interrupted\n"
            assert member.returncode == 130
        read_until(server, "me gone")
        with ends_in_time(server.pid):
            server.send_signal(signal.SIGTERM)
        server.communicate()
        assert server.returncode == 143
    assert port is not None
    assert not is_open(port)
