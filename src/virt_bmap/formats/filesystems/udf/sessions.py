"""Where the sessions of a disc begin, and which of them is shown.

A disc that was written on in one volume has a virtual allocation table for each time that it was closed; each
names the one before it. What they show counts as sessions where the disc has no other.

Sources: OSTA UDF 2.60, 2.2.11 (virtual allocation tables), 6.10.3 (several sessions); Linux fs/udf/super.c.
"""

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, ints
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held
from virt_bmap.formats.common import sessions
from virt_bmap.formats.filesystems.udf.superblock import (
    ANCHOR,
    ANCHOR_AT,
    SECTOR,
    TAG,
    LogicalVolume,
    recognised,
    tagged,
)

MAX_SESSIONS = 4096
"""Of a disc; on a DVD each takes 4 MB or more."""


def wanted(reader: Reader) -> tuple[int, int]:
    """(the byte at which the session begins that is to be shown, which virtual allocation table it is by: 0
    the newest)."""
    asked = sessions.asked(reader)
    if asked is None or asked.sector is not None:
        return sessions.begin(reader, asked, list), 0
    found = starts(reader)
    if recognised(reader)[2]:
        from virt_bmap.formats.filesystems.iso9660 import sessions as of_iso9660

        found = max(found, of_iso9660.starts(reader), key=len)
    return (sessions.begin(reader, asked, lambda: found), 0) if len(found) > 1 else (0, asked.number)


def features(disk: LogicalVolume) -> list[str]:
    """The revision, and what a map has to say of the session that it shows."""
    revision = [f"UDF{disk.revision >> 8:x}.{disk.revision & 0xFF:02x}"] if disk.revision else []
    virtual = [f"{sessions.OLDER}{disk.virtual // disk.block_size}"] if disk.virtual else []
    return revision + sessions.feature(disk.start) + virtual


def later(reader: Reader, disk: LogicalVolume) -> Int:
    """Where sessions begin that were written after this one, as far as they are near."""
    start = -(-disk.end // SECTOR) * SECTOR
    found = _sessions_in(reader, start, sessions.MAX_AFTER)
    return found[found >= start]


def starts(reader: Reader) -> list[int | None]:
    """Where all sessions begin, in bytes, in the order in which they were written."""
    return list(_sessions_in(reader, 0, reader.size).tolist())


def _sessions_in(reader: Reader, start: int, length: int) -> Int:
    """The first bytes of sessions whose first anchor lies in this range: it says itself where it lies, and
    the session's recognition sequence is where it should be."""
    count = max(0, min(length, reader.size - start) // SECTOR)
    found = [EMPTY]
    for at, raw in held(reader, ints(start), ints(count * SECTOR), sessions.MAX_AFTER):
        skip = -at % SECTOR
        data = raw[skip : skip + (len(raw) - skip) // SECTOR * SECTOR].reshape(-1, SECTOR)[:, : TAG.itemsize]
        tag = records(data, TAG)
        sector = (start + at + skip) // SECTOR + np.arange(len(data))
        good = (tag["TagIdentifier"] == ANCHOR) & (tag["TagLocation"] == sector) & tagged(data)
        found.append((sector[good] - ANCHOR_AT) * SECTOR)
    begin = np.concatenate(found)
    begin = begin[begin >= 0][:MAX_SESSIONS]
    return ints([at for at in begin.tolist() if recognised(reader, at)[0]])
