"""nbdkit's log filter.

    2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0x0 count=0x1000 ...

Source: nbdkit-log-filter(1), "LOG FILE FORMAT". The requests themselves are read by `watch.accesses`, which
follows a running server's log.
"""

import numpy as np

from virt_bmap.accesses.accesses import LogParser
from virt_bmap.accesses.logs.text import Lines, Parsed, zeros
from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import Int

NAME = "nbdkit's log filter"
EXPECTED = "2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0x0 count=0x1000 ..."

_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} "
_NUMBER = r"0x[0-9a-f]{1,16}"
REQUEST = (
    _DATE + rf"connection=\d{{1,10}} (?:(?:Read|Write|Trim|Zero|Cache) id=\d{{1,18}} offset={_NUMBER} "
    rf"count={_NUMBER}|Flush id=\d{{1,18}})\b"
)
OTHER = (
    _DATE + r"(?:connection=\d{1,10} "
    r")?(?:\.\.\.\w+|Extents|Connect|Disconnect|Preconnect|ListExports|Ready|Fork|Load|Unload|\w+ "
    r"id=)|\s*$"
)
"""Replies, and what moves no bytes."""


def recognise(head: list[str]) -> bool:
    return any("connection=" in line and " id=" in line and line[:2].isdigit() for line in head)


def parse(lines: Lines) -> Parsed:
    """Requests at the times when they came; the log's times have no zone, and are taken as UTC."""
    asked = lines.fits(REQUEST)
    rows = np.flatnonzero(asked).astype(np.int64)
    data = b"".join(lines.text.filter(asked).to_pylist())
    accesses = LogParser().feed(data if data.endswith(b"\n") else data + b"\n")
    good = _good(len(accesses), rows)
    return Parsed(accesses, good + 1, zeros(len(accesses)), [], lines.unread(asked, OTHER))


def _good(count: int, rows: Int) -> Int:
    """The rows of the accesses. Raises ValueError where some request's numbers were beyond all disks."""
    if count != len(rows):
        raise ValueError(
            counted(
                len(rows) - count,
                "of its requests [has a time or offset|have times or offsets] that can't be true",
            )
        )
    return rows
