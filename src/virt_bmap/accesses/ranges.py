"""Lists of byte ranges that other tools write: what was bad, changed or allocated, as arrays.

Each format has a small parser of its own; which one reads a file is found by its content. Logs of accesses
are read by `virt_bmap.accesses.logs`. Sources: GNU ddrescue manual, "Mapfile structure"; nbdinfo(1), --map;
qemu-img(1), map; badblocks(8), -o.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.errors import MapError, UsageError
from virt_bmap.model.tables import OPS

LIMIT = 1 << 63
"""Offsets are int64, as in all tables."""
BAD = "-*/"
"""What ddrescue could not read: bad sectors, and what failed but was not trimmed or scraped yet."""
STATUSES = "?*/-+"
"""ddrescue's statuses of blocks: non-tried, non-trimmed, non-scraped, bad-sector, finished."""
CURRENT = STATUSES + "FG"
"""What its first line may say that it was doing; F and G: filling, generating."""
ROUNDING = 4096
"""Tools count in blocks: the last range may reach this far
beyond the end of a disk that does not fill its last one."""
KNOWN = (
    "a ddrescue map, offset,length lines, nbdinfo --map or qemu-img map --output=json output, a badblocks "
    "list, or a log of accesses (blkparse, fio, nbdkit, QEMU)"
)

Entry = tuple[int, int, int]
"""(line or entry number, first byte, bytes)"""


class RangeList(NamedTuple):
    """Ranges [starts[i], ends[i]) in bytes, in the order of the file; `at` says in which of its lines or
    entries (`unit`) each was."""

    source: str
    format: str
    unit: str
    starts: Int
    ends: Int
    at: Int

    def inside(self, size: int, device: str) -> tuple[Int, Int]:
        """The ranges cut to a disk of `size` bytes.

        MapError where one lies beyond its end: then the list is another disk's.
        """
        bad = np.flatnonzero((self.starts >= size) | (self.ends > size + ROUNDING))
        if len(bad):
            first = int(bad[0])
            raise MapError(
                f"{self.source}: {self.unit} {self.at[first]}: bytes "
                f"{self.starts[first]:#x}-{self.ends[first]:#x} lie beyond the end of {device}, which has "
                f"{size:#x} bytes: it is a list of another disk"
            )
        return self.starts, np.minimum(self.ends, size)


def parse(
    data: bytes,
    source: str,
    status: str | None = None,
    block_size: int | None = None,
    op: str | None = None,
    device: str | None = None,
) -> RangeList:
    """The ranges in a file's content; `source` is its name for messages.

    `status` says which of ddrescue's blocks are meant, `block_size` what a badblocks list counts in, `op`
    which accesses of a log (None: all that have bytes), `device` whose. Raises MapError, with the line, where
    the content is malformed.
    """
    found = _of_log(data, source, op, device) or _of_list(data, source, status, block_size)
    for option, given, meant in (
        ("--status", status, DDRESCUE),
        ("--block-size", block_size, BADBLOCKS),
        ("--op", op, LOG),
        ("--device", device, LOG),
    ):
        if given is not None and not found.format.startswith((meant, EMPTY)):
            raise UsageError(f"{option} is for {meant}, but {source} is {found.format}")
    return found


def _of_log(data: bytes, source: str, op: str | None, device: str | None) -> RangeList | None:
    """The accesses of a log; None where it is not a log."""
    from virt_bmap.accesses import logs  # slow to import, and only commands with --ranges come here
    from virt_bmap.accesses.logs.text import HEAD, Lines

    head = Lines(data).head(HEAD)
    if data.lstrip()[:1] in (b"[", b"{") or not any(module.recognise(head) for module in logs.LOGS):
        return None
    log = logs.parse(data, source, device=device)
    wanted = log.accesses.length > 0
    if op is not None:
        wanted &= log.accesses.op == OPS.index(op)
    start, length = log.accesses.offset[wanted], log.accesses.length[wanted]
    return RangeList(source, f"{LOG} ({log.format})", "line", start, start + length, log.line[wanted])


def _of_list(data: bytes, source: str, status: str | None, block_size: int | None) -> RangeList:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MapError(f"{source}: byte {error.start:#x} is not text; expected {KNOWN}") from error
    if text.lstrip()[:1] in ("[", "{"):
        name, unit, entries = "a JSON list of extents", "entry", _json(text, source)
    else:
        lines = [(number, line.split("#", 1)[0].strip()) for number, line in enumerate(text.split("\n"), 1)]
        lines = [(number, line) for number, line in lines if line]
        name = _format_of(lines, source, "GNU ddrescue" in text[:200])
        unit = "line"
        entries = _entries(name, lines, source, status, block_size)
    return _ranges(source, name, unit, entries)


