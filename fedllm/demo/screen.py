"""Draws events: live bars and tables on a terminal, plain lines in a pipe."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fedllm.demo.events import Event, Judged, Listening, RoundDone, Said, Step, Wrote
from fedllm.demo.verdict import UNION, Verdict
from fedllm.demo.wording import printable

PIPE_COLUMNS = 100


def open_console() -> Console:
    """A console on standard output: as wide as the terminal, or a fixed width in a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        return Console(highlight=False, width=PIPE_COLUMNS)
    return console


class Screen:
    """What the user sees. Safe from any thread; leaving the block gives the terminal back."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.fields[name]:<12}"),
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, name: str, event: Event) -> None:
        """Draw one event of the process called `name`."""
        match event:
            case Step():
                self._step(name, event)
            case RoundDone():
                self._clear()
                self.console.print(_round_table(event))
            case Listening(host=host, port=port):
                self.say(f"{name}: listening on {host}:{port}")
            case Wrote(what=what, path=path):
                self.say(f"{name}: wrote {what} to {path}")
            case Said(text=text):
                self.say(f"{name}: {text}")
            case Judged():
                pass  # a table says it better, once all are there

    def begin(self, stage: str) -> None:
        """A new stage of the work: the bars of the last one go."""
        self._clear()
        self.say(stage, style="bold")

    def say(self, text: str, *, style: str | None = None) -> None:
        """One line of text, unwrapped, so that a path can be copied."""
        self.console.print(_shown(text), style=style, soft_wrap=True)

    def show_verdict(self, verdict: Verdict) -> None:
        """The table of perplexities and what follows from it."""
        self._clear()
        self.console.print(_verdict_table(verdict))
        for line in verdict.remarks():
            self.say(line)
        personalised = verdict.personalised()
        if personalised is not None:
            self.say(personalised)
        self.say(verdict.sentence(), style="bold green" if verdict.federated_wins else "bold red")

    def _step(self, name: str, event: Step) -> None:
        loss = "" if event.loss is None else f"loss {event.loss:.3f}"
        if self._progress.disable:
            if event.step == event.steps or event.step % max(10, event.steps // 4) == 0:
                self.say(f"{name}: {event.stage}, step {event.step} of {event.steps}  {loss}")
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(event.stage, name=name, loss="", total=None)
        self._progress.update(
            self._bars[name],
            description=event.stage,
            completed=event.step,
            total=event.steps,
            loss=loss,
        )

    def _clear(self) -> None:
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._bars.clear()
        self._progress.refresh()  # else what is printed next is drawn above the old bars


def _shown(text: str) -> str:
    return escape(printable(text))


def _round_table(event: RoundDone) -> Table:
    table = Table(
        title=f"round {event.round} of {event.rounds}, {event.seconds:.1f} s",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("silo")
    table.add_column("outcome")
    for column in ("bytes", "seconds", "GB/s", "loss"):
        table.add_column(column, justify="right")
    for row in event.silos:
        table.add_row(
            _shown(row.silo),
            _shown(row.status),
            f"{row.bytes:,}",
            f"{row.seconds:.4f}",
            f"{row.gb_per_s:.3f}",
            "" if row.loss is None else f"{row.loss:.3f}",
        )
    return table


def _verdict_table(verdict: Verdict) -> Table:
    table = Table(
        title="perplexity on held-out text (* lowest)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model")
    columns = (*verdict.texts, UNION)
    for column in columns:
        table.add_column(escape(column), justify="right")
    best = {column: verdict.best(column) for column in columns}
    for model, row in verdict.perplexities.items():
        table.add_row(
            escape(model), *(_cell(row, column, best[column] == model) for column in columns)
        )
    return table


def _cell(row: Mapping[str, float], column: str, is_best: bool) -> str:
    return f"{row[column]:.1f}{'*' if is_best else ' '}"
