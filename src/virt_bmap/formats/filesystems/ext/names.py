"""Names: the entries of all directory blocks, one cursor a block, all cursors stepped at once.

Hash trees need no reading of their own: their nodes look like blocks with empty entries to whoever reads a
directory plainly.

Sources: kernel Documentation/filesystems/ext4/directory.rst; fs/ext4/ext4.h (ext4_rec_len_from_disk),
fs/ext4/inline.c.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, in_order
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.ext.superblock import Superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

HEADER = 8
"""Bytes of an entry before its name: inode (4), rec_len (2), name_len (1), file_type (1; high byte of
name_len in ext2 rev 0)."""
DOT, DOT_DOT = 0x2E, 0x2E2E
BATCH = 8 << 20
"""Bytes of directory blocks read at a time."""


class Names(NamedTuple):
    """Entries of a batch as columns."""

    parent: Int
    inode: Int
    name: Ragged


def read_names(
    reader: Reader, superblock: Superblock, parent: Int, block: Int, damage: Damage
) -> list[Names]:
    """The entries of these blocks, sorted; each belongs to the directory `parent`."""
    size = superblock.block_size
    found = []
    # each batch takes as many steps as its longest block
    for part, data in reader.batches(block * size, size, BATCH, BATCH):
        starts = np.arange(len(data), dtype=np.int64) * size
        found.append(
            parse(
                data.reshape(-1),
                starts,
                starts + size,
                parent[part],
                block[part] * size,
                size,
                superblock.inodes,
                damage,
            )
        )
    return found


def parse(
    data: Bytes,
    starts: Int,
    ends: Int,
    parent: Int,
    offsets: Int,
    block_size: int,
    inodes: int,
    damage: Damage,
) -> Names:
    """The entries in the areas [starts, ends) of `data`, which begin at multiples of 4 and do not overlap.

    `offsets` are where the areas lie in the volume, for messages.
    """
    words = data[: len(data) // 4 * 4].view("<u4")
    header = _headers(words, starts, ends, offsets, block_size, damage)
    at, length = (header - 1) * 4, words[header] >> 16 & 0xFF
    inode = words[header - 1].astype(np.int64)
    keep = inode != 0
    short = np.flatnonzero((length == 1) | (length == 2))
    ones = length[short] == 1
    name = words[np.minimum(header[short] + 1, len(words) - 1)] & np.where(ones, 0xFF, 0xFFFF)
    keep[short[name == np.where(ones, DOT, DOT_DOT)]] = False
    area = np.repeat(np.arange(len(starts)), np.diff(np.searchsorted(at, starts), append=len(at)))
    for what, bad in (
        ("[name leads to an inode|names lead to inodes] that can't exist", inode > inodes),
        ("[name is|names are] empty", length == 0),
    ):
        rows = np.flatnonzero(keep & bad)
        damage.add("directory", what, offsets[area[rows]] + at[rows] - starts[area[rows]])
        keep[rows] = False
    rows = np.flatnonzero(keep)
    return Names(parent[area[rows]], inode[rows], Ragged.cut(data, at[rows] + HEADER, length[rows]))


def _headers(words: np.ndarray, starts: Int, ends: Int, offsets: Int, block_size: int, damage: Damage) -> Int:
    """Where the second words of entries lie (rec_len, name_len, file_type), sorted, counted in words.

    An area is left where an entry's length is impossible.
    """
    signed = words.view("<i4")
    found, bad_area, bad_at = [EMPTY], [EMPTY], [EMPTY]
    area = np.flatnonzero(starts + HEADER <= ends)
    at, limit = starts[area] // 4 + 1, ends[area] // 4 + 1
    while len(at):
        header = signed[at]
        length = header & 0xFFFF
        # a length of 65536 does not fit in 16 bits; the low two, otherwise zero, extend it
        if block_size > 0xFFFC:
            length = np.where(
                (length == 0xFFFF) | (length == 0), block_size, (length & 0xFFFC) | (length & 3) << 16
            )
        after = at + (length >> 2)
        good = (length - (header >> 16 & 0xFF) >= HEADER) & (length & 3 == 0)
        more = good & (after <= limit - HEADER // 4)
        if more.all():
            found.append(at)
            at = after
            continue
        good &= after <= limit
        found.append(at[good])
        bad_area.append(area[~good])
        bad_at.append(at[~good])
        at, limit, area = after[more], limit[more], area[more]
    bad, where = np.concatenate(bad_area), np.concatenate(bad_at)
    damage.add(
        "directory",
        "directory [entry has|entries have] an impossible length",
        offsets[bad] + (where - 1) * 4 - starts[bad],
    )
    return in_order(np.concatenate(found))


def table(found: list[Names]) -> pa.Table:
    """The table `names`."""
    if not found:
        return tables.empty("names")
    return tables.make(
        "names", volume=0, parent=np.concatenate([part.parent for part in found]),
        inode=np.concatenate([part.inode for part in found]),
        name=Ragged.concat([part.name for part in found]).arrow(),
    )  # fmt: skip
