"""What `python -m fedllm join` shows of what would leave, and what it lets a server ask, on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedllm.__main__ import main
from fedllm.demo import arguments, joining
from fedllm.demo.consent import RULES, policy_of
from fedllm.demo.joining import JoinOptions
from fedllm.demo.model import Base, save_base
from fedllm.demo.training import Assignment, Recipe
from fedllm.errors import SettingError
from tests.demo.processes import ROOT


@pytest.fixture(scope="module")
def silo(tmp_path_factory: pytest.TempPathFactory, tiny: Base) -> list[str]:
    """The words of a silo with a base and text of its own."""
    folder = tmp_path_factory.mktemp("silo")
    save_base(tiny, folder / "base")
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text(
            f"{number} {'the cat sat on the mat. ' * 40}"
        )
    return ["--name", "bank", "--base", str(folder / "base"), "--text", str(folder / "text")]


def test_the_rules_are_on_all_that_a_server_asks():
    recipe = Recipe(steps=1, batch=1, block_tokens=2, learning_rate=0.1)
    asked: dict[str, Any] = msgspec.to_builtins(Assignment(recipe=recipe, seed=0))
    inner = {f"recipe.{name}" for name in asked.pop("recipe")}
    assert set(RULES) == inner | set(asked)


ALONE = """
import socket, sys

def never(*_, **__):
    sys.exit("a connection was made")

