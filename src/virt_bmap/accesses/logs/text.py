"""Text as columns: lines, and the numbers and words that
a regular expression finds in them, all lines at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.escape import escape
from virt_bmap.model import tables

HEAD = 50
"""Lines that are looked at to find out the format: logs may begin with messages of the program."""
SHOWN = 60
"""Bytes of a malformed line that a message shows."""
DECIMAL, SECTORS, HEX = r"\d{1,18}", r"\d{1,15}", r"0x[0-9a-fA-F]{1,15}"
"""Numbers that fit into int64, those of SECTORS also times 512; no disk reaches further, and longer ones make
the line malformed."""
WHOLE = r"(?:\d{1,9}|[1-8]\d{9})"
"""Seconds that fit into int64 as nanoseconds."""
SECTOR = 512
READ, WRITE, TRIM, ZERO, FLUSH = range(5)


class Parsed(NamedTuple):
    """What a parser finds: accesses, and for each the line (from 1) and the device (a position in `devices`,
    0 where none are named).

    `unread` are the numbers of lines that do not belong to the
    format, `notes` what a person should know about the log.
    """

    accesses: Accesses
    line: Int
    device: Int
    devices: list[str]
    unread: Int
    notes: tuple[str, ...] = ()

    def take(self, keep: np.ndarray) -> "Parsed":
        """Some of the accesses."""
        return self._replace(
            accesses=self.accesses.take(keep), line=self.line[keep], device=self.device[keep]
        )


class AccessLog(NamedTuple):
    """The accesses of one device in order of time.

    Times of logs without dates count from 1970. `line` says where each came from, `unread` which lines were
    left out, of which `example` is the first."""

    source: str
    format: str
    accesses: Accesses
    line: Int
    unread: Int
    example: str
    notes: tuple[str, ...]


class Lines:
    """The lines of a text, which need not be UTF-8."""

    def __init__(self, data: bytes) -> None:
        flat = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(flat == ord("\n")).astype(np.int64) + 1
        self.cut = bool(len(flat)) and (len(ends) == 0 or ends[-1] < len(flat))
        """Does the last line lack its end? Then the program was stopped while it wrote."""
        bounds = np.concatenate([[0], ends, [len(flat)]] if self.cut else [[0], ends]).astype(np.int64)
        self.text = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(bounds) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(data)]
        )

    def __len__(self) -> int:
        return len(self.text)

    def head(self, count: int) -> list[str]:
        """The first lines that are not blank, as text."""
        lines = (line.decode(errors="replace").strip() for line in self.text.slice(0, 4 * count).to_pylist())
        return [line for line in lines if line][:count]

    def shown(self, number: int) -> str:
        """The beginning of line `number` (from 1), escaped and quoted."""
        return f"'{escape(self.text[int(number) - 1].as_py().strip()[:SHOWN])}'"

    def match(self, pattern: str) -> "Match":
        """The lines that a regular expression (RE2, named groups) fits from their beginning."""
        found = pc.extract_regex(self.text, rf"^(?:{pattern})")
        rows = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False)).astype(np.int64)
        return Match(rows, found.take(pa.array(rows)) if len(rows) < len(found) else found)

    def fits(self, pattern: str) -> Bool:
        """Which lines a regular expression fits from their beginning."""
        found: Bool = pc.match_substring_regex(self.text, rf"^(?:{pattern})").to_numpy(zero_copy_only=False)
        return found

    def unread(self, known: Bool, other: str = r"\s*$") -> Int:
        """The numbers of the lines that are neither `known`
        nor fit `other`; not a last one that was cut off."""
        rows = np.flatnonzero(~known)
        rows = rows[
            ~pc.match_substring_regex(self.text.take(pa.array(rows)), rf"^(?:{other})").to_numpy(
                zero_copy_only=False
            )
        ]
        numbers: Int = rows[rows < len(self) - self.cut].astype(np.int64) + 1
        return numbers


class Match(NamedTuple):
    """Lines `rows` (from 0) and what the named groups of the expression caught in them."""

    rows: Int
    found: pa.StructArray

    def known(self, count: int) -> Bool:
        """Which of `count` lines these are."""
        flags = np.zeros(count, bool)
        flags[self.rows] = True
        return flags

    def text(self, name: str) -> pa.Array:
        """A group as large_binary; empty where it caught nothing."""
        return self.found.field(name)

    def number(self, name: str) -> Int:
        """A group of decimal digits, or of 0x and hexadecimal ones, as int64; -1 where it caught nothing."""
        text = self.found.field(name).view(pa.large_string())
        return tables.integers(
            pa.table({name: pc.cast(pc.if_else(pc.equal(text, ""), None, text), pa.int64())}), name
        )

    def seconds(self, name: str) -> Int:
        """A group like 12.345678 as nanoseconds, exact to the
        last of nine digits; a point or comma may be missing."""
        parts = pc.extract_regex(
            self.found.field(name), rf"^(?P<whole>{WHOLE})(?:[.,](?P<rest>\d{{0,9}})\d*)?$"
        )
        rest = pc.binary_replace_slice(
            pc.utf8_rpad(parts.field("rest").view(pa.large_string()), 9, "0").view(pa.large_binary()),
            9,
            9,
            b"",
        )
        whole = Match(self.rows, parts).number("whole")
        result: Int = whole * 10**9 + pc.cast(rest.view(pa.large_string()), pa.int64()).to_numpy(
            zero_copy_only=False
        )
        return result

    def words(self, name: str) -> tuple[Int, list[str]]:
        """A group of few different words: (position of each line's word in the list, the list in order of
        appearance)."""
        codes = pc.dictionary_encode(self.text(name))
        return codes.indices.to_numpy(zero_copy_only=False).astype(np.int64), [
            escape(word) for word in codes.dictionary.to_pylist()
        ]


def coded(words: list[str], meaning: dict[str, int]) -> Int:
    """For each word its meaning, -1 where it has none."""
    return np.array([meaning.get(word, -1) for word in words], np.int64)


def numbered(count: int) -> Int:
    """Times for a log without any: a microsecond from one access to the next, so that their order is kept."""
    return np.arange(count, dtype=np.int64) * 1000


def zeros(count: int) -> Int:
    """A column of zeroes."""
    return np.zeros(count, np.int64)


def alternatives(words: Sequence[str]) -> str:
    """A group that fits any of these words."""
    return f"(?:{'|'.join(words)})"
