"""What happened to bytes of files: for pieces of content in the new map, where the old map has the same bytes
of the same file.

Everything is counted in bytes of the disk for each piece: `place` (there already), `moved` (the same content
lay elsewhere), `other` (other content lay elsewhere), `behind` (the end that the file had or, where it
shrank, has), `filled` (was a hole, or never written).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, Intervals
from virt_bmap.core.columns import take
from virt_bmap.diff.objects import MapSide, Objects, dense
from virt_bmap.model import tables


class ContentPieces(NamedTuple):
    """Pieces of content in the new map, as columns: `length` bytes at `inside` in `volume`, by row `extent`;
    of the object, its bytes [low, high)."""

    object: Int
    extent: Int
    volume: Int
    inside: Int
    length: Int
    low: Int
    high: Int

    @staticmethod
    def of(
        objects: Objects, owner: Int, extent: Int, volume: Int, inside: Int, length: Int
    ) -> "ContentPieces":
        """Pieces by where they lie; of compressed extents every piece stands for all that is stored there."""
        table = objects.new.bmap.extents
        column = {
            name: tables.integers(table, name)[extent]
            for name in ("file_offset", "file_length", "volume_offset", "flags")
        }
        packed = (column["flags"] & tables.COMPRESSED) != 0
        low = column["file_offset"] + np.where(packed, 0, inside - column["volume_offset"])
        return ContentPieces(
            owner, extent, volume, inside, length, low, low + np.where(packed, column["file_length"], length)
        )


class Fate(NamedTuple):
    """Bytes of each piece, together (but for `kept`) its length."""

    place: Int
    moved: Int
    other: Int
    behind: Int
    filled: Int
    kept: Int
    """Of `behind`, bytes of a last block that were the file's already."""


class _Pairs(NamedTuple):
    """A piece and an old extent that holds some of the same bytes of the file: `length` of them, at `old` in
    the old volume and `new` in the new one."""

    piece: Int
    extent: Int
    old: Int
    new: Int
    length: Int
    behind: Int
    """Of these, the bytes that count as beyond the file's end."""

    def take(self, keep: np.ndarray) -> "_Pairs":
        return take(self, keep)


Same = Callable[[int, Int, Int, Int], Int]
"""(volume of the new map, starts in the old volume, starts in the new one, lengths) -> how many bytes of each
are the same."""


def fate(objects: Objects, pieces: ContentPieces, grain: int, same: Same | None) -> Fate:
    """What became of the pieces, which must belong to objects of both maps.

    Without `same` content is taken to be unchanged where the file's time is.
    """
    end, size = _edge(objects, pieces, grain, same is not None), pieces.high - pieces.low
    behind = np.clip(pieces.high - np.maximum(pieces.low, end), 0, size)
    pairs = _pairs(objects, pieces, end)
    unwritten = tables.codes(objects.old.bmap.extents, "kind")[pairs.extent] == tables.UNWRITTEN
    here = (pairs.old == pairs.new) & ~unwritten
    before = pairs.length - pairs.behind
    place = np.minimum(_sum(pairs.piece[here], before[here], len(size)), size - behind)
    away = pairs.take(~here & ~unwritten & (before > 0))
    elsewhere = np.minimum(_sum(away.piece, away.length - away.behind, len(size)), size - behind - place)
    moved = np.minimum(_moved(objects, pieces, away, same), elsewhere)
    kept = np.minimum(_sum(pairs.piece[here], pairs.behind[here], len(size)), behind)
    return _on_disk(
        Fate(place, moved, elsewhere - moved, behind, size - behind - place - elsewhere, kept),
        pieces.length,
        size,
    )


def _edge(objects: Objects, pieces: ContentPieces, grain: int, exact: bool) -> Int:
    """From which byte of a file a changed block means that its size changed: the block where the shorter
    content ends. Where nobody looked into clusters, one that holds this byte may begin anywhere before it."""
    old, new = objects.old_size(pieces.object), objects.new_size(pieces.object)
    end = np.minimum(old, new)
    first = end // grain * grain if exact else np.maximum(0, end - grain)
    sized = (old != new) & (objects.type[pieces.object] != tables.T_DIRECTORY)
    return np.where(sized, first, np.iinfo(np.int64).max)


