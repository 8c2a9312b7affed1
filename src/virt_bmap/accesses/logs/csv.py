"""Tables with a heading, in columns of commas or blanks: biosnoop of BCC, scripts of bpftrace that print one
line for each access, and the like.

    TIME(s)     COMM           PID    DISK    T SECTOR     BYTES  LAT(ms)
    0.000004    supervise      1950   xvda1   W 13092560   4096      0.74

    time_ns,op,offset,length

Columns are known by their names; those that are not needed may be any. Source: BCC
tools/biosnoop_example.txt.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.logs.text import (
    DECIMAL,
    FLUSH,
    READ,
    SECTOR,
    SECTORS,
    TRIM,
    WHOLE,
    WRITE,
    ZERO,
    Lines,
    Match,
    Parsed,
    coded,
    numbered,
    zeros,
)
from virt_bmap.core.arrays import Int

NAME = "a table of accesses (biosnoop, bpftrace, CSV)"
EXPECTED = "time_ns,op,offset,length, or TIME(s) COMM PID DISK T SECTOR BYTES"

TIMES = {"s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}
COLUMNS = {
    "time": ("time", "ts", "timestamp"), "op": ("op", "t", "rwbs", "rwflag", "type", "dir", "r/w"),
    "device": ("disk", "dev", "device"), "sector": ("sector", "lba"), "offset": ("offset",),
    "bytes": ("bytes", "length", "len", "size"),
    "sectors": ("sectors", "nsectors", "nr_sector", "nr_sectors"), "text": ("comm", "process", "command"),
}  # fmt: skip
"""What a column is, by its name without unit: `time(ms)`, `time_ms`."""
PATTERNS = {
    "op": r"[A-Za-z]{1,10}", "device": r"\S+", "sector": SECTORS, "sectors": SECTORS, "offset": DECIMAL,
    "bytes": DECIMAL,
}  # fmt: skip
DIGITS = {10**9: WHOLE, 10**6: r"\d{1,12}", 1000: r"\d{1,15}", 1: r"\d{1,18}"}
"""Times that fit into int64 as nanoseconds, by their unit."""
OPS = {"R": READ, "W": WRITE, "D": TRIM, "T": TRIM, "Z": ZERO, "F": FLUSH}
"""By the first letter: R, read, RS (read, synchronous), ..."""


def recognise(head: list[str]) -> bool:
    return _header(head) is not None


def parse(lines: Lines) -> Parsed:
    """Accesses by their columns. Raises ValueError where a column is missing."""
    header = _header(lines.head(10))
    if header is None:
        raise ValueError(
            "has no line with the names of the columns: op, sector or offset, and bytes or sectors are needed"
        )
    at, columns, comma, unit = header
    found = lines.match(_pattern(columns, comma, unit))
    code, words = found.words("op")
    op = coded([word[:1].upper() for word in words], OPS)[code] if words else code
    offset = found.number("offset") if "offset" in columns else found.number("sector") * SECTOR
    length = found.number("bytes") if "bytes" in columns else found.number("sectors") * SECTOR
    device, devices = found.words("device") if "device" in columns else (zeros(len(op)), [])
    time_ns, notes = (
        (_times(found, unit), ())
        if "time" in columns
        else (numbered(len(op)), ("has no column of times: its accesses are put a microsecond apart",))
    )
    known = np.zeros(len(lines), bool)
    known[found.rows[op >= 0]] = True
    unread = lines.unread(known)
    titles = [number for number in unread[:20].tolist() if at in lines.shown(number)]
    rows = Parsed(
        Accesses(time_ns, zeros(len(op)), op, offset, length),
        found.rows + 1,
        device,
        devices,
        unread[~np.isin(unread, titles)],
        notes,
    )
    return rows.take(op >= 0)


def _header(head: list[str]) -> tuple[str, list[str], bool, int] | None:
    """(the line's beginning, what each column is, are there commas?, nanoseconds of a unit of time) of the
    first line that names the columns needed."""
    for line in head[:10]:
        comma = "," in line
        names = [word.strip().strip('"').lower() for word in (line.split(",") if comma else line.split())]
        parts = [re.fullmatch(r"(.+?)(?:[(_](s|ms|us|ns|bytes)\)?)?", name) for name in names]
        columns = [
            next((what for what, known in COLUMNS.items() if part and part[1] in known), "") for part in parts
        ]
        if "op" in columns and {"sector", "offset"} & set(columns) and {"bytes", "sectors"} & set(columns):
            units = [part[2] for part, what in zip(parts, columns, strict=True) if part and what == "time"]
            return line[:20], columns, comma, TIMES.get(units[0] or "s", 10**9) if units else 1
    return None


def _pattern(columns: list[str], comma: bool, unit: int) -> str:
    """The expression for a row: the first column of each
    meaning is caught, of the others only where they end."""
    parts, seen = [], {""}
    patterns = {**PATTERNS, "time": rf"{DIGITS[unit]}(?:\.\d{{1,20}})?"}
    for what in columns:
        if what in patterns and what not in seen:
            seen.add(what)
            parts.append(rf'"?(?P<{what}>{patterns[what]})"?')
        else:
            parts.append(r"[^,]*" if comma else r"\S.*?" if what == "text" else r"\S+")
    return r"\s*" + (r"\s*,\s*" if comma else r"\s+").join(parts) + r"\s*$"


def _times(found: Match, unit: int) -> Int:
    """Nanoseconds since the log's own start or since 1970, exact: fractions of floating point would round
    those of today."""
    parts = pc.extract_regex(found.text("time"), r"^(?P<whole>\d{1,19})(?P<fraction>\.\d*)?")
    text = pc.if_else(pc.equal(parts.field("fraction"), b""), b"0", parts.field("fraction"))
    fraction = text.cast(pa.large_string()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    times: Int = Match(found.rows, parts).number("whole") * unit + np.rint(fraction * unit).astype(np.int64)
    return times
