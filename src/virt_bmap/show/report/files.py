"""Files and how they are laid out: fragments, sizes, and where the most telling ones lie."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.resolve import Resolver, Touched
from virt_bmap.core.arrays import Int
from virt_bmap.core.escape import escape_all
from virt_bmap.model import tables
from virt_bmap.show.report.disk import Cells

LARGEST, MOST_BROKEN = 4000, 2000
"""Files in the page's table: the largest, and those in the most fragments."""
SHOWN_RANGES = 100
"""Ranges of a file that can be shown on the disk."""


class Layout(NamedTuple):
    """For each file with content on a disk its object, bytes there and fragments: pieces that do not follow
    each other on the disk in the order of the file.

    `bounds` gives the rows of each file in `pieces`, which are sorted by file and then by offset in it."""

    object: Int
    bytes: Int
    fragments: Int
    bounds: Int
    pieces: Touched


def layout(resolver: Resolver, pieces: Touched) -> Layout:
    """The files of a disk."""
    kind, inode = resolver.kind_of(pieces.object), resolver.inode_of(pieces.object)
    mine = pieces.take(np.isin(kind, (tables.DATA,)) & (inode >= 0))
    mine = mine.take(np.lexsort((mine.start, mine.file_offset, mine.object)))
    first = (
        np.flatnonzero(np.append(True, mine.object[1:] != mine.object[:-1]))
        if len(mine)
        else np.zeros(0, np.int64)
    )
    new = np.ones(len(mine), np.int64)
    new[1:] = (mine.object[1:] != mine.object[:-1]) | (mine.start[1:] != mine.end[:-1])
    bounds = np.append(first, len(mine))
    if not len(first):
        return Layout(first, first, first, bounds, mine)
    return Layout(
        mine.object[first],
        np.add.reduceat(mine.end - mine.start, first),
        np.add.reduceat(new, first),
        bounds,
        mine,
    )


def fragments(found: Layout) -> dict[str, list[int]]:
    """Files by their number of fragments: bins 1, 2, 3-4, 5-8, ...; files and bytes of each."""
    bins = np.ceil(np.log2(np.maximum(found.fragments, 1))).astype(np.int64)
    used = np.unique(bins)
    return {
        "low": [int(2 ** (b - 1)) + 1 if b else 1 for b in used], "high": [int(2**b) for b in used],
        "files": [int((bins == b).sum()) for b in used],
        "bytes": [int(found.bytes[bins == b].sum()) for b in used],
    }  # fmt: skip


def table(resolver: Resolver, found: Layout, cells: Cells) -> dict[str, Any]:
    """The largest and the most broken files as columns, with their ranges in cells, and how many files there
    are in all."""
    largest = np.argsort(-found.bytes, kind="stable")[:LARGEST]
    broken = np.argsort(-found.fragments, kind="stable")[:MOST_BROKEN]
    chosen = np.unique(np.concatenate([largest, broken[found.fragments[broken] > 1]]))
    chosen = chosen[np.argsort(-found.bytes[chosen], kind="stable")]
    objects = found.object[chosen]
    devices = [name.encode() for name in resolver.bmap.volumes.column("name").to_pylist()]
    paths = resolver.paths(objects)
    nameless = [f"[inode {inode}]" for inode in resolver.inode_of(objects).tolist()]
    name = [
        path if path is not None else word
        for path, word in zip(escape_all(paths).to_pylist(), nameless, strict=True)
    ]
    device = escape_all(
        pa.array([devices[volume] for volume in resolver.volume_of(objects).tolist()], pa.large_binary())
    )
    low, high = cells.of(found.pieces.start, found.pieces.end)
    ranges = []
    for begin, end in zip(found.bounds[chosen].tolist(), found.bounds[chosen + 1].tolist(), strict=True):
        stop = min(end, begin + SHOWN_RANGES)
        ranges.append(np.stack([low[begin:stop], high[begin:stop]], 1).reshape(-1).tolist())
    return {
        "all": len(found.object), "name": name, "device": device.to_pylist(),
        "bytes": found.bytes[chosen].tolist(), "fragments": found.fragments[chosen].tolist(),
        "ranges": ranges,
    }  # fmt: skip
