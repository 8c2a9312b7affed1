"""Names: blocks of directories and names inside inodes, one cursor for each, all cursors stepped at once.

A directory's blocks are buckets of hash tables, one table a level; whoever wants all names needs no hash. A
bitmap says which slots are in use; a name takes as many slots as it needs, and the entry is that of its first
one.

Sources: Linux fs/f2fs/dir.c (make_dentry_ptr_block, f2fs_fill_dentries), f2fs.h (make_dentry_ptr_inline),
include/linux/f2fs_fs.h; Documentation/filesystems/f2fs.rst ("Directory Structure").
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand
from virt_bmap.core.layout import struct
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.f2fs.inodes import S_IFDIR, BlockRuns, Inodes
from virt_bmap.formats.filesystems.f2fs.ondisk import BLOCK, Superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

DENTRY = struct(
    11, [(0, "hash_code", "<u4"), (4, "ino", "<u4"), (8, "name_len", "<u2"), (10, "file_type", "u1")]
)
SLOT, NAME_LEN = 8, 255
AT_ONCE = 4096
"""Blocks that are taken apart at a time."""


class Names(NamedTuple):
    """Names of a batch: inode of the directory, inode that each leads to, and the bytes."""

    parent: Int
    inode: Int
    name: Ragged


def slots_in(room: Int) -> tuple[Int, Int]:
    """(slots, bytes in front of the entries) of an area of `room` bytes: what is left over lies between
    bitmap and entries."""
    slots = room * 8 // ((DENTRY.itemsize + SLOT) * 8 + 1)
    return slots, room - slots * (DENTRY.itemsize + SLOT)


class Directories:
    """Collects names: `inline` as inodes are read, the rest when it is known where directories have their
    blocks."""

    def __init__(self, damage: Damage) -> None:
        self._damage = damage
        self._parts: list[Names] = []

    def inline(self, inodes: Inodes, data: Bytes) -> None:
        """The names inside the blocks of these inodes."""
        start = np.arange(len(data), dtype=np.int64) * BLOCK + inodes.inline_start
        self._add(data, start, inodes.inline_room, inodes.number, inodes.block * BLOCK + inodes.inline_start)

    def table(self, volume: Superblock, inodes: Inodes, runs: BlockRuns) -> pa.Table:
        """The table `names`, with those in the blocks of directories, which are among `runs`."""
        owner, block = _blocks(inodes, runs)
        for low in range(0, len(block), AT_ONCE):
            place = block[low : low + AT_ONCE] * BLOCK
            data = volume.reader.read_blocks(place, BLOCK)
            base = np.arange(len(place), dtype=np.int64) * BLOCK
            self._add(
                data, base, np.full(len(place), BLOCK), inodes.number[owner[low : low + AT_ONCE]], place
            )
        if not self._parts:
            return tables.empty("names")
        parent, inode = (
            np.concatenate([getattr(part, name) for part in self._parts]) for name in ("parent", "inode")
        )
        return tables.make(
            "names",
            volume=0,
            parent=parent,
            inode=inode,
            name=Ragged.concat([part.name for part in self._parts]).arrow(),
        )

    def _add(self, data: Bytes, base: Int, room: Int, parent: Int, place: Int) -> None:
        if len(data):
            self._parts.append(_parse(data.reshape(-1), base, room, parent, place, self._damage))


def _blocks(inodes: Inodes, runs: BlockRuns) -> tuple[Int, Int]:
    """(row of the directory, block) of every block of names, each block once."""
    mine = np.flatnonzero(inodes.form[runs.owner] == S_IFDIR)
    room = -(-inodes.size[runs.owner[mine]] // BLOCK)
    row, step = expand(np.clip(room - runs.logical[mine], 0, runs.count[mine]))
    block, first = np.unique(runs.start[mine][row] + step, return_index=True)
    return runs.owner[mine][row][first], block


def _parse(data: Bytes, base: Int, room: Int, parent: Int, place: Int, damage: Damage) -> Names:
    """The names in areas of `room` bytes at `base` of `data`; `place` is where they lie in the volume."""
    slots, front = slots_in(room)
    entries = base + front
    text = entries + slots * DENTRY.itemsize
    area, slot = expand(slots)
    used = data[base[area] + (slot >> 3)] >> (slot & 7).astype(np.uint8) & 1
    end = np.cumsum(slots)
    at_used = np.where(used, np.arange(len(used)), len(used))
    # the first used slot from each on
    upcoming = np.append(np.minimum.accumulate(at_used[::-1])[::-1], len(used))
    found, broken = [EMPTY], [EMPTY]
    which, cursor = np.arange(len(base)), upcoming[np.minimum(end - slots, len(used))]
    while True:
        inside = cursor < end[which]
        which, cursor = which[inside], cursor[inside]
        if not len(which):
            break
        head = entries[which] + (cursor - end[which] + slots[which]) * DENTRY.itemsize
        length = data[head + 8].astype(np.int64) | data[head + 9].astype(np.int64) << 8
        after = cursor + np.maximum(-(-length // SLOT), 1)
        good = (length <= NAME_LEN) & (after <= end[which])
        broken.append(place[which[~good]])
        found.append(cursor[good & (length > 0)])
        which, cursor = which[good], upcoming[after[good]]
    bad = np.concatenate(broken)
    damage.check(
        np.zeros(len(bad), bool),
        "directory",
        "directory [block has names that leave it|blocks have names that leave them]",
        bad,
    )
    at = np.sort(np.concatenate(found))
    area, slot = area[at], slot[at]
    head = entries[area] + slot * DENTRY.itemsize
    raw = np.ascontiguousarray(data[head[:, None] + np.arange(DENTRY.itemsize)]).view(DENTRY)[:, 0]
    begin, length = text[area] + slot * SLOT, raw["name_len"].astype(np.int64)
    dots = (data[begin] == 0x2E) & ((length == 1) | ((length == 2) & (data[begin + 1] == 0x2E)))
    keep = np.flatnonzero(~dots)
    return Names(
        parent[area[keep]], raw["ino"][keep].astype(np.int64), Ragged.cut(data, begin[keep], length[keep])
    )
