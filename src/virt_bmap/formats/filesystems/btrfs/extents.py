"""Rows for every logical byte: files, trees, what is shared, what is free."""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, union
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk, owners, tree
from virt_bmap.formats.filesystems.btrfs.pool import Pool
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def extents_of(
    source: tree.TreeSource,
    pool: Pool,
    found: items.Tables,
    links: files.Links,
    known: tuple[files.Inodes, Int],
    damage: Damage,
) -> pa.Table:
    """Rows for every logical byte that has an owner, is free, or lies in no chunk."""
    out = tables.ExtentRows()
    used = owners.allocated(
        links.only(items.join(found.allocated), ondisk.EXTENT_TREE), source.nodesize, pool, damage
    )
    logs = owners.add_trees(out, links.roots, links.forest, used, source.nodesize, damage)
    regular = owners.sound(files.regular(items.join(found.regular), links, known[1]), pool, damage)
    # after the last commit, extents were allocated that have no extent item yet: the log's word counts
    uncommitted = regular.logged & (used.find(regular.base) < 0)
    waiting = regular.part == owners.LOG
    owners.check_allocated(regular.select(~uncommitted & ~waiting), used, damage)
    plain = regular.select(~waiting)
    owners.add_files(out, owners.share(plain))
    owners.add_files(out, owners.share(regular.select(waiting & uncommitted)))
    files.add_inline(out, items.join(found.inline), links, *known)
    owners.add_bookends(out, plain, used)
    new = regular.select(uncommitted)
    logged = union(np.append(logs[0], new.base), np.append(logs[1], new.base + new.whole))
    groups = links.only(items.join(found.groups), ondisk.EXTENT_TREE, ondisk.BLOCK_GROUP_TREE)
    free = owners.add_space(out, pool, used, logged, groups, damage)
    if int(pool.superblock["compat_ro_flags"]) & ondisk.COMPAT_RO_FREE_SPACE_TREE_VALID:
        told, accounts = (
            links.only(items.join(rows), ondisk.FREE_SPACE_TREE)
            for rows in (found.free_space, found.accounts)
        )
        owners.check_free_space(free, told, accounts, pool, damage)
    return out.table(0)
