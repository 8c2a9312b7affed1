"""A delta, attributed: for each file, directory and piece of metadata its changed bytes and what happened to
it. Every byte of the delta counts once.

Precedence for each byte:

1. The record of an inode that changed or went away, where records have a place of their own: the file's.
2. Bytes that are known to be equal on both sides (in a changed cluster): `unchanged`, the new owner's; free
   space, where they are free now.
3. The owner in the new map, if there is one: what it is now.
4. Else, where the new map calls the byte free: the owner in the old map, what it was.
5. Else free space, gaps.

Of several owners in one map one is chosen as `tiles` says.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from virt_bmap.core.arrays import Bool, Int, joined
from virt_bmap.diff import objects as matched
from virt_bmap.diff.delta import Delta
from virt_bmap.diff.files import ContentPieces, fate
from virt_bmap.diff.objects import Objects
from virt_bmap.diff.segments import Content, Readers, Segments, View, Words, segments
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables

MEANING = {
    "added": "a new file, and all of its bytes",
    "replaced": "the name leads to another, new file: written anew and renamed over the old one",
    "deleted": "gone; its bytes that are free now, and its record",
    "renamed": "under another name or in another directory; the bytes of its record",
    "truncated": "shorter; bytes beyond the new end, in its last block or free now",
    "grown": "longer; bytes beyond the old end",
    "rewritten": "other content at the same place of the file, wherever that lies on the disk",
    "filled": "content where the file had a hole or was never written",
    "moved": "the same content at another place of the disk",
    "freed": "a place that the owner gave up and nobody has taken",
    "attributes": "only the inode changed: times, mode, owner, links",
    "unchanged": "in a changed cluster, but the same on both sides",
    "changed": "changed, in a way that only an older map or image could tell",
    "metadata": "structures of a filesystem or volume manager",
    "journal": "a journal or log",
    "free": "free space, a gap or what nothing refers to, on both sides or, where no byte changed, now: "
        "nothing that anybody would miss",
}  # fmt: skip
"""What `change` can say of bytes."""
CHANGES = tuple(MEANING)
(ADDED, REPLACED, DELETED, RENAMED, TRUNCATED, GROWN, REWRITTEN, FILLED, MOVED, FREED, ATTRIBUTES, UNCHANGED,
    CHANGED, METADATA, JOURNAL,
 FREE) = range(len(CHANGES))  # fmt: skip
EVENT = np.array([-1, ADDED, REPLACED, DELETED, RENAMED, TRUNCATED, GROWN, REWRITTEN, ATTRIBUTES], np.int64)
"""The change that each event of objects.EVENTS is."""
UNDECIDED = len(CHANGES)
"""Bytes that belong to a file, but are not its content: they go where most of the file's change is."""


@dataclass
class Changes:
    """Bytes by owner and change, as they are found; `object` or, for what is not a file, `volume`, `kind` and
    `part` say whose."""

    parts: list[tuple[Int, ...]] = field(default_factory=list)
    COLUMNS = ("object", "volume", "kind", "part", "change", "bytes", "content")

    def add(
        self,
        change: Any,
        size: Int,
        *,
        object: Any = -1,
        volume: Any = -1,
        kind: Any = -1,
        part: Any = -1,
        content: Any = 0,
    ) -> None:
        """Rows of `size` bytes each, of which `content` are content of a file; other values are arrays of
        this length or numbers."""
        columns = [
            np.broadcast_to(np.asarray(value, np.int64), size.shape)
            for value in (object, volume, kind, part, change, size, content)
        ]
        self.parts.append(tuple(column[size > 0] for column in columns))

    def columns(self) -> dict[str, Int]:
        """All rows, those of one owner and change added up."""
        *keys, size, content = joined(self.parts, 7)
        order = np.lexsort(keys[::-1])
        new = np.zeros(len(order), bool)
        for key in keys:
            new |= np.diff(key[order], prepend=-2) != 0
        first, group = np.flatnonzero(new), np.cumsum(new) - 1
        sums = [np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)]
        for result, values in zip(sums, (size, content), strict=True):
            np.add.at(result, group, values[order])
        return dict(zip(self.COLUMNS, [*(key[order][first] for key in keys), *sums], strict=True))


