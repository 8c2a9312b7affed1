"""Reading arrays with missing members: what lay on them is computed from parity, as the kernel does.

Sources: kernel lib/raid6/ (algos.c, recov.c), H. P. Anvin, "The mathematics of RAID-6".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, scatter, union
from virt_bmap.core.lost import Lost
from virt_bmap.core.mapping import PARITY
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.stripes import Parity, Place, rows

POLYNOMIAL = 0x11D
"""Of the field GF(256), whose generator is 2."""


def _tables() -> tuple[Int, Int]:
    powers = np.zeros(510, np.int64)
    value = 1
    for power in range(255):
        powers[power] = powers[power + 255] = value
        value = value << 1 ^ (POLYNOMIAL if value & 0x80 else 0)
    logs = np.zeros(256, np.int64)
    logs[powers[:255]] = np.arange(255)
    return powers, logs


POWERS, LOGS = _tables()


def times(factor: int, data: Bytes) -> Bytes:
    """Every byte multiplied by `factor` in GF(256)."""
    table = np.where(np.arange(256) == 0, 0, POWERS[(LOGS[factor] + LOGS) % 255]).astype(np.uint8)
    product: Bytes = table[data] if factor else np.zeros_like(data)
    return product


def inverse(factor: int) -> int:
    """The number by which `factor` gives 1."""
    return int(POWERS[(255 - LOGS[factor]) % 255])


class Stripes(NamedTuple):
    """An array of RAID4, 5 or 6: its layout, the bytes of a chunk and of the whole, and for each member
    reader and first byte; None: missing."""

    layout: Parity
    chunk: int
    size: int
    members: Sequence[tuple[Reader, int] | None]


class RebuiltReader(Reader):
    """The array's bytes: from `base` what lies on members that are there, the rest from parity."""

    def __init__(self, base: Reader, stripes: Stripes) -> None:
        super().__init__(base.size, base.name)
        self._base = base
        self.below = [base]
        self._stripes = stripes
        pattern = stripes.layout.pattern()
        gone = [Place(at, 0) if member is None else None for at, member in enumerate(stripes.members)]
        lost = rows(pattern, stripes.chunk, stripes.size, gone)
        self._lost = lost.take(lost.role != PARITY)
        self._row_of = self._lost.parent_offset // stripes.chunk % len(stripes.layout.p)

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = self._base.read_ranges(offsets, lengths)
        pieces = self._lost.down(offsets, offsets + lengths)
        if len(pieces.row) == 0:
            return data
        data = data if data.flags.writeable else data.copy()
        place = (np.cumsum(lengths) - lengths)[pieces.query] + pieces.source - offsets[pieces.query]
        kinds = self._lost.parent[pieces.row], self._row_of[pieces.row]
        for member, row in set(zip(*(kind.tolist() for kind in kinds), strict=True)):
            mine = np.flatnonzero((kinds[0] == member) & (kinds[1] == row))
            found = self._compute(member, row, pieces.target[mine], pieces.length[mine])
            scatter(data, place[mine], pieces.length[mine], found)
        return data

    @property
    def whole(self) -> bool:
        return all(self._computable(row) for row in range(len(self._stripes.layout.p))) and all(
            member[0].whole for member in self._stripes.members if member
        )

    def lost(self, starts: Int, ends: Int) -> Lost:
        """What lies on members that are missing is computed, where parity and the other members' parts of its
        row are there."""
        gone = self._base.lost(starts, ends)
        pieces = self._lost.down(starts, ends)
        good = np.zeros(len(pieces.row), bool)
        row_of = self._row_of[pieces.row]
        for row in np.unique(row_of).tolist():
            good[row_of == row] = self._computable(row)
        for reader, first in (member for member in self._stripes.members if member):
            if not reader.whole:
                low = pieces.target + first
                good[reader.lost(*union(low, low + pieces.length)).within(low, low + pieces.length)[0]] = (
                    False
                )
        return gone.without(pieces.source[good], (pieces.source + pieces.length)[good])

    def _computable(self, row: int) -> bool:
        """Can all that is missing in rows of chunks of this kind be computed?"""
        layout, members = self._stripes.layout, self._stripes.members
        there = sum(
            members[place] is not None for place in (int(layout.p[row]), int(layout.q[row])) if place >= 0
        )
        return sum(members[place] is None for place in layout.data[row].tolist()) <= there

    def _compute(self, member: int, row: int, starts: Int, lengths: Int) -> Bytes:
        """What the missing member holds at these ranges, which lie in rows of chunks of one kind; zeroes
        where too much is missing."""
        layout = self._stripes.layout
        p, q = int(layout.p[row]), int(layout.q[row])
        powers = layout.power[row]
        nothing = np.zeros(int(lengths.sum()), np.uint8)
        sum_p, sum_q = nothing.copy(), nothing.copy()
        others = []
        for other, there in enumerate(self._stripes.members):
            if there is None:
                if other not in (p, q, member):
                    others.append(other)
                continue
            reader, first = there
            data = reader.read_ranges(starts + first, lengths)
            if other != q:
                sum_p ^= data
            if other != p:
                sum_q ^= data if other == q else times(int(POWERS[powers[other] % 255]), data)
        has_p, has_q = self._stripes.members[p] is not None, q >= 0 and self._stripes.members[q] is not None
        own = int(POWERS[powers[member] % 255])
        if not others and has_p:
            return sum_p
        if not others and has_q:
            return times(inverse(own), sum_q)
        if len(others) == 1 and has_p and has_q:  # two data chunks: D_x * (g_x + g_y) = Q + g_y * P
            other = int(POWERS[powers[others[0]] % 255])
            return times(inverse(own ^ other), sum_q ^ times(other, sum_p))
        return nothing
