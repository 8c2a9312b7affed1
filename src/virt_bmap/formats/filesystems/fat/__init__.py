"""FAT12, FAT16 and FAT32 with long names: boot sector, file allocation table, directories.

Read are the boot sector, FSInfo, the active FAT once from end to end, and the directories, breadth first. FAT
decides what is free; a cluster that no file owns is lost and becomes `unknown`. The width of FAT entries is
told as the kernel and fsck.fat do: FAT32 where BPB_FATSz16 is 0, otherwise by the number of clusters. Short
names are shown in code page 437, the kernel's default; the disk does not say which one was used. Times are
local times of an unknown zone, taken as UTC.

Not recognised, and so named as one unknown piece: volumes of DOS 1.x without parameters in their boot sector,
and those whose sector count has 64 bits.

Inode numbers: byte offset of the directory entry / 32; the root is 0.

Sources: Microsoft FAT specification (fatgen103); kernel fs/fat/{inode,fatent,dir,namei_vfat}.c; util-linux
libblkid/src/superblocks/vfat.c; dosfstools src/{boot,fat,check}.c.
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.fat.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.fat.extents import add_owned, clipped, inode_table
from virt_bmap.formats.filesystems.fat.inodes import Parser
from virt_bmap.formats.filesystems.fat.owners import add_clusters, add_system
from virt_bmap.formats.filesystems.fat.proof import prove
from virt_bmap.formats.filesystems.fat.state import FSINFO, check_rest, volume_label, volume_state
from virt_bmap.formats.filesystems.fat.superblock import (
    BOOT_SECTOR,
    looks_like_fat,
)
from virt_bmap.formats.filesystems.fat.tables import read_directories, read_tables
from virt_bmap.formats.filesystems.fat.tree import ROOT
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage

__all__ = ["FEATURES", "NAME", "ORACLES", "REFUSED", "looks_like_fat", "probe", "read"]

NAME = "vfat"
INODE = "byte offset of the directory entry / 32; the root is 0"


def probe(reader: Reader) -> bool:
    """Does the first sector pass the tests of libblkid?"""
    return looks_like_fat(reader.read_clipped(0, BOOT_SECTOR.itemsize))


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds."""
    geometry, runs, heap = read_tables(reader, damage)
    parser = Parser(geometry.bits)
    tree = read_directories(reader, geometry, heap, parser)
    rows = tables.ExtentRows()
    add_system(rows, geometry)
    add_clusters(rows, heap, runs)
    add_owned(rows, heap, tree)
    check_rest(reader, geometry, runs, parser, damage)
    serial = geometry.serial
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.cluster_size, root=ROOT,
        state=volume_state(reader, geometry, damage),
        uuid=None if serial is None else f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        label=volume_label(parser.labels), features=f"FAT{geometry.bits}", reader=reader,
        inodes=inode_table(tree),
        names=tree.names(), extents=clipped(rows.table(0), reader.size),
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.fat.inodes import DIRECTORY_ENTRY
    from virt_bmap.formats.filesystems.fat.superblock import BOOT_SECTOR

    return {
        "boot sector": Structure(BOOT_SECTOR),
        "FSInfo": Structure(FSINFO),
        "directory": Structure(DIRECTORY_ENTRY, many=True),
        "root directory": Structure(DIRECTORY_ENTRY, many=True),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.fat import history

    return History(history.former)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the file allocation table",
    prove=prove,
    structures=_structures,
    history=_history,
    fixed_records=True,
    inode=INODE,
)
