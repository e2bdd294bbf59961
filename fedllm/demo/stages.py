"""The demo's steps before and after the federation; each runs in a child process of its own.

`prepare` makes the base and hands out the texts, `train_alone` is what one silo could do without
the others, `judge_all` measures every model on every silo's held-out text.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from fedllm.demo import text
from fedllm.demo.events import Judged, Report, Said, Step, Wrote
from fedllm.demo.learner import Mode, prepare_learner
from fedllm.demo.model import BaseSize, load_base, make_base, save_base, silence
from fedllm.demo.training import Recipe, encode, judge, round_seed, train
from fedllm.demo.verdict import PERSONAL


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """`silos` maps a silo's name to where its text is; a base is made unless `model` names one."""

    out: Path
    silos: dict[str, str]
    seed: int
    model: str | None
    size: BaseSize


def prepare(options: PrepareOptions, report: Report) -> None:
    """Write `base/` (if none is given) and `text/<silo>.jsonl` under `options.out`."""
    silence()
    folder = options.out / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for silo, split in _splits(options.silos).items():
        if not split.training or not split.held_out:
            raise text.TextError(
                f"{silo} has {len(split.training)} documents to train on and {len(split.held_out)} "
                f"held out, and needs some of each: give it more (or smaller) files"
            )
        path = folder / f"{silo}.jsonl"
        text.write_split(split, path)
        report(Wrote(f"{silo}'s text", str(path)))
    if options.model is not None:
        load_base(options.model)
        return
    documents = text.neutral()
    steps = options.size.steps
    report(Said(f"making a tokenizer and a base model from {len(documents)} neutral documents"))
    base = make_base(
        documents,
        options.size,
        seed=options.seed,
        on_step=lambda step, loss: report(Step("pre-training", step, steps, loss)),
    )
    save_base(base, options.out / "base")
    report(Wrote("the base model", str(options.out / "base")))


@dataclass(frozen=True, kw_only=True)
class AloneOptions:
    """One silo's training without the others: the settings of its federated self."""

    base: str
    mode: Mode
    name: str
    text: str
    out: Path
    rounds: int
    steps: int
    batch: int
    lr: float
    seed: int


def train_alone(options: AloneOptions, report: Report) -> None:
    """Train on one silo's text for as many rounds, steps and windows as the federation did.

    The optimizer starts afresh each round and the windows are drawn by the same seeds, so the only
    difference to the silo's part in the federation is that nobody else's update comes in.
    """
    silence()
    torch.set_num_threads(1)
    base = load_base(options.base)
    learner = prepare_learner(base, options.mode, seed=options.seed)
    tokens = encode(base.tokenizer, text.read_split(options.text).training)
    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        block_tokens=base.block_tokens,
        learning_rate=options.lr,
    )
    total = options.rounds * recipe.steps
    for round in range(1, options.rounds + 1):
        done = (round - 1) * recipe.steps

        def on_step(step: int, loss: float, done: int = done) -> None:
            report(Step("training alone", done + step, total, loss))

        seed = round_seed(options.seed, options.name, round)
        train(learner.model, tokens, recipe, seed=seed, on_step=on_step)
    learner.save(options.out)
    report(Wrote("its own model", str(options.out)))


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """`models` maps names to folders ("" is the base itself), `texts` silos to their text.

    `personal` maps silos to models that are theirs alone, and judged on their text alone.
    """

    base: str
    mode: Mode
    models: dict[str, str]
    personal: dict[str, str]
    texts: dict[str, str]
    eval_tokens: int


def judge_all(options: JudgeOptions, report: Report) -> None:
    """Report one `Judged` for each model and text."""
    silence()
    base = load_base(options.base)
    held_out = {
        name: encode(base.tokenizer, text.read_split(source).held_out)
        for name, source in options.texts.items()
    }
    judged = {(name, folder): tuple(held_out) for name, folder in options.models.items()}
    judged |= {(PERSONAL, folder): (silo,) for silo, folder in options.personal.items()}
    total = sum(len(silos) for silos in judged.values())
    done = 0
    for (name, folder), silos in judged.items():
        model = _load_tuned(options, folder)
        for silo in silos:
            result = judge(
                model,
                held_out[silo],
                block_tokens=base.block_tokens,
                limit_tokens=options.eval_tokens,
            )
            done += 1
            report(Judged(name, silo, result.nats, result.tokens))
            report(Step("judging", done, total))


def _load_tuned(options: JudgeOptions, folder: str) -> torch.nn.Module:
    if not folder:
        return load_base(options.base).model
    if options.mode == "full":
        return load_base(folder).model
    return PeftModel.from_pretrained(load_base(options.base).model, folder)


def _splits(silos: dict[str, str]) -> dict[str, text.Split]:
    """Each silo's split, all of them cleaned of all silos' held-out text."""
    return text.split({silo: text.read_documents(source) for silo, source in silos.items()})
