"""The words that `python -m fedllm` understands."""

import argparse
from pathlib import Path
from typing import Any

from fedllm.demo import arguments, consent, wording
from fedllm.demo.text import BUILTIN


def build(*, with_stages: object = False) -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and its commands, to which others may be added; it tells which was given as `command`."""
    parser = argparse.ArgumentParser(
        prog="python -m fedllm",
        description=wording.DESCRIPTION,
        epilog=wording.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="{serve,join,demo,bench-round}", required=True, title="commands"
    )
    _add_serve(commands)
    _add_join(commands)
    _add_demo(commands)
    if with_stages:  # else argparse lists them where it complains
        _add_stages(commands)
    return parser, commands


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands, "serve", wording.SERVE, wording.SERVE_EXAMPLES, help="average what silos train"
    )
    _base_arguments(parser)
    _run_arguments(parser)
    add = parser.add_argument
    add("--min-silos", type=arguments.whole, default=2, help="silos a round needs (default 2)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    add("--port", type=arguments.port, default=4791, help="0 takes a free one (default 4791)")
    add("--insecure", action="store_true", help="allow another address than this machine's own")
    for phase, what in (("train", "training, or an evaluation,"), ("upload", "upload")):
        add(
            f"--{phase}-deadline",
            type=arguments.seconds,
            metavar="SECONDS",
            help=f"most that a round's {what} may take (default: no end)",
        )
    add(
        "--absence-timeout",
        type=arguments.seconds,
        metavar="SECONDS",
        help="end the run when a round waits longer for --min-silos silos to be there (default: never)",
    )
    add("--out", type=Path, default=Path("result"), help="folder to write (default: ./result)")
    add("--lr", type=arguments.rate, help="learning rate (default: 1e-3 for lora, 5e-5 for full)")
    _local_argument(parser)
    _state_arguments(parser)


def _state_arguments(parser: Any) -> None:
    add = parser.add_argument
    add(
        "--fraction",
        type=arguments.share,
        default=1.0,
        help="part of the silos that a round asks, but at least --min-silos (default 1: all)",
    )
    add(
        "--evaluate-every",
        type=arguments.whole,
        metavar="ROUNDS",
        help="let the silos judge the model after so many rounds (default: never)",
    )
    add(
        "--patience",
        type=arguments.whole,
        metavar="TIMES",
        help="end when the loss has not become better so often: that of the evaluations, or, without, "
        "that of the training (default: run all rounds)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last round that OUT/checkpoints has, or begin if it has none",
    )
    add(
        "--aggregate",
        choices=("staged", "aligned"),
        default="staged",
        help="hold every update until all are there (default), or none, at the pace of the slowest silo",
    )
    add("--keep", type=arguments.whole, default=3, help="rounds kept on disk (default 3)")


def _add_join(commands: Any) -> None:
    parser = _command(
        commands, "join", wording.JOIN, wording.JOIN_EXAMPLES, help="train on this machine's text"
    )
    _base_arguments(parser)
    add = parser.add_argument
    add(
        "--server",
        type=arguments.address,
        required=True,
        metavar="HOST:PORT",
        help="where `serve` listens",
    )
    add("--name", type=arguments.name, required=True, help="this silo's own name in the run")
    add("--text", required=True, help=f"a file, a folder, or one of {', '.join(BUILTIN)}")
    add("--out", type=Path, help="folder for the run's final model (default: not written here)")
    add("--threads", type=arguments.whole, default=1, help="threads to train with (default 1)")
    add("--keep", type=Path, metavar="FOLDER", help="where to keep the last update (default: not)")
    add(
        "--retry",
        type=arguments.seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a server that is away (default 600)",
    )
    _local_argument(parser)
    add(
        "--refuse-above",
        type=arguments.ratio,
        metavar="RATIO",
        help="keep this silo's own weights if the server's have over RATIO times their perplexity",
    )
    consent.add_options(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", wording.DEMO, wording.DEMO_EXAMPLES, help="see all of it on this machine"
    )
    _mode_argument(parser)
    _run_arguments(parser)
    add = parser.add_argument
    add("--out", type=Path, help="folder to write (default: runs/<time>)")
    add("--model", metavar="PATH_OR_NAME", help="a base to load instead of making one")
    add(
        "--silos",
        type=arguments.pair,
        nargs="+",
        metavar="NAME[=TEXT]",
        default=[(name, name) for name in BUILTIN],
        help=f"TEXT as in `join`; NAME alone is a built-in text (default: {' '.join(BUILTIN)})",
    )
    add(
        "--lr",
        type=arguments.rate,
        help="default: 1e-2 (lora) or 1e-3 (full); with --model 1e-3, 5e-5",
    )
    add(
        "--eval-tokens",
        type=arguments.whole,
        default=24_576,
        help="most held-out tokens judged a silo",
    )
    _local_argument(parser)
    _size_arguments(parser)


def _add_stages(commands: Any) -> None:
    """The demo's own steps, `STAGES`: commands that no help mentions, since only the demo calls them."""
    prepare = commands.add_parser("prepare")
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--model")
    prepare.add_argument("--silos", type=arguments.pair, nargs="+", required=True)
    _size_arguments(prepare)
    prepare.add_argument("--seed", type=arguments.seed, required=True)
    alone = commands.add_parser("alone")
    _base_arguments(alone)
    _run_arguments(alone)
    alone.add_argument("--lr", type=arguments.rate, required=True)
    alone.add_argument("--name", type=arguments.name, required=True)
    alone.add_argument("--text", required=True)
    alone.add_argument("--out", type=Path, required=True)
    judge = commands.add_parser("judge")
    _base_arguments(judge)
    judge.add_argument("--models", type=arguments.pair, nargs="+", required=True)
    judge.add_argument("--personal", type=arguments.pair, nargs="*", required=True)
    judge.add_argument("--texts", type=arguments.pair, nargs="+", required=True)
    judge.add_argument("--eval-tokens", type=arguments.whole, required=True)
    for parser in (prepare, alone, judge):
        _program_arguments(parser)


