"""Content that a filesystem keeps compressed, as a reader of what it unpacks to.

What is unpacked as one is a *unit*. All units, one after the other, are the bytes of a reader, so whoever
reads content needs no word of compression: a piece of a file lies in the volume, or in here.
"""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from virt_bmap.core import lost
from virt_bmap.core.arrays import Bytes, Int, expand
from virt_bmap.core.checked import CheckedReader
from virt_bmap.core.lost import Lost
from virt_bmap.core.reader import Packed, Reader
from virt_bmap.core.salvage import read_known

Codec = Callable[[bytes, int], bytes]
"""Packed bytes, and how many bytes they become at most, to what they were. Raises ValueError, in words, where
they are damaged."""

BATCH = 16 << 20
"""Bytes, packed or unpacked, of the units that are in memory together: more than one only while they fit."""


class Units(NamedTuple):
    """What is packed, as columns: `size` bytes come out of each, `codec` is its number among the codecs.

    Unit i lies in the ranges [first[i], first[i + 1]) of `starts` and `lengths`, bytes of the volume.
    """

    size: Int
    codec: Int
    first: Int
    starts: Int
    lengths: Int


class UnpackedReader(CheckedReader):
    """The units that lie in a volume, unpacked, one after the other; those that are damaged are `lost`."""

    def __init__(self, packed: Reader, units: Units, codecs: Sequence[Codec]) -> None:
        super().__init__(int(units.size.sum()), packed.name)
        self.below = [packed]
        self.place = np.cumsum(units.size) - units.size
        """Where each unit begins."""
        self._packed, self._units, self._codecs = packed, units, codecs
        self._weight = np.maximum(units.size, np.add.reduceat(units.lengths, units.first[:-1]))
        self._last: dict[int, bytes | int] = {}
        """The units of the last batch: their bytes, or a number of lost.REASONS."""

    def _look(self, offsets: Int, lengths: Int) -> tuple[Bytes, Lost]:
        result = np.zeros(int(lengths.sum()), np.uint8)
        first = np.searchsorted(self.place, offsets, "right") - 1
        row, step = expand(np.searchsorted(self.place, offsets + lengths, "left") - first)
        unit = first[row] + step
        low = np.maximum(offsets[row], self.place[unit])
        high = np.minimum((offsets + lengths)[row], self.place[unit] + self._units.size[unit])
        to = (np.cumsum(lengths) - lengths)[row] + low - offsets[row]
        bad: list[tuple[int, int, int]] = []
        for needed in self._batches(np.unique(unit)):
            found = self._unpacked(needed)
            mine = slice(*np.searchsorted(unit, [needed[0], needed[-1] + 1]).tolist())
            columns = (unit[mine], low[mine], high[mine], to[mine], (low - self.place[unit])[mine])
            for number, start, end, at, skip in zip(*(column.tolist() for column in columns), strict=True):
                data = found[number]
                if isinstance(data, int):
                    bad.append((start, end, data))
                else:
                    result[at : at + end - start] = np.frombuffer(data, np.uint8, end - start, skip)
        return result, Lost(*np.array(bad, np.int64).reshape(-1, 3).T)

    def _batches(self, units: Int) -> list[Int]:
        """Units that are unpacked together."""
        group = np.cumsum(self._weight[units]) // BATCH
        edges = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(units)).tolist()
        return [units[low:high] for low, high in pairwise(edges)]

    def _unpacked(self, units: Int) -> dict[int, bytes | int]:
        """Each of these units, and no others: what it unpacks to, or why it does not."""
        known = {number: self._last[number] for number in units.tolist() if number in self._last}
        new = units[~np.isin(units, np.fromiter(known, np.int64, len(known)))]
        first, units_of = self._units.first, self._units
        count = first[new + 1] - first[new]
        row, step = expand(count)
        piece = first[new][row] + step
        length = units_of.lengths[piece]
        data, gone = read_known(self._packed, units_of.starts[piece], length)
        which, told = gone.within(units_of.starts[piece], units_of.starts[piece] + length)
        why = np.full(len(new), -1, np.int64)
        why[row[which]] = told.why
        ends = np.cumsum(np.add.reduceat(length, np.cumsum(count) - count)) if len(new) else count
        starts = np.append(0, ends)[:-1]
        work = zip(
            *(column.tolist() for column in (starts, ends, units_of.size[new], units_of.codec[new], why)),
            strict=True,
        )
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(lambda unit: self._unpack(data, *unit), work)
            self._last = known | dict(zip(new.tolist(), done, strict=True))
        return self._last

    def _unpack(self, data: Bytes, start: int, end: int, size: int, codec: int, why: int) -> bytes | int:
        if why >= 0:
            return why
        try:
            found = self._codecs[codec](data[start:end].tobytes(), size)
        except ValueError:
            return lost.DAMAGED
        return found if len(found) == size else lost.DAMAGED


class PackedRows(NamedTuple):
    """Content of files as columns, each row a part of one unit, which lies in one piece.

    Bytes [file_offset, file_offset + length) of a file are those from `skip` on of what bytes
    [start, start + stored) of the volume unpack to, by the codec of this number.
    """

    inode: Int
    file_offset: Int
    length: Int
    skip: Int
    start: Int
    stored: Int
    codec: Int


def unpacked(volume: Reader, rows: PackedRows, size: Int, codecs: Sequence[Codec]) -> Packed | None:
    """These rows, None where there are none; `size` is, for each of them, what its unit unpacks to. Units
    that begin at the same byte are one."""
    if not len(rows.inode):
        return None
    start, first, unit = np.unique(rows.start, return_index=True, return_inverse=True)
    whole = np.zeros(len(start), np.int64)
    np.maximum.at(whole, unit, size)
    each = np.arange(len(start) + 1)
    reader = UnpackedReader(volume, Units(whole, rows.codec[first], each, start, rows.stored[first]), codecs)
    return Packed(reader, rows.inode, rows.file_offset, rows.length, reader.place[unit] + rows.skip)
