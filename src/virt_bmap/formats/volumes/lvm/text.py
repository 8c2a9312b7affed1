"""The text that LVM keeps its metadata in: `section { key = value ... }`, values are numbers, strings or
lists of them.

Sources: lvm2 libdm/libdm-config.c (grammar); lib/format_text/ (what it is used for).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import INT64_MAX

MAX_DEPTH = 16
"""Sections within sections. LVM's own metadata has five: group, logical_volumes, volume, segment, list."""
MAX_WORDS = 3 << 20
"""Names, values and marks of one text. A word of a few bytes takes some hundred as an object; LVM itself
writes some seven bytes a word."""

TOKEN = re.compile(
    r'\s+|#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\]=,])|(?P<word>[^\s"{}\[\]=,#]+)|(?P<bad>.)',
    re.DOTALL,
)

Value = int | str | list[int | str]


@dataclass(slots=True)
class Section:
    """What stands between braces, in the order of the text: keys with values, and sections."""

    values: dict[str, Value] = field(default_factory=dict)
    sections: dict[str, "Section"] = field(default_factory=dict)

    def section(self, name: str) -> "Section":
        """The section of that name, empty where there is none."""
        return self.sections.get(name) or Section()

    def number(self, key: str, default: int | None = None, low: int = 0, high: int = INT64_MAX) -> int:
        """A number in [low, high]; Corrupt where it is missing (and has no default) or lies outside."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or not low <= value <= high:
            shown = "missing" if value is None else repr(value)
            raise Corrupt(f"{key} is {shown}, not a number from {low} to {high}")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string; the default where it is missing or something else."""
        value = self.values.get(key, default)
        return value if isinstance(value, str) else default

    def items(self, key: str) -> list[int | str]:
        """A list; one value counts as a list of one."""
        value = self.values.get(key, [])
        return value if isinstance(value, list) else [value]

    def words(self, key: str) -> list[str]:
        """The strings of a list."""
        return [item for item in self.items(key) if isinstance(item, str)]


def parse(text: str) -> Section:
    """The whole text as one section.

    Raises Corrupt, naming the line, where it does not follow the grammar or has too many words.
    """
    top = Section()
    stack = [top]
    tokens = _tokens(text)
    for line, kind, word in tokens:
        if word == "}" and kind == "mark":
            stack.pop()
            if not stack:
                raise Corrupt(f"LVM metadata, line {line}: a closing brace too many", code="mapping")
            continue
        if kind == "mark":
            raise Corrupt(f"LVM metadata, line {line}: {word!r} where a name should be", code="mapping")
        _, kind, mark = next(tokens, (line, "mark", "the end"))
        if kind == "mark" and mark == "{":
            if len(stack) >= MAX_DEPTH:
                raise Corrupt(
                    f"LVM metadata, line {line}: more than {MAX_DEPTH} sections within each other",
                    code="mapping",
                )
            stack.append(stack[-1].sections.setdefault(word, Section()))
        elif kind == "mark" and mark == "=":
            stack[-1].values[word] = _value(tokens, line)
        else:
            raise Corrupt(
                f"LVM metadata, line {line}: {mark!r} after {word!r}, where '=' or '{{' should be",
                code="mapping",
            )
    if len(stack) > 1:
        raise Corrupt(f"LVM metadata ends inside {len(stack) - 1} open sections", code="mapping")
    return top


def _tokens(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text) of every token that is not space or comment."""
    line = 1
    words = 0
    for match in TOKEN.finditer(text):
        kind, word = match.lastgroup, match.group()
        words += kind is not None
        if words > MAX_WORDS:
            raise Corrupt(f"LVM metadata, line {line}: more than {MAX_WORDS:,} words", code="too-many")
        if kind == "bad":
            raise Corrupt(f"LVM metadata, line {line}: a string that does not end", code="mapping")
        if kind == "string":
            yield line, kind, re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL)
        elif kind:
            yield line, kind, word
        line += word.count("\n")


def _value(tokens: Iterator[tuple[int, str, str]], line: int) -> Value:
    """What follows '=': one value, or a list in brackets."""
    for _, kind, word in tokens:
        if kind != "mark":
            return _scalar(kind, word)
        if word != "[":
            break
        found: list[int | str] = []
        for _, kind, word in tokens:
            if kind != "mark":
                found.append(_scalar(kind, word))
            elif word == "]":
                return found
            elif word != ",":
                break
        break
    raise Corrupt(f"LVM metadata, line {line}: '=' without a value", code="mapping")


def _scalar(kind: str, word: str) -> int | str:
    if kind == "word" and re.fullmatch(r"-?[0-9]{1,19}", word):
        return int(word)
    return word
