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

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import PIECES, Int, Intervals, bounded, expand

DATA, COPY, PARITY, ZERO, COMPRESSED = "data", "copy", "parity", "zero", "compressed"
ROLES = (DATA, COPY, PARITY, ZERO, COMPRESSED)
"""data: the bytes themselves, each volume byte once; copy: the same bytes again; parity: computed from them;
zero: space kept for bytes that read as zeroes; compressed: the bytes, packed. Layers on top of each other
have the last of their roles."""
PACKED = ROLES.index(COMPRESSED)


@dataclass(frozen=True)
class Row:
    """One strided row, in bytes. `parent` is the parent's volume id."""

    volume_offset: int
    parent: int
    parent_offset: int
    run: int
    count: int = 1
    volume_step: int = 0
    parent_step: int = 0
    role: str = DATA


class Side(NamedTuple):
    """One side of the rows: for each the first offset and the step between runs, in bytes."""

    offset: Int
    step: Int


@dataclass(frozen=True)
class Rows:
    """Mapping rows as columns, all of one length; `row` translations refer to positions in them."""

    volume: Int
    parent: Int
    role: Int
    run: Int
    count: Int
    on_volume: Side
    on_parent: Side
    parent_run: Int | None = None
    """Bytes that a run takes in the parent, where that is not
    `run` for every row: only compressed rows may differ."""
    _index: dict[str, Intervals] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(volume: int, rows: list[Row]) -> "Rows":
        """The rows of one volume as columns."""
        n = len(rows)

        def column(name: str) -> Int:
            return np.fromiter((getattr(row, name) for row in rows), np.int64, n)

        role = np.fromiter((ROLES.index(row.role) for row in rows), np.int64, n)
        return Rows(
            np.full(n, volume, np.int64), column("parent"), role, column("run"), column("count"),
            Side(column("volume_offset"), column("volume_step")),
            Side(column("parent_offset"), column("parent_step")),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.run)

    @staticmethod
    def concat(parts: "list[Rows]") -> "Rows":
        """The rows of all parts, in order."""

        def join(get: Callable[[Rows], Int]) -> Int:
            return np.concatenate([np.zeros(0, np.int64), *(get(part) for part in parts)])

        return Rows(
            join(lambda r: r.volume), join(lambda r: r.parent), join(lambda r: r.role), join(lambda r: r.run),
            join(lambda r: r.count),
            Side(join(lambda r: r.on_volume.offset), join(lambda r: r.on_volume.step)),
            Side(join(lambda r: r.on_parent.offset), join(lambda r: r.on_parent.step)),
            join(lambda r: r.in_parent),
        )  # fmt: skip

    def select(self, keep: np.ndarray) -> "Rows":
        """Those rows for which the boolean or index array `keep` asks."""
        return Rows(
            self.volume[keep], self.parent[keep], self.role[keep], self.run[keep], self.count[keep],
            Side(self.on_volume.offset[keep], self.on_volume.step[keep]),
            Side(self.on_parent.offset[keep], self.on_parent.step[keep]),
            None if self.parent_run is None else self.parent_run[keep],
        )  # fmt: skip

    @property
    def in_parent(self) -> Int:
        """Bytes that a run takes in the parent."""
        return self.run if self.parent_run is None else self.parent_run

    @property
    def parent_end(self) -> Int:
        """For each row the byte after its last run, in the parent."""
        return self.on_parent.offset + (self.count - 1) * self.on_parent.step + self.in_parent

    def placed(self, volume: int, parent: Int) -> "Rows":
        """The same rows as rows of `volume`, in these parents."""
        return replace(self, volume=np.full(len(self), volume, np.int64), parent=parent, _index={})

    def down(self, starts: Int, ends: Int) -> "Pieces":
        """Volume ranges to parent ranges. All rows must be of one volume."""
        return self._translate("down", self.on_volume, self.run, self.on_parent, self.in_parent, starts, ends)

    def up(self, starts: Int, ends: Int) -> "Pieces":
        """Parent ranges to volume ranges. All rows must have one parent."""
        return self._translate("up", self.on_parent, self.in_parent, self.on_volume, self.run, starts, ends)

    def _translate(
        self, way: str, source: Side, source_run: Int, target: Side, target_run: Int, starts: Int, ends: Int
    ) -> "Pieces":
        """Ranges of one side (the source) as pieces of the other (the target).

        Of each row that a range touches, the runs from the first that ends after the range's start to the
        last that begins before its end. Member 1 of a RAID0 of two, in chunks of 4: its row has four runs of
        4 bytes, every 8 bytes of the volume and side by side on the member. Asked for volume bytes 6-22:

            volume    0   4   8   12  16  20  24  28
            run           0       1       2       3       begin at 4 + 8 n
            asked           6===============22            runs 0 (from its byte 2), 1 and 2 (up to its byte 2)
            member        0       4       8       12      begin at 4 n

        >>> row = Row(4, 1, 0, 4, 4, 8, 4)
        >>> found = Rows.of(0, [row]).down(np.array([6]), np.array([22]))
        >>> found.source.tolist(), found.target.tolist(), found.length.tolist()
        ([6, 12, 20], [2, 4, 8], [2, 4, 2])
        """
        if way not in self._index:
            self._index[way] = Intervals(
                source.offset, source.offset + (self.count - 1) * source.step + source_run
            )
        query, row = self._index[way].overlaps(starts, ends)
        start, end, run = starts[query], ends[query], source_run[row]
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
        if self.parent_run is not None:
            packed = self.role[row] == PACKED
            moved = np.where(packed, target.offset[row] + nth * target.step[row], moved)
            target_length = np.where(packed, target_run[row], length)
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
        return self._rows.select(self._order[low:high])


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
