"""A delta cut into segments, each with one owner in the old
map and one in the new one, in terms that both share."""

from typing import NamedTuple

import numpy as np

from virt_bmap.ask.explain import record_size
from virt_bmap.core.arrays import EMPTY, Bool, Int, union
from virt_bmap.core.reader import Reader
from virt_bmap.diff import objects as matched
from virt_bmap.diff.compare import SECTOR, compare
from virt_bmap.diff.delta import Delta
from virt_bmap.diff.objects import CONTENT, MapSide, Objects
from virt_bmap.diff.tiles import InodeRecords, Tiles, tiles, touched
from virt_bmap.model import tables

Readers = tuple[list[Reader], list[Reader]]
"""The readers of the volumes of the old and of the new map, by their numbers."""


class View(NamedTuple):
    """One map's side of the segments: whose they are, in terms that both maps share.

    `object` -1: no file's.
    """

    tiles: Tiles
    object: Int
    volume: Int
    kind: Int
    part: Int
    offset: Int
    """Where in the file the segment begins; -1: not content of a file."""


class Segments(NamedTuple):
    """The delta as both maps see it, row by row; `same`: the bytes are known to be equal on both sides."""

    old: View
    new: View
    size: Int
    same: Bool


class Content:
    """Compares the content of volumes on both sides."""

    def __init__(self, objects: Objects, readers: Readers) -> None:
        self.objects, self.old, self.new = objects, *readers

    def equal(self, volume: int, old: Int, new: Int, length: Int, block: int = SECTOR) -> Int:
        """How many bytes of pieces of a volume of the new map are in blocks that are equal to what lies at
        `old` in its counterpart."""
        result = np.zeros(len(length), np.int64)
        for blocks in compare(
            self.old[int(self.objects.old_volume[volume])], old, self.new[volume], new, length, block
        ):
            np.add.at(result, blocks.piece, np.where(blocks.equal, blocks.length, 0))
        return result

    def different(self, records: InodeRecords) -> Bool:
        """Which records of the new map differ from what lay at the same place before? A file whose record
        only lies in the same block is not to blame."""
        different = np.ones(len(records.record), bool)
        for volume in np.unique(records.volume).tolist():
            before = int(self.objects.old_volume[volume])
            if before < 0:
                continue
            reach = min(self.old[before].size, self.new[volume].size)
            mine = np.flatnonzero((records.volume == volume) & (records.end <= reach))
            start, size = records.start[mine], records.end[mine] - records.start[mine]
            if len(mine):
                different[mine] = self.equal(volume, start, start, size, int(size.max())) < size
        return different


def segments(objects: Objects, disk: int, delta: Delta, words: "Words", content: Content | None) -> Segments:
    """The delta of disk number `disk`, cut where an owner changes
    in either map and where bytes are known to be equal.

    A delta of bytes 0-16 of a disk. In the old map file A had 0-12; in the new one it has 0-4,
    and file B has 4-16. Bytes 8-12 are known to be equal on both sides:

        disk        0   4   8   12  16
        old         A===========free=     cut at 12
        new         A===B============     cut at 4
        equal               ====          cuts at 8 and 12
        segments    0-4   A before,     A now
                    4-8   A before,     B now
                    8-12  A before,     B now, the same bytes
                    12-16 free before,  B now
    """
    *records, untouched = _changed_records(objects, disk, delta, content)
    sides = [tiles(side.bmap, disk, delta.starts, delta.ends, mine)
             for side, mine in zip((objects.old, objects.new), records, strict=True)]  # fmt: skip
    equal = _together(delta.same or (EMPTY, EMPTY), _on_disk(objects.new, disk, untouched))
    bounds = np.unique(
        np.concatenate([*(side.start for side in sides), *(side.end for side in sides), *equal])
    )
    old, new = (side.cut(bounds) for side in sides)
    at = np.searchsorted(equal[0], new.start, "right") - 1
    same = (at >= 0) & (new.start < equal[1][at]) if len(equal[0]) else np.zeros(len(new.start), bool)
    seen = _view(objects.old, objects.of_old, words, old), _view(objects.new, objects.of_new, words, new)
    return Segments(*seen, new.end - new.start, same)


