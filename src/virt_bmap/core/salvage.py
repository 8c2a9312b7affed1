"""Reading on where a disk fails: all that can be had of ranges, and what can't.

Whoever moves bytes reads so; a map reads `Reader.read_ranges`, where each failure is an error.
"""

import numpy as np

from virt_bmap.core import lost
from virt_bmap.core.arrays import EMPTY, Bytes, Int, ints, scatter, union
from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.lost import Lost
from virt_bmap.core.reader import Reader

UNIT = 4096
"""What is given up where reading fails: the sector of most disks, and a page of the others."""
MAX_FAILED = 1024
"""Reads of one batch that may fail before the rest of what
fails is given up whole: each can take a disk seconds."""


def read_known(reader: Reader, offsets: Int, lengths: Int) -> tuple[Bytes, Lost]:
    """Ranges as `read_ranges` gives them, with what of them can't be had, which is zeroes then: missing,
    wrong in every copy, unreadable, beyond the end."""
    offsets, lengths = ints(offsets), ints(lengths)
    inside = np.clip(reader.size - offsets, 0, lengths)
    parts = [Lost.of(union(np.maximum(offsets, reader.size), offsets + lengths), lost.BEHIND)]
    try:
        data, failed = reader.read_ranges(offsets, inside), (EMPTY, EMPTY)
    except (ImageError, Corrupt):
        data, failed = _salvaged(reader, offsets, inside)
    parts.append(Lost.of(failed, lost.UNREADABLE))
    if not reader.whole:
        parts.append(reader.lost(*union(offsets, offsets + inside)).without(*failed))
    if (inside < lengths).any():
        whole = np.zeros(int(lengths.sum()), np.uint8)
        scatter(whole, np.cumsum(lengths) - lengths, inside, data)
        data = whole
    found = Lost.join(parts)
    if len(found.starts):
        data = data if data.flags.writeable else data.copy()
        query, row = found.within(offsets, offsets + lengths)
        place = (np.cumsum(lengths) - lengths)[query] + row.starts - offsets[query]
        scatter(data, place, row.ends - row.starts, np.zeros(int((row.ends - row.starts).sum()), np.uint8))
    return data, found


def _salvaged(reader: Reader, offsets: Int, lengths: Int) -> tuple[Bytes, tuple[Int, Int]]:
    """(bytes, ranges that reading fails for): what fails is read again in halves, down to pieces of UNIT,
    while there were fewer than MAX_FAILED failures."""
    data, failed = np.zeros(int(lengths.sum()), np.uint8), 0
    bad: list[tuple[Int, Int]] = [(EMPTY, EMPTY)]
    todo = [(offsets, lengths, np.cumsum(lengths) - lengths)]
    while todo:
        low, length, place = todo.pop()
        try:
            scatter(data, place, length, reader.read_ranges(low, length))
            continue
        except (ImageError, Corrupt):
            failed += 1
        if failed >= MAX_FAILED or (len(low) == 1 and length[0] <= UNIT):
            bad.append((low, low + length))
            continue
        if len(low) == 1:  # at a border of a unit
            cut = max(
                (int(low[0]) + int(length[0]) // 2) // UNIT * UNIT - int(low[0]),
                min(UNIT, int(length[0]) - 1),
            )
            low, length = ints([low[0], low[0] + cut]), ints([cut, length[0] - cut])
            place = ints([place[0], place[0] + cut])
        half = len(low) // 2
        todo += [(low[part], length[part], place[part]) for part in (slice(half, None), slice(half))]
    return data, union(np.concatenate([pair[0] for pair in bad]), np.concatenate([pair[1] for pair in bad]))
