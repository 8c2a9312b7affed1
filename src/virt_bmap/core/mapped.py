"""Readers over other readers: a volume by its mapping rows, and one with some of its blocks replaced."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core import lost
from virt_bmap.core.arrays import Bool, Bytes, Int, gather, ints, scatter, subtract, total, union
from virt_bmap.core.lost import Lost
from virt_bmap.core.mapping import DATA, Rows
from virt_bmap.core.reader import Reader


class MappedReader(Reader):
    """A volume whose bytes lie in other readers, by mapping rows.

    Bytes that no `data` row covers read as zeroes: in `holes` they are, elsewhere they are lost.
    """

    in_turn = False

    def __init__(
        self,
        size: int,
        name: str,
        parents: Mapping[int, Reader],
        rows: Rows,
        holes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(size, name)
        self._holes = ints([start for start, _ in holes]), ints([end for _, end in holes])
        self._whole: bool | None = None
        self._parents = parents
        is_data = rows.role == DATA
        self._rows = rows if is_data.all() else rows.take(is_data)
        self.near = all(parent.near for parent in parents.values())
        self.below = list(parents.values())

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        pieces = self._rows.down(offsets, offsets + lengths)
        base = np.cumsum(lengths) - lengths
        place = base[pieces.query] + pieces.source - offsets[pieces.query]
        whole = len(self._parents) == 1 and int(pieces.length.sum()) == int(lengths.sum())
        if whole and (place[1:] >= place[:-1]).all():
            (parent,) = self._parents.values()
            return parent.read_ranges(pieces.target, pieces.length)
        result = np.zeros(int(lengths.sum()), np.uint8)
        owner = self._rows.parent[pieces.row]
        for volume, parent in self._parents.items():
            mine = np.flatnonzero(owner == volume)
            data = parent.read_ranges(pieces.target[mine], pieces.length[mine])
            scatter(result, place[mine], pieces.length[mine], data)
        return result

    @property
    def whole(self) -> bool:
        if self._whole is None:
            start, run, count = self._rows.volume_offset, self._rows.run, self._rows.count
            placed = total(start, start + run) if (count == 1).all() else int((run * count).sum())
            self._whole = placed + total(*self._holes) >= self.size and all(
                parent.whole for parent in self._parents.values()
            )
        return self._whole

    def lost(self, starts: Int, ends: Int) -> Lost:
        pieces = self._rows.down(starts, ends)
        left = subtract(
            starts,
            ends,
            np.append(pieces.source, self._holes[0]),
            np.append(pieces.source + pieces.length, self._holes[1]),
        )
        parts = [Lost.of(left, lost.MISSING)]
        owner = self._rows.parent[pieces.row]
        for volume, parent in self._parents.items():
            mine = np.flatnonzero(owner == volume)
            if parent.whole or not len(mine):
                continue
            target, length = pieces.target[mine], pieces.length[mine]
            piece, gone = parent.lost(*union(target, target + length)).within(target, target + length)
            back = pieces.source[mine][piece] - target[piece]
            parts.append(gone._replace(starts=gone.starts + back, ends=gone.ends + back))
        return Lost.join(parts)

    def stored(self) -> tuple[Int, Int]:
        parts = [np.zeros((2, 0), np.int64)]
        for volume, parent in self._parents.items():
            pieces = self._rows.take(self._rows.parent == volume).up(*parent.stored())
            parts.append(np.stack([pieces.target, pieces.target + pieces.length]))
        return union(*np.concatenate(parts, axis=1))


class Patch(NamedTuple):
    """Blocks of `size` bytes that replace what lies at `offsets` (sorted, multiples of `size`); `blocks` is
    (n, size)."""

    offsets: Int
    blocks: Bytes


class PatchedReader(Reader):
    """A reader over another with some of its blocks replaced, and of another size where one is given: a
    journal replayed in memory, never into the image."""

    in_turn = False
    corrects = True

    def __init__(self, base: Reader, patch: Patch, size: int | None = None) -> None:
        super().__init__(base.size if size is None else size, base.name)
        self._base = base
        self._patch = patch
        self.near = base.near
        self.below = [base]

    @property
    def whole(self) -> bool:
        return self._base.whole

    def replaced(self, offsets: Int, size: int) -> Bool:
        """Which of the ranges [offset, +size) are not, or not wholly, as they are on the disk."""
        low = np.searchsorted(self._patch.offsets, offsets - self._patch.blocks.shape[1], "right")
        high = np.searchsorted(self._patch.offsets, offsets + size)
        touched: Bool = low < high
        return touched

    def lost(self, starts: Int, ends: Int) -> Lost:
        size = self._patch.blocks.shape[1]
        there = starts < self._base.size
        ends = np.minimum(ends, self._base.size)
        return self._base.lost(starts[there], ends[there]).without(
            self._patch.offsets, self._patch.offsets + size
        )

    def stored(self) -> tuple[Int, Int]:
        there, size = self._base.stored(), self._patch.blocks.shape[1]
        return union(
            np.append(there[0], self._patch.offsets), np.append(there[1], self._patch.offsets + size)
        )

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = self._unpatched(offsets, lengths)
        n, size = self._patch.blocks.shape
        rows = Rows.make(self._patch.offsets, 0, np.arange(n, dtype=np.int64) * size, size)
        pieces = rows.down(offsets, offsets + lengths)
        base = np.cumsum(lengths) - lengths
        place = base[pieces.query] + pieces.source - offsets[pieces.query]
        scatter(
            data, place, pieces.length, gather(self._patch.blocks.reshape(-1), pieces.target, pieces.length)
        )
        return data

    def _unpatched(self, offsets: Int, lengths: Int) -> Bytes:
        """A copy of the bytes below; zeroes behind their end."""
        there = np.clip(self._base.size - offsets, 0, lengths)
        if (there == lengths).all():
            data = self._base.read_ranges(offsets, lengths)
            return data if data.flags.writeable else data.copy()
        data, some = np.zeros(int(lengths.sum()), np.uint8), there > 0
        place = np.cumsum(lengths) - lengths
        scatter(data, place[some], there[some], self._base.read_ranges(offsets[some], there[some]))
        return data
