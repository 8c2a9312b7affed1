"""The FAT and the allocation bitmap, and the up-case table, which lies beside them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, intersect, ints, subtract
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.formats.filesystems.exfat.inodes import (
    ALLOCATION_BITMAP,
    ENTRY,
    MAX_DIRECTORY,
    STREAM_ENTRY,
    UP_CASE_TABLE,
    VOLUME_LABEL,
)
from virt_bmap.formats.filesystems.exfat.superblock import Geometry
from virt_bmap.formats.filesystems.fat.allocator import (
    BAD,
    BROKEN,
    END,
    WHOLE,
    ClusterRuns,
)
from virt_bmap.formats.filesystems.fat.extents import Heap
from virt_bmap.formats.filesystems.fat.inodes import before_end
from virt_bmap.formats.filesystems.fat.tree import DirectoryRanges
from virt_bmap.model import tables
from virt_bmap.model.problems import NOTE, WARNING

FAT_BATCH = 16 << 20
"""Bytes of the FAT that are looked at together."""


def fat_entries(reader: Reader, geometry: Geometry) -> Iterator[Int | int]:
    """The entries of the active FAT from cluster 2 on, in batches, as `chains` wants them."""
    start, end, reached = geometry.fat + geometry.active * geometry.fat_size, geometry.clusters + 2, 2
    for at, raw in held(reader, ints(start), ints(end * 4), FAT_BATCH):
        if at // 4 > reached:
            yield at // 4 - reached
        entries = raw.view("<u4")[max(0, reached - at // 4) :].astype(np.int64)
        reached = (at + len(raw)) // 4
        odd = np.flatnonzero((entries >= end) | (entries == 1))
        value = entries[odd]
        entries[odd] = np.where(value >= 0xFFFFFFF8, END, np.where(value == 0xFFFFFFF7, BAD, BROKEN))
        yield entries
    if reached < end:
        yield end - reached


def ranges_of(heap: Heap, inode: int, first: Int, size: int = 0) -> DirectoryRanges:
    """Where a structure of the volume lies: chained in the FAT or, where it has no chain, in one piece of
    `size` bytes."""
    found = heap.chains.follow(first)
    cluster, count, before = found.cluster, found.count, found.before
    if size and (found.fate[0] != WHOLE or found.length[0] < heap.needed(ints(size))[0]):
        inside = 2 <= first[0] < heap.clusters + 2
        count = np.minimum(heap.needed(ints(size)), heap.clusters + 2 - first) if inside else ints(0)
        cluster, before = first, ints(0)
    return DirectoryRanges(
        np.full(len(cluster), inode),
        heap.offset(cluster),
        count * heap.cluster_size,
        before * heap.cluster_size,
    )


class Special(NamedTuple):
    """What the root directory says of the volume: (first cluster, bytes) of bitmap and up-case table."""

    bitmap: tuple[int, int]
    upcase: tuple[int, int]
    other_bitmaps: list[tuple[int, int]]
    label: str | None


def read_special(reader: Reader, root: DirectoryRanges, geometry: Geometry) -> Special:
    """The entries of the root directory that describe the volume; Corrupt where the allocation bitmap is
    missing."""
    if len(root.start) == 0:
        raise Corrupt(
            f"{reader.name}: the root directory of exFAT begins at "
            f"cluster {geometry.root_cluster}, which is not in use",
            96,
        )
    length = np.clip(np.minimum(reader.size - root.start, MAX_DIRECTORY - root.offset), 0, root.length)
    raw = reader.read_ranges(root.start, length // ENTRY * ENTRY).reshape(-1, ENTRY)
    raw = raw[before_end(raw, np.zeros(len(raw), np.int64))]

    def placed(kind: int) -> list[tuple[int, int, int]]:
        entry = records(raw[raw[:, 0] == kind][:16], STREAM_ENTRY)
        return [
            (int(e["GeneralSecondaryFlags"]) & 1, int(e["FirstCluster"]), int(e["DataLength"])) for e in entry
        ]

    bitmaps, upcase = placed(ALLOCATION_BITMAP), placed(UP_CASE_TABLE)
    mine = [(cluster, size) for which, cluster, size in bitmaps if which == geometry.active]
    wanted = -(-geometry.clusters // 8)
    if not mine or mine[0][1] < wanted or not 2 <= mine[0][0] < geometry.clusters + 2:
        raise Corrupt(
            f"{reader.name}: the root directory of exFAT does "
            f"not name an allocation bitmap of {wanted:,} bytes",
            geometry.heap,
        )
    labels = raw[raw[:, 0] == VOLUME_LABEL]
    label = (
        labels[0, 2 : 2 + 2 * min(11, int(labels[0, 1]))].tobytes().decode("utf-16-le", "replace")
        if len(labels)
        else ""
    )
    others = [(cluster, size) for which, cluster, size in bitmaps if which != geometry.active]
    return Special(mine[0], upcase[0][1:] if upcase else (0, 0), others, label.rstrip("\0") or None)


def add_special(rows: tables.ExtentRows, reader: Reader, heap: Heap, special: Special) -> tuple[Int, Int]:
    """Rows for allocation bitmap, up-case table and free clusters; returns the clusters that the bitmap calls
    used.

    A bitmap may claim more bytes than the clusters need: Linux and fsck.exfat use and reserve what is needed.
    """
    limit, needed = heap.clusters * heap.cluster_size, -(-heap.clusters // 8)

    def place(what: str, cluster: int, size: int) -> DirectoryRanges:
        found = ranges_of(heap, -1, ints(cluster), min(size, limit))
        rows.add(tables.METADATA, found.start, found.length, part=what)
        return found

    ranges = place("allocation bitmap", special.bitmap[0], needed)
    for cluster, size in special.other_bitmaps:
        place("inactive allocation bitmap", cluster, min(size, needed))
    if special.upcase[0]:
        place("up-case table", *special.upcase)
    else:
        heap.damage.say("directory", "the root directory does not name an up-case table", severity=WARNING)
    starts, ends = _free_clusters(reader, heap, ranges)
    rows.add(tables.FREE, heap.offset(starts), (ends - starts) * heap.cluster_size)
    return np.append(2, ends), np.append(starts, heap.clusters + 2)


def _free_clusters(reader: Reader, heap: Heap, ranges: DirectoryRanges) -> tuple[Int, Int]:
    """(starts, ends) of free clusters, from the bitmap at `ranges`; what of it can't be read calls nothing
    free."""
    length = np.clip(reader.size - ranges.start, 0, ranges.length)
    known = np.append(True, length[:-1] == ranges.length[:-1]).cumprod().astype(bool)[: len(length)]
    starts, ends = bitmap_runs(reader, ranges.start[known], length[known], heap.clusters, False)
    return starts + 2, ends + 2


def add_bad(rows: tables.ExtentRows, heap: Heap, runs: ClusterRuns, used: tuple[Int, Int]) -> None:
    """Bad clusters, which the FAT marks.

    Where the bitmap calls them free, they are: drivers ask only the bitmap.
    """
    start, end = intersect(*runs.bad, *used)
    rows.add(tables.METADATA, heap.offset(start), (end - start) * heap.cluster_size, part="bad clusters")
    free = heap.offset(subtract(*runs.bad, *used)[0])
    what = "[run|runs] of clusters that the FAT calls bad [is|are] free in the bitmap"
    heap.damage.add("allocator", what, free, severity=NOTE)
