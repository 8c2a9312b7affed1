"""Two readers compared, block by block: what is equal and what differs.

Both sides are read at the same time, in large batches.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import PIECES, Bool, Bytes, Int, bounded, expand, ints, union
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import Reader

BATCH = 8 << 20
"""Bytes read at once from each side: enough for any disk's streaming speed, and no strain on memory."""
SECTOR = 512
"""The smallest unit that a guest writes, and so the unit in which images are compared."""


class Blocks(NamedTuple):
    """Compared blocks as columns: `equal`[i] says of `length` bytes at `offset` in piece number `piece`
    whether both sides hold the same."""

    piece: Int
    offset: Int
    length: Int
    equal: Bool


def compare(
    old: Reader, old_starts: Int, new: Reader, new_starts: Int, lengths: Int, block: int = SECTOR
) -> Iterator[Blocks]:
    """Compare pieces of equal length, each from its start in blocks of `block` bytes (the last may be
    shorter); the pieces in their order."""
    batches = -(-lengths // BATCH)
    bounded(int(batches.sum()), PIECES, f"batches of {BATCH:,} bytes")
    piece, nth = expand(batches)
    skip = nth * BATCH
    length = np.minimum(lengths[piece] - skip, BATCH)
    batch = (np.cumsum(length) - 1) // BATCH
    edges = np.append(np.flatnonzero(np.diff(batch, prepend=-1)), len(batch)).tolist()
    with ThreadPoolExecutor(2) as pool:
        for low, high in pairwise(edges):
            now, at, size = piece[low:high], skip[low:high], length[low:high]
            sides = [pool.submit(reader.read_ranges, starts[now] + at, size)
                     for reader, starts in ((old, old_starts), (new, new_starts))]  # fmt: skip
            count = -(-size // block)
            row, step = expand(count)
            offset = step * block
            width = np.minimum(size[row] - offset, block)
            yield Blocks(
                now[row], at[row] + offset, width, _equal(sides[0].result(), sides[1].result(), width)
            )


def _equal(old: Bytes, new: Bytes, width: Int) -> Bool:
    """For blocks of these widths, one after the other: are they the same on both sides?"""
    word = 8 if len(old) % 8 == 0 and (width % 8 == 0).all() else 1
    same = _words(old, word) == _words(new, word)
    if same.all():
        return np.ones(len(width), bool)
    ends = np.cumsum(width) // word
    result: Bool = np.logical_and.reduceat(same, ends - width // word)
    return result


def _words(data: Bytes, size: int) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.int64) if size == 8 else data


def differing(
    old: Reader,
    new: Reader,
    starts: Int,
    ends: Int,
    block: int = SECTOR,
    tell: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[Int, Int]:
    """(starts, ends) of the blocks in these ranges of two readers that differ, merged; `tell` hears how many
    bytes are done, and of how many."""
    parts: list[tuple[Int, Int]] = []
    done = 0
    for blocks in compare(old, starts, new, starts, ends - starts, block):
        bad = ~blocks.equal
        at = starts[blocks.piece[bad]] + blocks.offset[bad]
        parts.append(union(at, at + blocks.length[bad]))
        done += int(blocks.length.sum())
        tell(done, int((ends - starts).sum()))
    if not parts:
        return ints([]), ints([])
    return union(np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts]))


def padded(reader: Reader, size: int) -> Reader:
    """The same bytes, with zeroes after them up to `size`: what an overlay that is larger than its backing
    file shows."""
    if reader.size >= size:
        return reader
    return _Padded(reader, size)


class _Padded(MappedReader):
    """`reader`, and zeroes after it."""

    def __init__(self, reader: Reader, size: int) -> None:
        super().__init__(size, reader.name, {0: reader}, Rows.of([Row(0, 0, 0, reader.size)]))
        self._reader = reader

    def stored(self) -> tuple[Int, Int]:
        return self._reader.stored()
