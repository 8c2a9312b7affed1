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

from virt_bmap.core.arrays import EMPTY, Int, expand
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext import blocks, directories, groups, inline, inodes, journal, owned
from virt_bmap.formats.filesystems.ext.blocks import Runs
from virt_bmap.formats.filesystems.ext.inodes import Inodes
from virt_bmap.formats.filesystems.ext.superblock import (
    OFFSET,
    STATE_CLEAN,
    STATE_ERRORS,
    Superblock,
    check_size,
    probe,
    read_superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Proof,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "ext"


FEATURES = (
    "ext2 rev 0 to ext4, blocks of 1 to 64 KiB, inodes of 128 bytes to a block, Hurd's translators",
    "extent trees, block pointers with three levels of indirection, sparse files, unwritten extents",
    (
        "flex_bg, meta_bg, sparse_super, sparse_super2, 64bit, bigalloc with the slack of its clusters, "
        "uninitialised groups and tables"
    ),
    (
        "plain, hashed (htree, large_dir), casefolded and encrypted directories (names as ciphertext), "
        "with or without file types"
    ),
    "inline data with its overflow, inline directories, short and long symbolic links",
    "attribute blocks, shared ones with all owners, attributes in inodes of their own (ea_inode)",
    (
        "journal in an inode or on another disk, replayed in memory: revokes, escapes, 64bit, checksums "
        "v1 to v3, asynchronous commits"
    ),
    (
        "resize inode, reserved descriptors, quota (hidden and plain), orphan files, project ids, mmp, "
        "bad blocks, verity, Android's shared blocks"
    ),
    (
        "backups of the superblock and of descriptors where the primary ones are damaged; checksums of "
        "both verified"
    ),
    "files deleted while open, times from 1901 to 2262 in nanoseconds",
)
REFUSED = (
    "features that the superblock calls incompatible and that no released kernel knows",
    "compression (e2compr)",
    "fast commits: not replayed, and named where there are any that a mount would replay",
    (
        "a journal on another disk that is not among the disks: the state before recovery is mapped, and "
        "a problem says so"
    ),
)
ORACLES = (
    "kernel FIEMAP of every file and directory through a loop mount",
    "debugfs blocks of inodes, dumpe2fs for places and counts, blkid for types",
    "content by SHA-256 through the map, also of files in blocks larger than this kernel mounts",
    "the block bitmap: every byte owned or free, none both",
    "e2fsck: the map of a crashed disk equals that of the same disk recovered, and its blocks byte for byte",
    "tables of mounted walks over images of other projects",
)
CHECKS = Checks(
    checksums=(
        "metadata_csum: superblock, descriptors, bitmaps, inodes, extent tree nodes, directory "
        "blocks, hash tree nodes, attribute blocks, mmp, orphan file, "
        "the journal's superblock; what is replayed of the journal; uninit_bg: descriptors"
    ),
    rules=(
        (
            "extent tree nodes: magic, counts, depth, order, overlaps, agreement with the parent's key, "
            "place in the volume, each node once"
        ),
        "block pointers: place in the volume, each block once",
        (
            "directory entries: lengths, names, inode numbers; names lead to used inodes, inodes with "
            "links have names"
        ),
        "hash trees: limits and counts, order of hashes, depth, place of children",
        "superblock and descriptors: geometry, places, features known",
        "journal: sequence and order of its blocks, revocations",
    ),
    unchecked=(
        "content of files; what is in attributes, and checksums of those in inodes of their own",
        "link counts, block counts of inodes and free counts of groups",
        "whether a name's hash fits the leaf that holds it, `.` and `..`",
        "backups of superblock and descriptors where the primary ones are sound; quota files",
    ),
)


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
    runs, trees = _block_map(reader, superblock, nodes, types, damage)
    owned.add_content(rows, superblock, nodes, types, runs)
    attributes = owned.add_trees_and_attributes(rows, superblock, nodes, trees, damage)
    inline.add_symlinks(rows, superblock, nodes, types)
    parents, holding = _directory_blocks(superblock, nodes, types, runs, damage)
    content = (runs.start, runs.start + runs.count) if superblock.cluster > 1 else (EMPTY, EMPTY)
    del runs  # what follows finds room where these were
    nodes = nodes._replace(block=np.zeros((0, inodes.I_BLOCK_SIZE), np.uint8))
    names = directories.read_names(reader, superblock, parents, holding, damage)
    names += inline.add_data(rows, superblock, nodes, types, bodies, damage)
    if superblock.cluster > 1:
        owned.add_cluster_slack(rows, superblock, free, [metadata, attributes, content])
    return Filesystem(
        type=superblock.type, size=superblock.blocks * superblock.block_size,
        block_size=superblock.block_size, root=inodes.ROOT,
        state=_state(superblock, reader is not on_disk, damage), reader=reader,
        inodes=inodes.table(superblock, nodes, types), names=directories.table(names),
        extents=rows.table(0), uuid=superblock.uuid,
        label=superblock.label, features=superblock.feature_words,
    )  # fmt: skip


def _state(superblock: Superblock, is_recovered: bool, damage: Damage) -> str:
    state = superblock.number("s_state")
    if state & STATE_ERRORS:
        damage.say(
            "marked-damaged", "the kernel found errors and says so in the superblock (s_state)", OFFSET
        )
    if is_recovered:
        return tables.RECOVERED
    if superblock.has("needs_recovery"):
        return tables.NEEDS_RECOVERY
    if not state & STATE_CLEAN:
        return tables.IN_USE
    # an unmount leaves no orphans: these are files that were deleted while open, on a filesystem that is
    # still mounted (ext4_freeze)
    orphans = superblock.number("s_last_orphan") or superblock.has("orphan_present")
    return tables.FROZEN if orphans else tables.CLEAN


def _block_map(
    reader: Reader, superblock: Superblock, nodes: Inodes, types: np.ndarray, damage: Damage
) -> tuple[Runs, tuple[Int, Int]]:
    """Where the blocks of all inodes lie that have any: runs, and tree nodes as (owner, block)."""
    with_blocks = inodes.with_types(types, tables.T_FILE, tables.T_DIRECTORY, tables.T_METADATA)
    with_blocks |= (types == tables.T_SYMLINK) & ~inline.fast_symlinks(superblock, nodes, types)
    with_blocks &= (nodes.flags & inodes.INLINE_DATA_FL == 0) & (nodes.number != inodes.RESIZE)
    by_extents = nodes.flags & inodes.EXTENTS_FL != 0
    extents, pointers = np.flatnonzero(with_blocks & by_extents), np.flatnonzero(with_blocks & ~by_extents)
    return blocks.read_blocks_of(reader, superblock, nodes.block, extents, pointers, nodes.offset, damage)


def _directory_blocks(
    superblock: Superblock, nodes: Inodes, types: np.ndarray, runs: Runs, damage: Damage
) -> tuple[Int, Int]:
    """(directory's inode number, block) of every block that holds names, each block once: damage can't make
    this long."""
    mine = runs.take(np.flatnonzero((types[runs.owner] == tables.T_DIRECTORY) & ~runs.unwritten))
    room = -(-nodes.size[mine.owner] // superblock.block_size)
    order = np.argsort(mine.start, kind="stable")
    owner, start = mine.owner[order], mine.start[order]
    end = start + np.clip(room - mine.logical, 0, mine.count)[order]
    reach = np.append(0, np.maximum.accumulate(end)[:-1]) if len(end) else end
    twice = (start < reach) & (end > start)
    damage.add("twice", "pieces of directories overlap others", (start * superblock.block_size)[twice])
    start = np.maximum(start, reach)
    row, step = expand(np.maximum(end - start, 0))
    return nodes.number[owner[row]], start[row] + step


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.ext.blocks import HEADER
    from virt_bmap.formats.filesystems.ext.groups import DESCRIPTOR, DESCRIPTOR_64
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
