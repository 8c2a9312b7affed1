"""ext2, ext3 and ext4.

Read are: the superblock; all group descriptors; the bitmaps that were ever written; of the inode tables the
blocks with an inode in use; extent tree nodes and indirect blocks, a level at a time; all directory blocks;
and the journal where a mount would replay it. Not read are the content of files, links and attributes. The
allocator is the block bitmap.

The order of a map: `superblock` and `groups` say where everything lies, `inodes` makes columns of the tables,
`blocks` follows the trees, `directories` and `inline` find names, `owned` turns all this into rows and checks
it. `journal` lays over the reader what recovery would write, before anything else is read.

Sources: kernel Documentation/filesystems/ext4/ and fs/ext4, fs/jbd2 (v6.12); e2fsprogs lib/ext2fs (1.47);
each module names its own.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.arrays import EMPTY
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext import allocator as groups
from virt_bmap.formats.filesystems.ext import inline, inodes, journal, orphans
from virt_bmap.formats.filesystems.ext import names as directories
from virt_bmap.formats.filesystems.ext import owners as owned
from virt_bmap.formats.filesystems.ext.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.ext.owners import block_map, directory_blocks
from virt_bmap.formats.filesystems.ext.superblock import check_size, probe, read_superblock, volume_state
from virt_bmap.model import tables
from virt_bmap.model.contract import Docs, Filesystem, FilesystemFormat, History, Proof, Structure, Structures
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "ext"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of an ext2, ext3 or ext4 filesystem."""
    superblock = read_superblock(reader, damage)
    check_size(reader, superblock, damage)
    on_disk, reader = reader, journal.replay(reader, superblock, others, damage)
    if reader is not on_disk:
        superblock = read_superblock(reader, Damage())  # its faults are known by now
    found = groups.read_groups(reader, superblock, damage)
    rows = ExtentRows()
    rows.add(tables.BOOT, 0, 1024)
    metadata = groups.add_metadata(rows, superblock, found)
    free = groups.add_free(reader, superblock, found, metadata, rows)
    used = groups.used_inodes(reader, superblock, found)
    nodes, bodies = inodes.read_inodes(reader, superblock, found, used, damage)
    types = inodes.types_of(superblock, nodes)
    runs, trees = block_map(reader, superblock, nodes, types, damage)
    content = (runs.start, runs.start + runs.count) if superblock.cluster > 1 else (EMPTY, EMPTY)
    if superblock.number("s_last_orphan") or superblock.has("orphan_present"):
        runs, cut = orphans.separate(reader, superblock, nodes, types, runs, damage)
        owned.add_cut(rows, superblock, nodes, cut)
    owned.add_content(rows, superblock, nodes, types, runs)
    attributes = owned.add_trees_and_attributes(rows, superblock, nodes, trees, damage)
    inline.add_symlinks(rows, superblock, nodes, types)
    parents, holding = directory_blocks(superblock, nodes, types, runs, damage)
    del runs  # what follows finds room where these were
    nodes = nodes._replace(block=np.zeros((0, inodes.I_BLOCK_SIZE), np.uint8))
    names = directories.read_names(reader, superblock, parents, holding, damage)
    names += inline.add_data(rows, superblock, nodes, types, bodies, damage)
    if superblock.cluster > 1:
        owned.add_cluster_slack(rows, superblock, free, [metadata, attributes, content])
    return Filesystem(
        type=superblock.type, size=superblock.blocks * superblock.block_size,
        block_size=superblock.block_size, root=inodes.ROOT,
        state=volume_state(superblock, reader is not on_disk, damage), reader=reader,
        inodes=inodes.table(superblock, nodes, types), names=directories.table(names),
        extents=rows.table(0), uuid=superblock.uuid,
        label=superblock.label, features=superblock.feature_words,
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.ext.allocator import DESCRIPTOR, DESCRIPTOR_64
    from virt_bmap.formats.filesystems.ext.extents import HEADER
    from virt_bmap.formats.filesystems.ext.inodes import INODE
    from virt_bmap.formats.filesystems.ext.journal import JOURNAL_SUPER
    from virt_bmap.formats.filesystems.ext.superblock import SUPER

    return {
        "superblock": Structure(SUPER),
        "group descriptors": Structure(DESCRIPTOR, many=True),
        "group descriptors, 64bit": Structure(DESCRIPTOR_64, many=True),
        "record": Structure(INODE),
        "journal": Structure(JOURNAL_SUPER),
        "tree": Structure(HEADER),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.ext import history

    return History(history.former, history.copy_of)


def _prove(found: Filesystem, damage: Damage) -> list[Proof]:
    from virt_bmap.formats.filesystems.ext import proof

    return proof.prove(found, damage)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the block bitmaps",
    prove=_prove,
    structures=_structures,
    history=_history,
    journals=("journal",),
    fixed_records=True,
)
