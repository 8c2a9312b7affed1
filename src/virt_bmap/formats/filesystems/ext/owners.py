"""Rows for what inodes own, and what must hold between owners, names and the allocator.

Sources: kernel Documentation/filesystems/ext4/{attributes,bigalloc,verity,special_inodes}.rst;
fs/ext4/verity.c; e2fsprogs lib/ext2fs/res_gdt.c (resize inode).
"""

import numpy as np

from virt_bmap.core.arrays import Int, Intervals, covered_twice, expand, subtract, union
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext import extents as blocks
from virt_bmap.formats.filesystems.ext import inline, inodes
from virt_bmap.formats.filesystems.ext.allocator import whole_clusters
from virt_bmap.formats.filesystems.ext.extents import Runs
from virt_bmap.formats.filesystems.ext.inodes import (
    EA_INODE_FL,
    ENCRYPT_FL,
    RESIZE,
    VERITY_FL,
    Inodes,
    metadata_names,
)
from virt_bmap.formats.filesystems.ext.superblock import (
    Superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

VERITY_ALIGNMENT = 65536
"""The Merkle tree of a verity file begins at the next multiple of this behind its end (fs/ext4/verity.c)."""
DENSE = 8
"""Numbers of inodes for each that is in use, up to which a table of all is quicker than a search, and not
larger than what is known of them."""
DIND = 13
"""The place in i_block of the doubly indirect block, the only one that the resize inode has."""


def add_content(
    rows: ExtentRows, superblock: Superblock, nodes: Inodes, types: np.ndarray, runs: Runs
) -> None:
    """Rows for the blocks that hold what files, directories, links and the filesystem's own files consist
    of."""
    size = superblock.block_size
    kind_of = np.full(len(tables.TYPES), tables.METADATA, np.int8)
    kind_of[[tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK]] = (
        tables.DATA,
        tables.DIRECTORY,
        tables.SYMLINK,
    )
    kind = kind_of[types]
    kind[nodes.flags & EA_INODE_FL != 0] = tables.XATTR
    special = kind == tables.METADATA
    if special.any():
        of_special = runs.take(special[runs.owner])
        runs = runs.take(~special[runs.owner])
        for number, part in metadata_names(superblock).items():
            some = of_special.take(nodes.number[of_special.owner] == number)
            rows.add(tables.METADATA, some.start * size, some.count * size, part=part,
                inode=nodes.number[some.owner],
                     file_offset=some.logical * size)  # fmt: skip
    if (nodes.flags & VERITY_FL != 0).any():
        runs, trees = _verity(superblock, nodes, runs)
        rows.add(
            tables.METADATA,
            trees.start * size,
            trees.count * size,
            part="verity tree",
            inode=nodes.number[trees.owner],
        )
    shared: Int | int = 0
    if superblock.has("shared_blocks"):
        runs, shared = _shared(runs)
    encrypted = nodes.flags & ENCRYPT_FL != 0
    flags = np.where(encrypted[runs.owner], tables.ENCRYPTED, 0) | shared if encrypted.any() else shared
    rows.add(np.where(runs.unwritten, np.int8(tables.UNWRITTEN), kind[runs.owner]), runs.start * size,
        runs.count * size,
             inode=nodes.number[runs.owner], file_offset=runs.logical * size, flags=flags)  # fmt: skip


def add_cut(rows: ExtentRows, superblock: Superblock, nodes: Inodes, cut: Runs) -> None:
    """Rows for what lies behind the end of files that were being cut: the next mount frees it."""
    size = superblock.block_size
    rows.add(tables.DATA, cut.start * size, cut.count * size, part="cut off", inode=nodes.number[cut.owner])


def _verity(superblock: Superblock, nodes: Inodes, runs: Runs) -> tuple[Runs, Runs]:
    """Cut the runs of verity files where their Merkle trees begin: (content, trees)."""
    border = -(-nodes.size[runs.owner] // VERITY_ALIGNMENT) * (VERITY_ALIGNMENT // superblock.block_size)
    before = np.where(
        nodes.flags[runs.owner] & VERITY_FL != 0, np.clip(border - runs.logical, 0, runs.count), runs.count
    )
    content = Runs(runs.owner, runs.logical, runs.start, before, runs.unwritten)
    trees = Runs(runs.owner, runs.logical + before, runs.start + before, runs.count - before, runs.unwritten)
    return content.take(before > 0), trees.take(trees.count > 0)


def _shared(runs: Runs) -> tuple[Runs, Int]:
    """Cut the runs where blocks begin or cease to have several owners; returns them and the flag for each
    (Android's dedup)."""
    twice = covered_twice(runs.start, runs.start + runs.count)
    run, inside = Intervals(*twice).overlaps(runs.start, runs.start + runs.count)
    low = np.maximum(runs.start[run], twice[0][inside])
    high = np.minimum((runs.start + runs.count)[run], twice[1][inside])
    points = np.concatenate([runs.start, low, high])
    of = np.concatenate([np.arange(len(runs.start)), run, run])
    order = np.lexsort((points, of))
    points, of = points[order], of[order]
    ends = np.append(points[1:], 0)
    ends = np.where(np.append(of[1:] != of[:-1], True), (runs.start + runs.count)[of], ends)
    keep = ends > points
    points, ends, of = points[keep], ends[keep], of[keep]
    cut = Runs(
        runs.owner[of], runs.logical[of] + points - runs.start[of], points, ends - points, runs.unwritten[of]
    )
    hit = np.zeros(len(points), np.int64)
    hit[Intervals(*twice).overlaps(points, ends)[0]] = tables.SHARED
    return cut, hit


def add_trees_and_attributes(
    rows: ExtentRows, superblock: Superblock, nodes: Inodes, trees: tuple[Int, Int], damage: Damage
) -> tuple[Int, Int]:
    """Rows for tree nodes, attribute blocks, Hurd's translators; returns these blocks as (starts, ends)."""
    size = superblock.block_size
    rows.add(
        tables.TREE, trees[1] * size, np.full(len(trees[1]), size, np.int64), inode=nodes.number[trees[0]]
    )
    taken = [trees[1]]
    for part, block in ((None, nodes.acl), ("translator", nodes.translator)):
        owner = np.flatnonzero(block)
        place = block[owner]
        fits = superblock.inside(place, 1)
        damage.add(
            "outside", "attribute [block lies|blocks lie] outside the volume", nodes.offset[owner[~fits]]
        )
        owner, place = owner[fits], place[fits]
        _, which, count = np.unique(place, return_inverse=True, return_counts=True)
        shared = np.where(count[which] > 1, tables.SHARED, 0)
        rows.add(
            tables.XATTR,
            place * size,
            np.full(len(place), size, np.int64),
            part=part,
            inode=nodes.number[owner],
            flags=shared,
        )
        taken.append(place)
    resize = np.flatnonzero(nodes.number == RESIZE)
    top = nodes.block[resize].view("<u4")[:, DIND].astype(np.int64)
    top = top[superblock.inside(top, 1)]
    rows.add(tables.TREE, top * size, np.full(len(top), size, np.int64), inode=RESIZE)
    starts = np.concatenate([*taken, top])
    return starts, starts + 1


def add_cluster_slack(
    rows: ExtentRows, superblock: Superblock, free: tuple[Int, Int], owned: list[tuple[Int, Int]]
) -> None:
    """Rows for the blocks of a cluster (bigalloc) that nobody needs, while others of the cluster are in
    use."""
    low, high = union(np.concatenate([a for a, _ in owned]), np.concatenate([b for _, b in owned]))
    clusters = union(*whole_clusters(superblock, low, high))
    start, end = subtract(
        *subtract(clusters[0], np.minimum(clusters[1], superblock.readable), low, high), *free
    )
    rows.add(
        tables.GAP, start * superblock.block_size, (end - start) * superblock.block_size, part="cluster slack"
    )


def block_map(
    reader: Reader, superblock: Superblock, nodes: Inodes, types: np.ndarray, damage: Damage
) -> tuple[Runs, tuple[Int, Int]]:
    """Where the blocks of all inodes lie that have any: runs, and tree nodes as (owner, block)."""
    with_blocks = inodes.with_types(types, tables.T_FILE, tables.T_DIRECTORY, tables.T_METADATA)
    with_blocks |= (types == tables.T_SYMLINK) & ~inline.fast_symlinks(superblock, nodes, types)
    with_blocks &= (nodes.flags & inodes.INLINE_DATA_FL == 0) & (nodes.number != inodes.RESIZE)
    by_extents = nodes.flags & inodes.EXTENTS_FL != 0
    extents, pointers = np.flatnonzero(with_blocks & by_extents), np.flatnonzero(with_blocks & ~by_extents)
    return blocks.read_blocks_of(reader, superblock, nodes.block, extents, pointers, nodes.offset, damage)


def directory_blocks(
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
    damage.add(
        "twice",
        "[piece of a directory overlaps|pieces of directories overlap] others",
        (start * superblock.block_size)[twice],
    )
    start = np.maximum(start, reach)
    row, step = expand(np.maximum(end - start, 0))
    return nodes.number[owner[row]], start[row] + step
