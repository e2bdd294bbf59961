"""Real text from the running Python alone: what the silos hold, and what the base model reads.

Three silos, three kinds of prose: the language reference's help topics (`pydoc_data.topics`), the
standard library's docstrings, and the standard library's sources with those docstrings cut out.
Neutral text for the base model comes from numpy's docstrings and tests. All of it is read as
files (`ast` for the sources); no module is imported for its text but `pydoc_data.topics`.

A document is held out by the hash of its name, so every process that reads the same document
agrees without a word. Some text stands in two documents (help topics nest: *Special method
names* contains *Emulating numeric types*), so a paragraph that stands in any held-out document
is taken out of every training document; what is held out is never trained on.
"""

import ast
import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.errors import FedError

HELD_OUT_ONE_IN = 6
SILO_CHARACTERS = 1_000_000
NEUTRAL_CHARACTERS = 2_000_000
MIN_DOCUMENT_CHARACTERS = 400
MIN_PARAGRAPH_CHARACTERS = 40
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".json", ".html", ".csv"})

_TOPICS_MODULE = "pydoc_data.topics"
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "pydoc_data"}
)


class TextError(FedError, ValueError):
    """There is no text where a silo was told to find it."""


@dataclass(frozen=True)
class Document:
    """One named text; the name alone decides whether it is held out."""

    name: str
    text: str


@dataclass(frozen=True)
class Split:
    """A silo's documents: those it trains on, and those nobody does."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(name: str) -> bool:
    """Whether the document of this name is held out: about one in six, everywhere alike."""
    return _rank(name) % HELD_OUT_ONE_IN == 0


def paragraphs(text: str) -> Iterator[str]:
    """The blocks between blank lines, each with its white space folded to single spaces."""
    for block in text.replace("\r\n", "\n").split("\n\n"):
        folded = " ".join(block.split())
        if folded:
            yield folded


def split(silos: dict[str, Sequence[Document]]) -> dict[str, Split]:
    """Divide each silo's documents by `is_held_out` and clean all training text of held-out text.

    Paragraphs under `MIN_PARAGRAPH_CHARACTERS` are idiom rather than text (`See also:`), and stay.
    """
    held_out = {
        silo: tuple(document for document in documents if is_held_out(document.name))
        for silo, documents in silos.items()
    }
    secret = {
        paragraph
        for documents in held_out.values()
        for document in documents
        for paragraph in paragraphs(document.text)
        if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS
    }
    return {
        silo: Split(
            training=tuple(
                replace(document, text=_without(document.text, secret))
                for document in documents
                if not is_held_out(document.name)
            ),
            held_out=held_out[silo],
        )
        for silo, documents in silos.items()
    }


def builtin_splits() -> dict[str, Split]:
    """The three silos that ship with every Python, cleaned of one another's held-out text."""
    return split({name: collect() for name, collect in BUILTIN.items()})


def read_split(source: str) -> Split:
    """The split of a built-in silo, of text files, or what `write_split` wrote.

    Raises `TextError` when there is nothing to read there.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _read_written(path)
    if source in BUILTIN and not path.exists():
        return builtin_splits()[source]
    return split({source: read_documents(source)})[source]


def read_documents(source: str) -> list[Document]:
    """All documents of a built-in silo, or of a text file or a folder of them; else `TextError`."""
    path = Path(source)
    if path.exists():
        return _read_files(path)
    if source in BUILTIN:
        return BUILTIN[source]()
    raise TextError(
        f"no text at {source!r}: give a file, a folder, or one of {', '.join(sorted(BUILTIN))}"
    )


def write_split(split: Split, path: Path) -> None:
    """Write a split as JSON lines that `read_split` reads; appears whole or not at all."""
    rows = [
        {"name": document.name, "held_out": held_out, "text": document.text}
        for held_out, documents in ((False, split.training), (True, split.held_out))
        for document in documents
    ]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def topics() -> list[Document]:
    """The help topics of the language reference (`help('assert')` and its like)."""
    spec = importlib.util.find_spec(_TOPICS_MODULE)
    if spec is None or spec.origin is None:
        raise TextError("this Python ships without pydoc_data.topics: give a silo other text")
    module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    table: dict[str, Any] = next(
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    )
    return [Document(f"topics:{name}", text) for name, text in sorted(table.items())]


def docstrings() -> list[Document]:
    """The standard library's docstrings, one document a module."""
    return _modules("docstrings", _standard_library(), _docstrings_of, SILO_CHARACTERS)


