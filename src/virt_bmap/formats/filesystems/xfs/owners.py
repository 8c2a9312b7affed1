"""Who owns the volume's blocks: the forks of all inodes, and what must hold of orphans."""

import numpy as np

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.columns import take
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.extents import ATTR_FORK, Extents, split
from virt_bmap.formats.filesystems.xfs.inodes import Inodes
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def of_kind(extents: Extents, inodes: Inodes, kind: int) -> Bool:
    """Which extents are content of inodes of this type."""
    result: Bool = (inodes.type[extents.owner] == kind) & (extents.fork != ATTR_FORK)
    return result


def add_forks(
    geometry: Geometry,
    damage: Damage,
    inodes: Inodes,
    extents: Extents,
    shared: tuple[Int, Int],
    rows: tables.ExtentRows,
) -> None:
    """Rows for all extents of all forks; those of files are cut where sharing begins and ends."""
    number = inodes.number[extents.owner]
    start, length = geometry.block_offset(extents.block), extents.count * geometry.block_size

    def add(which: Bool, kind: int, part: str | None = None) -> None:
        if which.any():
            rows.add(kind, start[which], length[which], inode=number[which], part=part)

    add(extents.fork == ATTR_FORK, tables.XATTR)
    place = extents.file_block * geometry.block_size
    directory = of_kind(extents, inodes, tables.T_DIRECTORY)
    named = directory & (place < ondisk.DIR2_LEAF_OFFSET)
    rows.add(tables.DIRECTORY, start[named], length[named], inode=number[named], file_offset=place[named])
    add(
        directory & (place >= ondisk.DIR2_LEAF_OFFSET) & (place < ondisk.DIR2_FREE_OFFSET),
        tables.DIRECTORY,
        "leaf",
    )
    add(directory & (place >= ondisk.DIR2_FREE_OFFSET), tables.DIRECTORY, "free index")
    hidden = of_kind(extents, inodes, tables.T_METADATA)
    for inode, name in geometry.hidden.items():
        add(hidden & (number == inode), tables.METADATA, name)
    _symlink_rows(geometry, take(extents, of_kind(extents, inodes, tables.T_SYMLINK)), inodes, rows)
    mine = np.flatnonzero(of_kind(extents, inodes, tables.T_FILE))
    row, at, size, flags = split((start[mine], length[mine]), shared, damage)
    row = mine[row]
    kind = np.where(extents.unwritten[row] != 0, tables.UNWRITTEN, tables.DATA)
    rows.add(kind, at, size, inode=number[row], file_offset=place[row] + at - start[row], flags=flags)


def _symlink_rows(geometry: Geometry, extents: Extents, inodes: Inodes, rows: tables.ExtentRows) -> None:
    """Targets of symlinks that do not fit into the inode; in version 5 each extent begins with struct
    xfs_dsymlink_hdr."""
    header = ondisk.SYMLINK_HEADER if geometry.crc else 0
    extents = take(extents, np.argsort(extents.owner, kind="stable"))
    number = inodes.number[extents.owner]
    start, length = geometry.block_offset(extents.block), extents.count * geometry.block_size
    before = np.arange(len(start)) - np.searchsorted(extents.owner, extents.owner)
    rows.add(tables.SYMLINK, start, header, inode=number, part="symlink header")
    place = extents.file_block * geometry.block_size - before * header
    rows.add(tables.SYMLINK, start + header, length - header, inode=number, file_offset=place)


def check_orphans(geometry: Geometry, damage: Damage, inodes: Inodes, heads: Int) -> None:
    """Inodes without links are on the lists of orphans (AGI, di_next_unlinked), and no others begin one."""
    deleted = (inodes.flags & tables.I_DELETED) != 0
    orphans = inodes.number[deleted]
    group = orphans >> geometry.agi_bits << geometry.agi_bits
    listed = np.isin(orphans, np.concatenate([heads, group | inodes.next_unlinked[deleted]]))
    what = "[inode without links is|inodes without links are] on no list of orphans"
    damage.check(listed, "orphan-list", what, inodes.record[deleted], "warning")
    astray = int((~np.isin(heads, orphans)).sum())
    damage.add(
        "orphan-list",
        "[list|lists] of orphans [begins|begin] with an inode that does not exist",
        count=astray,
    )
