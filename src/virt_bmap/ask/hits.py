"""Many ranges of a disk, added up by what they hit: files with the ranges inside them, metadata, free space.

All of it is arithmetic on columns: ten thousand ranges on
a map of any size are one lookup, a sort and a few sums.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.ask.explain import record_size
from virt_bmap.core.arrays import Int, Intervals, expand, in_order, ints, total, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.escape import escape, escape_all
from virt_bmap.core.mapping import PACKED, ROLES
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners
from virt_bmap.model.paths import positions
from virt_bmap.saved.results import field

KINDS = (*tables.KINDS, "slack", "record")
"""The kinds of extents, and two more. slack: beyond the end of the file in its last block, no loss to the
file; record: the inode's own, without which the file can't be found though its bytes are whole."""
SLACK, RECORD = range(len(tables.KINDS), len(KINDS))

WORDS = [
    [word for word, bit in tables.FLAGS.items() if flags & bit] for flags in range(1 << len(tables.FLAGS))
]
"""The words of every combination of flags: objects can be many."""

OBJECTS = pa.schema([
    field("bytes", pa.int64(), "bytes of the disk that were hit", unit="bytes"),
    field("kind", pa.string(), "kind of extent, slack or record"),
    field("device", pa.string(), "the volume"),
    field("path", pa.string(), "path in the filesystem", null="has none"),
    field("also", pa.list_(pa.string()), "its other paths"),
    field("part", pa.string(), "metadata structure or named stream", null="plain content"),
    field("inode", pa.int64(), "the owner's number", null="belongs to no inode"),
    field("ranges", pa.list_(pa.list_(pa.int64())), "[first byte, byte after the last] inside the file"),
    field("names", pa.int64(), "names in the directory, all of its blocks together: they are at risk",
        unit="count", null="no directory"),
    field("role", pa.string(), "data, copy, zero, parity or compressed"),
    field("flags", pa.list_(pa.string()), "inline, shared, compressed, encrypted"),
])  # fmt: skip
"""The columns of `Hits.objects`."""


class _Pieces(NamedTuple):
    """Pieces of the ranges, by columns: bytes [start, end) of the disk belong to an object, whose bytes [low,
    high) they are (-1: not file content)."""

    volume: Int
    kind: Int
    inode: Int
    part: Int
    role: Int
    flags: Int
    start: Int
    end: Int
    low: Int
    high: Int

    def take(self, keep: np.ndarray) -> "_Pieces":
        return take(self, keep)

    def join(self, *others: "_Pieces") -> "_Pieces":
        return stack(_Pieces, [self, *others])


class Hits(NamedTuple):
    """What the ranges hit: `objects` by bytes, most first, each a dictionary ready for JSON; `kinds` the
    bytes of the disk of each kind, each byte counted once a kind; `size` all bytes of the ranges."""

    objects: list[dict[str, Any]]
    kinds: dict[str, int]
    size: int


def hits(bmap: BlockMap, disk: int, starts: Int, ends: Int) -> Hits:
    """What lies in the ranges [starts[i], ends[i]) of disk number `disk` (from 1); where they overlap, bytes
    count once."""
    starts, ends = union(ints(starts), ints(ends))
    owners = bmap.owners(disk, starts, ends)
    pieces = _pieces(bmap, owners.take(owners.extent >= 0))
    pieces = _slack(bmap, pieces).join(*_records(bmap, owners.take(owners.extent < 0)))
    kinds = {KINDS[code]: total(pieces.start[mine], pieces.end[mine])
             for code in np.unique(pieces.kind).tolist() for mine in [pieces.kind == code]}  # fmt: skip
    return Hits(_objects(bmap, pieces), kinds, int((ends - starts).sum()))


def _pieces(bmap: BlockMap, owners: Owners) -> _Pieces:
    row = owners.extent
    column = {
        name: tables.integers(bmap.extents, name)[row]
        for name in ("inode", "flags", "file_offset", "file_length", "volume_offset")
    }
    part = tables.parts(bmap.extents)[0][row]
    # a damaged byte of a compressed extent spoils all that is stored there
    whole = (column["flags"] & tables.COMPRESSED) != 0
    low = column["file_offset"] + np.where(whole, 0, owners.inside - column["volume_offset"])
    high = low + np.where(whole, column["file_length"], owners.length)
    nowhere = column["file_offset"] < 0
    return _Pieces(
        owners.volume, tables.codes(bmap.extents, "kind").astype(np.int64)[row], column["inode"], part,
        owners.role, column["flags"], owners.start, owners.end, np.where(nowhere, -1, low),
        np.where(nowhere, -1, high),
    )  # fmt: skip


def _slack(bmap: BlockMap, pieces: _Pieces) -> _Pieces:
    """The pieces cut at the ends of their files: what lies beyond is slack."""
    size = np.full(len(pieces.volume), np.iinfo(np.int64).max, np.int64)
    content = np.isin(pieces.kind, (tables.DATA, tables.UNWRITTEN)) & (pieces.part < 0) & (pieces.low >= 0)
    for volume in np.unique(pieces.volume[content]).tolist():
        _, inodes = bmap.slice_of("inodes", volume)
        mine = np.flatnonzero(content & (pieces.volume == volume))
        row = positions(tables.integers(inodes, "inode"), pieces.inode[mine])
        known = row >= 0
        # a text map knows no types and no sizes
        known[known] = tables.codes(inodes, "type")[row[known]] == tables.T_FILE
        size[mine[known]] = tables.integers(inodes, "size")[row[known]]
    behind = pieces.high > size
    if not behind.any():
        return pieces
    plain = ((pieces.flags & tables.COMPRESSED) == 0) & (pieces.role != PACKED)
    inside = np.where(plain & behind, np.maximum(0, size - pieces.low), 0)
    cut = np.where(plain & behind, pieces.start + inside, pieces.end)
    front = pieces._replace(end=cut, high=np.minimum(pieces.high, np.maximum(size, pieces.low)))
    back = pieces._replace(
        start=cut, low=np.maximum(pieces.low, size), kind=np.full(len(size), SLACK, np.int64)
    )
    return front.take(front.end > front.start).join(back.take(back.end > back.start))


def _records(bmap: BlockMap, volumes: Owners) -> list[_Pieces]:
    """The inodes' own records that the ranges hit, from the rows of whole volumes."""
    result = []
    for volume in np.unique(volumes.volume).tolist():
        size = record_size(bmap, volume)
        if not size:
            continue
        here = volumes.take(volumes.volume == volume)
        _, inodes = bmap.slice_of("inodes", volume)
        place = tables.integers(inodes, "record_offset")
        some = np.flatnonzero(place >= 0)
        at, row = Intervals(place[some], place[some] + size).overlaps(here.inside, here.inside + here.length)
        low = np.maximum(here.inside[at], place[some[row]])
        high = np.minimum(here.inside[at] + here.length[at], place[some[row]] + size)
        packed = here.role[at] == PACKED
        start = np.where(packed, here.start[at], here.start[at] + low - here.inside[at])
        end = np.where(packed, here.end[at], start + high - low)
        none = np.full(len(at), -1, np.int64)
        result.append(_Pieces(none * 0 + volume, none * 0 + RECORD,
                tables.integers(inodes, "inode")[some[row]], none, here.role[at], none * 0,
                              start, end, none, none))  # fmt: skip
    return result


