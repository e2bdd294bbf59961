"""`python -m fedllm serve | join | demo | bench-round`: federated fine-tuning from a shell."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiordma import AiordmaError
from fedllm.bench import command as bench
from fedllm.config import RunConfig
from fedllm.demo import consent, parser, wording
from fedllm.demo.events import Report, Said, json_lines
from fedllm.demo.leash import hold_leash
from fedllm.demo.preflight import check_base, check_host
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
    words_of, commands = parser.build(with_stages=given[:1] and given[0] in STAGES)
    bench.add_command(commands)
    namespace = words_of.parse_args(given)
    if namespace.leash:
        hold_leash()
    try:
        return COMMANDS[namespace.command](namespace)
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
            sys.stderr.write(f"fedllm: {wording.printable(str(error))}\n")
        return 1


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
    if namespace.dry_run:
        # Nobody is connected to, not even to look a base up by its name.
        os.environ["HF_HUB_OFFLINE"] = "1"
    host, port = namespace.server
    given = {
        "host": host,
        "port": port,
        "policy": consent.policy_of(namespace.allow, tells_examples=namespace.tell_examples),
        "proxy": namespace.proxy or os.environ.get("FEDLLM_PROXY"),
    }
    with _reporting(namespace, namespace.name) as report:
        from fedllm.demo.joining import JoinOptions, take_part

        take_part(_options(JoinOptions, namespace, **given), report)
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


def _bench_round(namespace: argparse.Namespace) -> int:
    return bench.run(namespace, sys.stdout, sys.stderr)


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


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "join": _join,
    "demo": _demo,
    "bench-round": _bench_round,
    "prepare": _prepare,
    "alone": _alone,
    "judge": _judge,
}


def _leaves(group: ExceptionGroup[Exception] | None) -> Iterator[Exception]:
    for error in group.exceptions if group else ():
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
