"""Checksums of a filesystem's metadata, compared kind by kind: what `prove` of several formats shares."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Bytes, Int, Intervals, expand
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.contract import NOT_LOOKED_AT, PROVEN, Filesystem, Proof
from virt_bmap.model.damage import Damage

BATCH = 4 << 20
"""Bytes of blocks whose checksums are computed together: few enough to stay near the processor."""

LINKS = 1 << 15
"""Symbolic links looked at together."""


class Compared:
    """Counts what was compared, by kind; what is wrong is damage."""

    def __init__(self, damage: Damage) -> None:
        self.damage = damage
        self._counts: dict[str, int] = {}

    def compare(self, kind: str, good: Bool, offsets: Int) -> None:
        """`kind` names the records in the plural; where `good` is False, those at `offsets` (bytes) have a
        wrong checksum."""
        self._counts[kind] = self._counts.get(kind, 0) + len(good)
        self.damage.check(good, "checksum", f"wrong [checksum|checksums] among {kind}", offsets)

    def proof(self, absent: str = "the filesystem has none") -> Proof:
        """What was compared, in words."""
        words = ", ".join(f"{count:,} {kind}" for kind, count in self._counts.items() if count)
        return Proof("checksums", PROVEN, words) if words else Proof("checksums", NOT_LOOKED_AT, absent)


def blocks(reader: Reader, offsets: Int, size: int) -> Iterator[tuple[slice, Bytes]]:
    """(which of the offsets, their blocks), a bounded batch at a time; offsets that leave the volume were
    complained of before."""
    return reader.batches(offsets, size, BATCH, BATCH)


class Places:
    """Where metadata lies by the tables that a reader made: blocks by kind and part, with their owner."""

    def __init__(self, found: Filesystem, block_size: int) -> None:
        own = (tables.integers(found.extents, "flags") & tables.INLINE) == 0
        extents = found.extents.filter(pa.array(own))
        self._size = block_size
        self._kind = tables.codes(extents, "kind")
        self._there = found.reader.stored()
        self._part, self._parts = tables.parts(extents)
        self._start, self._length, self._inode, self._file = (
            tables.integers(extents, name) for name in ("volume_offset", "length", "inode", "file_offset")
        )

    def of_kind(self, kind: int, *parts: str | None, unit: int = 0) -> tuple[Int, Int, Int]:
        """(offset, inode, file offset) of each block of this kind and these parts (None: plain content;
        without any: all); -1 stands for null.

        `unit` is another size than the blocks'; extents that are no multiple of it are left out.
        """
        unit = unit or self._size
        at = self._rows(kind, parts)
        at = at[self._length[at] % unit == 0]
        row, first, count = self._stored_pieces(at, unit)
        piece, step = expand(count)
        row, step = row[piece], first[piece] + step
        place = np.where(self._file[row] < 0, -1, self._file[row] + step * unit)
        return self._start[row] + step * unit, self._inode[row], place

    def _stored_pieces(self, at: Int, unit: int) -> tuple[Int, Int, Int]:
        """(extent, number of its first block, how many) of what of these extents is stored: blocks in holes
        are zeroes, and may be more than any time suffices for."""
        start, end = self._start[at], self._start[at] + self._length[at]
        row, hit = Intervals(*self._there).overlaps(start, end)
        first = np.maximum(self._there[0][hit] - start[row], 0) // unit
        last = -(-(np.minimum(self._there[1][hit], end[row]) - start[row]) // unit)
        order = np.lexsort((first, row))
        row, first, last = row[order], first[order], last[order]
        again = np.append(False, (row[1:] == row[:-1]) & (first[1:] < last[:-1]))[: len(row)]
        first = first + again  # two ranges that touch one block
        return at[row], first, np.maximum(last - first, 0)

    def ranges(self, kind: int, *parts: str | None, whole: bool = False) -> tuple[Int, Int, Int]:
        """(offset, length, inode) of such extents; `whole`: together with the extent of the same inode that
        goes on where they end."""
        at = self._rows(kind, parts)
        length = self._length[at]
        if whole and len(at):
            order = np.argsort(self._start, kind="stable")
            after = order[
                np.minimum(np.searchsorted(self._start[order], self._start[at] + length), len(order) - 1)
            ]
            follows = (self._start[after] == self._start[at] + length) & (
                self._inode[after] == self._inode[at]
            )
            length = length + np.where(follows, self._length[after], 0)
        return self._start[at], length, self._inode[at]

    def _rows(self, kind: int, parts: tuple[str | None, ...]) -> Int:
        which = self._kind == kind
        if parts:
            codes = [
                self._parts.index(part) if part is not None else -1
                for part in parts
                if part is None or part in self._parts
            ]
            which &= np.isin(self._part, codes)
        return np.flatnonzero(which)

    def names(self, kind: int) -> list[str]:
        """The parts that this kind has."""
        return [self._parts[code] for code in np.unique(self._part[self._kind == kind]).tolist() if code >= 0]


def check_names(found: Filesystem, damage: Damage) -> None:
    """Names that no Unix directory can hold: with a NUL or a slash.

    Those of encrypted directories are ciphertext.
    """
    names = found.names.column("name").combine_chunks()
    if not len(names):
        return
    offsets = np.frombuffer(names.buffers()[1], np.int32, len(names) + 1, names.offset * 4)
    data = np.frombuffer(names.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    strange = np.flatnonzero((data == 0) | (data == ord("/"))) + offsets[0]
    row = np.unique(np.searchsorted(offsets, strange, "right") - 1)
    number, flags = tables.integers(found.inodes, "inode"), tables.integers(found.inodes, "flags")
    parent = np.minimum(np.searchsorted(number, tables.integers(found.names, "parent")[row]), len(number) - 1)
    plain = flags[parent] & tables.I_ENCRYPTED == 0
    place = tables.integers(found.inodes, "record_offset")[parent[plain]]
    damage.add(
        "name", "[name holds|names hold] a NUL or a slash; the place is that of the directory's inode", place
    )


def check_targets(found: Filesystem, damage: Damage) -> None:
    """Targets of symbolic links that end before their inode says, at a NUL."""
    kind, flags = tables.codes(found.extents, "kind"), tables.integers(found.extents, "flags")
    row = np.flatnonzero(
        (kind == tables.SYMLINK) & (flags & (tables.INLINE | tables.ENCRYPTED) == tables.INLINE)
    )
    start = tables.integers(found.extents, "volume_offset")[row]
    length = tables.integers(found.extents, "length")[row]
    for at in range(0, len(row), LINKS):
        part = slice(at, at + LINKS)
        data = found.reader.read_ranges(start[part], length[part])
        ends = np.cumsum(length[part])
        hit = np.zeros(len(ends), bool)
        hit[np.searchsorted(ends, np.flatnonzero(data == 0), "right")] = True
        damage.add("symlink", "symbolic [link has|links have] a target with a NUL in it", start[part][hit])