def _view(side: MapSide, of_side: Int, words: "Words", found: Tiles) -> View:
    extents, row, owned = side.bmap.extents, np.maximum(found.extent, 0), found.extent >= 0

    def column(values: Int) -> Int:
        return np.where(owned, values[row], -1) if len(values) else np.full(len(row), -1, np.int64)

    owner = column(side.owner)
    owner = np.where(owner >= 0, of_side[owner], -1) if len(of_side) else owner
    kind = column(tables.codes(extents, "kind").astype(np.int64))
    offset = column(tables.integers(extents, "file_offset"))
    content = owned & (offset >= 0) & np.isin(kind, CONTENT)
    offset = np.where(content, offset + found.inside - column(tables.integers(extents, "volume_offset")), -1)
    owner = np.where(found.record >= 0, found.record, owner)
    return View(
        found, owner, words.volume(side, found.volume), kind, words.part(side, column(side.part)), offset
    )


# ---- records -----------------------------------------------------------------------------------------------


def _changed_records(
    objects: Objects, disk: int, delta: Delta, content: Content | None
) -> tuple[InodeRecords, InodeRecords, InodeRecords]:
    """The inodes' records that changed, numbered by object: in the old map
    those of files that are gone, in the new one all others. And those of
    the new map that lie in the delta and are known not to have changed."""
    none = InodeRecords(EMPTY, EMPTY, EMPTY, EMPTY)
    if delta.only_owners:
        return none, none, none
    gone = np.flatnonzero((objects.event == matched.DELETED) & (objects.new_row < 0))
    # not what was gone before, too
    alive = matched.pick(objects.new.alive, objects.new_row) | (objects.event != matched.NONE)
    here = np.flatnonzero((objects.new_row >= 0) & alive)
    old = _records(objects.old, objects.old_row[gone], gone)
    new = _records(objects.new, objects.new_row[here], here)
    if content is None:
        return old, new.take(objects.event[new.record] != matched.NONE), none
    new = new.take(touched(objects.new.bmap, disk, delta.starts, delta.ends, new))
    different = content.different(new)
    return old, new.take(different), new.take(~different)


def _on_disk(side: MapSide, disk: int, records: InodeRecords) -> tuple[Int, Int]:
    """Where records lie on a disk."""
    parts = [(EMPTY, EMPTY)]
    for volume in np.unique(records.volume).tolist():
        mine = records.take(records.volume == volume)
        found = side.bmap.descend(volume, mine.start, mine.end)
        found = found.take(found.volume == side.bmap.disk(disk))
        parts.append((found.start, found.end))
    return _together(*parts)


def _together(*ranges: tuple[Int, Int]) -> tuple[Int, Int]:
    return union(np.concatenate([low for low, _ in ranges]), np.concatenate([high for _, high in ranges]))


def _records(side: MapSide, rows: Int, numbers: Int) -> InodeRecords:
    """The records of these inode rows, where the filesystem's all have one size and a place of their own."""
    volume, place = side.volume[rows], side.record_offset[rows]
    size = np.zeros(side.bmap.volumes.num_rows, np.int64)
    for number in np.unique(volume).tolist():
        size[number] = record_size(side.bmap, number)
    keep = (place >= 0) & (size[volume] > 0) & (side.type[rows] != tables.T_METADATA)
    volume, place = volume[keep], place[keep]
    return InodeRecords(volume, place, place + size[volume], numbers[keep])


# ---- common words ------------------------------------------------------------------------------------------


class Words:
    """The volumes and parts of both maps in common numbers: those of the new map, and after them what only
    the old one has."""

    def __init__(self, objects: Objects) -> None:
        old, new = objects.old.bmap, objects.new.bmap
        parts = [tables.parts(bmap.extents)[1] for bmap in (old, new)]
        self.parts: list[str] = list(dict.fromkeys([*parts[1], *parts[0]]))
        known = {word: number for number, word in enumerate(self.parts)}
        self._old, self._new = (np.array([*(known[word] for word in mine), -1], np.int64) for mine in parts)
        self._old_side = objects.old
        back = {before: after for after, before in enumerate(objects.old_volume.tolist()) if before >= 0}
        self.volumes: list[str] = new.volumes.column("name").to_pylist()
        for number, name in enumerate(old.volumes.column("name").to_pylist()):
            if number not in back:
                back[number] = len(self.volumes)
                self.volumes.append(name)
        self.volume_of_old = np.array([back[number] for number in range(old.volumes.num_rows)], np.int64)

    def part(self, side: MapSide, codes: Int) -> Int:
        """One map's codes of parts (-1: none) in common numbers."""
        found: Int = (self._old if side is self._old_side else self._new)[codes]
        return found

    def volume(self, side: MapSide, numbers: Int) -> Int:
        """One map's volumes (-1: none) in common numbers."""
        return np.where(numbers >= 0, self.volume_of_old[numbers], -1) if side is self._old_side else numbers
