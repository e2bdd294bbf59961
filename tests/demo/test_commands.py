"""The command line: help, complaints, and what a server and a silo of the demo say of each other."""

import asyncio
import io
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

import fedllm
from fedllm.__main__ import main
from fedllm.demo import consent, joining, parser
from fedllm.demo.conduct import DemoOptions, _join_arguments
from fedllm.demo.events import Event, Listening, RoundDone, Said, SiloRow
from fedllm.demo.joining import _assignment
from fedllm.demo.learner import prepare_learner
from fedllm.demo.model import Base
from fedllm.demo.screen import Screen
from fedllm.demo.serving import ServeOptions, _serve
from fedllm.demo.training import Assignment
from fedllm.errors import FedError
from tests.demo.conftest import RECIPE
from tests.demo.processes import ROOT


@pytest.mark.parametrize("command", [[], ["serve"], ["join"], ["demo"]])
def test_help_teaches_by_examples(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert f"python -m fedllm {' '.join(command) or 'demo'}" in page[page.index("examples:") :]


def test_the_script_is_the_module():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    found = metadata.EntryPoint("fedllm", scripts["fedllm"], "console_scripts").load()
    assert found is main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["join", "--server", "nowhere", "--name", "a", "--base", "b", "--text", "c"], "HOST:PORT"),
        (["join", "--server", "h:1", "--name", "a/b", "--base", "b", "--text", "c"], "letters"),
        (["demo", "--rounds", "0"], "0 is not a positive whole number"),
        (["demo", "--mode", "half"], "invalid choice"),
        (["demo", "--width", "130"], "130 is not a multiple of 4"),
        (["demo", "--seed", "-1"], "-1 is negative"),
        (["demo", "--lr", "nan"], "nan is not above 0 and at most 1"),
        (["demo", "--json"], "unrecognized arguments: --json"),
        (["serve", "--base", "b", "--lr", "0"], "0 is not above 0"),
        (
            ["serve", "--base", "b", "--upload-deadline", "0"],
            "0 is not a positive number of seconds",
        ),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("personal", [False, True])
def test_the_demos_silos_allow_its_own_recipe_and_personalised_ones_have_a_gate(
    personal: bool, tmp_path: Path
):
    words, _ = parser.build()
    told = vars(words.parse_args(["demo", "--out", str(tmp_path), "--steps", "7", "--batch", "3"]))
    given = {field.name: told[field.name] for field in fields(DemoOptions)}
    options = DemoOptions(**{**given, "silos": {"topics": "topics"}})
    joins = words.parse_args(_join_arguments(options, "topics", 1, personal))
    policy = consent.policy_of(joins.allow, tells_examples=False)
    assert policy.objection({"recipe": {"steps": 7, "batch": 3}}) is None
    assert policy.objection({"recipe": {"steps": 8}}) is not None
    assert policy.objection({"recipe": {"batch": 2}}) is not None
    assert (joins.refuse_above is not None) is personal
    assert bool(joins.keep_local) is personal


