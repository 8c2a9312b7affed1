"""btrfs: subvolumes, snapshots, inodes, names and extents, in the logical address space that `devices`
makes of the devices.

Read are the root tree, the extent tree (which is the allocator), and the trees of all subvolumes and
snapshots, all at once, a level a step. Other trees are named. Blocks that snapshots share are read once;
every file that refers to an extent owns it, flagged as shared.

An inode's number here is `tree << 40 | objectid`, where the top-level subvolume counts as tree 0: numbers
there are those of stat, and those of subvolume 257 begin at 257 << 40. Special ids, which are negative on the
disk, count from 2^23 or 2^40 downwards. Subvolumes are directories where they are found in their parent, as
in a mount of the top level. A snapshot holds an empty directory (objectid 2) in the place of a subvolume.

Part "bookend": what is left of an extent after a part of it was overwritten; it stays allocated, with the
inode of a file that keeps it. Part "log": written to a file by fsync after the last commit, to be put into
its place at the next mount; until then the file's other extents are those of the commit, as are its size and
its names. Files that were created and fsynced since are shown as they will be.

Sources: include/uapi/linux/btrfs_tree.h, fs/btrfs/ (v6.12); btrfs-progs Documentation/dev/On-disk-format.rst.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs import files, items, ondisk, owners, tree
from virt_bmap.formats.filesystems.btrfs.pool import Pool, pool_of
from virt_bmap.formats.filesystems.btrfs.verified import VerifiedReader
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE

NAME = "btrfs"
INODE = "tree << 40 | objectid; the top-level subvolume counts as tree 0, so its numbers are those of stat"
FEATURES = (
    "all subvolumes and snapshots", "skinny and full extent items", "mixed block groups", "block group tree",
    "free space tree (checked)", "free space cache v1", "inline extents",
    "zlib, LZO and zstd extents (flagged)", "preallocated extents", "reflinks", "bookend extents",
    "log tree (new files are shown; what changes old ones is named, not replayed)",
    "deletion and relocation that were interrupted", "nodes of 4 to 64 KiB", "changed fsid (metadata_uuid)",
)  # fmt: skip
REFUSED = ("btrfs-image dumps",)
ORACLES = (
    "kernel FIEMAP through a loop mount", "btrfs inspect-internal dump-tree",
    "btrfs inspect-internal logical-resolve", "content through the map", "the extent tree against all owners",
    ("the free space tree against the "
        "extent tree"),
)  # fmt: skip
CHECKS = Checks(
    checksums="crc32c, xxhash64, sha256 or blake2b of superblocks and of tree blocks that are read",
    rules=(
        "superblock: geometry, features and flags known",
        "tree blocks: address, owner, generation, level, order of keys, each block once",
        "chunks and block groups: lengths, profiles, overlaps, each the other",
        "extent items: place, overlaps, used bytes of block groups, the free space tree's account",
        "file extents: numbers, an extent item each",
    ),
    unchecked=(
        "content of files and its checksums",
        "quotas, back references of extent items, the checksums of what is not read of log trees",
    ),
)

READ_TREES = {
    ondisk.EXTENT_TREE,
    ondisk.FREE_SPACE_TREE,
    ondisk.BLOCK_GROUP_TREE,
    ondisk.DATA_RELOC_TREE,
    ondisk.TREE_LOG,
}


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """The filesystem of a pool. Raises Corrupt where its root tree or its extent tree can't be read."""
    pool = pool_of(reader)
    superblock = pool.superblock
    source = source_of(reader, pool)
    if int(superblock["flags"]) & ondisk.SUPER_FLAG_METADUMP:
        damage.say("elsewhere", "it was restored from btrfs-image: the content of files is not there")
    found, links = read_trees(source, superblock, READ_TREES, damage)
    inodes, fresh = files.inodes(items.join(found.inodes), links, damage)
    names, stubs = files.names(items.join(found.names), found.name_bytes, links, fresh, damage)
    extents = _extents(source, pool, found, links, (inodes, fresh), damage)
    return Filesystem(
        type="btrfs", size=reader.size, block_size=source.sectorsize, root=ondisk.FIRST_FREE,
        state=_state(superblock, damage),
        reader=VerifiedReader(reader, source, links.roots, links.forest),
        inodes=files.inode_table(inodes, stubs), names=names, extents=extents,
        uuid=ondisk.uuid_text(superblock["fsid"]),
        label=bytes(superblock["label"]).decode(errors="replace") or None,
        features=ondisk.feature_names(superblock),
    )  # fmt: skip


