"""Messages are plain English, and keep to docs/concepts.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_house import modules

from virt_bmap.core.amounts import counted, plural

PAGE = Path(__file__).resolve().parents[2] / "docs/concepts.md"
NOT_SAID = sorted(
    word.strip()
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and line.count("|") == 4
    for word in line.split("|")[3].split(",")
    if word.strip() not in ("", "not")
)
GERMAN = (
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|one\b)[a-z]",
    r"\bbehind (the|its|their|a) (\w+ )?end\b",
    r"\b(lie|lies) over each other\b",
    r"\bmetadata (are|lie|say|do|have|were)\b",
    r"\bof no one moment\b",
)
NOUNS = re.compile(
    r" (?:more |other |of its |of the )?(?:\w+ )?"
    "(accesses|blocks|chains|chunks|clusters|copies|devices|directories|disks|entries|extents|files|filesystems"
    "|groups|images|inodes|items|lines|members|nodes|partitions|pieces|problems|ranges|records|requests|rows"
    "|sectors|segments|snapshots|subvolumes|volumes)\\b"
)
"""What is counted in messages. Sizes in bytes are left alone: they are hardly ever 1."""
NO_COUNT = re.compile(
    r"[A-Z_]+|.*\b(name|names|words|word|key|kind|what|where|part)|(plural|counted|human|', '\.join)\(.*"
)
"""Expressions that are a limit (more than one), words, or a count with its noun."""


def texts(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """The strings of a module that people may read: no docstrings, no single words; fields as {}."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            hidden.add(node.value)
        if isinstance(node, ast.JoinedStr):
            hidden |= set(ast.walk(node)) - {node}
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node, "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in hidden and " " in str(node.value):
            yield node, str(node.value)


def said(path: Path) -> list[str]:
    """Words of messages that we don't say."""
    return [
        f"line {node.lineno}: {found[0]!r} in {text!r}"
        for node, text in texts(path)
        for pattern in (*GERMAN, *(rf"\b{re.escape(word)}\b" for word in NOT_SAID))
        if (found := re.search(pattern, text))
    ]


def uncounted(path: Path) -> list[str]:
    """Counts beside a plural noun that does not follow them."""
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            for field, after in zip(node.values, node.values[1:], strict=False):
                if isinstance(field, ast.FormattedValue) and isinstance(after, ast.Constant):
                    words = ast.unparse(field.value)
                    noun = NOUNS.match(after.value)
                    rounded = field.format_spec and ast.unparse(field.format_spec).endswith("f'")
                    if noun and not rounded and not NO_COUNT.fullmatch(words):
                        wrong.append(f"line {node.lineno}: {{{words}}}{noun[0]}")
    return wrong


MODULES = sorted(modules())


@pytest.mark.parametrize("name", MODULES)
def test_messages_keep_to_the_vocabulary(name: str) -> None:
    assert not said(modules()[name])


@pytest.mark.parametrize("name", MODULES)
def test_nouns_agree_with_their_counts(name: str) -> None:
    assert not uncounted(modules()[name])


def test_what_is_not_said_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""It is no module."""\nraise Corrupt("it is corrupt")\nsay(f"{name} is no file")\n')
    assert said(module) == [
        "line 3: 'is no f' in '{} is no file'",
        "line 2: 'corrupt' in 'it is corrupt'",
    ]


def test_a_count_that_does_not_agree_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("say(f'{count} more files', f'{MOST} files', f\"{plural(n, 'file')} of rows\")\n")
    assert uncounted(module) == ["line 1: {count} more files"]


def test_words_agree_with_their_count() -> None:
    assert [plural(count, "file") for count in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]
    assert plural(1, "directory", "directories") == "1 directory"
    assert counted(1, "[name leads|names lead] to [an inode|inodes]") == "1 name leads to an inode"
    assert counted(2, "[name leads|names lead] to [an inode|inodes]") == "2 names lead to inodes"
