"""The demo's text: real, each silo's own, and held out honestly."""

import sys
from pathlib import Path

import pytest

from fedllm.demo import text


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