DDRESCUE, CSV, NBDINFO, BADBLOCKS, LOG, EMPTY = (
    "a ddrescue map", "offset,length lines", "nbdinfo --map output", "a list of block numbers",
    "a log of accesses", "empty",
)  # fmt: skip


def _format_of(lines: list[tuple[int, str]], source: str, says_ddrescue: bool) -> str:
    """Which format the first line that is not a comment belongs to."""
    if not lines:
        if says_ddrescue:
            raise MapError(f"{source}: is a ddrescue map with nothing but comments")
        return EMPTY
    number, line = lines[0]
    words = line.split()
    if says_ddrescue or (len(words) in (2, 3) and words[1] in tuple(CURRENT)):
        return DDRESCUE
    if "," in line and len(words) <= 2:
        return CSV
    if len(words) == 1 and words[0].isdigit():
        return BADBLOCKS
    if line.startswith("Offset") and "Mapped to" in line:
        raise MapError(
            f"{source}: is qemu-img map's table for people, which "
            "leaves out everything but data in files: use --output=json"
        )
    if len(words) >= 3 and words[1].endswith("%"):
        raise MapError(
            f"{source}: is the output of nbdinfo --map --totals, which has no offsets: use --map alone"
        )
    if len(words) >= 3 and all(word.isdigit() for word in words[:3]):
        return NBDINFO
    raise MapError(f"{source}: line {number}: {line[:60]!r} is not of a known format; expected {KNOWN}")


def _entries(
    name: str, lines: list[tuple[int, str]], source: str, status: str | None, block_size: int | None
) -> Iterator[Entry]:
    if name == DDRESCUE:
        return _ddrescue(lines, source, BAD if status is None else _statuses(status))
    if name == CSV:
        return _csv(lines, source)
    if name == NBDINFO:
        return _nbdinfo(lines, source)
    if name == BADBLOCKS:
        if block_size is None:
            raise UsageError(
                f"{source}: is a list of block numbers: say with --block-size how many bytes a block has "
                "(without -b, badblocks counts blocks of 1024)"
            )
        return _badblocks(lines, source, block_size)
    return iter(())


def _ranges(source: str, name: str, unit: str, entries: Iterator[Entry]) -> RangeList:
    at, starts, lengths = [], [], []
    for number, start, length in entries:
        if start + length >= LIMIT:
            raise MapError(
                f"{source}: {unit} {number}: the range ends beyond byte 2**63, where no disk reaches"
            )
        if length:
            at.append(number)
            starts.append(start)
            lengths.append(length)
    return RangeList(source, name, unit, ints(starts), ints(starts) + ints(lengths), ints(at))


def _malformed(source: str, number: int, line: str, expected: str) -> MapError:
    return MapError(f"{source}: line {number}: {line[:60]!r} is not {expected}")


# ---- GNU ddrescue ------------------------------------------------------------------------------------------

_NUMBER = r"(?:0[xX][0-9a-fA-F]{1,16}|[0-9]{1,22})"
"""No longer than 64 bits are in octal: Python refuses to read numbers of thousands of digits."""
_BLOCK = re.compile(rf"({_NUMBER})\s+({_NUMBER})\s+([{re.escape(STATUSES)}])")
_CURRENT = re.compile(rf"{_NUMBER}\s+[{re.escape(CURRENT)}](?:\s+[0-9]+)?")


def _statuses(text: str) -> str:
    unknown = sorted(set(text) - set(STATUSES))
    if unknown or not text:
        raise UsageError(f"--status takes letters of {STATUSES}, as ddrescue writes them; given: {text!r}")
    return text


def _ddrescue(lines: list[tuple[int, str]], source: str, wanted: str) -> Iterator[Entry]:
    number, line = lines[0]
    if not _CURRENT.fullmatch(line):
        raise _malformed(source, number, line, "the status line of a ddrescue map: position, status, pass")
    for number, line in lines[1:]:
        match = _BLOCK.fullmatch(line)
        if not match:
            raise _malformed(
                source, number, line, f"a block of a ddrescue map: position, size, and one of {STATUSES}"
            )
        if match[3] in wanted:
            yield number, _c_number(match[1], source, number), _c_number(match[2], source, number)


