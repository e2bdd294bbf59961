"""The house rules as tests: who may import whom, and how large a thing may grow.

`ROOMS` is the floor plan. A new module needs a row, or an existing pattern that it falls under; the
first pattern that matches counts. Arrows point down only.
"""

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import aiordma
import aiordma.errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("aiordma", "fedllm")

WIRE_LEAVES = "aiordma.errors aiordma.wire.frames aiordma.wire.manifest aiordma.wire.credit"
WIRE = "aiordma.wire aiordma.wire.*"
RDMA = (
    "aiordma.errors aiordma.ring aiordma.wire aiordma.wire.frames aiordma.wire.hello aiordma.lanes.choice"
    " aiordma.lanes.completion aiordma.lanes.needs aiordma.lanes.outbox aiordma.lanes.rdma"
    " aiordma.lanes.registry aiordma.lanes.statuses"
)
BELOW_ROUNDS = (
    "fedllm.errors fedllm.config fedllm.messages fedllm.memory fedllm.aggregate fedllm.strategy"
)
BELOW_STRATEGY = "fedllm.errors fedllm.config fedllm.aggregate fedllm.fold"

ROOMS: Mapping[str, str] = {
    # module pattern: the modules of this project that it may import ("aiordma": by public name)
    "aiordma": "aiordma.errors aiordma.config aiordma.ring aiordma.wire.manifest aiordma.outgoing"
    " aiordma.stats aiordma.chunk aiordma.transfer aiordma.registration aiordma.channel aiordma.listener"
    " aiordma.endpoint",
    "aiordma.errors": "",
    "aiordma.config": "aiordma.errors",
    "aiordma.ring": "aiordma.errors aiordma.config",
    "aiordma.wire": "",
    "aiordma.wire.sending": WIRE_LEAVES,
    "aiordma.wire.receiving": WIRE_LEAVES,
    "aiordma.wire.session": f"aiordma.errors {WIRE}",
    "aiordma.wire.*": "aiordma.errors",
    "aiordma.tensors": "aiordma.errors aiordma.wire aiordma.wire.manifest",
    "aiordma.outgoing": "aiordma.errors aiordma.tensors aiordma.wire aiordma.wire.frames aiordma.wire.manifest",
    "aiordma.stats": "",
    "aiordma.lanes": "",
    "aiordma.lanes.completion": "aiordma.errors",
    "aiordma.lanes.signals": "",
    "aiordma.lanes.outbox": "aiordma.errors aiordma.ring aiordma.wire aiordma.wire.frames aiordma.lanes.signals",
    "aiordma.lanes.probe": "",
    "aiordma.lanes.silence": "",
    "aiordma.lanes.rendezvous": "aiordma.errors aiordma.ring aiordma.wire.frames aiordma.lanes.outbox",
    "aiordma.lanes.rdma": "aiordma.errors aiordma.ring aiordma.wire aiordma.wire.frames"
    " aiordma.lanes.base aiordma.lanes.completion aiordma.lanes.outbox aiordma.lanes.probe"
    " aiordma.lanes.registry aiordma.lanes.rendezvous aiordma.lanes.silence",
    "aiordma.lanes.choice": "aiordma.errors",
    "aiordma.lanes.needs": "aiordma.ring aiordma.lanes.outbox aiordma.lanes.rdma",
    "aiordma.lanes.registry": "aiordma.errors aiordma.lanes.outbox",
    "aiordma.lanes.statuses": "",
    "aiordma.lanes.verbs": f"{RDMA} aiordma.lanes.verbs.*",
    "aiordma.lanes.verbs.*": f"{RDMA} aiordma.lanes.verbs aiordma.lanes.verbs.*",
    "aiordma.lanes.*": "aiordma.errors aiordma.ring aiordma.wire aiordma.wire.frames aiordma.lanes.base",
    "aiordma.control": "aiordma.errors",
    "aiordma.pulse": "aiordma.errors",
    "aiordma.queues": "aiordma.errors aiordma.wire.credit",
    "aiordma.chunk": f"aiordma.errors aiordma.tensors {WIRE}",
    "aiordma.transfer": f"aiordma.errors aiordma.outgoing aiordma.tensors aiordma.chunk aiordma.loans {WIRE}",
    "aiordma.loans": "aiordma.tensors aiordma.lanes.rendezvous",
    "aiordma.registration": "",
    "aiordma.path": "aiordma.errors aiordma.config aiordma.ring aiordma.handshake aiordma.lanes.choice"
    f" aiordma.lanes.base aiordma.lanes.rdma aiordma.lanes.registry aiordma.lanes.verbs {WIRE}",
    "aiordma.ending": "aiordma.control aiordma.lanes.base aiordma.loans aiordma.port",
    "aiordma.early": "aiordma.chunk aiordma.wire.frames",
    "aiordma.port": "aiordma.errors aiordma.ring aiordma.stats aiordma.outgoing aiordma.chunk aiordma.transfer"
    f" aiordma.lanes.base aiordma.lanes.rdma {WIRE}",
    "aiordma.link": "aiordma.errors aiordma.config aiordma.outgoing aiordma.stats aiordma.chunk aiordma.control"
    f" aiordma.pulse aiordma.queues aiordma.transfer aiordma.early aiordma.ending"
    f" aiordma.loans aiordma.port {WIRE}",
    "aiordma.channel": "aiordma.errors aiordma.outgoing aiordma.tensors aiordma.stats aiordma.transfer aiordma.link"
    f" aiordma.registration aiordma.lanes.registry {WIRE}",
    "aiordma.handshake": f"aiordma.errors aiordma.config aiordma.ring {WIRE}",
    "aiordma.proxy": "aiordma.errors aiordma.handshake",
    "aiordma.assembly": "aiordma.errors aiordma.config aiordma.ring aiordma.stats aiordma.control"
    f" aiordma.port aiordma.link aiordma.channel aiordma.handshake aiordma.path aiordma.lanes.* {WIRE}",
    "aiordma.listener": "aiordma.errors aiordma.config aiordma.queues aiordma.channel"
    f" aiordma.handshake aiordma.path aiordma.assembly {WIRE}",
    "aiordma.endpoint": "aiordma.errors aiordma.config aiordma.channel aiordma.handshake aiordma.proxy"
    " aiordma.path aiordma.assembly aiordma.listener aiordma.lanes.choice",
    "aiordma.bench": "",
    "aiordma.bench.*": "aiordma aiordma.errors aiordma.bench aiordma.bench.*",
    "aiordma.doctor": "",
    "aiordma.doctor.*": "aiordma aiordma.errors aiordma.lanes.choice aiordma.lanes.needs"
    " aiordma.lanes.verbs aiordma.doctor aiordma.doctor.*",
    "aiordma.__main__": "aiordma aiordma.bench aiordma.bench.* aiordma.doctor aiordma.doctor.*",
    "fedllm": "fedllm.errors fedllm.config fedllm.aggregate fedllm.aligned fedllm.staged fedllm.strategy"
    " fedllm.backoff fedllm.checkpoint fedllm.participation fedllm.rounds fedllm.evaluation fedllm.history"
    " fedllm.memory fedllm.messages fedllm.policy fedllm.shards fedllm.federation fedllm.silo fedllm.joining"
    " fedllm.threads",
    "fedllm.errors": "aiordma.errors",
    "fedllm.config": "aiordma.errors fedllm.errors",
    "fedllm.messages": "aiordma.errors fedllm.errors",
    "fedllm.aggregate": "aiordma fedllm.errors",
    "fedllm.fold": "fedllm.errors",
    "fedllm.memory": "fedllm.fold",
    "fedllm.staged": f"aiordma {BELOW_STRATEGY} fedllm.memory",
    "fedllm.aligned": f"aiordma {BELOW_STRATEGY} fedllm.memory fedllm.patience",
    "fedllm.strategy": f"{BELOW_STRATEGY} fedllm.staged fedllm.aligned",
    "fedllm.threads": "",
    "fedllm.patience": "",
    "fedllm.interrupt": "",
    "fedllm.dtensors": "fedllm.errors fedllm.messages",
    "fedllm.parameters": "fedllm.errors fedllm.dtensors",
    "fedllm.loading": "fedllm.dtensors fedllm.parameters",
    "fedllm.adapters": "fedllm.messages fedllm.dtensors fedllm.parameters fedllm.loading",
    "fedllm.trainers": "fedllm.threads",
    "fedllm.checkpoint": f"aiordma aiordma.errors {BELOW_ROUNDS}",
    "fedllm.door": f"aiordma {BELOW_ROUNDS}",
    "fedllm.sending": "aiordma",
    "fedllm.participation": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.door fedllm.sending fedllm.patience",
    "fedllm.shards": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.staged fedllm.participation",
    "fedllm.assembly": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.shards",
    "fedllm.rounds": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.fold fedllm.participation fedllm.shards"
    " fedllm.threads",
    "fedllm.evaluation": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.participation fedllm.shards fedllm.rounds",
    "fedllm.history": "fedllm.participation fedllm.rounds",
    "fedllm.membership": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.participation fedllm.shards fedllm.assembly"
    " fedllm.sending",
    "fedllm.federation": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.participation fedllm.rounds"
    " fedllm.evaluation fedllm.history fedllm.membership fedllm.checkpoint fedllm.threads fedllm.tries"
    " fedllm.hooks",
    "fedllm.hooks": "",
    "fedllm.tries": "aiordma aiordma.errors fedllm.participation",
    "fedllm.backoff": "fedllm.errors fedllm.config",
    "fedllm.kept": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.checkpoint",
    "fedllm.policy": "fedllm.errors fedllm.messages",
    "fedllm.journal": "aiordma fedllm.errors fedllm.checkpoint",
    "fedllm.conversation": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.door fedllm.policy fedllm.journal"
    " fedllm.threads",
    "fedllm.silo": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.kept fedllm.conversation fedllm.policy"
    " fedllm.journal fedllm.threads",
    "fedllm.joining": f"aiordma aiordma.errors {BELOW_ROUNDS} fedllm.backoff fedllm.kept fedllm.conversation"
    " fedllm.policy fedllm.journal fedllm.silo fedllm.threads",
    "fedllm.bench": "",
    "fedllm.bench.*": "aiordma aiordma.errors fedllm fedllm.errors fedllm.interrupt fedllm.bench.*",
    "fedllm.demo": "",
    "fedllm.demo.*": "aiordma aiordma.errors fedllm fedllm.errors fedllm.adapters fedllm.checkpoint fedllm.policy"
    " fedllm.interrupt fedllm.demo.*",
    "fedllm.__main__": "aiordma aiordma.errors fedllm fedllm.* fedllm.demo.*",
}