# ---- by object ---------------------------------------------------------------------------------------------


def _objects(bmap: BlockMap, pieces: _Pieces) -> list[dict[str, Any]]:
    """The pieces added up by (volume, kind, inode, part, role), as records."""
    keys = (pieces.volume, pieces.inode, pieces.kind, pieces.part, pieces.role)
    order = np.lexsort(keys)
    if len(order) == 0:
        return []
    pieces = pieces.take(order)
    new = np.any([np.diff(key[order], prepend=key[order][0] - 1) != 0 for key in keys], axis=0)
    first, number = np.flatnonzero(new), np.cumsum(new) - 1
    group, low, high = grouped_union(number, pieces.start, pieces.end)
    size = np.zeros(len(first), np.int64)
    np.add.at(size, group, high - low)
    in_file = pieces.low >= 0
    group, low, high = grouped_union(number[in_file], pieces.low[in_file], pieces.high[in_file])
    bounds = np.searchsorted(group, np.arange(len(first) + 1))
    ranges = np.stack([low, high], 1).tolist()
    flags = np.bitwise_or.reduceat(pieces.flags, first)
    one = pieces.take(first)
    names = _names(bmap, one)
    devices = [
        escape(name.encode(errors="surrogateescape")) for name in bmap.volumes.column("name").to_pylist()
    ]
    _, parts = tables.parts(bmap.extents)
    ranked = np.lexsort((one.kind, one.inode, one.volume, -size)).tolist()
    held = _names_held(bmap, one)
    columns = [
        column.tolist()
        for column in (one.volume, one.kind, one.inode, one.part, one.role, flags, size, bounds, held)
    ]
    return [_object(at, columns, names, ranges, devices, parts) for at in ranked]


