"""The demo and the commands: real text, honest splits, whole files, and no process left behind."""

import asyncio
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import fedllm
from fedllm.__main__ import main
from fedllm.adapters import full_arrays
from fedllm.demo import text
from fedllm.demo.crew import ChildFailed, Crew
from fedllm.demo.events import (
    Event,
    Judged,
    Listening,
    RoundDone,
    Said,
    SiloRow,
    Step,
    Wrote,
    json_lines,
    read_event,
)
from fedllm.demo.joining import _assignment
from fedllm.demo.learner import prepare_learner
from fedllm.demo.model import Base, load_base, save_base, train_tokenizer
from fedllm.demo.publish import publish
from fedllm.demo.serving import ServeOptions, _serve
from fedllm.demo.training import (
    Assignment,
    Recipe,
    TooLittleText,
    TrainingStopped,
    encode,
    judge,
    round_seed,
    train,
    windows,
)
from fedllm.demo.verdict import Verdict
from fedllm.errors import FedError

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(steps=3, batch=2, block_tokens=16, learning_rate=1e-2)
END_S = 2.0
"""How long after a signal everything may take to be gone."""

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5 for an attribute by its old name
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


# Text


@pytest.fixture(scope="module")
def splits() -> dict[str, text.Split]:
    return text.builtin_splits()


def test_three_silos_hold_real_text_of_their_own(splits):
    assert list(splits) == ["topics", "docstrings", "sources"]
    names = [
        document.name
        for split in splits.values()
        for document in (*split.training, *split.held_out)
    ]
    assert len(names) == len(set(names))
    for split in splits.values():
        assert sum(len(document.text) for document in split.training) > 200_000
        assert sum(len(document.text) for document in split.held_out) > 20_000
        assert len(split.held_out) >= 5


def test_no_text_belongs_to_two_silos(splits):
    texts = [
        {document.text for document in (*split.training, *split.held_out)}
        for split in splits.values()
    ]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_held_out_text_stands_in_no_training_text(splits):
    training = {
        paragraph
        for split in splits.values()
        for document in (*split.training, *text.neutral())
        for paragraph in text.paragraphs(document.text)
    }
    held_out = {
        paragraph
        for split in splits.values()
        for document in split.held_out
        for paragraph in text.paragraphs(document.text)
        if len(paragraph) >= text.MIN_PARAGRAPH_CHARACTERS
    }
    assert len(held_out) > 500
    assert not held_out & training


def test_the_name_alone_decides_what_is_held_out(splits):
    for split in splits.values():
        assert all(text.is_held_out(document.name) for document in split.held_out)
        assert not any(text.is_held_out(document.name) for document in split.training)


def test_nested_documents_are_cleaned_of_held_out_paragraphs():
    secret = "A paragraph that is long enough to be text, and is held out."
    held_out, trained = sorted((f"document {n}" for n in range(40)), key=text.is_held_out)[::-39]
    split = text.split(
        {
            "one": [text.Document(held_out, f"intro\n\n{secret}")],
            "two": [text.Document(trained, f"before\n\n  {secret.replace(' ', '  ')}\n\nafter")],
        }
    )
    assert [document.text for document in split["two"].training] == ["before\n\nafter"]


def test_sources_keep_code_and_comments_but_no_docstrings(tmp_path: Path):
    source = '"""Module."""\nclass A(int): "Inline."\n\x0c\ndef f():\n    """Two\n    lines."""\n    return 1  # why\n'
    assert text._code_of(source) == "\nclass A(int):\n\x0c\ndef f():\n\n\n    return 1  # why\n"
    assert text._docstrings_of(source) == "Module.\n\nInline.\n\nTwo\nlines."


def test_modules_are_read_and_never_imported(splits):
    assert any("antigravity" in path.name for _, path in text._standard_library())
    assert "antigravity" not in sys.modules
    assert "pydoc_data.topics" not in sys.modules


