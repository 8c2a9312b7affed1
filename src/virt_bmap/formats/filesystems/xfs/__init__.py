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
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.columns import stack, take
from virt_bmap.core.errors import Corrupt, FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import disk
from virt_bmap.formats.filesystems.xfs.directories import read_directories, stack_names
from virt_bmap.formats.filesystems.xfs.forks import ATTR_FORK, Extents, split, tree_extents, usable
from virt_bmap.formats.filesystems.xfs.geometry import Geometry, read_geometry, uuid_text
from virt_bmap.formats.filesystems.xfs.groups import read_groups
from virt_bmap.formats.filesystems.xfs.inodes import Inodes, read_inodes
from virt_bmap.formats.filesystems.xfs.log import find_log
from virt_bmap.model import tables
from virt_bmap.model.contract import Checks, Docs, Filesystem, FilesystemFormat, Proof, Structure, Structures
from virt_bmap.model.damage import Damage

NAME = "xfs"
FEATURES = (
    "versions 4 and 5, blocks of 512 bytes to 64 KiB, inodes of 256 bytes to 2 KiB, larger directory blocks",
    "short, block, leaf, node and B-tree directories, with or without file types, ASCII case-insensitive too",
    "extents in inodes and in B-trees, unwritten extents, attribute forks with remote values",
    (
        "reverse-map and reference-count B-trees: shared (reflinked) extents with all owners, "
        "copy-on-write staging"
    ),
    "sparse inode chunks, large extent counters, big timestamps",
    "orphans: files deleted while open",
    "quota inodes, bitmap and summary of a real-time device",
    "the log, internal or on another disk, replayed in memory (version 5)",
)
REFUSED = (
    "directories of version 1 (IRIX before 6.5)",
    "metadata directory trees and real-time groups (metadir)",
    "zoned devices",
    "incompatible features nobody has named yet",
    "replay of version 4 logs: the state says that recovery is needed",
    "content on a real-time device: a note",
)
ORACLES = (
    "kernel FIEMAP, GETFSMAP, stat and contents through a loop mount",
    "the kernel's own log recovery",
    "xfs_db blockuse and bmap on version 4",
    "head and tail of xfs_logprint",
    "truth tables of images from other projects",
)
CHECKS = Checks(
    checksums="version 5: superblocks, AG headers, B-tree blocks, inodes, directory and attribute blocks, "
    "symbolic links, quotas, log records",
    rules=(
        "superblock and AG headers: geometry, group numbers, lengths, features known",
        (
            "B-trees: magic, levels, counts, order and overlaps of records, keys against children, each "
            "block once"
        ),
        "inodes: numbers, forks, extents in order and inside the volume",
        "directories: blocks, entries, names that lead to inodes in use",
        "free lists and orphans: places, who is on them",
    ),
    unchecked=(
        "content of files, names and values of attributes",
        "hash indexes and free indexes of directories but for their checksums",
        "free counts and link counts",
    ),
)