def source_of(reader: Reader, pool: Pool) -> tree.Source:
    """Where the tree blocks of a pool are read."""
    return tree.Source.of(pool.superblock, reader, pool.copies, pool.chunks)


def read_trees(
    source: tree.Source, superblock: np.void, wanted: set[int], damage: Damage
) -> tuple[items.Tables, files.Links]:
    """The items of all subvolumes and of the trees `wanted` that a superblock leads to.

    Corrupt where there are none.
    """
    roots, refs = _roots(source, superblock, wanted, damage)
    forest = tree.walk(source, roots, damage)
    found = items.Tables()
    for leaves in tree.read_leaves(source, forest, damage):
        found.add(leaves, source.sectorsize, refs=bool(superblock["log_root"]))
    if not found.inodes:
        raise Corrupt(f"{source.reader.name}: no leaf of any tree can be read", None, "tree")
    return found, files.Links(roots, forest, refs)


def _roots(
    source: tree.Source, superblock: np.void, wanted: set[int], damage: Damage
) -> tuple[tree.Roots, items.Columns]:
    """All trees, and which directory holds which subvolume. Those of the superblock come first."""
    generation = int(superblock["generation"])
    first = [
        tree.Roots.single(
            ondisk.ROOT_TREE, int(superblock["root"]), int(superblock["root_level"]), generation
        ),
        tree.Roots.single(
            ondisk.CHUNK_TREE,
            int(superblock["chunk_root"]),
            int(superblock["chunk_root_level"]),
            int(superblock["chunk_root_generation"]),
        ),
    ]
    if int(superblock["log_root"]):  # written by the transaction after the last one that was committed
        first.append(
            tree.Roots.single(
                ondisk.TREE_LOG,
                int(superblock["log_root"]),
                int(superblock["log_root_level"]),
                generation + 1,
            )
        )
        damage.say("not-replayed", "its log tree is to be replayed at the next mount", severity=NOTE)
    known = tree.Roots.join(first)
    known = known._replace(wanted=known.id != ondisk.CHUNK_TREE)
    forest = tree.walk(source, known, Damage())  # what is wrong is noted when all trees are walked
    parts, refs = [], []
    for leaves in tree.read_leaves(source, forest, Damage()):
        parts.append(items.roots_of(leaves, wanted))
        refs.append(items.root_refs(leaves))
    if not parts:
        raise Corrupt(f"{source.reader.name}: the root tree can't be read", int(superblock["root"]), "tree")
    return tree.Roots.join([known._replace(wanted=known.id == ondisk.ROOT_TREE), *parts]), items.join(refs)


def _extents(
    source: tree.Source,
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


def _state(superblock: np.void, damage: Damage) -> str:
    if int(superblock["flags"]) & ondisk.SUPER_FLAG_ERROR:
        damage.say("marked-damaged", "the superblock says that the kernel found errors")
    return tables.NEEDS_RECOVERY if int(superblock["log_root"]) else tables.CLEAN


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.btrfs.ondisk import SUPERBLOCK

    return {
        "superblock": Structure(SUPERBLOCK),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.btrfs import history

    return History(history.former)


FORMAT = FilesystemFormat(
    NAME,
    None,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the extent tree",
    structures=_structures,
    history=_history,
    journals=("log tree",),
    reuses_numbers=False,
    inode=INODE,
    in_place=True,
    mount="subvolid=5",
)
