"""`python -m fedllm demo`: the whole story in one command, each part in a process of its own.

Nothing here imports torch, so that this process answers Ctrl-C at once whatever its children do.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedllm.demo.crew import Crew
from fedllm.demo.events import Event, Judged, Listening
from fedllm.demo.screen import Screen
from fedllm.demo.verdict import BASE, FEDERATED, PERSONAL, Verdict
from fedllm.interrupt import run_interruptibly

HOST = "127.0.0.1"
JOURNALS = "journals"
EXIT_NOT_BETTER = 3
RATES_MADE = {"lora": 1e-2, "full": 1e-3}
"""Measured for the small base that the demo makes."""
RATES_GIVEN = {"lora": 1e-3, "full": 5e-5}
"""Usual for a base that has read much more."""


OWN_FACTORS = ("*.lora_B",)
"""Of each LoRA pair A is shared and B stays: FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463)."""

REFUSE_ABOVE = "2"
"""A personalised silo's gate: far from what the demo comes to, so that it holds back only what has gone wrong."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `demo` is told. `silos` maps names to texts; `lr` None means a rate that suits.

    `keep_local` empty means layers that suit, if the demo knows the model's.
    """

    out: Path
    mode: str
    model: str | None
    silos: dict[str, str]
    rounds: int
    steps: int
    batch: int
    lr: float | None
    seed: int
    eval_tokens: int
    pretrain_steps: int
    width: int
    layers: int
    keep_local: Sequence[str] = ()

    @property
    def base(self) -> str:
        return self.model or str(self.out / "base")

    @property
    def learning_rate(self) -> float:
        rates = RATES_MADE if self.model is None else RATES_GIVEN
        return rates[self.mode] if self.lr is None else self.lr

    @property
    def local_layers(self) -> tuple[str, ...]:
        """What stays at each silo in the personalised run; nothing: there is no such run."""
        if self.keep_local or self.mode == "lora":
            return tuple(self.keep_local) or OWN_FACTORS
        return () if self.model else (f"transformer.h.{self.layers - 1}", "transformer.ln_f")

    def personal(self, silo: str) -> Path:
        """Where a silo's personalised model is."""
        return self.out / PERSONAL / silo

    def text(self, silo: str) -> str:
        """Where `prepare` puts a silo's text."""
        return str(self.out / "text" / f"{silo}.jsonl")


def demo(
    options: DemoOptions, *, command: Sequence[str], environment: Mapping[str, str], screen: Screen
) -> int:
    """Run the demo; 0 if the federated model wins on the union, else `EXIT_NOT_BETTER`.

    `command` starts a child, its arguments follow. SIGINT and SIGTERM end all children first; what
    then stands in `options.out` is whole, unless its name ends in `.part` or begins with a dot.
    Raises `ChildFailed`, alone or in an `ExceptionGroup`.
    """
    return run_interruptibly(_conduct(options, (*command,), environment, screen))


async def _conduct(
    options: DemoOptions, command: tuple[str, ...], environment: Mapping[str, str], screen: Screen
) -> int:
    started = time.monotonic()
    (options.out / JOURNALS).mkdir(parents=True, exist_ok=True)
    federation = _Federation(options, screen)
    async with Crew(
        command, environment=environment, logs=options.out / "logs", on_event=federation.hear
    ) as crew:
        screen.begin("1 of 5: the base model, and each silo's text")
        await crew.run("prepare", *_prepare_arguments(options))
        screen.begin(f"2 of 5: {options.rounds} federated rounds")
        await federation.train(crew)
        if options.local_layers:
            kept = " ".join(options.local_layers)
            screen.begin(f"3 of 5: the same, but each silo keeps to itself: {kept}")
            await federation.train(crew, personal=True)
        else:
            screen.begin("3 of 5 is left out: no --keep-local says which layers stay at a silo")
        screen.begin("4 of 5: each silo alone, with the same steps and settings")
        async with asyncio.TaskGroup() as together:
            for silo in options.silos:
                together.create_task(crew.run(f"{silo}-alone", *_alone_arguments(options, silo)))
        screen.begin("5 of 5: every model on every silo's held-out text")
        await crew.run("judge", *_judge_arguments(options))
    verdict = Verdict.of(tuple(options.silos), federation.judged)
    with (options.out / "metrics.jsonl").open("a") as lines:
        lines.write(msgspec.json.encode({"perplexity": verdict.perplexities}).decode() + "\n")
    screen.show_verdict(verdict)
    screen.say(f"The federated model: {options.out / FEDERATED}   its base: {options.base}")
    screen.say(f"What left each silo, and when: {options.out / JOURNALS}")
    screen.say(
        f"Figures: {options.out / 'metrics.jsonl'}   {time.monotonic() - started:.0f} s in all"
    )
    return 0 if verdict.federated_wins else EXIT_NOT_BETTER


