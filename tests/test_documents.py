"""What the README shows and the examples do works when it is pasted."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.timeout(180)

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = re.findall(
    r"python -m ((?:aiordma|fedllm) [a-z].*?)(?:`|#|$)", README, flags=re.MULTILINE
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@cache
def run(*arguments: str) -> str:
    """Output of a Python program that must succeed without a warning. Run once: some import torch."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("code", PROGRAMS)
def test_a_program_in_the_readme_runs_as_it_stands(code: str):
    assert "bytes" in run("-c", code)


def test_the_readme_shows_a_program_of_about_twenty_lines():
    assert PROGRAMS
    lines = [line for line in PROGRAMS[0].splitlines() if line.strip()]
    assert 15 <= len(lines) <= 25


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path):
    assert run(str(path))


def test_the_readme_names_each_example():
    named = re.findall(r"`(\w+\.py)`", README[README.index("More in `examples/`") :])
    assert sorted(named) == [path.name for path in EXAMPLES]


def test_the_federated_example_does_without_torch():
    program = (
        "import runpy, sys\n"
        "runpy.run_path('examples/federated.py', run_name='__main__')\n"
        "sys.exit('torch' in sys.modules)"
    )
    errors = [float(line.rpartition(" ")[2]) for line in run("-c", program).splitlines()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]


def test_the_fine_tuning_example_shares_its_body_alone_and_refuses_the_broken_round():
    lines = run("examples/finetune.py").splitlines()
    assert lines[0] == "the server sees body.weight, body.bias"
    assert [line[:24] for line in lines[1:-2]] == ["round 5: north refuses: "]
    assert all(float(line.rpartition(" ")[2]) < 0.01 for line in lines[-2:])


@pytest.mark.parametrize("name", ["trainer", "accelerated"])
def test_the_loss_falls_round_by_round(name: str):
    losses = [float(line.rpartition(" ")[2]) for line in run(f"examples/{name}.py").splitlines()]
    assert len(losses) == 3
    assert losses[0] > losses[1] + 0.5 > losses[2] + 0.5


def test_every_command_of_the_readme_is_a_target_of_the_makefile():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)", README)
    assert {"demo", "test"} <= set(named) <= set(targets)


@pytest.mark.parametrize("command", sorted({line.strip() for line in COMMANDS}))
def test_a_command_of_the_readme_has_its_options(command: str):
    module, name, *words = command.split()
    page = run("-m", module, name, "--help")
    known = set(re.findall(r"--[a-z-]+", page))
    assert {word for word in words if word.startswith("--")} <= known
