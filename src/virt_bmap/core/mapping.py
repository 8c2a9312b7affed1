"""Where a volume's bytes lie in its parents: strided rows,
and the one function that follows them, either way.

A row says: for i in [0, count), the `run` bytes of the volume from volume_offset + i * volume_step are the
`run` bytes of the parent from parent_offset + i * parent_step. A partition is one row with count 1; a RAID0
member is one row; a rotating RAID5 repeats its pattern every n stripes. Reading through a volume, descending
(volume to parent) and climbing (parent to volume) are the same arithmetic with the two sides exchanged, and
stripes are never unrolled beyond what is asked for.

A compressed run (an image format's compressed cluster) takes `parent_run` bytes of the parent, in which
offsets mean nothing: whatever is asked of one side, the answer is the whole run on the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.arrays import PIECES, Int, Intervals, bounded, expand
from virt_bmap.core.columns import stack, take

ROLES = ("data", "copy", "parity", "zero", "compressed")
DATA, COPY, PARITY, ZERO, PACKED = range(len(ROLES))
"""data: the bytes themselves, each volume byte once; copy: the same bytes again; parity: computed from them;
zero: space kept for bytes that read as zeroes; compressed: the bytes, packed. Layers on top of each other
have the last of their roles."""


class Row(NamedTuple):
    """One strided row, in bytes. `parent` is the parent's number, `role` a code of ROLES."""

    volume_offset: int
    parent: int
    parent_offset: int
    run: int
    count: int = 1  # type: ignore[assignment]  # nobody counts values in it
    volume_step: int = 0
    parent_step: int = 0
    role: int = DATA


@dataclass(frozen=True)
class _Side:
    """One side of rows: for each the first offset, the step between runs, the bytes that a run takes, and the
    byte behind the last one."""

    offset: Int
    step: Int
    run: Int
    end: Int

    @cached_property
    def index(self) -> Intervals:
        return Intervals(self.offset, self.end)