def _object(
    at: int,
    columns: list[list[int]],
    names: list[list[str]],
    ranges: list[list[int]],
    devices: list[str],
    parts: list[str],
) -> dict[str, Any]:
    volume, kind, inode, part, role, flags, size, bounds, held = columns
    return {
        "bytes": size[at], "kind": KINDS[kind[at]], "device": devices[volume[at]],
        "path": names[at][0] if names[at] else None, "also": names[at][1:],
        "part": escape(parts[part[at]].encode()) if part[at] >= 0 else None,
        "inode": inode[at] if inode[at] >= 0 else None, "ranges": ranges[bounds[at] : bounds[at + 1]],
        "names": held[at] if held[at] >= 0 else None, "role": ROLES[role[at]],
        "flags": WORDS[flags[at] & (len(WORDS) - 1)],
    }  # fmt: skip


def _names(bmap: BlockMap, one: _Pieces) -> list[list[str]]:
    """All paths of each object's inode, escaped."""
    result: list[list[str]] = [[] for _ in one.volume]
    for volume in np.unique(one.volume[one.inode >= 0]).tolist():
        known, path = bmap.paths(volume)
        mine = np.flatnonzero((one.volume == volume) & (one.inode >= 0))
        low = np.searchsorted(known, one.inode[mine], "left")
        high = np.searchsorted(known, one.inode[mine], "right")
        row, step = expand(high - low)
        words = escape_all(path.take(pa.array(low[row] + step))).to_pylist()
        ends = np.cumsum(high - low)
        for at, start, end in zip(mine.tolist(), (ends - (high - low)).tolist(), ends.tolist(), strict=True):
            result[at] = words[start:end]
    return result


def _names_held(bmap: BlockMap, one: _Pieces) -> Int:
    """How many names each directory holds; -1 for what is not a directory."""
    result = np.full(len(one.volume), -1, np.int64)
    blocks = (one.kind == tables.DIRECTORY) & (one.inode >= 0)
    for volume in np.unique(one.volume[blocks]).tolist():
        mine = np.flatnonzero(blocks & (one.volume == volume))
        parent = in_order(tables.integers(bmap.slice_of("names", volume)[1], "parent"))
        result[mine] = np.searchsorted(parent, one.inode[mine], "right") - np.searchsorted(
            parent, one.inode[mine], "left"
        )
    return result


def grouped_union(group: Int, starts: Int, ends: Int) -> tuple[Int, Int, Int]:
    """(group, start, end) of the ranges merged within each group, by group and then by start."""
    points, at = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    # one more than there are: the last range of a group does not touch the first of the next
    span = len(points) + 1
    low, high = union(group * span + at[: len(starts)], group * span + at[len(starts) :])
    merged: Int = low // span
    return merged, points[low % span], points[high % span]