def test_a_split_survives_its_file(splits, tmp_path: Path):
    path = tmp_path / "topics.jsonl"
    text.write_split(splits["topics"], path)
    assert text.read_split(str(path)) == splits["topics"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_text_is_a_silo(tmp_path: Path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"letter {number}")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    split = text.read_split(str(tmp_path))
    assert len(split.training) + len(split.held_out) == 20
    assert split.held_out


@pytest.mark.parametrize(
    "what", ["empty.jsonl", "strange.jsonl", "broken.jsonl", "folder", "nothing"]
)
def test_where_there_is_no_text_the_error_says_so(tmp_path: Path, what: str):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "strange.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "broken.jsonl").write_text("no JSON\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(text.TextError, match=what):
        text.read_split(str(tmp_path / what))


# Tokenizer and training


@pytest.fixture(scope="module")
def tiny() -> Base:
    tokenizer = train_tokenizer(["def f(x): return x\n", "the cat sat on the mat"] * 3, 300)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return Base(GPT2LMHeadModel(config), tokenizer)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips_through_the_tokenizer(tiny, words):
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(words)) == words


def test_documents_are_joined_by_end_of_text(tiny):
    tokens = encode(tiny.tokenizer, [text.Document("a", "the cat"), text.Document("b", "sat")])
    end = tiny.tokenizer.eos_token_id
    assert [tokens[-1], list(tokens).count(end)] == [end, 2]
    assert tiny.tokenizer.decode(tokens, skip_special_tokens=True) == "the catsat"


def test_data_order_depends_on_seed_silo_and_round_alone():
    tokens = np.arange(5000, dtype=np.int64)

    def drawn(seed: int, silo: str, round: int) -> torch.Tensor:
        return torch.stack(list(windows(tokens, RECIPE, round_seed(seed, silo, round))))

    first = drawn(0, "a", 1)
    assert first.shape == (3, 2, 16)
    assert torch.equal(first, drawn(0, "a", 1))
    for other in (drawn(1, "a", 1), drawn(0, "b", 1), drawn(0, "a", 2)):
        assert not torch.equal(first, other)
    assert torch.equal(first[:, :, 1:], first[:, :, :-1] + 1)  # each window is consecutive


def test_too_little_text_is_an_error():
    with pytest.raises(TooLittleText, match="15 tokens are fewer than one window of 16"):
        next(windows(np.zeros(15, dtype=np.int64), RECIPE, (0,)))


def test_training_lowers_the_loss_and_repeats_exactly(tiny):
    tokens = encode(tiny.tokenizer, [text.Document("a", "the cat sat on the mat " * 40)])
    recipe = Recipe(steps=12, batch=4, block_tokens=16, learning_rate=1e-2)
    losses: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(1)
        model = GPT2LMHeadModel(tiny.model.config)
        heard: list[float] = []

        def on_step(step: int, loss: float, heard: list[float] = heard) -> None:
            heard.append(loss)

        mean = train(model, tokens, recipe, seed=(5,), on_step=on_step)
        assert mean == pytest.approx(np.mean(heard))
        losses.append(heard)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