@pytest.mark.parametrize("name", ["union", "base", "server", "a-alone", ".."])
def test_a_silo_goes_by_no_name_that_the_demo_uses(name: str, tmp_path: Path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--silos", "topics", f"{name}=x"]) == 1
    assert f"a silo of the demo cannot be called {name!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_command_hears_of_those_that_are_for_it(capsys):
    with pytest.raises(SystemExit):
        main(["dome"])
    complaint = capsys.readouterr().err
    assert "join" in complaint
    assert "prepare" not in complaint


def test_a_missing_base_is_one_line(tmp_path: Path, capsys):
    assert main(["serve", "--base", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("fedllm: no base model at")
    assert complaint.count("\n") == 1


COMMANDING = "\x1b]0;owned\x07\x1b[2J\r\u202eno\nfedllm: all is [bold]well\x9b"
HARMLESS = r"\x1b]0;owned\x07\x1b[2J\r\u202eno" + "\n    fedllm: all is [bold]well" + r"\x9b"


def test_what_a_server_says_commands_no_terminal(monkeypatch, capsys, tmp_path: Path):
    def refused(*_: object) -> None:
        raise fedllm.JoinRefused(COMMANDING)

    monkeypatch.setattr(joining, "take_part", refused)
    words = ["--server", "h:1", "--name", "a", "--base", str(tmp_path), "--text", "c", "--json"]
    assert main(["join", *words]) == 1
    assert capsys.readouterr().err == f"fedllm: {HARMLESS}\n"


def test_what_a_peer_says_commands_no_screen():
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=True, color_system=None, width=200))
    screen.show("bank", Said(f"refused: {COMMANDING}"))
    row = SiloRow(silo=COMMANDING, status="committed", bytes=1, seconds=1.0)
    screen.show("server", RoundDone(round=1, rounds=2, seconds=1.0, silos=(row,)))
    assert f"bank: refused: {HARMLESS}\n" in file.getvalue()
    own = re.compile("\x1b\\[[0-9;]*m|\n")  # rich's own: bold, italic
    assert own.sub("", file.getvalue()).isprintable()


def test_without_its_extra_it_says_what_to_install(tmp_path: Path):
    program = (
        "import sys; sys.modules['torch'] = None; import fedllm.__main__ as m; sys.exit(m.main())"
    )
    arguments = ("serve", "--base", str(tmp_path))
    child = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 1
    assert child.stderr == "fedllm: torch is not installed: pip install 'aiordma[fedllm]'\n"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"batch": 10**9}, "batch"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": "fast"}, "learning_rate"),
    ],
)
def test_a_silo_bounds_what_a_server_asks(recipe: dict[str, object], words: str):
    asked = msgspec.to_builtins(Assignment(recipe=RECIPE, seed=0))
    assert _assignment(asked) == Assignment(recipe=RECIPE, seed=0)
    asked["recipe"] |= recipe
    with pytest.raises(FedError, match=words):
        _assignment(asked)


async def test_the_server_says_whose_update_is_not_taken_and_why(tmp_path: Path, tiny: Base):
    learner = prepare_learner(tiny, "full", seed=0)
    options = ServeOptions(
        base="",
        mode="full",
        out=tmp_path,
        host="127.0.0.1",
        port=0,
        insecure=False,
        rounds=2,
        min_silos=1,
        fraction=1.0,
        train_deadline=None,
        upload_deadline=None,
        absence_timeout=None,
        evaluate_every=None,
        patience=None,
        resume=False,
        keep=1,
        steps=1,
        batch=1,
        lr=1e-3,
        seed=0,
    )
    said: asyncio.Queue[Event] = asyncio.Queue()
    serving = asyncio.ensure_future(_serve(options, learner, said.put_nowait))
    listening = await said.get()
    assert isinstance(listening, Listening)
    has_both = asyncio.Event()

    async def take_part(name: str, spoils: float) -> None:
        address = (listening.host, listening.port)
        async with fedllm.join(*address, name=name, fingerprint=learner.fingerprint) as silo:
            async for task in silo.rounds():
                await has_both.wait()
                update = {key: array + np.float32(spoils) for key, array in task.weights.items()}
                await task.submit(update, weight=1)

    good = asyncio.ensure_future(take_part("good", 0.0))
    assert await said.get() == Said("good joined")
    bad = asyncio.ensure_future(take_part("bad", math.nan))
    assert await said.get() == Said("bad joined")
    has_both.set()
    await asyncio.gather(serving, good, bad)
    remarks = [event.text for event in drain(said) if isinstance(event, Said)]
    assert any(re.match("bad is refused in round 2: .* holds nan at", text) for text in remarks)


def drain(queue: asyncio.Queue[Event]) -> Iterator[Event]:
    while not queue.empty():
        yield queue.get_nowait()
