"""Operations whose intent is in the log, and not their end: what the kernel does to finish them.

A change of many steps, as taking an extent from a file and freeing it, is logged as the list of what is to be
done, a step a transaction. Recovery finishes what is left. Here this is done to the tables, not to the
metadata: extents are mapped into files or out of them, and what nobody owns then is free. The trees of free
space, owners and reference counts stay as the log left them.

Sources: libxfs/xfs_log_format.h xfs_{efi,cui,bui}_log_format; xfs_extfree_item.c, xfs_refcount_item.c,
xfs_bmap_item.c, xfs_reflink.c xfs_reflink_recover_cow() (Linux 6.12).
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, covered_twice, intersect, subtract, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.filesystems.xfs.extents import ATTR_FORK, DATA_FORK, Extents
from virt_bmap.formats.filesystems.xfs.superblock import Geometry

EFI, RUI, CUI, BUI = 0x1236, 0x1240, 0x1242, 0x1244
"""Extents to be freed, and to be entered in the trees of owners, of reference counts, and of files."""
HEAD = struct.Struct("<HHIQ")
"""Type, size, number of extents, id."""
PHYSICAL = np.dtype([("start", "<i8"), ("count", "<u4"), ("flags", "<u4")])
SHORT = np.dtype([("start", "<i8"), ("count", "<u4")])
"""struct xfs_extent of a 32-bit kernel."""
MAPPED = np.dtype([
    ("owner", "<i8"), ("start", "<i8"), ("place", "<i8"), ("count", "<u4"), ("flags", "<u4"),
])  # fmt: skip
INCREASE, DECREASE, ALLOC_COW, FREE_COW = 1, 2, 3, 4
MAP, UNMAP = 1, 2
KIND, OF_ATTRIBUTES, UNWRITTEN = 0xFF, 1 << 31, 1 << 30
MOST = 256
"""Extents to be mapped or unmapped: each is a step of its own, and a log of real life has a few."""
MOST_BLOCKS = 1 << 54
"""Blocks of a file: what its extents have room for."""


class Intents(NamedTuple):
    """What is left to do. `freed`, `landed` and `counted` are extents (fsblock, count): those that lose an
    owner, those of copy-on-write staging that a file takes, and those whose owners are to be counted;
    `mapped` has the fields of MAPPED."""

    freed: tuple[Int, Int] = (EMPTY, EMPTY)
    landed: tuple[Int, Int] = (EMPTY, EMPTY)
    counted: tuple[Int, Int] = (EMPTY, EMPTY)
    mapped: np.ndarray = np.zeros(0, MAPPED)


def intents_of(geometry: Geometry, items: Sequence[tuple[int, bytes]]) -> tuple[Intents, int]:
    """What unfinished items, as (type, data), still want, and how many of them are not known here."""
    none = np.zeros(0, PHYSICAL)
    freed, landed, counted, mapped, unknown = [none], [none], [none], [np.zeros(0, MAPPED)], 0
    for kind, data in items:
        if kind == EFI:
            freed.append(_extents(data, PHYSICAL, SHORT))
        elif kind == CUI:
            found = _extents(data, PHYSICAL)
            what = found["flags"] & KIND
            freed.append(found[(what == DECREASE) | (what == ALLOC_COW)])
            landed.append(found[what == FREE_COW])
            counted.append(found[(what == DECREASE) | (what == INCREASE)])
        elif kind == BUI:
            mapped.append(_extents(data, MAPPED))
        elif kind != RUI:
            unknown += 1
    every = np.concatenate(mapped)
    good = geometry.holds(every["start"], every["count"].astype(np.int64))
    every = every[good & (every["place"] >= 0) & (every["place"] < MOST_BLOCKS)]
    gone, taken, recounted = (_good(geometry, part) for part in (freed, landed, counted))
    return Intents(gone, taken, recounted, every[:MOST]), unknown + (len(every) > MOST)


def _extents(data: bytes, *layouts: np.dtype[np.void]) -> np.ndarray:
    """The extents of an item, in the layout that its length gives."""
    if len(data) >= HEAD.size:
        count = HEAD.unpack_from(data)[2]
        for layout in layouts:
            if len(data) - HEAD.size == count * layout.itemsize:
                return np.frombuffer(data, layout, count, HEAD.size)
    raise Corrupt(f"XFS log: an intent of {len(data)} bytes does not hold its extents", code="journal")


def _good(geometry: Geometry, found: list[np.ndarray]) -> tuple[Int, Int]:
    """(fsblock, count) of the extents that lie in the volume."""
    start = np.concatenate([EMPTY, *(part["start"] for part in found)])
    count = np.concatenate([EMPTY, *(part["count"].astype(np.int64) for part in found)])
    good = geometry.holds(start, count)
    return start[good], count[good]


def ranges(geometry: Geometry, extents: tuple[Int, Int]) -> tuple[Int, Int]:
    """(starts, ends) in bytes."""
    start = geometry.block_offset(extents[0])
    return start, start + extents[1] * geometry.block_size


def finished(extents: Extents, number: Int, intents: Intents) -> Extents:
    """The extents of all inodes (`number`, sorted) with those that were still to come or go."""
    for want in intents.mapped:
        row = int(np.searchsorted(number, want["owner"]))
        what = int(want["flags"]) & KIND
        if what not in (MAP, UNMAP) or row == len(number) or number[row] != want["owner"]:
            continue
        fork = ATTR_FORK if want["flags"] & OF_ATTRIBUTES else DATA_FORK
        low, high = int(want["place"]), int(want["place"]) + int(want["count"])
        mine = (extents.owner == row) & (extents.fork == fork)
        mine &= (extents.file_block < high) & (extents.file_block + extents.count > low)
        kept = [take(extents, ~mine), *_around(take(extents, mine), low, high)]
        if what == MAP:
            unwritten = int(bool(want["flags"] & UNWRITTEN))
            new = (row, fork, low, int(want["start"]), high - low, unwritten)
            kept.append(Extents(*(np.array([value], np.int64) for value in new)))
        extents = stack(Extents, kept)
    return extents


def _around(extents: Extents, low: int, high: int) -> list[Extents]:
    """What is left of extents in front of file block `low`, and from `high` on."""
    before = np.maximum(low - extents.file_block, 0)
    skip = np.clip(high - extents.file_block, 0, extents.count)
    parts = [(np.zeros_like(skip), before), (skip, extents.count - skip)]
    return [
        take(
            Extents(extents.owner, extents.fork, extents.file_block + at, extents.block + at, count,
                    extents.unwritten),
            count > 0,
        )
        for at, count in parts
    ]  # fmt: skip


def unowned(geometry: Geometry, intents: Intents, extents: Extents) -> tuple[Int, Int]:
    """(starts, ends) in bytes of what lost an owner, and has no other in any file."""
    return subtract(*ranges(geometry, intents.freed), *ranges(geometry, (extents.block, extents.count)))


def sharing(
    geometry: Geometry, intents: Intents, extents: Extents, shared: tuple[Int, Int]
) -> tuple[Int, Int]:
    """(starts, ends) in bytes of what has several owners: by the reference counts (`shared`), but where these
    were about to change, by the files themselves."""
    if not len(intents.counted[0]):
        return shared
    changed = ranges(geometry, intents.counted)
    several = covered_twice(*ranges(geometry, (extents.block, extents.count)))
    low, high = subtract(*shared, *changed), intersect(*several, *changed)
    return union(np.append(low[0], high[0]), np.append(low[1], high[1]))
