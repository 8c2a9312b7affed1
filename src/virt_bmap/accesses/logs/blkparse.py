"""blkparse's standard output, of a recording by blktrace.

      8,0    3        1     0.000000000   697  D   W 223490 + 8 [kjournald]

Sources: blkparse(1), "TRACE ACTIONS" and "OUTPUT DESCRIPTION AND FORMATTING"; blktrace blkparse_fmt.c (1.2).
Offsets are sectors of 512 bytes of the device traced; those of a partition are remapped to the whole disk by
the time they are issued.
"""

import numpy as np

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.logs.text import FLUSH, READ, SECTOR, SECTORS, TRIM, WRITE, Lines, Parsed, zeros

NAME = "blkparse's output"
EXPECTED = "8,0    3        1     0.000000000   697  D   W 223490 + 8 [kjournald]"

_FRONT = r"\s*(?P<device>\d{1,4},\d{1,7})\s+\d+\s+\d+\s+(?P<time>\d{1,9}\.\d{9})\s+\d+\s+"
REQUEST = (
    _FRONT
    + r"(?P<action>[DQC])\s+(?P<kind>[A-Z]{1,8})"
    + rf"(?:\s+(?P<offset>{SECTORS})(?:\s+\+\s+(?P<length>{SECTORS}))?)?(?:\s+[\[(<].*)?\s*$"
)
OTHER = _FRONT.replace("?P<device>", "").replace("?P<time>", "") + r"\w+\s|\s*$"
SUMMARY = r"(?:CPU\d+ |Total )\("
"""What follows is no more than sums."""
ACTIONS = ("D", "Q", "C")
"""Issued to the drive, queued, completed: each access goes through all of them and counts once, by the first
of these that was traced."""


def recognise(head: list[str]) -> bool:
    return any(
        len(words := line.split()) > 6 and "," in words[0] and words[3].count(".") == 1 and words[5].isalpha()
        for line in head
    )


def parse(lines: Lines) -> Parsed:
    """Requests as they were issued to the drive."""
    found = lines.match(REQUEST)
    code, words = found.words("action")
    action = next((words.index(word) for word in ACTIONS if word in words), 0)
    code_of_kind, kinds = found.words("kind")
    op = np.array([_op(kind) for kind in kinds], np.int64)[code_of_kind] if kinds else code_of_kind
    offset, length = (np.maximum(found.number(name), 0) * SECTOR for name in ("offset", "length"))
    op = np.where((op == WRITE) & (length == 0), FLUSH, op)  # FWS without sectors is a flush
    device, devices = found.words("device")
    accesses = Accesses(found.seconds("time"), zeros(len(op)), op, offset, length)
    rows = Parsed(accesses, found.rows + 1, device, devices, _unread(lines, found.known(len(lines))))
    return rows.take((code == action) & (op >= 0))


def _op(kind: str) -> int:
    """The RWBS field: D discard, W write, R read, F flush (or force unit access, after a W)."""
    return next(
        (op for letter, op in (("D", TRIM), ("W", WRITE), ("R", READ), ("F", FLUSH)) if letter in kind), -1
    )


def _unread(lines: Lines, known: np.ndarray) -> np.ndarray:
    sums = np.flatnonzero(lines.fits(SUMMARY))
    unread = lines.unread(known, OTHER)
    return unread[unread <= sums[0]] if len(sums) else unread