def _c_number(text: str, source: str, line: int) -> int:
    """A number as in C: 0x hexadecimal, a leading 0 octal."""
    try:
        return int(text, 16 if text[:2] in ("0x", "0X") else 8 if text[0] == "0" else 10)
    except ValueError:
        raise _malformed(source, line, text, "a number as in C (a leading 0 is octal)") from None


# ---- the others --------------------------------------------------------------------------------------------

_PAIR = re.compile(rf"({_NUMBER})\s*,\s*({_NUMBER})")
_HEADER = re.compile(r"(?:offset|start)\s*,\s*(?:length|size)", re.IGNORECASE)


def _csv(lines: list[tuple[int, str]], source: str) -> Iterator[Entry]:
    for number, line in lines[1:] if _HEADER.fullmatch(lines[0][1]) else lines:
        match = _PAIR.fullmatch(line)
        if not match:
            raise _malformed(
                source, number, line, "offset,length: two numbers of bytes, decimal or 0x hexadecimal"
            )
        yield number, *(int(text, 16 if text[1:2] in ("x", "X") else 10) for text in match.groups())  # type: ignore[misc]


def _badblocks(lines: list[tuple[int, str]], source: str, size: int) -> Iterator[Entry]:
    if size <= 0:
        raise UsageError("--block-size must be more than 0 bytes")
    for number, line in lines:
        if not (line.isascii() and line.isdigit() and len(line) < 20):
            raise _malformed(source, number, line, "a block number, one a line")
        yield number, int(line) * size, size


_EXTENT = re.compile(r"([0-9]{1,19})\s+([0-9]{1,19})\s+([0-9]{1,19})(?:\s+(.*))?")


def _nbdinfo(lines: list[tuple[int, str]], source: str) -> Iterator[Entry]:
    for number, line in lines:
        match = _EXTENT.fullmatch(line)
        if not match:
            raise _malformed(
                source, number, line, "an extent of nbdinfo --map: offset, length, type, description"
            )
        if _means(int(match[3]), match[4] or ""):
            yield number, int(match[1]), int(match[2])


WORDS = {
    "data": True,
    "dirty": True,
    "local": True,
    "hole": False,
    "zero": False,
    "hole,zero": False,
    "clean": False,
    "absent": False,
}
"""The descriptions of base:allocation, of dirty bitmaps
and of allocation depths: is that what one asks about?"""


def _means(type: int, description: str) -> bool:
    """Is an extent data, dirty, or allocated in the image itself? Of contexts that nbdinfo has no words for,
    every type but 0."""
    return WORDS.get(description.strip(), type != 0 and not description.startswith("backing depth"))


def _json(text: str, source: str) -> Iterator[Entry]:
    """nbdinfo --map --json and qemu-img map --output=json: an array of objects."""
    try:
        found = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise MapError(f"{source}: line {line}: is not JSON: {getattr(error, 'msg', error)}") from error
    except RecursionError:
        raise MapError(f"{source}: line 1: is nested too deeply to be a list of extents") from None
    if not isinstance(found, list):
        raise MapError(
            f"{source}: line 1: is a JSON object; expected the array of "
            "extents of nbdinfo --map --json or qemu-img map --output=json"
        )
    for number, extent in enumerate(found, 1):
        entry = _json_entry(extent)
        if entry is None:
            raise MapError(
                f"{source}: entry {number}: {json.dumps(extent)[:80]} is not an extent of nbdinfo --map "
                "--json (offset, length, type) or qemu-img map --output=json (start, length, depth, data)"
            )
        wanted, start, length = entry
        if wanted:
            yield number, start, length


def _json_entry(extent: Any) -> tuple[bool, int, int] | None:
    """(is it meant?, first byte, bytes); None where it is not an extent.

    Of a qemu-img map: data in the image itself, not in its backing files.
    """
    if not isinstance(extent, dict):
        return None
    if "start" in extent:
        start, length, depth = (_natural(extent.get(key)) for key in ("start", "length", "depth"))
        meant = extent.get("data")
        return (
            (meant and depth == 0, start, length)
            if isinstance(meant, bool) and min(start, length, depth) >= 0
            else None
        )
    start, length, type = (_natural(extent.get(key)) for key in ("offset", "length", "type"))
    words = extent.get("description", "")
    return (
        (_means(type, words), start, length)
        if isinstance(words, str) and min(start, length, type) >= 0
        else None
    )


def _natural(value: Any) -> int:
    """The number; -1 where it is not a number."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else -1