def _pairs(objects: Objects, pieces: ContentPieces, end: Int) -> _Pairs:
    """All pairs of a piece and an old extent of the same object and stream that share bytes of the file."""
    old, new = objects.old, objects.new
    wanted = np.zeros(len(objects.event) + 1, bool)
    wanted[pieces.object] = True
    rows = old.content[wanted[objects.of_old[old.owner[old.content]]]]
    start, length = (tables.integers(old.bmap.extents, name)[rows] for name in ("file_offset", "file_length"))
    place, flags = (tables.integers(old.bmap.extents, name)[rows] for name in ("volume_offset", "flags"))
    left, right = dense(
        (objects.of_old[old.owner[rows]], pieces.object),
        (_translated(old, new, rows), new.part[pieces.extent]),
    )
    points = np.unique(np.concatenate([start, start + length, pieces.low, pieces.high]))

    def coded(group: Int, at: Int) -> Int:
        return group * (len(points) + 1) + np.searchsorted(points, at)

    index = Intervals(coded(left, start), coded(left, start + length))
    piece, at = index.overlaps(coded(right, pieces.low), coded(right, pieces.high))
    low, high = np.maximum(pieces.low[piece], start[at]), np.minimum(pieces.high[piece], (start + length)[at])
    packed = (
        (flags[at] | tables.integers(new.bmap.extents, "flags")[pieces.extent[piece]]) & tables.COMPRESSED
    ) != 0
    whole = tables.integers(new.bmap.extents, "volume_offset")[pieces.extent[piece]]
    before = place[at] + np.where(packed, 0, low - start[at])
    now = np.where(packed, whole, pieces.inside[piece] + low - pieces.low[piece])
    return _Pairs(
        piece, rows[at], before, now, high - low, np.clip(high - np.maximum(low, end[piece]), 0, None)
    )


def _translated(old: MapSide, new: MapSide, extents: Int) -> Int:
    """The parts (streams) of old extents by the codes of the new map; one that it does not have gets a number
    of its own."""
    words = [tables.parts(side.bmap.extents)[1] for side in (old, new)]
    known = {word: number for number, word in enumerate(words[1])}
    numbers = [*(known.get(word, len(words[1]) + at) for at, word in enumerate(words[0])), -1]
    translated: Int = np.array(numbers, np.int64)[old.part[extents]]
    return translated


def _moved(objects: Objects, pieces: ContentPieces, away: _Pairs, same: Same | None) -> Int:
    """How many bytes of each piece lay elsewhere with the same content."""
    moved = np.zeros(len(pieces.object), np.int64)
    if not len(away.piece):
        return moved
    flags = (
        tables.integers(objects.old.bmap.extents, "flags")[away.extent]
        | tables.integers(objects.new.bmap.extents, "flags")[pieces.extent[away.piece]]
    )
    unread = ((flags & tables.COMPRESSED) != 0) if same else np.ones(len(away.piece), bool)
    owner = pieces.object[away.piece]
    untouched = objects.old.mtime[objects.old_row[owner]] == objects.new.mtime[objects.new_row[owner]]
    length = away.length - away.behind
    guessed = np.flatnonzero(unread & untouched)
    np.add.at(moved, away.piece[guessed], length[guessed])
    if same:
        volume = pieces.volume[away.piece]
        for number in np.unique(volume[~unread]).tolist():
            mine = np.flatnonzero(~unread & (volume == number))
            np.add.at(moved, away.piece[mine], same(number, away.old[mine], away.new[mine], length[mine]))
    return moved


def _sum(group: Int, values: Int, groups: int) -> Int:
    result = np.zeros(groups, np.int64)
    np.add.at(result, group, values)
    return result


def _on_disk(fate: Fate, length: Int, size: Int) -> Fate:
    """Bytes of files as bytes of the disk: of a compressed piece all go to what most of it is."""
    columns = np.stack([fate.place, fate.moved, fate.other, fate.behind, fate.filled])
    odd = np.flatnonzero(size != length)
    most = columns[:, odd].argmax(axis=0)
    columns[:, odd] = np.where(np.arange(5)[:, None] == most, length[odd], 0)
    place, moved, other, behind, filled = columns
    return Fate(place, moved, other, behind, filled, np.minimum(fate.kept, behind))