GUESTS: Mapping[str, str] = {
    # third party or standard library: the only modules that may import it, anywhere in their text
    "pyverbs": "aiordma.lanes.verbs*",
    "torch": "fedllm.adapters fedllm.dtensors fedllm.parameters fedllm.loading fedllm.demo.*",
    "peft": "fedllm.adapters fedllm.parameters fedllm.demo.*",
    "transformers": "fedllm.adapters fedllm.trainers fedllm.demo.*",
    "accelerate": "",
    "pickle": "",
}
LAZY_GUESTS = {("aiordma.tensors", "torch")}
"""May be imported inside a function: torch, where the caller has asked for `framework="torch"`."""

CLOCKS = "asyncio datetime select selectors socket time"
BLIND: Mapping[str, str] = {
    # module patterns: what may never be imported there
    "aiordma.wire*": f"{CLOCKS} threading",
    "fedllm.config": f"{CLOCKS} threading",
    "fedllm.aggregate": f"{CLOCKS} threading",
    "fedllm.fold": CLOCKS,  # updates are checked and folded in threads
    "fedllm.strategy": f"{CLOCKS} threading",
}

FILE_LINES, FUNCTION_LINES, CLASS_ATTRIBUTES, GIT_FILE_BYTES = 400, 60, 15, 100_000

