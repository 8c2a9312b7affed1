"""Indexes of directories, which a map does not need: every record says where its file is called what. Drivers
find files by the index alone, so a name that it lacks is not seen there.

Sources: Linux fs/ntfs/layout.h (index root, block, header and entry); linux-ntfs project, index records.
"""

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, expand, joined
from virt_bmap.core.layout import records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.filesystems.ntfs.ondisk import REFERENCE, STRIDE
from virt_bmap.formats.filesystems.ntfs.records import put_back
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem, Proof
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE

ROOT = struct(32, [
    (8, "index_block_size", "<u4"),
    (16, "entries_offset", "<u4"), (20, "index_length", "<u4"),  # the header, from which both are counted
])  # fmt: skip
BLOCK = struct(64, [
    (0, "magic", "S4"), (4, "usa_ofs", "<u2"), (6, "usa_count", "<u2"), (16, "index_block_vcn", "<u8"),
    (24, "entries_offset", "<u4"), (28, "index_length", "<u4"),
])  # fmt: skip
ENTRY = struct(16, [(0, "indexed_file", "<u8"), (8, "length", "<u2"), (12, "flags", "<u2")])
HAS_BLOCK, LAST = 1, 2
MOST_BLOCKS = 1 << 31
"""Numbers of blocks are less; a directory has no terabytes."""
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
BATCH = 16 << 20


def prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """The blocks of all indexes, and that they lead to every name that is not deleted."""
    rows = _Rows(found)
    directory, size, known, below = _roots(found.reader, rows, damage)
    parts = [known]
    for block_size in SIZES:
        mine = np.isin(below[0], directory[size == block_size])
        level = below[0][mine], below[1][mine]
        unit = found.block_size if found.block_size <= block_size else STRIDE
        parts += _blocks(found.reader, rows, level, block_size, unit, damage)
    listed = np.concatenate([_pair(*part) for part in parts])
    parent, child = (tables.integers(found.names, name) for name in ("parent", "inode"))
    number, flags = (tables.integers(found.inodes, name) for name in ("inode", "flags"))
    live = number[flags & tables.I_DELETED == 0]
    wanted = np.isin(parent, directory) & np.isin(child, live) & np.isin(parent, live)
    lacks = child[wanted & ~np.isin(_pair(parent, child), listed)]
    place = tables.integers(found.inodes, "record_offset")[np.searchsorted(number, lacks)]
    what = (
        "[name is|names are] in [its file's record|their files' records] alone, and not in the directory's "
        "index: drivers do not show [it|them]"
    )
    damage.add("directory", what, place, severity=NOTE)
    return []


def _pair(parent: Int, child: Int) -> Int:
    """One number for two, of which the second is less than 2^31."""
    return parent << 31 | child


class _Rows:
    """What directories own, sorted by inode and place."""

    def __init__(self, found: Filesystem) -> None:
        mine = np.flatnonzero(tables.codes(found.extents, "kind") == tables.DIRECTORY)
        self.inode, self.at, self.start, self.length = (
            tables.integers(found.extents, name)[mine]
            for name in ("inode", "file_offset", "volume_offset", "length")
        )

    def where(self, which: Bool) -> tuple[Int, Int, Int, Int]:
        """(inode, file offset, start, length) of some, sorted."""
        rows = np.flatnonzero(which)
        rows = rows[np.lexsort((self.at[rows], self.inode[rows]))]
        return self.inode[rows], self.at[rows], self.start[rows], self.length[rows]


def _roots(reader: Reader, rows: _Rows, damage: Damage) -> tuple[Int, Int, tuple[Int, Int], tuple[Int, Int]]:
    """(directories, size of their blocks, what their roots list, the blocks below as (directory, number)).

    A resident value lies in several rows where an update sequence moved its bytes; they are in order.
    """
    inode, _, start, length = rows.where(rows.at < 0)
    afford(reader, int(length.sum()), "the roots of indexes")
    data = np.append(reader.read_ranges(start, length), np.zeros(64, np.uint8))
    inode, at = np.unique(inode, return_index=True)
    bounds = np.append(0, np.cumsum(length))[np.append(at, len(length))]
    begin, length = bounds[:-1], np.diff(bounds)
    head = records(data[begin[:, None] + np.arange(ROOT.itemsize)], ROOT)
    known = (length >= ROOT.itemsize) & np.isin(head["index_block_size"], SIZES)
    good = known.copy()
    first = begin + 16 + head["entries_offset"].astype(np.int64)
    end = np.minimum(begin + length, begin + 16 + head["index_length"].astype(np.int64))
    row, child, (above, block), broken = _entries(data, first[good], end[good])
    good[np.flatnonzero(good)[broken]] = False
    damage.add("directory", "[root of an index|roots of indexes] can't be read", start[at[~good]])
    inode = inode[known]
    return inode, head["index_block_size"][known].astype(np.int64), (inode[row], child), (inode[above], block)


