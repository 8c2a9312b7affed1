"""fio: what it writes with write_iolog (versions 2 and 3),
and latency, bandwidth and IOPS logs with log_offset=1.

    fio version 3 iolog
    129 /dev/vdb read 61440 4096

    0, 233314, 0, 4096, 61440, 0            time (ms), value, direction, bytes, offset, priority

Sources: fio(1), "TRACE FILE FORMAT" and "LOG FILE FORMATS"
(3.33); iolog.c there: version 3 counts microseconds.
"""

import numpy as np
import pyarrow.compute as pc

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.logs.text import (
    DECIMAL,
    FLUSH,
    READ,
    TRIM,
    WRITE,
    Lines,
    Parsed,
    alternatives,
    coded,
    numbered,
    zeros,
)

NAME = "fio's log"
EXPECTED = "0, 233314, 0, 4096, 61440, 0"

OPS = {"read": READ, "write": WRITE, "trim": TRIM, "sync": FLUSH, "datasync": FLUSH}
IOLOG = (
    rf"(?:(?P<time>\d{{1,15}}) )?(?P<device>\S.*?) (?P<op>wait|{alternatives(list(OPS))})(?: "
    rf"(?P<offset>{DECIMAL})(?: (?P<length>{DECIMAL}))?)?\s*$"
)
IOLOG_OTHER = r"fio version [23] iolog\s*$|(?:\d+ )?\S.*? (?:add|open|close)\s*$|\s*$"
VALUES = (
    rf"(?P<time>\d{{1,12}}), -?\d{{1,18}}, (?P<op>[012]), (?P<length>{DECIMAL}), "
    rf"(?P<offset>{DECIMAL})(?:, (?:0x)?[0-9a-f]+)+\s*$"
)
NO_OFFSETS = r"\d+, -?\d+, [012], \d+, (?:0x)?[0-9a-f]+\s*$"


def recognise(head: list[str]) -> bool:
    return bool(head) and (
        head[0].startswith("fio version") or (head[0].count(", ") in (4, 5, 6) and head[0][0].isdigit())
    )


def parse(lines: Lines) -> Parsed:
    """Accesses to the files, by file; of the logs of values, to the only one that there is.

    Raises ValueError where a log has no offsets.
    """
    head = lines.head(1)
    if head and head[0].startswith("fio version"):
        if head[0] not in ("fio version 2 iolog", "fio version 3 iolog"):
            raise ValueError(f"line 1: {head[0]!r}: only versions 2 and 3 of fio's iolog are read")
        return _iolog(lines, head[0] == "fio version 3 iolog")
    found = lines.match(VALUES)
    if not len(found.rows) and lines.fits(NO_OFFSETS).any():
        raise ValueError("is a log of fio without offsets: run fio with log_offset=1")
    direction, words = found.words("op")
    op = coded(words, {"0": READ, "1": WRITE, "2": TRIM})[direction] if words else direction
    accesses = Accesses(
        found.number("time") * 10**6, zeros(len(op)), op, found.number("offset"), found.number("length")
    )
    return Parsed(accesses, found.rows + 1, zeros(len(op)), [], lines.unread(found.known(len(lines))))


def _iolog(lines: Lines, timed: bool) -> Parsed:
    found = lines.match(IOLOG if timed else IOLOG.removeprefix(r"(?:(?P<time>\d{1,15}) )?"))
    code, words = found.words("op")
    op = coded(words, OPS)[code] if words else code
    offset, length = np.maximum(found.number("offset"), 0), np.maximum(found.number("length"), 0)
    waited = np.where(op < 0, offset, 0)
    notes: tuple[str, ...] = ()
    if timed:
        time_ns = found.number("time") * 1000
    elif waited.any():
        time_ns = np.cumsum(waited) * 1000
    else:
        time_ns = numbered(len(op))
        notes = ("has no times (version 2 of fio's iolog): its accesses are put a microsecond apart",)
    moves = (op >= 0) & (op != FLUSH)
    whole = (
        (op == FLUSH)
        | ((op < 0) & ~np.asarray(timed))
        | pc.not_equal(found.text("length"), b"").to_numpy(zero_copy_only=False)
    )
    device, devices = found.words("device")
    accesses = Accesses(time_ns, zeros(len(op)), op, np.where(moves, offset, 0), np.where(moves, length, 0))
    known = np.zeros(len(lines), bool)
    known[found.rows[whole]] = True
    rows = Parsed(accesses, found.rows + 1, device, devices, lines.unread(known, IOLOG_OTHER), notes)
    return rows.take(whole & (op >= 0))
