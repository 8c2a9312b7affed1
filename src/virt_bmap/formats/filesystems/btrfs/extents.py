"""Rows for every logical byte: files, trees, what is shared, what is free."""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, total, union
from virt_bmap.core.columns import stack
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk, owners, replay, tree
from virt_bmap.formats.filesystems.btrfs.inodes import Inline
from virt_bmap.formats.filesystems.btrfs.owners import FileExtents
from virt_bmap.formats.filesystems.btrfs.pool import Pool
from virt_bmap.formats.filesystems.btrfs.trees import Log
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def extents_of(
    source: tree.TreeSource,
    pool: Pool,
    trees: tuple[items.Tables, files.Links],
    subvolumes: files.Subvolumes,
    log: Log | None,
    damage: Damage,
) -> tuple[pa.Table, FileExtents, Inline]:
    """Rows for every logical byte that has an owner, is free, or lies in no chunk; and the extents of files
    that they were made of."""
    found, links = trees
    out = tables.ExtentRows()
    used = owners.allocated(
        links.only(items.join(found.allocated), ondisk.EXTENT_TREE), source.nodesize, pool, damage
    )
    logs = owners.add_trees(out, links.roots, links.forest, used, source.nodesize, damage)
    regular = owners.sound(files.regular(items.join(found.regular), links), pool, damage)
    regular = owners.only_moved(regular)
    owners.check_allocated(regular, used, damage)
    inline = files.inline(items.join(found.inline), links)
    freed, taken = (EMPTY, EMPTY), (EMPTY, EMPTY)
    if log and log.found.inodes:
        told = _told(log, subvolumes, pool, damage)
        # after the last commit, extents were allocated that have no extent item yet: the log's word counts
        new = told.select((told.base > 0) & (used.find(told.base) < 0))
        taken = new.base, new.base + new.whole
        owners.check_allocated(told.select(used.find(told.base) >= 0), used, damage)
        if log.whole:
            small = files.inline(items.join(log.found.inline), log.links)
            both = (regular, inline), (told, small)
            regular, inline, gone = replay.content(subvolumes, source.sectorsize, *both)
            freed = used.ranges(gone)
        else:
            regular = stack(FileExtents, [regular, new._replace(part=new.part + owners.LOG)])
    owners.add_files(out, owners.share(regular))
    files.add_inline(out, inline, subvolumes.inodes)
    plain = regular.select(regular.part != owners.LOG)
    held = int(used.length[used.data != 0].sum()) + total(*taken) - total(*freed)
    owners.add_bookends(out, plain, held)
    logged = union(np.append(logs[0], taken[0]), np.append(logs[1], taken[1]))
    groups = links.only(items.join(found.groups), ondisk.EXTENT_TREE, ondisk.BLOCK_GROUP_TREE)
    free = owners.add_space(out, pool, used, freed, logged, groups, damage)
    if int(pool.superblock["compat_ro_flags"]) & ondisk.COMPAT_RO_FREE_SPACE_TREE_VALID:
        free_space, accounts = (
            links.only(items.join(rows), ondisk.FREE_SPACE_TREE)
            for rows in (found.free_space, found.accounts)
        )
        owners.check_free_space(free, free_space, accounts, pool, damage)
    return out.table(0), regular, inline


def _told(log: Log, subvolumes: files.Subvolumes, pool: Pool, damage: Damage) -> FileExtents:
    """The extents that a log has of the inodes that are replayed, of all where nothing is; holes are extents
    at 0."""
    told = files.regular(items.join(log.found.regular), log.links)
    if log.whole:
        told = told.select(np.isin(told.inode, subvolumes.logged))
    hole = told.base == 0
    return stack(FileExtents, [owners.sound(told.select(~hole), pool, damage), told.select(hole)])
