"""Names: the entries of all directory blocks, one cursor a block, all cursors stepped at once.

Hash trees need no reading of their own: their nodes look like blocks with empty entries to whoever reads a directory plainly.

Sources: kernel Documentation/filesystems/ext4/directory.rst; fs/ext4/ext4.h (ext4_rec_len_from_disk), fs/ext4/inline.c.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap import tables
from virt_bmap.arrays import EMPTY, Bytes, Int, in_order
from virt_bmap.filesystems.ext.damage import Problems, complain_where
from virt_bmap.filesystems.ext.superblock import Superblock
from virt_bmap.filesystems.ragged import Ragged
from virt_bmap.reader import Reader

HEADER = 8
"""Bytes of an entry before its name: inode (4), rec_len (2), name_len (1), file_type (1; high byte of name_len in ext2 rev 0)."""
BATCH = 8 << 20
"""Bytes of directory blocks read at a time."""


class Names(NamedTuple):
    """Entries of a batch as columns."""

    parent: Int
    inode: Int
    name: Ragged


def read_names(reader: Reader, superblock: Superblock, parent: Int, block: Int, problems: Problems) -> list[Names]:
    """The entries of these blocks, sorted; each belongs to the directory `parent`."""
    size = superblock.block_size
    found = []
    for part, data in reader.batches(block * size, size, BATCH):
        starts = np.arange(len(data), dtype=np.int64) * size
        found.append(
            parse(data.reshape(-1), starts, starts + size, parent[part], block[part] * size, size, superblock.inodes, problems)
        )
    return found


def parse(
    data: Bytes, starts: Int, ends: Int, parent: Int, offsets: Int, block_size: int, inodes: int, problems: Problems
) -> Names:
    """The entries in the areas [starts, ends) of `data`, which begin at multiples of 4 and do not overlap.

    `offsets` are where the areas lie in the volume, for messages.
    """
    words = data[: len(data) // 4 * 4].view("<u4")
    at = _entries(words, starts, ends, offsets, block_size, problems)
    inode, header = words[at >> 2].astype(np.int64), words[(at >> 2) + 1]
    length = ((header >> 16) & 0xFF).astype(np.int64)
    second = words[np.minimum((at >> 2) + 2, len(words) - 1)]
    dots = ((length == 1) & (second & 0xFF == 0x2E)) | ((length == 2) & (second & 0xFFFF == 0x2E2E))
    keep = (inode != 0) & ~dots
    area = np.repeat(np.arange(len(starts)), np.diff(np.searchsorted(at, starts), append=len(at)))
    place = offsets[area] + at - starts[area]
    complain_where(problems, "directory-entry", "names lead to inodes that cannot exist", keep & (inode > inodes), place)
    complain_where(problems, "directory-entry", "names are empty", keep & (length == 0), place)
    keep = np.flatnonzero(keep & (inode <= inodes) & (length > 0))
    return Names(parent[area[keep]], inode[keep], Ragged.cut(data, at[keep] + HEADER, length[keep]))


def _entries(words: np.ndarray, starts: Int, ends: Int, offsets: Int, block_size: int, problems: Problems) -> Int:
    """Where entries begin, sorted. An area is left where an entry's length is impossible."""
    found = [EMPTY]
    at, end, area = starts, ends, np.arange(len(starts), dtype=np.int64)
    fits = at + HEADER <= end
    at, end, area = at[fits], end[fits], area[fits]
    bad_area, bad_at = [EMPTY], [EMPTY]
    while len(at):
        header = words[(at >> 2) + 1].astype(np.int64)
        length = header & 0xFFFF
        if block_size > 0xFFFC:  # a length of 65536 does not fit in 16 bits; the low two, otherwise zero, extend it
            length = np.where((length == 0xFFFF) | (length == 0), block_size, (length & 0xFFFC) | (length & 3) << 16)
        after = at + length
        good = (length >= HEADER + ((header >> 16) & 0xFF)) & (after <= end) & (length & 3 == 0)
        if not good.all():
            bad_area.append(area[~good])
            bad_at.append(at[~good])
            at, end, area, after = at[good], end[good], area[good], after[good]
        found.append(at)
        more = after <= end - HEADER
        if more.all():
            at = after
        else:
            at, end, area = after[more], end[more], area[more]
    bad, where = np.concatenate(bad_area), np.concatenate(bad_at)
    place = offsets[bad] + where - starts[bad]
    complain_where(problems, "directory-entry", "directory entries have an impossible length", np.ones(len(bad), bool), place)
    return in_order(np.concatenate(found))


def table(found: list[Names]) -> pa.Table:
    """The table `names`."""
    if not found:
        return tables.empty("names")
    return tables.make(
        "names", volume=0, parent=np.concatenate([part.parent for part in found]),
        inode=np.concatenate([part.inode for part in found]), name=Ragged.concat([part.name for part in found]).arrow(),
    )  # fmt: skip