def probe(reader: Reader) -> bool:
    """The magic number of the first superblock."""
    return reader.read_clipped(0, 4) == b"XFSB"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the filesystem."""
    geometry = read_geometry(reader)
    rows = tables.ExtentRows()
    if geometry.size > reader.size:
        words = f"the filesystem has {geometry.size} bytes, but the volume ends after {reader.size}"
        damage.say("truncated", words, reader.size)
    reader, state = _recovered(reader, geometry, others, damage)
    if state in (tables.RECOVERED, tables.FROZEN):
        geometry = read_geometry(reader)  # the superblock may be in the log, too
    if geometry.has("needsrepair"):
        damage.say("marked-damaged", "the superblock says that it needs xfs_repair (needsrepair)", 0)
    log = np.array([geometry.logstart])
    if geometry.logstart and geometry.holds(log, np.array([geometry.logblocks])).all():
        rows.add(
            tables.METADATA, geometry.block_offset(log), geometry.logblocks * geometry.block_size, part="log"
        )
    groups = read_groups(reader, geometry, damage, rows)
    contents = read_inodes(reader, geometry, damage, groups, rows)
    inodes = contents.inodes
    grown = tree_extents(reader, geometry, damage, contents.roots, inodes.number, rows)
    extents = usable(
        geometry, damage, stack(Extents, [contents.extents, grown]), inodes.realtime, inodes.record
    )
    in_blocks = read_directories(
        reader, geometry, damage, take(extents, _of(extents, inodes, tables.T_DIRECTORY)), inodes.number
    )
    _fork_rows(geometry, damage, inodes, extents, groups.shared, rows)
    names = stack_names([contents.names, in_blocks])
    _check_orphans(geometry, damage, inodes, groups.unlinked)
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.block_size, root=geometry.rootino, state=state,
        reader=reader, inodes=_inodes_table(inodes), extents=rows.table(0),
        names=tables.make("names", volume=0, parent=names.parent, inode=names.inode, name=names.name.arrow()),
        uuid=uuid_text(geometry.uuid), label=geometry.label or None, features=" ".join(geometry.features),
    )  # fmt: skip


def _recovered(
    reader: Reader, geometry: Geometry, others: Sequence[Reader], damage: Damage
) -> tuple[Reader, str]:
    """The volume as it is once its log is replayed, and its state."""
    try:
        log = find_log(reader, geometry, others)
    except Corrupt as error:
        damage.say("journal", f"the log can't be followed: {error}", error.offset)
        return reader, tables.NEEDS_RECOVERY
    if log is None:
        damage.say(
            "journal-missing",
            "the log lies outside, on none of these disks: it may hold changes that are not in place",
        )
        return reader, tables.NEEDS_RECOVERY
    if log.clean:
        return reader, tables.CLEAN
    from virt_bmap.formats.filesystems.xfs.replay import (
        replay,  # most volumes were unmounted, and do without it
    )

    try:
        done = replay(reader, geometry, log)
    except FormatError as error:
        damage.say("not-replayed", f"the log with {log.active} bytes of changes was not replayed: {error}")
        return reader, tables.NEEDS_RECOVERY
    # xfs_fs_freeze empties the log, then logs the superblock so that orphans are freed after a crash
    if done.superblock_only:
        return done.reader, tables.FROZEN
    damage.add(
        "journal-replayed",
        "changes of the log are applied in memory, the image itself is unchanged",
        count=done.items,
    )
    if done.unfinished:
        text = (
            "operations of the log were begun and not ended; a kernel would complete them, what they "
            "free is still shown as it was"
        )
        damage.add("not-replayed", text, count=done.unfinished)
    return done.reader, tables.RECOVERED


def _of(extents: Extents, inodes: Inodes, kind: int) -> Bool:
    """Which extents are content of inodes of this type."""
    result: Bool = (inodes.type[extents.owner] == kind) & (extents.fork != ATTR_FORK)
    return result


def _fork_rows(
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
    directory = _of(extents, inodes, tables.T_DIRECTORY)
    named = directory & (place < disk.DIR2_LEAF_OFFSET)
    rows.add(tables.DIRECTORY, start[named], length[named], inode=number[named], file_offset=place[named])
    add(
        directory & (place >= disk.DIR2_LEAF_OFFSET) & (place < disk.DIR2_FREE_OFFSET),
        tables.DIRECTORY,
        "leaf",
    )
    add(directory & (place >= disk.DIR2_FREE_OFFSET), tables.DIRECTORY, "free index")
    hidden = _of(extents, inodes, tables.T_METADATA)
    for inode, name in geometry.hidden.items():
        add(hidden & (number == inode), tables.METADATA, name)
    _symlink_rows(geometry, take(extents, _of(extents, inodes, tables.T_SYMLINK)), inodes, rows)
    mine = np.flatnonzero(_of(extents, inodes, tables.T_FILE))
    row, at, size, flags = split((start[mine], length[mine]), shared, damage)
    row = mine[row]
    kind = np.where(extents.unwritten[row] != 0, tables.UNWRITTEN, tables.DATA)
    rows.add(kind, at, size, inode=number[row], file_offset=place[row] + at - start[row], flags=flags)


def _symlink_rows(geometry: Geometry, extents: Extents, inodes: Inodes, rows: tables.ExtentRows) -> None:
    """Targets of symlinks that do not fit into the inode; in version 5 each extent begins with struct
    xfs_dsymlink_hdr."""
    header = disk.SYMLINK_HEADER if geometry.crc else 0
    extents = take(extents, np.argsort(extents.owner, kind="stable"))
    number = inodes.number[extents.owner]
    start, length = geometry.block_offset(extents.block), extents.count * geometry.block_size
    before = np.arange(len(start)) - np.searchsorted(extents.owner, extents.owner)
    rows.add(tables.SYMLINK, start, header, inode=number, part="symlink header")
    place = extents.file_block * geometry.block_size - before * header
    rows.add(tables.SYMLINK, start + header, length - header, inode=number, file_offset=place)


def _inodes_table(inodes: Inodes) -> pa.Table:
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=inodes.type, mode=inodes.mode, uid=inodes.uid,
        gid=inodes.gid, size=inodes.size, nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=inodes.flags,
        record_offset=inodes.record,
    )  # fmt: skip


def _check_orphans(geometry: Geometry, damage: Damage, inodes: Inodes, heads: Int) -> None:
    """Inodes without links are on the lists of orphans (AGI, di_next_unlinked), and no others begin one."""
    deleted = (inodes.flags & tables.I_DELETED) != 0
    orphans = inodes.number[deleted]
    group = orphans >> geometry.agi_bits << geometry.agi_bits
    listed = np.isin(orphans, np.concatenate([heads, group | inodes.next_unlinked[deleted]]))
    what = "inodes without links are on no list of orphans"
    damage.check(listed, "orphan-list", what, inodes.record[deleted], "warning")
    astray = int((~np.isin(heads, orphans)).sum())
    damage.add("orphan-list", "lists of orphans begin with an inode that is none", count=astray)


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.xfs.disk import AGF, AGI, DINODE, DINODE3, SUPERBLOCK

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