def _command(commands: Any, name: str, text: str, examples: str, *, help: str) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _program_arguments(parser, reports=name != "demo")
    return parser


def _base_arguments(parser: Any) -> None:
    parser.add_argument(
        "--base",
        required=True,
        metavar="FOLDER_OR_NAME",
        help="the base model and its tokenizer, as transformers saves or names them",
    )
    _mode_argument(parser)


def _local_argument(parser: Any) -> None:
    parser.add_argument(
        "--keep-local",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="parameters or modules that stay at each silo; say the same everywhere (default: none)",
    )


def _mode_argument(parser: Any) -> None:
    parser.add_argument(
        "--mode",
        choices=("lora", "full"),
        default="lora",
        help="train a LoRA adapter (default), or all weights",
    )


def _run_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--rounds", type=arguments.whole, default=5, help="of training and averaging (default 5)")
    add("--steps", type=arguments.steps, default=20, help="training steps a round (default 20)")
    add("--batch", type=arguments.batch, default=8, help="windows of 128 tokens a step (default 8)")
    add("--seed", type=arguments.seed, default=0, help="of everything random (default 0)")


def _size_arguments(parser: Any) -> None:
    made = parser.add_argument_group("the base model that is made when none is given")
    made.add_argument("--pretrain-steps", type=arguments.whole, default=300, help="default 300")
    made.add_argument("--width", type=arguments.width, default=128, help="default 128; by fours")
    made.add_argument("--layers", type=arguments.whole, default=4, help="default 4")


def _program_arguments(parser: Any, *, reports: bool = True) -> None:
    programs = parser.add_argument_group("for programs that start this one")
    if reports:
        programs.add_argument("--json", action="store_true", help="report as lines of JSON")
    programs.add_argument("--leash", action="store_true", help="end when standard input closes")
