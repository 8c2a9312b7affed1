"""Do a direct map and what a kernel read agree about the same files?

Compared are the bytes of regular files, by their offset in the file and in the volume. What differs has a
reason that is no one's fault, or is a disagreement:

agreed         the kernel read these bytes of the file from where the map says
inline         the map has them inside an inode or a tree node, which the kernel had in memory, or read as
               metadata
compressed     stored in another form: what was read for them and where the map has them overlap
unwritten      allocated and never written: reads as zeroes, from memory
zeroes         read as zeroes from where the map says, beside holes that are zero, too: which is which can't
               be told
hole           neither has a place for them
other content  read on the way: what it is by the direct map (metadata, tree, directory, readahead of other
               files, ...)

Disagreements: `elsewhere`, read from another place than the map has; `unread`, in
the map but not read; `unmapped`, read but not in the map; `free`, read on the way,
although the map calls it free and it shares no page with anything that is owned;
`size` and `missing`, the map has another size for the file, or no such file.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import EMPTY, Int, Intervals, intersect, subtract, union
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.observe.engine import PAGE, Observed, joined, merged
from virt_bmap.observe.files import Listing

Ranges = tuple[Int, Int]
PLAIN = 0
"""The flags of content that lies in blocks of its own as it is."""
PLACED = tables.INLINE | tables.COMPRESSED | tables.ENCRYPTED
NOBODYS = ("free", "unreferenced")
"""Kinds of bytes that have nothing to do with reading a file."""
LISTED = 20
"""Ranges of one file that are listed one by one."""


class Difference(NamedTuple):
    """Bytes [start, end) of a file that the map and the kernel place differently, and where each has the
    first of them; -1: nowhere."""

    code: str
    path: str
    start: int
    end: int
    mapped: int = -1
    observed: int = -1
    detail: str = ""


@dataclass
class Agreement:
    """Of one filesystem: bytes by reason, `other` bytes read on the way by what they are in the direct map,
    and the disagreements."""

    type: str = ""
    kernel: str = ""
    files: int = 0
    of: int = 0
    """Files that there are."""
    bytes: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    disagreements: list[Difference] = field(default_factory=list)

    def add(self, reason: str, count: int) -> None:
        if count:
            self.bytes[reason] = self.bytes.get(reason, 0) + count


class Judge:
    """The direct map's word on the files of one filesystem."""

    def __init__(self, bmap: BlockMap, volume: int) -> None:
        self._bmap, self._volume = bmap, volume
        _, extents = bmap.slice_of("extents", volume)
        inode, offset, kind = (
            tables.integers(extents, "inode"),
            tables.integers(extents, "file_offset"),
            tables.codes(extents, "kind"),
        )
        plain = extents.column("part").combine_chunks().is_null().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(
            (inode >= 0) & (offset >= 0) & plain & np.isin(kind, (tables.DATA, tables.UNWRITTEN))
        )
        rows = rows[np.lexsort((offset[rows], inode[rows]))]
        self._inode, self._offset, self._kind = inode[rows], offset[rows], kind[rows]
        self._place, self._length = (
            tables.integers(extents, name)[rows] for name in ("volume_offset", "length")
        )
        self._file_length, self._flags = (
            tables.integers(extents, name)[rows] for name in ("file_length", "flags")
        )
        _, inodes = bmap.slice_of("inodes", volume)
        self._size = dict(
            zip(
                tables.integers(inodes, "inode").tolist(),
                tables.integers(inodes, "size").tolist(),
                strict=True,
            )
        )
        known, paths = bmap.paths(volume)
        self._inode_of = dict(zip(paths.to_pylist(), known.tolist(), strict=True))
        self._kinds = _kinds(bmap, volume)
        self.verdict = Agreement()
        self._path = ""

    def hear(self, path: str, size: int, seen: Observed) -> None:
        """Compare one file, which the kernel calls `path`, with the map."""
        self.verdict.files += 1
        self._path = path
        inode = self._inode_of.get(path.encode(), -1)
        if inode < 0:
            self._disagree("missing", [(0, size)], detail="the map has no such file")
            return
        if self._size.get(inode) != size:
            self._disagree(
                "size", [(0, size)], detail=f"the map says {self._size.get(inode)} bytes, the kernel {size}"
            )
        if seen.failed:
            self._disagree("unreadable", [(0, size)], detail=seen.failed)
            return
        self._compare(inode, size, seen)

    def listed(self, listing: Listing) -> None:
        """Compare what names there are: every name of the kernel's is in the map."""
        missing = [entry.path for entry in listing.entries if entry.path.encode() not in self._inode_of]
        for path in missing[:LISTED]:
            self.verdict.disagreements.append(
                Difference("missing", path, -1, -1, detail="the map has no such name")
            )

    def _compare(self, inode: int, size: int, seen: Observed) -> None:
        low, high = np.searchsorted(self._inode, [inode, inode + 1])
        offset, place, flags = self._offset[low:high], self._place[low:high], self._flags[low:high] & PLACED
        length = np.minimum(
            np.where(flags == PLAIN, self._length[low:high], self._file_length[low:high]),
            np.maximum(0, size - offset),
        )
        data = self._kind[low:high] == tables.DATA
        rows = joined(seen.rows)
        own = rows[:, 4] == PLAIN
        mine = _PlacedLines(offset, place, length, data & (flags == PLAIN))
        theirs = _PlacedLines(rows[:, 0], rows[:, 1], rows[:, 2], own)
        other = {
            word: _ranges(offset, length, data & ((flags & flag) != 0))
            for word, flag in tables.FLAGS.items()
            if flag & PLACED
        }
        other["unwritten"] = _ranges(offset, length, self._kind[low:high] == tables.UNWRITTEN)
        claimed = union(
            np.concatenate([mine.start, *(low for low, _ in other.values())]),
            np.concatenate([mine.end, *(high for _, high in other.values())]),
        )
        self.verdict.add("agreed", mine.both(theirs))
        self._plain(mine, theirs, other, seen)
        for word, ranges in other.items():
            self.verdict.add(word, int((ranges[1] - ranges[0]).sum()))
        holes = subtract(np.zeros(1, np.int64), np.array([size]), *claimed)
        unseen = subtract(*holes, theirs.start, theirs.end)
        self.verdict.add("hole", int((unseen[1] - unseen[0]).sum()))
        self._packed(size, rows[~own], low, high, seen)
        self._on_the_way(
            subtract(
                *merged(seen.read), self._place[low:high], self._place[low:high] + self._length[low:high]
            )
        )

    def _plain(
        self, mine: "_PlacedLines", theirs: "_PlacedLines", other: dict[str, Ranges], seen: Observed
    ) -> None:
        """Content that lies as it is: each side's lines that the other has not."""
        excused = _together(other.values())
        only_map, only_kernel = mine.without(theirs), theirs.without(mine)
        for start, end, moved in only_kernel:
            where = mine.at(start)
            word = "elsewhere" if where >= 0 else "unmapped"
            for low, high in _pairs(
                subtract(np.array([start]), np.array([end]), *(excused if where < 0 else (EMPTY, EMPTY)))
            ):
                self._disagree(word, [(low, high)], where, moved + low)
        doubtful, read = merged(seen.unsure), merged(seen.read)
        for start, end, moved in only_map:
            rest = subtract(np.array([start]), np.array([end]), theirs.start, theirs.end)
            zero = intersect(*intersect(*rest, *doubtful), read[0] - moved, read[1] - moved)
            self.verdict.add("zeroes", int((zero[1] - zero[0]).sum()))
            for low, high in _pairs(subtract(*rest, *zero)):
                self._disagree("unread", [(low, high)], moved + low)
        for low, high in _pairs(subtract(*merged(seen.left), mine.start, mine.end)):
            rest = subtract(np.array([low]), np.array([high]), *excused)
            self._disagree(
                "unread", _pairs(rest), detail="the kernel gave bytes that are not zero, and the map has none"
            )

    def _packed(self, size: int, rows: Int, low: int, high: int, seen: Observed) -> None:
        """Content inside other things or in another form: what was read must be where the map has it, as far
        as either can tell."""
        start, end = self._place[low:high], self._place[low:high] + self._length[low:high]
        for offset, place, length, file_length, flags in rows.tolist():
            if flags & tables.INLINE and not len(
                intersect(np.array([place]), np.array([place + length]), start, end)[0]
            ):
                self._disagree("elsewhere", [(offset, offset + file_length)], -1, place)
        coded = (self._flags[low:high] & (tables.COMPRESSED | tables.ENCRYPTED)) != 0
        # in a tree node: in memory, as all inline content
        coded &= (self._flags[low:high] & tables.INLINE) == 0
        touched = merged([*seen.read, *((place, place + length) for _, place, length, _, _ in rows.tolist())])
        for row in np.flatnonzero(coded & (self._offset[low:high] < size)).tolist():
            inside = intersect(np.array([start[row]]), np.array([end[row]]), *touched)
            if not len(inside[0]):
                at = int(self._offset[low + row])
                self._disagree(
                    "unread",
                    [(at, at + int(self._file_length[low + row]))],
                    int(start[row]),
                    detail="stored compressed or encrypted",
                )

    def _on_the_way(self, read: Ranges) -> None:
        """What was read and is not content of the file: by what it is in the map."""
        for word, ranges in self._kinds.items():
            found = intersect(*read, *ranges)
            if word not in NOBODYS:
                if len(found[0]):
                    self.verdict.other[word] = self.verdict.other.get(word, 0) + int(
                        (found[1] - found[0]).sum()
                    )
                continue
            owned = _together(ranges for other, ranges in self._kinds.items() if other not in NOBODYS)
            beside = union(owned[0] // PAGE * PAGE, -(-owned[1] // PAGE) * PAGE)
            for low, high in _pairs(subtract(*found, *beside)):
                self.verdict.disagreements.append(
                    Difference(
                        "free",
                        self._path,
                        -1,
                        -1,
                        -1,
                        low,
                        f"{counted(high - low, f'[byte|bytes] at {low:#x} [is|are] read on the way')}, "
                        f"but the map says {word}",
                    )
                )

    def _disagree(
        self, code: str, ranges: list[tuple[int, int]], mapped: int = -1, observed: int = -1, detail: str = ""
    ) -> None:
        self.verdict.disagreements += [
            Difference(code, self._path, low, high, mapped, observed, detail)
            for low, high in ranges[:LISTED]
            if high > low
        ]


class _PlacedLines:
    """Ranges of a file with their places: on each line place - offset is the same."""

    def __init__(self, offset: Int, place: Int, length: Int, keep: np.ndarray) -> None:
        keep = keep & (length > 0)
        self.start, self.end, self.moved = offset[keep], (offset + length)[keep], (place - offset)[keep]

    def at(self, offset: int) -> int:
        """Where the byte at this offset lies; -1: nowhere."""
        row = np.flatnonzero((self.start <= offset) & (offset < self.end))
        return offset + int(self.moved[row[0]]) if len(row) else -1

    def both(self, other: "_PlacedLines") -> int:
        """How many bytes of the file both place alike."""
        return sum(end - start for start, end in _pairs(union(self.start, self.end))) - sum(
            end - start for start, end in _pairs(union(*self._columns(self.without(other))))
        )

    @staticmethod
    def _columns(rows: list[tuple[int, int, int]]) -> Ranges:
        table = np.array(rows, np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1]

    def without(self, other: "_PlacedLines") -> list[tuple[int, int, int]]:
        """(start, end, moved) of what the other has not on the same line, by offset."""
        result = []
        at, row = (
            Intervals(other.start, other.end).overlaps(self.start, self.end)
            if len(other.start)
            else (EMPTY, EMPTY)
        )
        same = self.moved[at] == other.moved[row]
        at, row = at[same], row[same]
        bounds = np.searchsorted(at, np.arange(len(self.start) + 1))
        for line, (start, end, moved) in enumerate(
            zip(self.start.tolist(), self.end.tolist(), self.moved.tolist(), strict=True)
        ):
            hit = row[bounds[line] : bounds[line + 1]]
            rest = subtract(np.array([start]), np.array([end]), other.start[hit], other.end[hit])
            result += [(low, high, moved) for low, high in _pairs(rest)]
        return result


def _kinds(bmap: BlockMap, volume: int) -> dict[str, Ranges]:
    """The ranges of a volume by kind, most special first; each byte in one of them, and what only records of
    inodes lie in as metadata."""
    _, extents = bmap.slice_of("extents", volume)
    kind, start = tables.codes(extents, "kind"), tables.integers(extents, "volume_offset")
    end = start + tables.integers(extents, "length")
    result: dict[str, Ranges] = {}
    taken: Ranges = (EMPTY, EMPTY)
    for code in sorted(
        set(kind.tolist()), key=lambda code: (tables.KINDS[code] in NOBODYS, code == tables.DATA, code)
    ):
        mine = kind == code
        result["content of other files" if code == tables.DATA else tables.KINDS[code]] = subtract(
            start[mine], end[mine], *taken
        )
        taken = _together([taken, (start[mine], end[mine])])
    return result


def _ranges(offset: Int, length: Int, keep: np.ndarray) -> Ranges:
    return union(offset[keep], (offset + length)[keep])


def _together(parts: Iterable[Ranges]) -> Ranges:
    every = list(parts)
    return union(
        np.concatenate([EMPTY, *(low for low, _ in every)]),
        np.concatenate([EMPTY, *(high for _, high in every)]),
    )


def _pairs(ranges: Ranges) -> list[tuple[int, int]]:
    return list(zip(ranges[0].tolist(), ranges[1].tolist(), strict=True))