Scope = Literal["module", "function", "typing"]


class Import(NamedTuple):
    """One name that one import statement asks for: `name` out of `module`, or all of `module`."""

    module: str
    name: str
    line: int
    scope: Scope


class Source(NamedTuple):
    module: str
    text: str
    is_package: bool = False


def sources_of(*packages: str) -> Iterator[Source]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            yield Source(module, path.read_text(encoding="utf-8"), is_package)


def imports_of(source: Source) -> Iterator[Import]:
    """Every import, however deep; a call of `import_module("x")` counts as one."""
    package = source.module if source.is_package else source.module.rpartition(".")[0]

    def visit(node: ast.AST, scope: Scope) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, scope)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (parent, node.module) if part)
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, scope)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, "", node.lineno, scope)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            scope = "function"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            scope = "typing"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    return visit(ast.parse(source.text), "module")


def fits(module: str, patterns: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns.split())


def arrows_of(source: Source, modules: frozenset[str]) -> Iterator[tuple[Import, str]]:
    """The project's modules that a source imports: `from a import b` means `a.b` if that is one."""
    for found in imports_of(source):
        inner = f"{found.module}.{found.name}"
        target = inner if inner in modules else found.module
        if target.partition(".")[0] in PACKAGES:
            yield found, target


def broken_arrows(
    source: Source, modules: frozenset[str], public: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    room = next((pattern for pattern in ROOMS if fnmatchcase(source.module, pattern)), None)
    if room is None:
        yield f"{source.module}: unknown room; say in ROOMS what it may import"
        return
    for found, target in arrows_of(source, modules):
        where = f"{source.module}:{found.line}"
        if not fits(target, ROOMS[room]):
            yield f"{where}: may not import {target}"
        elif target in public and found.name and found.name not in public[target]:
            yield f"{where}: {found.name} is not a public name of {target}"
    if fits("aiordma", ROOMS[room]):
        for node in ast.walk(ast.parse(source.text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "aiordma":
                if node.attr not in public["aiordma"] | {"errors"}:
                    yield f"{source.module}:{node.lineno}: aiordma.{node.attr} is not public"


def unwelcome_guests(source: Source) -> Iterator[str]:
    for found in imports_of(source):
        guest = found.module.partition(".")[0]
        lazy = found.scope == "function" and (source.module, guest) in LAZY_GUESTS
        if guest in GUESTS and not fits(source.module, GUESTS[guest]) and not lazy:
            yield f"{source.module}:{found.line}: {guest} is not at home here"
        for pattern, banned in BLIND.items():
            if guest in banned.split() and fits(source.module, pattern):
                yield f"{source.module}:{found.line}: {pattern} is blind, it may not import {guest}"


def circles(sources: list[Source]) -> list[list[str]]:
    """Import circles at module scope; a package's `__init__` is a module like any other."""
    modules = frozenset(source.module for source in sources)
    graph = {
        source.module: {
            target
            for found, target in arrows_of(source, modules)
            if found.scope == "module" and target in modules and target != source.module
        }
        for source in sources
    }
    done: set[str] = set()
    found_circles: list[list[str]] = []

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found_circles.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found_circles


def untidiness(source: Source) -> Iterator[str]:
    """What has grown too large, is unfinished, prints, or asks the environment."""
    lines = source.text.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{source.module}: {len(lines)} lines, more than {FILE_LINES}"
    for number, line in enumerate(lines, 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"{source.module}:{number}: unfinished"
    is_main = source.module.endswith("__main__")
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{source.module}:{node.lineno}: {node.name}() has {length} lines"
        elif isinstance(node, ast.ClassDef):
            count = len(self_attributes(node))
            if count > CLASS_ATTRIBUTES:
                yield f"{source.module}:{node.lineno}: {node.name} keeps {count} attributes"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not is_main:
            yield f"{source.module}:{node.lineno}: print() outside __main__"
        elif isinstance(node, ast.Attribute) and not is_main:
            if ast.unparse(node) in ("os.environ", "os.getenv"):
                yield f"{source.module}:{node.lineno}: the environment is read outside __main__"


def self_attributes(node: ast.ClassDef) -> set[str]:
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


PUBLIC = {
    "aiordma": frozenset(aiordma.__all__),
    "aiordma.errors": frozenset(aiordma.errors.__all__),
}
SOURCES = list(sources_of(*PACKAGES))
EXAMPLES = list(sources_of("examples"))
MODULES = frozenset(source.module for source in SOURCES)
module_name = attrgetter("module")


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_arrows_point_down(source):
    assert list(broken_arrows(source, MODULES, PUBLIC)) == []


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_guests_are_where_they_live(source):
    assert list(unwelcome_guests(source)) == []


@pytest.mark.parametrize("source", SOURCES + EXAMPLES, ids=module_name)
def test_is_tidy(source):
    allowed = "print() outside" if source in EXAMPLES else "\0"
    assert [line for line in untidiness(source) if allowed not in line] == []


@pytest.mark.parametrize("source", EXAMPLES, ids=module_name)
def test_examples_use_public_names(source):
    for found, target in arrows_of(source, MODULES):
        assert not found.name or target in MODULES
        if target in PUBLIC and found.name:
            assert found.name in PUBLIC[target], f"{source.module}:{found.line}"


def test_there_are_no_import_circles():
    assert circles(SOURCES) == []


def test_no_large_file_is_in_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    assert sizes
    assert {path: size for path, size in sizes.items() if size > GIT_FILE_BYTES} == {}


# The checker itself, on sources that break one rule each.

BAD_ARROWS = {
    "upwards": ("aiordma.ring", "from aiordma.channel import Channel", "may not import"),
    "upwards, a module": ("aiordma.ring", "from aiordma import channel", "may not import"),
    "upwards, relative": ("aiordma.wire.frames", "from ..channel import Channel", "may not import"),
    "sideways": ("aiordma.wire.credit", "import aiordma.wire.session", "may not import"),
    "in a function": ("aiordma.ring", "def f():\n    import aiordma.channel", "may not import"),
    "for types": ("aiordma.ring", "if TYPE_CHECKING:\n import aiordma.channel", "may not import"),
    "past the door": ("fedllm.rounds", "from aiordma.channel import Channel", "may not import"),
    "a private name": ("fedllm.rounds", "from aiordma import _secret", "not a public name"),
    "an attribute": ("fedllm.rounds", "import aiordma\naiordma._secret", "is not public"),
    "an error that is none": ("fedllm.errors", "from aiordma.errors import Nope", "not a public"),
    "an unknown room": ("aiordma.attic", "", "unknown room"),
}


@pytest.mark.parametrize(("module", "text", "complaint"), BAD_ARROWS.values(), ids=BAD_ARROWS)
def test_the_checker_sees_a_broken_arrow(module, text, complaint):
    known = frozenset({"aiordma.ring", "aiordma.channel", "aiordma.wire.session"})
    [line] = broken_arrows(Source(module, text), known, PUBLIC)
    assert complaint in line


def test_the_checker_lets_good_arrows_pass():
    text = "import json\nfrom aiordma import connect\nfrom aiordma.errors import ChannelError"
    assert list(broken_arrows(Source("fedllm.rounds", text), MODULES, PUBLIC)) == []
    relative = Source("aiordma.wire.session", "from . import frames\nfrom .credit import Window")
    assert list(broken_arrows(relative, MODULES, PUBLIC)) == []


BAD_GUESTS = {
    "pyverbs": ("aiordma.lanes.tcp", "from pyverbs.device import Context"),
    "torch at module scope": ("aiordma.tensors", "import torch"),
    "torch for types": ("aiordma.tensors", "if TYPE_CHECKING:\n    import torch"),
    "torch in a function": ("fedllm.rounds", "def f():\n    import torch.nn"),
    "torch by name": ("fedllm.rounds", "importlib.import_module('torch')"),
    "peft": ("fedllm.silo", "from peft import LoraConfig"),
    "pickle": ("fedllm.demo.model", "import pickle"),
    "a clock on the wire": ("aiordma.wire.session", "from time import monotonic"),
    "a loop on the wire": ("aiordma.wire.session", "def f():\n    import asyncio"),
}


@pytest.mark.parametrize(("module", "text"), BAD_GUESTS.values(), ids=BAD_GUESTS)
def test_the_checker_sees_an_unwelcome_guest(module, text):
    assert len(list(unwelcome_guests(Source(module, text)))) == 1


def test_the_checker_lets_welcome_guests_pass():
    assert not list(unwelcome_guests(Source("aiordma.tensors", "def f():\n    import torch")))
    assert not list(unwelcome_guests(Source("fedllm.demo.model", "import torch")))
    assert not list(unwelcome_guests(Source("aiordma.lanes.verbs", "import pyverbs.cq")))


def test_the_checker_sees_a_circle():
    first = Source("aiordma.a", "from aiordma import b")
    second = Source("aiordma.b", "import aiordma.c")
    back = "from aiordma.a import f"
    assert circles([first, second, Source("aiordma.c", back)]) == [
        ["aiordma.a", "aiordma.b", "aiordma.c", "aiordma.a"]
    ]
    assert circles([first, second, Source("aiordma.c", f"def g():\n    {back}")]) == []


UNTIDY = {
    "a long file": "x = 1\n" * (FILE_LINES + 1),
    "a long function": "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
    "a wide class": "class C:\n  def f(self):\n"
    + "".join(f"    self.a{i} = 1\n" for i in range(16)),
    "unfinished": "x = 1  # " + "TODO",
    "print": "print(1)",
    "environment": "import os\nos.environ['HOME']",
}


@pytest.mark.parametrize("text", UNTIDY.values(), ids=UNTIDY)
def test_the_checker_sees_untidiness(text):
    assert len(list(untidiness(Source("aiordma.ring", text)))) == 1


def test_the_checker_lets_main_print():
    assert not list(untidiness(Source("aiordma.__main__", "import os\nprint(os.environ)")))
