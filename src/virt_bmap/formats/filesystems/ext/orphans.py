"""Inodes that a mount has to finish: the list of orphans, or the orphan file.

Those without links were deleted while they were open; the table `inodes` says so of each. Those with links
were being cut, or written behind their end: what lies behind their size now is freed by the next mount, and
is no content.

Sources: kernel Documentation/filesystems/ext4/orphan.rst; fs/ext4/orphan.c ext4_orphan_cleanup().
"""

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext.extents import Runs
from virt_bmap.formats.filesystems.ext.inodes import Inodes
from virt_bmap.formats.filesystems.ext.superblock import Superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

I_DTIME = 0x14
"""Of an inode on the list, the number of the next one; 0 ends it."""
TAIL = 8
"""Bytes at the end of each block of the orphan file: a magic number and a checksum."""
MAX_BLOCKS = 512
"""EXT4_MAX_ORPHAN_FILE_BLOCKS: what is longer is no orphan file."""
LONGEST = 1 << 16
"""Inodes of the list that are followed: each is a read of its own."""


def separate(
    reader: Reader, superblock: Superblock, nodes: Inodes, types: np.ndarray, runs: Runs, damage: Damage
) -> tuple[Runs, Runs]:
    """(what inodes consist of, what the next mount cuts off)."""
    number = np.append(_listed(reader, superblock, nodes, damage), _in_file(reader, superblock, nodes, runs))
    if not len(number):
        return runs, runs.take(EMPTY)
    row = np.unique(np.searchsorted(nodes.number, number))
    row = row[row < len(nodes.number)]
    row = row[np.isin(nodes.number[row], number) & (nodes.nlink[row] > 0)]
    row = row[np.isin(types[row], (tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK))]
    mine = np.isin(runs.owner, row)
    some = runs.take(mine)
    border = -(-nodes.size[some.owner] // superblock.block_size)
    kept = np.clip(border - some.logical, 0, some.count)
    before = Runs(some.owner, some.logical, some.start, kept, some.unwritten).take(kept > 0)
    behind = Runs(some.owner, some.logical + kept, some.start + kept, some.count - kept, some.unwritten)
    other = runs.take(~mine)
    columns = (np.append(getattr(other, name), getattr(before, name)) for name in Runs.__match_args__)
    return Runs(*columns), behind.take(behind.count > 0)


def _listed(reader: Reader, superblock: Superblock, nodes: Inodes, damage: Damage) -> Int:
    """The numbers of the inodes on the list."""
    found: dict[int, None] = {}
    number = superblock.number("s_last_orphan")
    while number and number not in found and len(found) < LONGEST:
        row = int(np.searchsorted(nodes.number, number))
        if row == len(nodes.number) or nodes.number[row] != number:
            damage.say("orphan-list", f"the list of orphans leads to inode {number}, which is not in use")
            break
        found[number] = None
        number = int.from_bytes(reader.read(int(nodes.offset[row]) + I_DTIME, 4), "little")
    return np.array([*found], np.int64)


def _in_file(reader: Reader, superblock: Superblock, nodes: Inodes, runs: Runs) -> Int:
    """The numbers in the orphan file; the superblock says whether there are any."""
    if not superblock.has("orphan_present"):
        return EMPTY
    row = np.searchsorted(nodes.number, superblock.number("s_orphan_file_inum"))
    mine = runs.take((runs.owner == row) & ~runs.unwritten)
    size, parts, left = superblock.block_size, [EMPTY], MAX_BLOCKS
    for start, count in zip(mine.start.tolist(), mine.count.tolist(), strict=True):
        count = min(count, left)
        left -= count
        data = np.frombuffer(reader.read(start * size, count * size), np.uint8).reshape(count, size)
        parts.append(np.ascontiguousarray(data[:, :-TAIL]).view("<u4").reshape(-1).astype(np.int64))
    every = np.concatenate(parts)
    return every[every > 0]