@dataclass(frozen=True)
class Rows:
    """Mapping rows as columns, which are those of the table `mappings`; `row` translations refer to positions
    in them. `parent_run` differs from `run` in compressed rows only."""

    volume: Int
    volume_offset: Int
    parent: Int
    parent_offset: Int
    run: Int
    count: Int
    volume_step: Int
    parent_step: Int
    parent_run: Int
    role: Int

    @staticmethod
    def of(rows: Sequence[Row], volume: int = 0) -> "Rows":
        """Rows that were made one by one, as columns."""
        return Rows.make(*np.array(rows, np.int64).reshape(-1, len(Row._fields)).T.copy(), volume=volume)

    @staticmethod
    def make(
        volume_offset: Any, parent: Any, parent_offset: Any, run: Any, count: Any = 1, volume_step: Any = 0,
        parent_step: Any = 0, role: Any = DATA, parent_run: Any = None, *, volume: Any = 0,
    ) -> "Rows":  # fmt: skip
        """Rows from columns of one length, or numbers, which hold for all rows."""
        columns = (volume, volume_offset, parent, parent_offset, run, count, volume_step, parent_step,
                   run if parent_run is None else parent_run, role)  # fmt: skip
        lengths = [len(column) for column in columns if isinstance(column, np.ndarray)]
        if not lengths:  # one row: nearly every volume of thousands has no more
            return Rows(*np.array(columns, np.int64).reshape(-1, 1))
        rows = lengths[0]
        return Rows(*(
            column if isinstance(column, np.ndarray) else np.full(rows, column, np.int64)
            for column in columns
        ))  # fmt: skip

    def __len__(self) -> int:
        return len(self.run)

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, in order."""
        return parts[0] if len(parts) == 1 else stack(Rows, parts)

    def take(self, keep: Any) -> "Rows":
        """Those rows for which the boolean or index array `keep` asks."""
        return take(self, keep)

    @property
    def parent_end(self) -> Int:
        """For each row the byte after its last run, in the parent."""
        return self._on_parent.end

    def placed(self, volume: int, numbers: Int) -> "Rows":
        """The same rows as rows of `volume`; their parents' numbers are places in `numbers`, which are to be
        theirs."""
        return replace(self, volume=np.full(len(self), volume, np.int64), parent=numbers[self.parent])

    def down(self, starts: Int, ends: Int) -> "Pieces":
        """Volume ranges to parent ranges. All rows must be of one volume."""
        return self._translate(self._on_volume, self._on_parent, starts, ends)

    def up(self, starts: Int, ends: Int) -> "Pieces":
        """Parent ranges to volume ranges. All rows must have one parent."""
        return self._translate(self._on_parent, self._on_volume, starts, ends)

    @cached_property
    def _on_volume(self) -> _Side:
        end = self.volume_offset + (self.count - 1) * self.volume_step + self.run
        return _Side(self.volume_offset, self.volume_step, self.run, end)

    @cached_property
    def _on_parent(self) -> _Side:
        end = self.parent_offset + (self.count - 1) * self.parent_step + self.parent_run
        return _Side(self.parent_offset, self.parent_step, self.parent_run, end)

    @cached_property
    def _packed(self) -> bool:
        return bool((self.role == PACKED).any())

    def _translate(self, source: _Side, target: _Side, starts: Int, ends: Int) -> "Pieces":
        """Ranges of one side (the source) as pieces of the other (the target).

        Of each row that a range touches, the runs from the first that ends after the range's start to the
        last that begins before its end. Member 1 of a RAID0 of two, in chunks of 4: its row has four runs of
        4 bytes, every 8 bytes of the volume and side by side on the member. Asked for volume bytes 6-22:

            volume    0   4   8   12  16  20  24  28
            run           0       1       2       3       begin at 4 + 8 n
            asked           6===============22            runs 0 (from its byte 2), 1 and 2 (up to its byte 2)
            member        0       4       8       12      begin at 4 n

        >>> row = Row(4, 1, 0, 4, 4, 8, 4)
        >>> found = Rows.of([row]).down(np.array([6]), np.array([22]))
        >>> found.source.tolist(), found.target.tolist(), found.length.tolist()
        ([6, 12, 20], [2, 4, 8], [2, 4, 2])
        """
        query, row = source.index.overlaps(starts, ends)
        start, end, run = starts[query], ends[query], source.run[row]
        offset, step = source.offset[row], np.maximum(source.step[row], 1)
        first = np.maximum(0, -((offset + run - start - 1) // step))
        last = np.minimum(self.count[row] - 1, (end - 1 - offset) // step)
        count = np.maximum(0, last - first + 1)
        bounded(int(min(count.sum(dtype=float), 1e18)), PIECES + 16 * len(query), "stripes")
        piece, nth = expand(count)
        nth += first[piece]
        row, query = row[piece], query[piece]
        run_start = offset[piece] + nth * source.step[row]
        low = np.maximum(start[piece], run_start)
        high = np.minimum(end[piece], run_start + run[piece])
        moved = target.offset[row] + nth * target.step[row] + (low - run_start)
        length = target_length = high - low
        if self._packed:
            packed = self.role[row] == PACKED
            moved = np.where(packed, target.offset[row] + nth * target.step[row], moved)
            target_length = np.where(packed, target.run[row], length)
        keep = high > low
        return Pieces(query[keep], row[keep], low[keep], moved[keep], length[keep], target_length[keep])


class Groups:
    """Mapping rows by a number that each of them has, its volume or its parent: sorted once, however many are
    asked for."""

    def __init__(self, rows: Rows, key: Int) -> None:
        self._rows = rows
        self._order = np.argsort(key, kind="stable")
        self._key = key[self._order]

    def of(self, number: int) -> Rows:
        """The rows with this number, in their order."""
        low, high = np.searchsorted(self._key, [number, number + 1])
        return self._rows.take(self._order[low:high])


class Pieces(NamedTuple):
    """What became of the queries: `query` and `row` say where a piece comes from; it is `length` bytes at
    `source` on the side asked about, and `target_length` (the same but for compressed rows) at `target` on
    the other. A query that no row covers gives no piece."""

    query: Int
    row: Int
    source: Int
    target: Int
    length: Int
    target_length: Int