def sources() -> list[Document]:
    """The standard library's sources without their docstrings, one document a module."""
    return _modules("sources", _standard_library(), _code_of, SILO_CHARACTERS)


def neutral() -> list[Document]:
    """What base model and tokenizer read: numpy's docstrings and tests, never a silo's text."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        raise TextError("numpy's sources are not there: install numpy from its wheel")
    root = Path(spec.submodule_search_locations[0])
    files = [path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts]
    tests = [(root, path) for path in files if "tests" in path.parts]
    library = [(root, path) for path in files if "tests" not in path.parts]
    half = NEUTRAL_CHARACTERS // 2
    return [
        *_modules("numpy-docstrings", library, _docstrings_of, half),
        *_modules("numpy-tests", tests, _code_of, half),
    ]


BUILTIN: dict[str, Callable[[], list[Document]]] = {
    "topics": topics,
    "docstrings": docstrings,
    "sources": sources,
}


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _without(text: str, secret: set[str]) -> str:
    blocks = text.replace("\r\n", "\n").split("\n\n")
    return "\n\n".join(block for block in blocks if " ".join(block.split()) not in secret)


def _standard_library() -> list[tuple[Path, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        (root, path)
        for path in sorted(root.rglob("*.py"))
        if not _NOT_LIBRARY & set(path.relative_to(root).parts)
    ]


def _modules(
    kind: str,
    files: Iterable[tuple[Path, Path]],
    text_of: Callable[[str], str],
    limit_characters: int,
) -> list[Document]:
    """Documents of some modules, picked by the hash of their names until the limit is reached."""
    named = {f"{kind}:{path.relative_to(root).as_posix()}": path for root, path in files}
    documents: list[Document] = []
    seen: set[str] = set()
    characters = 0
    for name in sorted(named, key=_rank):
        if characters >= limit_characters:
            break
        text = _text_of_file(named[name], text_of)
        if len(text) >= MIN_DOCUMENT_CHARACTERS and text not in seen:
            seen.add(text)
            documents.append(Document(name, text))
            characters += len(text)
    return documents


def _text_of_file(path: Path, text_of: Callable[[str], str]) -> str:
    try:
        return text_of(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # the library ships files for other grammars and codecs; they hold no text for us


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(source: str) -> Iterator[tuple[_Documented, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and (doc := ast.get_docstring(node)):
            yield node, doc


def _docstrings_of(source: str) -> str:
    return "\n\n".join(doc for _, doc in _documented(source))


def _code_of(source: str) -> str:
    # ast counts columns in UTF-8 bytes, and lines by newline alone (str.splitlines adds form feeds)
    lines = source.encode().split(b"\n")
    for node, _ in _documented(source):
        literal = node.body[0]
        first, last = literal.lineno - 1, (literal.end_lineno or literal.lineno) - 1
        rest = lines[last][literal.end_col_offset :]
        lines[first] = lines[first][: literal.col_offset].rstrip() + rest
        lines[first + 1 : last + 1] = [b""] * (last - first)
    return b"\n".join(lines).decode()


def _read_written(path: Path) -> Split:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        documents = [(bool(row["held_out"]), Document(row["name"], row["text"])) for row in rows]
    except (KeyError, TypeError, ValueError) as exc:
        raise TextError(
            f"{path}: each line must be a JSON object with name, held_out and text"
        ) from exc
    if not rows:
        raise TextError(f"{path} is empty")
    return Split(
        training=tuple(document for held_out, document in documents if not held_out),
        held_out=tuple(document for held_out, document in documents if held_out),
    )


def _read_files(path: Path) -> list[Document]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    documents = [
        Document(file.relative_to(path.parent).as_posix(), file.read_text(errors="replace"))
        for file in files
        if file.is_file() and (file == path or file.suffix in TEXT_SUFFIXES)
    ]
    if not documents:
        raise TextError(
            f"no text files under {path}: expected names ending in "
            f"{', '.join(sorted(TEXT_SUFFIXES))}"
        )
    return documents
