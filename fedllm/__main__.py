"""`python -m fedllm serve | join | demo | bench-round`: federated fine-tuning from a shell."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiordma import AiordmaError
from fedllm.bench import command as bench
from fedllm.config import RunConfig
from fedllm.demo import arguments, wording
from fedllm.demo.events import Report, Said, json_lines
from fedllm.demo.leash import hold_leash
from fedllm.demo.preflight import check_base, check_host
from fedllm.demo.text import BUILTIN
from fedllm.errors import FedError, SettingError

EXTRA = ("torch", "transformers", "peft", "safetensors", "tokenizers", "rich")
STAGES = ("prepare", "alone", "judge")
RESERVED = frozenset({"server", "prepare", "judge", "base", "federated", "personal", "union"})
"""What the demo calls other things than silos."""
MENDABLE = (AiordmaError, FedError, OSError)
Options = TypeVar("Options")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. What a user can mend is one line, and code 1."""
    given = sys.argv[1:] if words is None else words
    namespace = _parser(with_stages=given[:1] and given[0] in STAGES).parse_args(given)
    if namespace.leash:
        hold_leash()
    try:
        return int(namespace.run(namespace))
    except KeyboardInterrupt:
        sys.stderr.write("fedllm: interrupted\n")
        return 130
    except ModuleNotFoundError as exc:
        if exc.name not in EXTRA:
            raise
        sys.stderr.write(f"fedllm: {exc.name} is not installed: pip install 'aiordma[fedllm]'\n")
        return 1
    except (*MENDABLE, ExceptionGroup) as exc:
        mendable, foreign = ExceptionGroup("", [exc]).split(MENDABLE)
        if foreign is not None:
            raise
        for error in _leaves(mendable):
            sys.stderr.write(f"fedllm: {error}\n")
        return 1


def _parser(*, with_stages: object = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedllm",
        description=wording.DESCRIPTION,
        epilog=wording.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        metavar="{serve,join,demo,bench-round}", required=True, title="commands"
    )
    _add_serve(commands)
    _add_join(commands)
    _add_demo(commands)
    bench.add_command(commands, sys.stdout, sys.stderr)
    if with_stages:  # else argparse lists them where it complains
        _add_stages(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands, "serve", wording.SERVE, wording.SERVE_EXAMPLES, help="average what silos train"
    )
    parser.set_defaults(run=_serve)
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
    add("--keep", type=arguments.whole, default=3, help="rounds kept on disk (default 3)")


def _add_join(commands: Any) -> None:
    parser = _command(
        commands, "join", wording.JOIN, wording.JOIN_EXAMPLES, help="train on this machine's text"
    )
    parser.set_defaults(run=_join)
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


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", wording.DEMO, wording.DEMO_EXAMPLES, help="see all of it on this machine"
    )
    parser.set_defaults(run=_demo)
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
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--model")
    prepare.add_argument("--silos", type=arguments.pair, nargs="+", required=True)
    _size_arguments(prepare)
    prepare.add_argument("--seed", type=arguments.seed, required=True)
    alone = commands.add_parser("alone")
    alone.set_defaults(run=_alone)
    _base_arguments(alone)
    _run_arguments(alone)
    alone.add_argument("--lr", type=arguments.rate, required=True)
    alone.add_argument("--name", type=arguments.name, required=True)
    alone.add_argument("--text", required=True)
    alone.add_argument("--out", type=Path, required=True)
    judge = commands.add_parser("judge")
    judge.set_defaults(run=_judge)
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


def _serve(namespace: argparse.Namespace) -> int:
    check_base(namespace.base)
    RunConfig(min_silos=namespace.min_silos, rounds=namespace.rounds)
    if not namespace.insecure:
        check_host(namespace.host)
    with _reporting(namespace, "server") as report:
        from fedllm.demo.conduct import RATES_GIVEN
        from fedllm.demo.serving import ServeOptions, serve

        lr = namespace.lr or RATES_GIVEN[namespace.mode]
        serve(_options(ServeOptions, namespace, lr=lr), report)
    return 0


def _join(namespace: argparse.Namespace) -> int:
    check_base(namespace.base)
    with _reporting(namespace, namespace.name) as report:
        from fedllm.demo.joining import JoinOptions, take_part

        host, port = namespace.server
        take_part(_options(JoinOptions, namespace, host=host, port=port), report)
    return 0


def _demo(namespace: argparse.Namespace) -> int:
    from fedllm.demo.conduct import DemoOptions, demo
    from fedllm.demo.screen import Screen, open_console

    out = namespace.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    silos = dict(namespace.silos)
    if not 2 <= len(silos) == len(namespace.silos):
        raise SettingError("a federation takes two silos or more, each with a name of its own")
    for name in silos:
        if name in RESERVED or name.endswith(("-alone", "-personal")) or name.strip(".") == "":
            raise SettingError(
                f"a silo of the demo cannot be called {name!r}: give it another name"
            )
    if namespace.model is not None:
        check_base(namespace.model)
    options = _options(DemoOptions, namespace, out=out, silos=silos)
    # Children may look a model up by name; nothing else of the demo needs a network.
    is_local = namespace.model is None or Path(namespace.model).exists()
    environment = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if is_local else {})}
    command = (sys.executable, "-m", "fedllm")
    with Screen(open_console()) as screen:
        return demo(options, command=command, environment=environment, screen=screen)


def _prepare(namespace: argparse.Namespace) -> int:
    with _reporting(namespace, "prepare") as report:
        from fedllm.demo.model import BaseSize
        from fedllm.demo.stages import PrepareOptions, prepare

        steps = namespace.pretrain_steps
        size = BaseSize(width=namespace.width, layers=namespace.layers, steps=steps)
        silos = dict(namespace.silos)
        prepare(_options(PrepareOptions, namespace, silos=silos, size=size), report)
    return 0


def _alone(namespace: argparse.Namespace) -> int:
    with _reporting(namespace, namespace.name) as report:
        from fedllm.demo.stages import AloneOptions, train_alone

        train_alone(_options(AloneOptions, namespace), report)
    return 0


def _judge(namespace: argparse.Namespace) -> int:
    with _reporting(namespace, "judge") as report:
        from fedllm.demo.stages import JudgeOptions, judge_all

        pairs = {name: dict(vars(namespace)[name]) for name in ("models", "personal", "texts")}
        judge_all(_options(JudgeOptions, namespace, **pairs), report)
    return 0


def _options(kind: type[Options], namespace: argparse.Namespace, **given: Any) -> Options:
    """An options dataclass from the arguments of the same names, `given` first."""
    named = vars(namespace) | given
    return kind(**{field.name: named[field.name] for field in fields(kind)})  # type: ignore[arg-type]


@contextmanager
def _reporting(namespace: argparse.Namespace, name: str) -> Iterator[Report]:
    with ExitStack() as stack:
        if namespace.json:
            report = json_lines(sys.stdout)
        else:
            from fedllm.demo.screen import Screen, open_console

            report = partial(stack.enter_context(Screen(open_console())).show, name)
        report(Said("loading torch"))
        yield report


def _leaves(group: ExceptionGroup[Exception] | None) -> Iterator[Exception]:
    for error in group.exceptions if group else ():
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
