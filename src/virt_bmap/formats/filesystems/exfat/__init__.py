"""exFAT: boot regions, FAT, allocation bitmap, entry sets.

Read are both boot regions' places, the main one's checksum, the active FAT and allocation bitmap once from
end to end, and the directories, breadth first. The bitmap decides what is free. A file's clusters follow each
other when its entry says so (NoFatChain), otherwise they are chained in the FAT, of which only entries of
allocated clusters count: drivers leave old links in freed ones. What lies beyond a file's ValidDataLength was
never written.

Clusters that vendor extensions allocate (entries 0xE1) have no owner here: they are `unknown`.

Inode numbers: byte offset of the file's directory entry / 32; the root is 0.

Sources: Microsoft exFAT file system specification (2019); kernel fs/exfat/{super,balloc,dir,namei}.c;
exfatprogs fsck/fsck.c.
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import ints
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.exfat.allocator import (
    add_bad,
    add_special,
    fat_entries,
    ranges_of,
    read_special,
)
from virt_bmap.formats.filesystems.exfat.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.exfat.inodes import MAX_DIRECTORY, Parser
from virt_bmap.formats.filesystems.exfat.superblock import (
    BOOT_SECTOR,
    MEDIA_FAILURE,
    VOLUME_DIRTY,
    add_regions,
    read_geometry,
)
from virt_bmap.formats.filesystems.fat.allocator import (
    chains_of,
    read_runs,
)
from virt_bmap.formats.filesystems.fat.extents import Heap, add_owned, clipped, inode_table
from virt_bmap.formats.filesystems.fat.tree import ROOT, read_tree
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

NAME = "exfat"
INODE = "byte offset of the file's directory entry / 32; the root is 0"


def probe(reader: Reader) -> bool:
    """Is the name of the file system where it belongs, and zero where FAT has its parameters?"""
    sector = reader.read_clipped(0, 64)
    return sector[3:11] == b"EXFAT   " and not any(sector[11:64])


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds."""
    geometry = read_geometry(reader, damage)
    runs = read_runs(fat_entries(reader, geometry))
    heap = Heap(geometry.heap, geometry.cluster_size, geometry.clusters, chains_of(runs), damage)
    root = ranges_of(heap, ROOT, ints(geometry.root_cluster))
    special = read_special(reader, root, geometry)
    rows = tables.ExtentRows()
    add_regions(rows, geometry)
    used = add_special(rows, reader, heap, special)
    add_bad(rows, heap, runs, used)
    heap.chains = chains_of(runs.within(*used))
    tree = read_tree(reader, root, heap.locate, Parser(damage), MAX_DIRECTORY, damage)
    add_owned(rows, heap, tree)
    if geometry.flags & MEDIA_FAILURE:
        damage.say("marked-damaged", "a driver met errors of the disk and says so in the boot sector", 106)
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.cluster_size, root=ROOT,
        state=tables.IN_USE if geometry.flags & VOLUME_DIRTY else tables.CLEAN,
        uuid=f"{geometry.serial >> 16:04X}-{geometry.serial & 0xFFFF:04X}", label=special.label,
        reader=reader, inodes=inode_table(tree), names=tree.names(),
        extents=clipped(rows.table(0), reader.size),
    )  # fmt: skip


def _structures() -> Structures:
    return {
        "main boot region": Structure(BOOT_SECTOR),
        "backup boot region": Structure(BOOT_SECTOR),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.exfat import history

    return History(history.former)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the allocation bitmap",
    structures=_structures,
    history=_history,
    fixed_records=True,
    inode=INODE,
)
