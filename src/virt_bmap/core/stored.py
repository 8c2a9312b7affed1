"""What is really stored of a volume, and what may be held of it for its sake.

A number of a disk can claim tables of terabytes that lie in a hole, or over each other. So what is claimed is
measured by what is stored, and what is read of a table that may be mostly holes is read without them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, Intervals, ints, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layers import bottom

if TYPE_CHECKING:
    from virt_bmap.core.reader import Reader

PIECE = 4096
"""Stretches that may hold something are read in whole pieces of so many bytes."""
HOLE = 64 << 10
"""Holes that are shorter are read with what lies around
them: each piece costs as much as some thousand bytes."""
ROW = 64
"""Bytes that a row of a table of ours takes, about: for those who make many of few bytes."""
CLAIM_FREE, CLAIM_STORED = 64 << 20, 4
"""Bytes of tables that a volume may make us hold at once: this many, and so many times what is really stored
of it. What claims more lies in holes, or over itself."""


def stored_bytes(reader: "Reader") -> int:
    """At most so many bytes are stored of this: those of all that lies below, if it has no own.

    Layers that show one byte a thousand times have it once.
    """
    if reader.stored_most is None:
        if reader.below:
            reader.stored_most = min(reader.size, sum(stored_bytes(one) for one in bottom(reader)))
        else:
            starts, ends = reader.stored()
            reader.stored_most = int((ends - starts).sum())
    return reader.stored_most


def afford(reader: "Reader", claimed: int, what: str) -> None:
    """Corrupt where `what` claims so many bytes of tables,
    to be held together, and nothing like that is stored.

    Every number of a disk that sets the size of an array passes here first, unless what was read has as
    many records. What is stored is asked only where much is claimed: a file's holes cost a call each.
    """
    if claimed > CLAIM_FREE and claimed > CLAIM_FREE + CLAIM_STORED * stored_bytes(reader):
        raise Corrupt(
            f"{reader.name}: {what} would take {claimed:,} bytes, but only {stored_bytes(reader):,} are "
            "stored: they lie in holes, or overlap",
            None,
            "holes",
        )


def allowance(reader: "Reader") -> int:
    """Bytes of tables that others point to, in all.

    Many can point to the same bytes, which are then read for each: together no more than the volume has,
    nor than `afford` takes.
    """
    if reader.size <= CLAIM_FREE:
        return reader.size
    return min(reader.size, CLAIM_FREE + CLAIM_STORED * stored_bytes(reader))


def spans(reader: "Reader", starts: Int, lengths: Int) -> tuple[Int, Int]:
    """(starts, ends) of what may hold anything but zeroes of the stream that these ranges make one after
    the other; gaps are at least HOLE long.

    What is stored is asked only where the ranges are long together.
    """
    reader.check_inside(starts, lengths)
    place, count = np.cumsum(lengths) - lengths, int(lengths.sum())
    if count <= CLAIM_FREE:
        return union(ints(0), ints(count))
    stored = Intervals(*reader.stored())
    row, part = stored.overlaps(starts, starts + lengths)
    low = np.maximum(starts[row], stored.starts[part])
    high = np.minimum((starts + lengths)[row], stored.ends[part])
    afford(reader, int((high - low).sum()), "what is read of a table")
    move = (place - starts)[row]
    return union((low + move) // PIECE * PIECE, np.minimum(count, -(-(high + move) // PIECE) * PIECE), HOLE)


def held(reader: "Reader", starts: Int, lengths: Int, most: int) -> Iterator[tuple[int, Bytes]]:
    """(place in the stream that these ranges make, bytes) of what may hold anything but zeroes, in order,
    up to `most` bytes each. What is left out is zeroes.

    For tables and bitmaps whose size a number of the disk
    says, where zeroes say little: holes cost nothing.
    """
    for low, high in zip(*(side.tolist() for side in spans(reader, starts, lengths)), strict=True):
        yield from _pieces(reader, starts, lengths, low, high, most)


def whole(reader: "Reader", starts: Int, lengths: Int, most: int) -> Iterator[tuple[int, Bytes]]:
    """The same with its holes, where zeroes say something. Who asks has looked whether it can be afforded."""
    return _pieces(reader, starts, lengths, 0, int(lengths.sum()), most)


def _pieces(
    reader: "Reader", starts: Int, lengths: Int, low: int, high: int, most: int
) -> Iterator[tuple[int, Bytes]]:
    """The bytes [low, high) of the stream."""
    ends = np.cumsum(lengths)
    place = ends - lengths
    for at in range(low, high, most):
        end = min(at + most, high)
        mine = slice(int(np.searchsorted(ends, at, "right")), int(np.searchsorted(place, end)))
        begin, stop = np.maximum(place[mine], at), np.minimum(ends[mine], end)
        yield at, reader.read_ranges(starts[mine] + begin - place[mine], stop - begin)
