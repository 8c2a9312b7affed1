"""Directories: names, out of short directories (in the inode) and out of directory blocks.

The blocks of a directory lie in an address space of their own: names below 32 GiB,
then their hash index, then an index of free space. Only the names are read. A
directory block can be larger than a filesystem block, and then lie in several places.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, in_order, joined
from virt_bmap.core.columns import take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.btree import BATCH
from virt_bmap.formats.filesystems.xfs.extents import Extents
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model.damage import Damage

ALIGN = 8
"""XFS_DIR2_DATA_ALIGN: entries begin and end on multiples of it."""
DOT = ord(".")
MAX_INODE = 1 << 56
"""XFS_MAXINUMBER: no inode number is larger."""


class Names(NamedTuple):
    """Directory entries: numbers of directory and inode, and the name."""

    parent: Int
    inode: Int
    name: Ragged


NO_NAMES = Names(EMPTY, EMPTY, Ragged(np.zeros(0, np.uint8), np.zeros(0, np.uint16)))


def stack_names(parts: Sequence[Names]) -> Names:
    """The entries of all parts, one after the other."""
    parts = [NO_NAMES, *parts]
    parent, inode = (np.concatenate([getattr(part, name) for part in parts]) for name in ("parent", "inode"))
    return Names(parent, inode, Ragged.concat([part.name for part in parts]))


def short_form(
    data: Bytes, start: Int, end: Int, parent: Int, place: Int, ftype: bool, damage: Damage
) -> Names:
    """Names of directories that lie in `data[start:end]` of their inodes; `place`: byte of the volume for
    messages.

    struct xfs_dir2_sf_hdr: count, i8count, number of the parent in 4 or 8 bytes; then for each name its
    length, an offset (2 bytes), the name, its type where there is one, and the inode's number in 4 or 8
    bytes.
    """
    wide = (end - start >= 6) & (data[np.minimum(start + 1, len(data) - 1)] > 0)
    size = np.where(wide, 8, 4)
    good = damage.check(
        end - start >= 2 + size, "directory", "short [directory is|directories are] cut off", place
    )
    row = np.flatnonzero(good)
    at, left = (start + 2 + size)[row], data[start[row]].astype(np.int64)
    found: list[tuple[Int, Int]] = []
    while True:
        more = left > 0
        row, at, left = row[more], at[more], left[more] - 1
        if len(row) == 0:
            break
        length = data[np.minimum(at, len(data) - 1)].astype(np.int64)
        after = at + 3 + length + ftype + size[row]
        good = damage.check(
            (after <= end[row]) & (length > 0),
            "directory",
            "short [directory is|directories are] cut off",
            place[row],
        )
        found.append((row[good], at[good]))
        row, at, left = row[good], after[good], left[good]
    if not found:
        return stack_names([])
    row, at = joined(found, 2)
    order = np.argsort(at, kind="stable")
    row, at = row[order], at[order]
    length = data[at].astype(np.int64)
    number_at = at + 3 + length + ftype
    inode = _big_endian(data, number_at, 4)
    eight = np.flatnonzero(size[row] == 8)
    inode[eight] = _big_endian(data, number_at[eight], 8)
    good = damage.check(
        (inode > 0) & (inode < MAX_INODE),
        "directory",
        "[name leads to an impossible inode number|names lead to impossible inode numbers]",
        place[row],
    )
    row, at, length = row[good], at[good], length[good]
    return Names(parent[row], inode[good], Ragged.cut(data, at + 3, length))


def _big_endian(data: Bytes, at: Int, size: int) -> Int:
    """Unaligned big-endian numbers; what does not fit int64 comes out negative."""
    raw = np.ascontiguousarray(data[at[:, None] + np.arange(size)])
    return raw.view(f">u{size}")[:, 0].astype(np.int64)


def read_directories(
    reader: Reader, geometry: Geometry, damage: Damage, extents: Extents, number: Int
) -> Names:
    """Names out of directory blocks.

    `extents` are those of directories, each one's in order; `number`: inode of each owner.
    """
    names = [
        _names(geometry, damage, number[owner], place, blocks)
        for owner, place, blocks in _blocks(reader, geometry, damage, _leading(geometry, damage, extents))
    ]  # fmt: skip
    return stack_names(names)


def _leading(geometry: Geometry, damage: Damage, extents: Extents) -> Extents:
    """The extents that hold names, without those that overlap others: so there are never more blocks than the
    volume has."""
    extents = take(extents, extents.file_block < ondisk.DIR2_LEAF_OFFSET // geometry.block_size)
    order = np.argsort(extents.block, kind="stable")
    start = extents.block[order]
    reach = np.maximum.accumulate(start + extents.count[order])
    again = np.zeros(len(order), bool)
    again[order[1:]] = start[1:] < reach[:-1]
    damage.check(
        ~again,
        "twice",
        "[extent of a directory overlaps|extents of directories overlap] others",
        geometry.block_offset(extents.block),
    )
    return take(extents, ~again) if again.any() else extents


def _blocks(
    reader: Reader, geometry: Geometry, damage: Damage, extents: Extents
) -> Iterator[tuple[Int, Int, Bytes]]:
    """Batches of whole directory blocks: owner, place of the first byte, bytes (n, directory block size)."""
    each = geometry.dirblock_size // geometry.block_size
    ends = np.cumsum(extents.count)
    total = int(ends[-1]) if len(ends) else 0
    step = max(2, BATCH // geometry.dirblock_size) * each
    first = 0
    while first < total:
        at = np.arange(first, min(first + step, total))
        row = np.searchsorted(ends, at, "right")
        inside = at - (ends - extents.count)[row]
        owner = extents.owner[row]
        file_block = extents.file_block[row] + inside
        block = extents.block[row] + inside
        new = np.flatnonzero(np.append(True, (np.diff(owner) != 0) | (np.diff(file_block // each) != 0)))
        if at[-1] < total - 1 and new[-1] > 0:  # the last one may go on in the next batch
            owner, file_block, block = owner[: new[-1]], file_block[: new[-1]], block[: new[-1]]
            new = new[:-1]
        first += len(owner)
        place = geometry.block_offset(block)
        if each > 1:
            new, keep = _whole(damage, new, file_block, each, place)
            owner, place = owner[keep], place[keep]
        if len(place):
            blocks = reader.read_blocks(place, geometry.block_size).reshape(-1, geometry.dirblock_size)
            yield owner[::each], place[::each], blocks


def _whole(damage: Damage, new: Int, file_block: Int, each: int, place: Int) -> tuple[Int, Int]:
    """Which filesystem blocks form whole directory blocks: (first ones, all of them), as indexes."""
    count = np.diff(np.append(new, len(file_block)))
    row, step = expand(count)
    fits = np.logical_and.reduceat(file_block % each == step, new)
    good = damage.check(
        fits & (count == each), "directory", "directory [block is|blocks are] incomplete", place[new]
    )
    keep = np.flatnonzero(good[row])
    return new[good], keep


def _names(geometry: Geometry, damage: Damage, parent: Int, place: Int, blocks: Bytes) -> Names:
    """Names in directory blocks (n, size): one cursor for each block, all of them stepped at once."""
    size = geometry.dirblock_size
    begin, end = _spans(geometry, damage, place, blocks)
    flat = blocks.reshape(-1)
    words = flat.view(">u8")
    base = np.arange(len(blocks), dtype=np.int64) * size
    at, end = base + begin, base + end
    overhead = 8 + 1 + 2 + geometry.has("ftype") + ALIGN - 1
    found = [np.zeros(0, np.int64)]
    while True:
        more = at < end
        if not more.all():
            at, end = at[more], end[more]
        if len(at) == 0:
            break
        high = (words[at >> 3] >> np.uint64(32)).astype(np.int64)
        unused = high >> 16 == ondisk.DIR2_FREE_TAG
        length = flat[np.minimum(at + 8, len(flat) - 1)].astype(np.int64)
        step = np.where(unused, high & 0xFFFF, (length + overhead) & -ALIGN)
        good = (step >= ALIGN) & (step % ALIGN == 0) & (at + step <= end) & (unused | (length > 0))
        if not good.all():
            damage.check(
                good,
                "directory",
                "directory [block holds|blocks hold] entries that do not fit",
                place[at // size],
            )
            at, end, step, unused = at[good], end[good], step[good], unused[good]
        found.append(at[~unused])
        at = at + step
    at = in_order(np.concatenate(found))
    return _entries(damage, flat, words, at, parent[at // size], place[at // size])


def _entries(damage: Damage, flat: Bytes, words: np.ndarray, at: Int, parent: Int, place: Int) -> Names:
    """struct xfs_dir2_data_entry at `at`: inode's number (8 bytes), length of the name, name; without "." and
    ".."."""
    length = flat[at + 8].astype(np.int64)
    first, second = flat[at + 9], flat[at + 10]
    dots = (first == DOT) & ((length == 1) | ((length == 2) & (second == DOT)))
    inode = words[at >> 3].astype(np.int64)
    good = damage.check(
        (inode > 0) & (inode < MAX_INODE),
        "directory",
        "[name leads to an impossible inode number|names lead to impossible inode numbers]",
        place,
    )
    keep = good & ~dots
    at, length = at[keep], length[keep]
    return Names(parent[keep], inode[keep], Ragged.cut(flat, at + 9, length))


def _spans(geometry: Geometry, damage: Damage, place: Int, blocks: Bytes) -> tuple[Int, Int]:
    """Where entries begin and end in each block; an empty span where the block is not one of names."""
    magic = np.ascontiguousarray(blocks[:, :4]).view("S4")[:, 0]
    begin, end = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
    tail = np.ascontiguousarray(blocks[:, -8:-4]).view(">u4")[:, 0].astype(np.int64)
    for kind, (header, whole) in ondisk.DIR2_MAGICS.items():
        mine = magic == kind
        begin[mine] = header
        end[mine] = geometry.dirblock_size - 8 * (1 + tail[mine]) if whole else geometry.dirblock_size
    good = damage.check(
        end > begin, "directory", "directory [block has|blocks have] a wrong magic number or tail", place
    )
    return np.where(good, begin, 0), np.where(good, end, 0)
