"""NTFS, from NT 4 to Windows 11: every record of the $MFT in a few large reads, names from the records
themselves.

Read are the boot sector (or its copy), the $MFT with all its attributes, the bitmap, and a few bytes of
$LogFile and hiberfil.sys. Directory indexes are never opened: each record carries its names with a reference
to the directory. The journal is not replayed: the map shows the volume as it lies there, and `state` says
when it was not left in order.

Bytes of a resident value that an update sequence moved are mapped to where they lie. A compression unit in
several pieces gives rows of one file_offset, in order. Deleted records become inodes (and names, where the
directory is known) without extents.

Sources: ntfs-3g 2022.10.3 (include/ntfs-3g/layout.h, libntfs-3g); kernel fs/ntfs3 (v6.12); [MS-FSCC] for
reparse points.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.allocator import check_records, free_space, hibernated, label, state
from virt_bmap.formats.filesystems.ntfs.contents import (
    interix_starts,
    read_contents,
    reparse_tags,
    sizes_and_flags,
)
from virt_bmap.formats.filesystems.ntfs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.ntfs.inodes import (
    inode_table,
    inode_types,
    name_table,
    read_tree,
    record_offset,
)
from virt_bmap.formats.filesystems.ntfs.links import target
from virt_bmap.formats.filesystems.ntfs.mft import read_mft
from virt_bmap.formats.filesystems.ntfs.owners import claim
from virt_bmap.formats.filesystems.ntfs.proof import prove
from virt_bmap.formats.filesystems.ntfs.superblock import is_boot, read_boot, tail
from virt_bmap.model import tables
from virt_bmap.model.contract import Docs, Filesystem, FilesystemFormat, History, Structure, Structures
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "ntfs"


def probe(reader: Reader) -> bool:
    """Does a boot sector of NTFS lie at the start?"""
    return is_boot(reader.read_clipped(0, ntfs.BOOT_SECTOR.itemsize))


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """The tables of one NTFS volume."""
    geometry = read_boot(reader, damage)
    mft = read_mft(reader, geometry, damage)
    tree = read_tree(mft, damage)
    contents = read_contents(mft, geometry, damage)
    check_records(reader, mft, contents, damage)
    tags = reparse_tags(reader, len(mft), contents)
    moved = np.flatnonzero(tags == ntfs.REPARSE_DEDUP)
    damage.add(
        "elsewhere",
        "[file has its|files have their] content in the chunk store of deduplication",
        record_offset(mft, moved),
    )
    types = inode_types(mft, tree, tags, interix_starts(reader, mft, contents))
    sizes, flags = sizes_and_flags(mft, tree, contents, tags)
    root = ntfs.ROOT if mft.records.directory[ntfs.ROOT : ntfs.ROOT + 1].any() else -1
    rows = ExtentRows()
    claim(mft, tree, contents, types, reader.size, rows, damage)
    rows.add(tables.FREE, *free_space(reader, geometry, contents, damage))
    size = tail(reader, geometry, rows)
    asleep = hibernated(reader, tree, contents)
    condition, features = state(reader, geometry, mft, contents, damage, asleep)
    return Filesystem(
        type="ntfs", size=size, block_size=geometry.cluster_size, root=root, state=condition,
        reader=reader, inodes=inode_table(mft, tree, types, sizes, flags), names=name_table(tree),
        extents=rows.table(0), uuid=f"{geometry.serial:016X}", label=label(mft), features=features or None,
        traits=tables.SLEEPING if asleep else 0,
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.ntfs.ondisk import BOOT_SECTOR, MFT_RECORD

    return {
        "$Boot": Structure(BOOT_SECTOR),
        "boot sector copy": Structure(BOOT_SECTOR),
        "record": Structure(MFT_RECORD),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.ntfs import history

    return History(history.former, contents=history.contents)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="$Bitmap",
    prove=prove,
    structures=_structures,
    history=_history,
    journals=("$LogFile",),
    fixed_records=True,
    target=target,
)
