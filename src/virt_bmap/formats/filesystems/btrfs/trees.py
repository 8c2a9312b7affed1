"""All trees that a superblock leads to, walked together."""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk, tree
from virt_bmap.formats.filesystems.btrfs.pool import Pool
from virt_bmap.model.damage import Damage

READ_TREES = {
    ondisk.EXTENT_TREE,
    ondisk.FREE_SPACE_TREE,
    ondisk.BLOCK_GROUP_TREE,
    ondisk.DATA_RELOC_TREE,
    ondisk.TREE_RELOC,
}


def source_of(reader: Reader, pool: Pool) -> tree.TreeSource:
    """Where the tree blocks of a pool are read."""
    return tree.TreeSource.of(pool.superblock, reader, pool.copies, pool.chunks)


def read_trees(
    source: tree.TreeSource, superblock: np.void, wanted: set[int], damage: Damage
) -> tuple[items.Tables, files.Links]:
    """The items of all subvolumes and of the trees `wanted` that a superblock leads to.

    Corrupt where there are none.
    """
    roots, refs = _roots(source, superblock, wanted, damage)
    forest = tree.walk(source, roots, damage)
    found = items.Tables()
    for leaves in tree.read_leaves(source, forest, damage):
        found.add(leaves, source.sectorsize)
    if not found.inodes:
        raise Corrupt(f"{source.reader.name}: no leaf of any tree can be read", None, "tree")
    return found, files.Links(roots, forest, refs)


class Log(NamedTuple):
    """The log trees of a filesystem: what fsync wrote after the last commit."""

    found: items.LogTables
    links: files.Links
    whole: bool


def read_log(source: tree.TreeSource, links: files.Links, damage: Damage) -> Log:
    """The logs of all subvolumes that there are. A mount refuses those that can't be read whole."""
    roots, faults = links.roots, Damage()
    logs = roots.select(roots.id == ondisk.TREE_LOG)
    alive = roots.id[items.is_subvolume(roots.id) & (roots.refs > 0)]
    logs = logs._replace(
        wanted=(logs.offset == 0) | np.isin(logs.offset, alive)
    )  # 0: the tree of their roots
    forest, found = tree.walk(source, logs, faults), items.LogTables()
    for leaves in tree.read_leaves(source, forest, faults):
        found.add(leaves)
    whole = not faults.problems()
    if not whole:
        words = "its log tree can't be read whole: a mount refuses it, the map shows the last commit"
        damage.say("not-replayed", words)
    return Log(found, links._replace(roots=logs, forest=forest), whole)


def _roots(
    source: tree.TreeSource, superblock: np.void, wanted: set[int], damage: Damage
) -> tuple[tree.TreeRoots, items.Columns]:
    """All trees, and which directory holds which subvolume. Those of the superblock come first."""
    generation = int(superblock["generation"])
    first = [
        tree.TreeRoots.single(
            ondisk.ROOT_TREE, int(superblock["root"]), int(superblock["root_level"]), generation
        ),
        tree.TreeRoots.single(
            ondisk.CHUNK_TREE,
            int(superblock["chunk_root"]),
            int(superblock["chunk_root_level"]),
            int(superblock["chunk_root_generation"]),
        ),
    ]
    if int(superblock["log_root"]):  # written by the transaction after the last one that was committed
        first.append(
            tree.TreeRoots.single(
                ondisk.TREE_LOG,
                int(superblock["log_root"]),
                int(superblock["log_root_level"]),
                generation + 1,
            )
        )
    known = tree.TreeRoots.join(first)
    known = known._replace(wanted=known.id != ondisk.CHUNK_TREE)
    forest = tree.walk(source, known, Damage())  # what is wrong is noted when all trees are walked
    parts, refs = [], []
    for leaves in tree.read_leaves(source, forest, Damage()):
        parts.append(items.roots_of(leaves, wanted))
        refs.append(items.root_refs(leaves))
    if not parts:
        raise Corrupt(f"{source.reader.name}: the root tree can't be read", int(superblock["root"]), "tree")
    return tree.TreeRoots.join([known._replace(wanted=known.id == ondisk.ROOT_TREE), *parts]), items.join(
        refs
    )
