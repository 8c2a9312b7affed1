"""XFS, versions 4 and 5.

Read are: the headers of all allocation groups; their B-trees of free space, inodes and reference counts with
the records, those by size, of free inodes and of owners (rmapbt) down to the places of their leaves; all
inode chunks with an inode in use; the B-trees of forks; all directory blocks that hold names; of the log what
it takes to find head and tail, and what lies between them if the volume was not unmounted.

The allocator is the B-tree of free extents (bnobt) with the AGFL. Attributes are mapped by place, their names
are not read.

Sources: fs/xfs/libxfs (Linux 6.12): xfs_format.h, xfs_da_format.h, xfs_log_format.h, xfs_bmap_btree.c,
xfs_dir2_data.c, xfs_dir2_sf.c, xfs_symlink_remote.c; fs/xfs/xfs_log_recover.c; "XFS Algorithms & Data
Structures", 3rd edition.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs.allocator import read_groups
from virt_bmap.formats.filesystems.xfs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.xfs.extents import Extents, tree_extents, usable
from virt_bmap.formats.filesystems.xfs.inodes import inode_table, read_inodes
from virt_bmap.formats.filesystems.xfs.intents import finished, sharing, unowned
from virt_bmap.formats.filesystems.xfs.names import read_directories, stack_names
from virt_bmap.formats.filesystems.xfs.owners import add_forks, check_orphans, of_kind
from virt_bmap.formats.filesystems.xfs.replay import recovered
from virt_bmap.formats.filesystems.xfs.superblock import read_geometry, uuid_text
from virt_bmap.model import tables
from virt_bmap.model.contract import Docs, Filesystem, FilesystemFormat, Proof, Structure, Structures
from virt_bmap.model.damage import Damage

NAME = "xfs"


def probe(reader: Reader) -> bool:
    """The magic number of the first superblock."""
    return reader.read_clipped(0, 4) == b"XFSB"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the filesystem."""
    geometry = read_geometry(reader)
    rows = tables.ExtentRows()
    damage.ends_early(geometry.size, reader.size)
    reader, state, intents = recovered(reader, geometry, others, damage)
    if state in (tables.RECOVERED, tables.FROZEN):
        geometry = read_geometry(reader)  # the superblock may be in the log, too
    if geometry.has("needsrepair"):
        damage.say("marked-damaged", "the superblock says that it needs xfs_repair (needsrepair)", 0)
    log = np.array([geometry.logstart])
    if geometry.logstart and geometry.holds(log, np.array([geometry.logblocks])).all():
        rows.add(
            tables.METADATA, geometry.block_offset(log), geometry.logblocks * geometry.block_size, part="log"
        )
    groups = read_groups(reader, geometry, damage, intents, rows)
    contents = read_inodes(reader, geometry, damage, groups, rows)
    inodes = contents.inodes
    grown = tree_extents(reader, geometry, damage, contents.roots, inodes.number, rows)
    extents = usable(
        geometry, damage, stack(Extents, [contents.extents, grown]), inodes.realtime, inodes.record
    )
    if state == tables.RECOVERED:
        extents = finished(extents, inodes.number, intents)
        low, high = unowned(geometry, intents, extents)
        rows.add(tables.FREE, low, high - low)
        groups = groups._replace(shared=sharing(geometry, intents, extents, groups.shared))
    in_blocks = read_directories(
        reader, geometry, damage, take(extents, of_kind(extents, inodes, tables.T_DIRECTORY)), inodes.number
    )
    add_forks(geometry, damage, inodes, extents, groups.shared, rows)
    names = stack_names([contents.names, in_blocks])
    check_orphans(geometry, damage, inodes, groups.unlinked)
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.block_size, root=geometry.rootino, state=state,
        reader=reader, inodes=inode_table(inodes), extents=rows.table(0),
        names=tables.make("names", volume=0, parent=names.parent, inode=names.inode, name=names.name.arrow()),
        uuid=uuid_text(geometry.uuid), label=geometry.label or None, features=" ".join(geometry.features),
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.xfs.ondisk import AGF, AGI, DINODE, DINODE3, SUPERBLOCK

    return {
        "superblock": Structure(SUPERBLOCK),
        "AGF": Structure(AGF),
        "AGI": Structure(AGI),
        "record": Structure(DINODE),
        "record, crc": Structure(DINODE3),
    }


def _prove(found: Filesystem, damage: Damage) -> list[Proof]:
    from virt_bmap.formats.filesystems.xfs import proof

    return proof.prove(found, damage)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the free space B+trees of the allocation groups",
    prove=_prove,
    structures=_structures,
    journals=("log",),
    fixed_records=True,
    moving=("bnobt", "cntbt", "inobt", "finobt", "rmapbt", "refcountbt", "inode chunk"),
)
