"""ext2, ext3 and ext4."""

from collections.abc import Sequence

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Int, expand
from virt_bmap.contract import Filesystem
from virt_bmap.filesystems.ext import blocks, directories, groups, inline, inodes
from virt_bmap.filesystems.ext.blocks import Runs
from virt_bmap.filesystems.ext.damage import Problems
from virt_bmap.filesystems.ext.inodes import Inodes
from virt_bmap.filesystems.ext.superblock import STATE_CLEAN, STATE_ERRORS, Superblock, probe, read_superblock
from virt_bmap.reader import Reader
from virt_bmap.tables import ExtentRows

NAME = "ext"

__all__ = ["FEATURES", "NAME", "ORACLES", "REFUSED", "probe", "read"]

FEATURES: tuple[str, ...] = ()
REFUSED: tuple[str, ...] = ()
ORACLES: tuple[str, ...] = ()

VERITY_ALIGNMENT = 65536
"""The Merkle tree of a verity file begins at the next multiple of this behind its end (fs/ext4/verity.c)."""


def read(reader: Reader, others: Sequence[Reader] = ()) -> Filesystem:
    """All tables of an ext2, ext3 or ext4 filesystem."""
    problems: Problems = []
    superblock = read_superblock(reader, problems)
    found = groups.read_groups(reader, superblock, problems)
    rows = ExtentRows()
    rows.add(tables.BOOT, 0, 1024)
    metadata = groups.add_metadata(rows, superblock, found)
    groups.add_free(reader, superblock, found, metadata, rows)
    used = groups.used_inodes(reader, superblock, found)
    nodes = inodes.read_inodes(reader, superblock, found, used, problems)
    types = inodes.types_of(superblock, nodes)
    runs, trees = _block_map(reader, superblock, nodes, types, problems)
    _add_owned(rows, superblock, nodes, types, runs, trees, problems)
    names = directories.read_names(reader, superblock, *_directory_blocks(superblock, nodes, types, runs), problems)
    inline.add(reader, superblock, nodes, types, rows, names, problems)
    extents = rows.table(0)
    names_table = directories.table(names)
    return Filesystem(
        type=superblock.type, size=superblock.blocks * superblock.block_size, block_size=superblock.block_size, root=inodes.ROOT,
        state=_state(superblock, problems), inodes=inodes.table(superblock, nodes, types), names=names_table, extents=extents,
        uuid=superblock.uuid, label=superblock.label, features=superblock.feature_words, problems=problems,
    )  # fmt: skip


def _state(superblock: Superblock, problems: Problems) -> str:
    if any(problem.severity == "error" for problem in problems):
        return "damaged"
    if superblock.has("needs_recovery"):
        return "needs recovery"
    state = superblock.number("s_state")
    if state & STATE_ERRORS:
        return "errors"
    return "clean" if state & STATE_CLEAN else "not clean"


def _block_map(
    reader: Reader, superblock: Superblock, nodes: Inodes, types: np.ndarray, problems: Problems
) -> tuple[Runs, tuple[Int, Int]]:
    """Where the blocks of all inodes lie that have any: runs, and tree nodes as (owner, block)."""
    with_blocks = np.isin(types, (tables.T_FILE, tables.T_DIRECTORY, tables.T_METADATA))
    with_blocks |= (types == tables.T_SYMLINK) & ~inline.fast_symlinks(superblock, nodes, types)
    with_blocks &= (nodes.flags & inodes.INLINE_DATA_FL == 0) & (nodes.number != inodes.RESIZE)
    at = np.flatnonzero(with_blocks)
    runs, trees = blocks.read_blocks_of(
        reader, superblock, nodes.block[at], nodes.offset[at], nodes.flags[at] & inodes.EXTENTS_FL != 0, problems
    )
    return Runs(at[runs.owner], runs.logical, runs.start, runs.count, runs.unwritten), (at[trees[0]], trees[1])


def _directory_blocks(superblock: Superblock, nodes: Inodes, types: np.ndarray, runs: Runs) -> tuple[Int, Int]:
    """(directory's inode number, block) of every block that holds names."""
    mine = runs.take(np.flatnonzero((types[runs.owner] == tables.T_DIRECTORY) & ~runs.unwritten))
    room = -(-nodes.size[mine.owner] // superblock.block_size)
    row, step = expand(np.clip(room - mine.logical, 0, mine.count))
    return nodes.number[mine.owner[row]], mine.start[row] + step


def _add_owned(
    rows: ExtentRows,
    superblock: Superblock,
    nodes: Inodes,
    types: np.ndarray,
    runs: Runs,
    trees: tuple[Int, Int],
    problems: Problems,
) -> None:
    """Rows for what inodes own."""
    size = superblock.block_size
    rows.add(tables.TREE, trees[1] * size, np.full(len(trees[1]), size, np.int64), inode=nodes.number[trees[0]])
    kind_of = np.full(len(tables.TYPES), tables.METADATA, np.int8)
    kind_of[[tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK]] = tables.DATA, tables.DIRECTORY, tables.SYMLINK
    kind = kind_of[types]
    kind[nodes.flags & inodes.EA_INODE_FL != 0] = tables.XATTR
    special = np.flatnonzero(kind == tables.METADATA)
    names = inodes.metadata_names(superblock)
    is_special = kind[runs.owner] == tables.METADATA
    for owner in special.tolist():  # a handful: journal, quotas, ...
        mine = np.flatnonzero(is_special & (runs.owner == owner))
        number = int(nodes.number[owner])
        rows.add(tables.METADATA, runs.start[mine] * size, runs.count[mine] * size, part=names.get(number, "reserved inode"),
                 inode=number, file_offset=runs.logical[mine] * size)  # fmt: skip
    mine = np.flatnonzero(~is_special)
    owner, unwritten = runs.owner[mine], runs.unwritten[mine]
    encrypted = np.where(nodes.flags & inodes.ENCRYPT_FL != 0, tables.ENCRYPTED, 0).astype(np.int32)
    rows.add(np.where(unwritten, np.int8(tables.UNWRITTEN), kind[owner]), runs.start[mine] * size, runs.count[mine] * size,
             inode=nodes.number[owner], file_offset=runs.logical[mine] * size, flags=encrypted[owner])  # fmt: skip