class Attribution:
    """Attributes a delta of disk number `disk` of two maps; with the readers of the maps' volumes content is
    compared where that tells more. `blind`: both maps are one, since nothing older is there, so that
    nothing can be said of what happened."""

    def __init__(
        self, objects: Objects, disk: int, delta: Delta, readers: Readers | None = None, blind: bool = False
    ) -> None:
        self.objects, self.disk, self.delta, self.blind = objects, disk, delta, blind
        self.content = Content(objects, readers) if readers and delta.same is not None else None
        self.words = Words(objects)
        self.guessing = delta.same is None and not blind and not delta.only_owners
        """Nobody looked: what has its old time, size and
        place is taken to be only copied with its cluster."""

    def rows(self) -> dict[str, Int]:
        """The columns of Rows: every byte of the delta once, and a row of 0 bytes for what happened to files
        without changing any of them."""
        found = segments(self.objects, self.disk, self.delta, self.words, self.content)
        rows, left = Changes(), np.ones(len(found.size), bool)
        if self.delta.only_owners:
            left &= ~_alike(found)
        for take in (self._records, self._same, self._metadata, self._files, self._lost, self._idle):
            take(rows, found, left)
        return _decided(rows, self.objects, CHANGED if self.blind else ATTRIBUTES)

    # Each of these takes segments that are left, in the order of precedence, and adds rows for them.

    def _records(self, rows: Changes, found: Segments, left: Bool) -> None:
        for view in (found.new, found.old):
            mine = _take(left, view.tiles.record >= 0)
            rows.add(UNDECIDED, found.size[mine], object=view.object[mine])

    def _same(self, rows: Changes, found: Segments, left: Bool) -> None:
        mine = _take(left, found.same & _owned(found.new))
        self._whose(rows, found, mine, found.new, UNCHANGED)
        self._idle(rows, found, _take(left, found.same.copy()))

    def _metadata(self, rows: Changes, found: Segments, left: Bool) -> None:
        """What belongs to no file now: metadata, journals, boot code, foreign content."""
        new = found.new
        mine = _take(left, _owned(new) & ~self._is_file(new.object))
        parts = len(self.words.parts) + 1
        journal = np.isin(new.volume * parts + new.part, self._journals(parts))
        other = np.isin(new.kind, (tables.CONTENT, tables.UNKNOWN, tables.DATA))
        self._whose(
            rows, found, mine, new, np.where(journal, JOURNAL, np.where(other, REWRITTEN, METADATA))[mine]
        )

    def _journals(self, parts: int) -> list[int]:
        """The journals of the new map's filesystems, as volume * `parts` + part."""
        bmap = self.objects.new.bmap
        declared = [
            (volume, formats.filesystem(type))
            for volume, type in zip(
                *(bmap.filesystems.column(name).to_pylist() for name in ("volume", "type")), strict=True
            )
        ]
        return [
            volume * parts + number
            for volume, format in declared
            for number, word in enumerate(self.words.parts)
            if format and word in format.journals
        ]

    def _files(self, rows: Changes, found: Segments, left: Bool) -> None:
        """What belongs to files now: their metadata, then their content."""
        new, objects = found.new, self.objects
        mine = left & self._is_file(new.object)
        if self.guessing:
            quiet = _take(left, mine & (new.offset < 0) & matched.pick(objects.row_same, new.object))
            rows.add(UNCHANGED, found.size[quiet], object=new.object[quiet])
        other = _take(left, mine & (new.offset < 0) & left)
        rows.add(UNDECIDED, found.size[other], object=new.object[other])
        event = matched.pick(objects.event, new.object)
        whole = np.isin(event, (matched.ADDED, matched.REPLACED, matched.DELETED)) | (
            matched.pick(objects.old_row, new.object) < 0
        )
        whole = _take(left, mine & whole & left)
        # without an event: neither alive before nor now
        change = np.where(EVENT[event] >= 0, EVENT[event], DELETED)
        rows.add(change[whole], found.size[whole], object=new.object[whole], content=found.size[whole])
        self._content(rows, found, np.flatnonzero(_take(left, mine & left)))

    def _content(self, rows: Changes, found: Segments, at: Int) -> None:
        """Content of files that are in both maps, by what became of it."""
        if not len(at):
            return
        objects, tiles = self.objects, found.new.tiles.take(at)
        pieces = ContentPieces.of(
            objects, found.new.object[at], tiles.extent, tiles.volume, tiles.inside, found.size[at]
        )
        what = fate(objects, pieces, self.delta.grain, self.content.equal if self.content else None)
        here = np.full(len(at), CHANGED if self.blind else REWRITTEN)
        if self.guessing:
            here[objects.content_same[pieces.object]] = UNCHANGED
        place, sized = (
            (what.place * 0, what.behind - what.kept) if self.delta.only_owners else (what.place, what.behind)
        )
        behind = np.where(objects.new_size(pieces.object) < objects.old_size(pieces.object), TRUNCATED, GROWN)
        sums = (
            (here, place),
            (MOVED, what.moved),
            (REWRITTEN, what.other),
            (behind, sized),
            (FILLED, what.filled),
        )
        for change, size in sums:
            rows.add(change, size, object=pieces.object, content=size)

    def _lost(self, rows: Changes, found: Segments, left: Bool) -> None:
        """What is free now and was not: the old owner's."""
        old, objects = found.old, self.objects
        mine = _take(left, _owned(old))
        file = mine & self._is_file(old.object)
        self._whose(rows, found, mine & ~file, old, FREED)
        object, offset, size = old.object[file], old.offset[file], found.size[file]
        change = np.full(len(object), FREED)
        change[(offset >= 0) & (offset >= objects.new_size(object))] = TRUNCATED
        event = objects.event[object]
        whole = np.isin(event, (matched.DELETED, matched.REPLACED))
        change[whole] = EVENT[event[whole]]
        rows.add(change, size, object=object, content=np.where(offset >= 0, size, 0))

    def _idle(self, rows: Changes, found: Segments, left: Bool) -> None:
        kind = np.where(found.new.kind < 0, tables.GAP, found.new.kind)
        disk = self.objects.new.bmap.disk(self.disk)  # which has what a saved map gives to nobody
        volume = np.where(found.new.volume < 0, disk, found.new.volume)
        rows.add(FREE, found.size[left], volume=volume[left], kind=kind[left])

    def _whose(self, rows: Changes, found: Segments, mine: Bool, view: View, change: Any) -> None:
        """These segments as rows of their owners: files by
        object, everything else by volume, kind and part."""
        file = self._is_file(view.object)[mine]
        rows.add(
            change,
            found.size[mine],
            object=view.object[mine],
            volume=np.where(file, -1, view.volume[mine]),
            kind=np.where(file, -1, view.kind[mine]),
            part=np.where(file, -1, view.part[mine]),
        )

    def _is_file(self, object: Int) -> Bool:
        """Is it a file that a user knows, rather than nothing or an inode that holds metadata?"""
        result: Bool = (object >= 0) & (matched.pick(self.objects.type, object) != tables.T_METADATA)
        return result