def _blocks(
    reader: Reader, rows: _Rows, level: tuple[Int, Int], size: int, unit: int, damage: Damage
) -> list[tuple[Int, Int]]:
    """(directory, file) of all entries in blocks of this size, from those of the first level on.

    Their numbers count `unit` bytes.
    """
    inode, at, start, length = rows.where(rows.at >= 0)
    listed: list[tuple[Int, Int]] = []
    seen = EMPTY
    small = min(size, STRIDE)
    while len(level[0]):
        keys, once = np.unique(_pair(*level), return_index=True)
        once = once[~np.isin(keys, seen)]
        seen = np.append(seen, keys)
        below: list[tuple[Int, Int]] = [(EMPTY, EMPTY)]
        for low in range(0, len(once), BATCH // size):
            owner, number = (side[once[low : low + BATCH // size]] for side in level)
            row, step = expand(np.full(len(owner), size // small))  # a block may lie in several pieces
            offset = number[row] * unit + step * small
            held = np.searchsorted(_pair(inode, at // small), _pair(owner[row], offset // small), "right") - 1
            there = (held >= 0) & (np.append(inode, -1)[held] == owner[row])
            there &= offset - np.append(at, 0)[held] < np.append(length, 0)[held]
            whole = there.reshape(-1, size // small).all(axis=1)
            place = (np.append(start, 0)[held] + offset - np.append(at, 0)[held])[whole[row]]
            owner, first = owner[whole], place.reshape(-1, size // small)[:, 0]
            data = reader.read_blocks(place, small).reshape(-1, size).copy()
            good = _whole(data)
            what = "[block|blocks] of indexes [is|are] torn, or [has|have] no signature"
            damage.add("directory", what, first[~good])
            head, base = records(data, BLOCK), np.arange(len(data)) * size
            begin = base + 24 + head["entries_offset"].astype(np.int64)
            end = np.minimum(base + size, base + 24 + head["index_length"].astype(np.int64))
            flat = np.append(data.reshape(-1), np.zeros(64, np.uint8))
            found, child, (above, block), broken = _entries(flat, begin[good], end[good])
            what = "[block|blocks] of indexes [has|have] an entry of an impossible length"
            damage.add("directory", what, first[good][broken])
            listed.append((owner[good][found], child))
            below.append((owner[good][above], block))
        owner, number = joined(below, 2)
        level = owner, number
    return listed


def _whole(block: Bytes) -> Bool:
    """Which blocks have the signature and no torn sector; their update sequences are undone."""
    size, strides = block.shape[1], max(1, block.shape[1] // STRIDE)
    head = records(block, BLOCK)
    start = head["usa_ofs"].astype(np.int64)
    good: Bool = (head["magic"] == b"INDX") & (head["usa_count"] == strides + 1)
    good &= (start >= 24) & (start % 2 == 0) & (start + 2 * (strides + 1) <= size)
    row = np.flatnonzero(good)
    good[row] = put_back(block.reshape(-1).view("<u2"), row * size, start[row], strides)
    return good


def _entries(data: Bytes, at: Int, end: Int) -> tuple[Int, Int, tuple[Int, Int], Bool]:
    """(list, file) of the entries of each list in [at, end) of `data`, (list, number) of the blocks below,
    and which lists break off."""
    row = np.arange(len(at))
    rows, files, above, blocks = [EMPTY], [EMPTY], [EMPTY], [EMPTY]
    broken = np.zeros(len(at), bool)
    while len(row):
        inside = at + ENTRY.itemsize <= end
        broken[row[~inside]] = True
        row, at, end = row[inside], at[inside], end[inside]
        entry = records(data[at[:, None] + np.arange(ENTRY.itemsize)], ENTRY)
        length = entry["length"].astype(np.int64)
        leads = entry["flags"] & HAS_BLOCK > 0
        fits = (length >= ENTRY.itemsize + 8 * leads) & (at + length <= end)
        broken[row[~fits]] = True
        leads &= fits
        tail = (at + length - 8)[leads]
        block = data[tail[:, None] + np.arange(8)].view("<u8")[:, 0] if len(tail) else EMPTY.view("<u8")
        near = block < MOST_BLOCKS
        above.append(row[leads][near])
        blocks.append(block[near].astype(np.int64))
        real = fits & (entry["flags"] & LAST == 0)
        rows.append(row[real])
        files.append((entry["indexed_file"][real] & np.uint64(REFERENCE)).astype(np.int64))
        row, at, end = row[real], (at + length)[real], end[real]
    return (
        np.concatenate(rows),
        np.concatenate(files),
        (np.concatenate(above), np.concatenate(blocks)),
        broken,
    )