class _Federation:
    """Hears what the children tell, and starts the silos when the server can be joined."""

    def __init__(self, options: DemoOptions, screen: Screen) -> None:
        self.judged: list[Judged] = []
        self._options = options
        self._screen = screen
        self._port: asyncio.Future[int]

    def hear(self, name: str, event: Event) -> None:
        """Take one event of one child, and show it."""
        match event:
            case Judged():
                self.judged.append(event)
            case Listening(port=port):
                self._port.set_result(port)
        self._screen.show(name, event)

    async def train(self, crew: Crew, *, personal: bool = False) -> None:
        """Run the server and every silo to their end, all at once."""
        options = self._options
        self._port = asyncio.get_running_loop().create_future()
        suffix = f"-{PERSONAL}" if personal else ""
        async with asyncio.TaskGroup() as together:
            serving = _serve_arguments(options, personal)
            together.create_task(crew.run(f"server{suffix}", *serving))
            port = await self._port
            for silo in options.silos:
                joining = _join_arguments(options, silo, port, personal)
                together.create_task(crew.run(f"{silo}{suffix}", *joining))


def _tuning(options: DemoOptions) -> list[str]:
    return [
        *("--mode", options.mode),
        *("--steps", str(options.steps)),
        *("--batch", str(options.batch)),
        *("--lr", repr(options.learning_rate)),
        *("--rounds", str(options.rounds), "--seed", str(options.seed)),
    ]


def _prepare_arguments(options: DemoOptions) -> list[str]:
    return [
        *("prepare", "--out", str(options.out), "--seed", str(options.seed)),
        *("--silos", *(f"{name}={source}" for name, source in options.silos.items())),
        *("--pretrain-steps", str(options.pretrain_steps)),
        *("--width", str(options.width), "--layers", str(options.layers)),
        *(("--model", options.model) if options.model is not None else ()),
    ]


def _serve_arguments(options: DemoOptions, personal: bool) -> list[str]:
    return [
        *("serve", "--base", options.base),
        *("--out", str(options.out / PERSONAL if personal else options.out)),
        *("--host", HOST, "--port", "0", "--min-silos", str(len(options.silos))),
        *_tuning(options),
        *(("--keep-local", *options.local_layers) if personal else ()),
    ]


def _join_arguments(options: DemoOptions, silo: str, port: int, personal: bool) -> list[str]:
    arguments = [
        *("join", "--server", f"{HOST}:{port}", "--name", silo, "--mode", options.mode),
        *("--base", options.base, "--text", options.text(silo)),
        *("--journal", str(options.out / JOURNALS / f"{silo}.jsonl")),
        *("--allow", f"recipe.steps=1..{options.steps}", f"recipe.batch={options.batch}"),
    ]
    if personal:
        arguments += ["--keep-local", *options.local_layers, "--refuse-above", REFUSE_ABOVE]
        arguments += ["--out", str(options.personal(silo))]
    return arguments


def _alone_arguments(options: DemoOptions, silo: str) -> list[str]:
    return [
        *("alone", "--base", options.base, "--name", silo, "--text", options.text(silo)),
        *("--out", str(options.out / "alone" / silo)),
        *_tuning(options),
    ]


def _judge_arguments(options: DemoOptions) -> list[str]:
    models = {
        BASE: "",
        **{f"{silo}-alone": str(options.out / "alone" / silo) for silo in options.silos},
        FEDERATED: str(options.out / FEDERATED),
    }
    personal = options.silos if options.local_layers else ()
    return [
        *("judge", "--base", options.base, "--mode", options.mode),
        *("--models", *(f"{name}={folder}" for name, folder in models.items())),
        *("--texts", *(f"{silo}={options.text(silo)}" for silo in options.silos)),
        *("--personal", *(f"{silo}={options.personal(silo)}" for silo in personal)),
        *("--eval-tokens", str(options.eval_tokens)),
    ]