def _take(left: Bool, mine: Bool) -> Bool:
    """Those of the segments that are left; they are taken off."""
    mine = mine & left
    left &= ~mine
    return mine


def _owned(view: View) -> Bool:
    result: Bool = ~np.isin(view.kind, (-1, *tables.IDLE))
    return result


def _alike(found: Segments) -> Bool:
    """Segments whose owner is the same in both maps, and content the same piece of its file."""
    old, new = found.old, found.new
    same: Bool = (
        (old.object == new.object)
        & (old.volume == new.volume)
        & (old.kind == new.kind)
        & (old.part == new.part)
        & (old.offset == new.offset)
    )
    return same


def _decided(rows: Changes, objects: Objects, otherwise: int) -> dict[str, Int]:
    """All rows, with what was undecided where it belongs,
    and a row for each event of a file that has none."""
    found = rows.columns()
    decided = found["change"] != UNDECIDED
    main = EVENT[objects.event]
    # the change of most bytes, where the maps only say that attributes changed
    mine = np.flatnonzero(decided & (found["object"] >= 0) & (found["change"] != UNCHANGED))
    mine = mine[np.argsort(found["bytes"][mine], kind="stable")]
    vague = np.isin(main, (-1, ATTRIBUTES))
    most = np.full(len(main), -1, np.int64)
    most[found["object"][mine]] = found["change"][mine]
    main = np.where(vague & (most >= 0), most, main)
    undecided = ~decided
    found["change"][undecided] = np.where(
        main[found["object"][undecided]] >= 0, main[found["object"][undecided]], otherwise
    )
    again = Changes([tuple(found[name] for name in Changes.COLUMNS)])
    silent = np.flatnonzero((EVENT[objects.event] >= 0) & (main >= 0))
    said = found["object"] * len(CHANGES) + found["change"]
    silent = silent[~np.isin(silent * len(CHANGES) + main[silent], said)]
    none = np.full(len(silent), -1, np.int64)
    again.parts.append((silent, none, none, none, main[silent], none * 0, none * 0))
    return again.columns()