def test_training_stops_when_told(tiny):
    stop = threading.Event()
    done: list[int] = []

    def on_step(step: int, loss: float) -> None:
        done.append(step)
        stop.set()

    with pytest.raises(TrainingStopped, match="after 1 of 3"):
        train(tiny.model, np.zeros(99, np.int64), RECIPE, seed=(0,), on_step=on_step, stop=stop)
    assert done == [1]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny):
    model = GPT2LMHeadModel(tiny.model.config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = judge(model, np.arange(100, dtype=np.int64), block_tokens=16, limit_tokens=70)
    assert result.tokens == 4 * 15
    assert math.exp(result.nats / result.tokens) == pytest.approx(len(tiny.tokenizer))


def test_judging_is_the_models_own_loss(tiny):
    tokens = np.random.default_rng(0).integers(0, 200, 32)
    result = judge(tiny.model, tokens, block_tokens=16, limit_tokens=32)
    rows = torch.from_numpy(tokens.reshape(2, 16))
    with torch.inference_mode():
        mean = tiny.model(input_ids=rows, labels=rows).loss.item()
    assert result.nats / result.tokens == pytest.approx(mean)


def test_warm_up_then_constant_or_decay():
    constant = Recipe(steps=10, batch=1, block_tokens=1, learning_rate=1.0, warmup_steps=2)
    assert [constant.rate(step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    decaying = Recipe(steps=10, batch=1, block_tokens=1, learning_rate=1.0, decays=True)
    assert decaying.rate(0) == pytest.approx(1.0)
    assert decaying.rate(10) == pytest.approx(0.1)


# The verdict


def verdict(federated: float, alone: float) -> Verdict:
    table = {
        "base": (8.0, 8.0), "a-alone": (2.0, alone), "b-alone": (9.0, 9.0), "federated": (4.0, federated),
    }  # fmt: skip
    judged = [
        Judged(model, silo, math.log(perplexity) * tokens, tokens)
        for model, row in table.items()
        for silo, perplexity, tokens in zip("ab", row, (100, 300), strict=True)
    ]
    return Verdict.of("ab", judged)


def test_the_union_is_weighted_by_tokens():
    row = verdict(4.0, 32.0).perplexities["a-alone"]
    assert row["a"] == pytest.approx(2)
    assert row["union"] == pytest.approx(2 ** (1 / 4) * 32 ** (3 / 4))


def test_a_federated_win_is_told_with_what_a_silo_alone_does_better():
    won = verdict(4.0, 32.0)
    assert won.federated_wins
    assert won.sentence().startswith("On the union federated wins: 4.0 against")
    assert won.remarks() == ["On a a-alone does better than federated: 2.0 against 4.0."]


def test_a_lost_union_is_told_as_clearly():
    lost = verdict(4.0, 4.0)
    assert not lost.federated_wins
    assert "does NOT win" in lost.sentence()
    row = {"a": 4.0, "union": 4.0}
    assert not Verdict(("a",), {"base": row, "a-alone": row, "federated": row}).federated_wins


@pytest.mark.parametrize("nats", [None, math.nan, math.inf, 1e6])
def test_a_model_that_diverged_never_wins(nats: float | None):
    judged = [
        Judged("base", "a", 1.0, 1),
        Judged("a-alone", "a", 2.0, 1),
        Judged("federated", "a", nats, 1),
    ]
    diverged = Verdict.of("a", judged)
    assert diverged.perplexities["federated"] == {"a": math.inf, "union": math.inf}
    assert not diverged.federated_wins


# Files, events, children


def test_published_files_appear_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "result"

    def fail_halfway() -> None:
        with publish(target) as part:
            (part / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [path.name for path in tmp_path.iterdir()] == ["result.part"]
    for content in ("one", "two"):
        with publish(target) as part:
            (part / "weights").write_text(content)
        assert (target / "weights").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize(
    "event",
    [
        Step("round 1", 2, 3, 4.5),
        Step("judging", 1, 2),
        Listening("127.0.0.1", 1),
        RoundDone(
            1, 5, 0.5, (SiloRow("a", "committed", 10, 0.1, 2.0), SiloRow("b", "late", 0, 0.0))
        ),
        Judged("base", "a", 1.0, 2),
        Wrote("x", "y"),
        Said('with "quotes"\nand lines'),
    ],
)
def test_events_survive_their_line(event: Event, tmp_path: Path):
    path = tmp_path / "lines"
    with path.open("w") as stream:
        json_lines(stream)(event)
        assert path.read_bytes().count(b"\n") == 1  # flushed, and one line
    assert read_event(path.read_bytes()) == event


def crew(tmp_path: Path, program: str, heard: list[tuple[str, Event]]) -> Crew:
    return Crew(
        (sys.executable, "-c", program),
        environment=os.environ,
        logs=tmp_path,
        on_event=lambda name, event: heard.append((name, event)),
    )


async def test_a_child_is_heard_line_by_line(tmp_path: Path):
    heard: list[tuple[str, Event]] = []
    program = 'import sys; print(\'{"type": "Said", "text": "\' + sys.argv[1] + \'"}\')'
    async with crew(tmp_path, program, heard) as children:
        await children.run("one", "hello")
    assert heard == [("one", Said("hello"))]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('out of luck')", "one ended with code 1.*out of luck"),
        ("print('hello')", "one said what is no event: b'hello"),
    ],
)
async def test_a_failed_child_is_told_with_its_complaint(tmp_path: Path, program, message):
    async with crew(tmp_path, program, []) as children:
        with pytest.raises(ChildFailed, match=re.compile(message, re.DOTALL)):
            await children.run("one")


async def test_cancelling_ends_the_children_first(tmp_path: Path):
    started = asyncio.Event()
    heard: list[int] = []
    program = (
        "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'print(\'{"type": "Said", "text": "%d"}\' % os.getpid(), flush=True)\n'
        "signal.pause()"
    )

    def on_event(name: str, event: Event) -> None:
        assert isinstance(event, Said)
        heard.append(int(event.text))
        started.set()

    async def work() -> None:
        command = (sys.executable, "-c", program)
        async with Crew(command, environment=os.environ, logs=tmp_path, on_event=on_event) as it:
            await it.run("one")

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


def test_a_child_on_the_leash_ends_when_its_parent_lets_go():
    program = "from fedllm.demo.leash import hold_leash; hold_leash(); print(flush=True)\nwhile True: pass"
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(END_S) == 75


# The command line


@pytest.mark.parametrize("command", [[], ["serve"], ["join"], ["demo"]])
def test_help_teaches_by_examples(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert f"python -m fedllm {' '.join(command) or 'demo'}" in page[page.index("examples:") :]


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
        (["serve", "--base", "b", "--deadline", "0"], "0 is not a positive number of seconds"),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


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
        deadline=None,
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


# End to end


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


def start_demo(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return start("demo", "--out", str(out), *arguments)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedllm", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(out: Path) -> Iterator[int]:
    """The processes that work for the run in `out`, by their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if str(out).encode() in command:
                yield int(entry.name)


def read_until(process: subprocess.Popen[str], words: str) -> int | None:
    """Read what it says until a line with these words; the port that was listened on, if any."""
    assert process.stdout is not None
    port = None
    for line in process.stdout:
        if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
        if words in line:
            return port
    raise AssertionError(f"it ended without a word of {words!r}")


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_small_demo_from_end_to_end(tmp_path: Path, own: dict[str, str]):
    out = tmp_path / "run"
    size = ("--pretrain-steps", "10", "--width", "16", "--layers", "1")
    short = ("--rounds", "2", "--steps", "2", "--batch", "2", "--eval-tokens", "2000")
    silos = ("--silos", "topics", own["code"])
    with start_demo(out, *size, *short, *silos) as demo:
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
    assert list(table) == ["base", "topics-alone", "code-alone", "federated"]
    best_alone = min(row["union"] for name, row in table.items() if name.endswith("-alone"))
    federated_wins = table["federated"]["union"] < best_alone
    assert demo.returncode == (0 if federated_wins else 3)
    assert ("On the union federated wins" in said) == federated_wins
    assert "round 2 of 2" in said
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
    with start_demo(out, *arguments, "--steps", "4", "--silos", own["prose"], own["code"]) as demo:
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
    with start_demo(out, *arguments, "--rounds", "500") as demo:
        port = read_until(demo, moment)
        children = [os.pidfd_open(pid) for pid in processes_of(out) if pid != demo.pid]
        assert len(children) >= (3 if moment == "round 1" else 1)
        end(demo)
        demo.communicate(timeout=END_S)
    for child in children:
        ended, _, _ = select.select([child], [], [], END_S)
        assert ended, "a child outlived its parent"
        os.close(child)
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
    with start(
        "serve", *base, *out, "--port", "0", "--rounds", "500", "--min-silos", "1"
    ) as server:
        port = read_until(server, "listening")
        joining = ("join", *base, *silo, "--server", f"127.0.0.1:{port}")
        with start(*joining, "--mode", "full") as stranger:
            complaint = stranger.communicate()[1]
            assert stranger.returncode == 1
            assert complaint.startswith("fedllm: ")
            assert "adapter" in complaint
        with start(*joining) as member:
            read_until(member, "round 1, ")
            member.send_signal(signal.SIGINT)
            assert member.communicate(timeout=END_S)[1] == "fedllm: interrupted\n"
            assert member.returncode == 130
        read_until(server, "me gone")
        server.send_signal(signal.SIGTERM)
        assert server.wait(END_S) == 143
    assert port is not None
    assert not is_open(port)