socket.socket.connect = socket.socket.bind = socket.getaddrinfo = never
import fedllm.__main__ as m
sys.exit(m.main())
"""
"""A connection, and a name that is looked up, would end it."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_dry_run_shows_what_would_leave_and_speaks_to_nobody(silo: list[str], tmp_path: Path):
    words = ["join", "--server", "h:1", *silo, "--mode", "full", "--keep-local", "*.mlp", "--json"]
    policy = ["--dry-run", "--allow", "recipe.steps=1..200", "recipe.decays=false"]
    journal = tmp_path / "journal.jsonl"
    child = subprocess.run(
        [sys.executable, "-c", ALONE, *words, *policy, "--journal", str(journal)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert not journal.exists()
    said = [json.loads(line)["text"] for line in child.stdout.splitlines()]
    assert "nobody is connected to. This would leave for h:1 in each round:" in said[2]
    assert "  transformer.h.0.attn.c_attn.weight  F32 [16, 48]  3,072 bytes" in said
    assert not any(".mlp." in line for line in said)
    tensors = [line for line in said if " bytes" in line and line.startswith("  ")]
    total = sum(int(line.split()[-2].replace(",", "")) for line in tensors)
    assert any(line.startswith(f"in all {len(tensors)} tensors, {total:,} bytes") for line in said)
    assert any(line.startswith("not the number of examples") for line in said)
    assert "  recipe.steps: 1 to 200" in said
    assert "  recipe.decays: False" in said
    assert "  seed: 0 to 18446744073709551615" in said
    assert (
        "and a key drawn by chance, by which the server knows this silo when it comes back" in said
    )
    assert said[-1].startswith("if a task is declined the server is told why, in words that quote")


def test_a_dry_run_asks_nobody_for_a_base_that_is_a_name(tmp_path: Path):
    """What has been downloaded before is found; anything else is not there."""
    words = ["join", "--server", "h:1", "--name", "bank", "--base", "some/base", "--text", "topics"]
    child = subprocess.run(
        [sys.executable, "-c", ALONE, *words, "--dry-run"],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert child.returncode == 1
    assert "fedllm: no base model at 'some/base'; give a folder" in child.stderr


def test_what_no_server_asks_cannot_be_allowed():
    with pytest.raises(
        SettingError, match=r"--allow recipe\.lr: what a server asks for is recipe\.s"
    ):
        policy_of([arguments.rule("recipe.lr=1")], tells_examples=False)


@pytest.mark.parametrize(
    "word",
    [
        "recipe.steps=1..5000000",
        "recipe.steps=0..5",
        "recipe.steps=true..5",
        "recipe.batch=true",
        "recipe.batch=4,5000",
        "recipe.decays=0..1",
        "recipe.decays=0",
    ],
)
def test_a_rule_narrows_and_never_widens(word: str):
    name = word.partition("=")[0]
    with pytest.raises(SettingError, match=rf"^--allow {name}: .* what a silo does at all, which"):
        policy_of([arguments.rule(word)], tells_examples=False)


@pytest.mark.parametrize("word", ["a", "a=", "a=1..", "a=2..1", "a=x", "a=1,,2", "a=[1]", "a=1..x"])
def test_a_rule_that_is_none_is_refused(word: str, capsys: pytest.CaptureFixture[str]):
    words = [
        "join",
        "--server",
        "h:1",
        "--name",
        "a",
        "--base",
        "b",
        "--text",
        "c",
        "--allow",
        word,
    ]
    with pytest.raises((SystemExit, SettingError)):
        main(words)
    assert "NAME=LOW..HIGH" in capsys.readouterr().err


def test_the_proxy_may_come_from_the_environment(silo: list[str]):
    """Words are seen by all users of a machine, an environment is not: proc(5)."""
    words = ["join", "--server", "h:1", *silo, "--retry", "0.1"]
    child = subprocess.run(
        [sys.executable, "-m", "fedllm", *words],
        env={**os.environ, "FEDLLM_PROXY": "http://me:secret@127.0.0.1:1"},
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert child.returncode == 1
    assert "the way goes through a proxy, and there: cannot connect to 127.0.0.1:1" in child.stderr
    assert "secret" not in child.stdout + child.stderr


def test_the_options_of_join_reach_the_silo(silo: list[str], monkeypatch: pytest.MonkeyPatch):
    found: list[JoinOptions] = []
    monkeypatch.setattr(joining, "take_part", lambda options, report: found.append(options))
    monkeypatch.setenv("FEDLLM_PROXY", "http://elsewhere:1")
    words = ["join", "--server", "[::1]:1", *silo, "--json", "--journal", "j", "--tell-examples"]
    words += [
        "--refuse-above",
        "1.05",
        "--keep",
        "updates",
        "--retry",
        "5",
        "--keep-local",
        "*.mlp",
    ]
    assert main([*words, "--proxy", "http://p:1", "--allow", "recipe.batch=4,8"]) == 0
    assert main(["join", "--server", "h:1", *silo, "--json"]) == 0
    given, usual = found
    assert (given.host, given.proxy, given.journal) == ("::1", "http://p:1", Path("j"))
    assert (given.refuse_above, given.keep, given.retry) == (1.05, Path("updates"), 5)
    assert given.keep_local == ["*.mlp"]
    assert given.policy.tells_weight
    assert given.policy.objection({"recipe": {"batch": 5}}) is not None
    assert (usual.proxy, usual.journal) == ("http://elsewhere:1", None)
    assert (usual.refuse_above, usual.keep, usual.keep_local) == (None, None, ())
    assert not usual.policy.tells_weight
    assert usual.policy.objection({"recipe": {"batch": 5}}) is None


def test_a_silo_listens_nowhere():
    """One connection and its lanes go out, and nothing comes in: no socket listens, and none is bound by UDP."""
    program = """
import asyncio, os, re, sys
from pathlib import Path
import numpy as np
import fedllm
from fedllm import RunConfig

def own(table):
    files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    mine = {os.readlink(file) for file in files if os.path.lexists(file)}
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        words = line.split()
        if f"socket:[{words[9]}]" in mine:
            yield words[3]

async def main():
    async with fedllm.join("127.0.0.1", int(sys.argv[1]), name="a", fingerprint={}) as silo:
        async for task in silo.rounds():
            states = [state for table in ("tcp", "tcp6") for state in own(table)]
            print(states, [*own("udp"), *own("udp6")])
            await task.submit(task.weights, weight=1)

asyncio.run(main())
"""
    server = """
import asyncio, sys
import numpy as np
import fedllm
from fedllm import RunConfig

async def main():
    weights = {"w": np.zeros(4, np.float32)}
    async with fedllm.Federation(weights, RunConfig(min_silos=1, rounds=1), fingerprint={}) as server:
        host, port = await server.start()
        print(port, flush=True)
        await server.run()

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", server], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as serving:
        assert serving.stdout is not None
        port = serving.stdout.readline().strip()
        child = subprocess.run(
            [sys.executable, "-c", program, port],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        serving.kill()
    assert child.returncode == 0, child.stderr
    assert child.stdout == "['01', '01'] []\n"  # established, both: proc_net_tcp(5)
