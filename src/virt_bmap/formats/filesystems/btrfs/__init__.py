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
inode of a file that keeps it. What fsync wrote after the last commit lies in log trees, and is shown as the
next mount will put it in its place (`replay`). Part "log": where it can't be, since the log is damaged.

Sources: include/uapi/linux/btrfs_tree.h, fs/btrfs/ (v6.12); btrfs-progs Documentation/dev/On-disk-format.rst.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk, replay
from virt_bmap.formats.filesystems.btrfs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.btrfs.extents import extents_of
from virt_bmap.formats.filesystems.btrfs.packed import packed_of
from virt_bmap.formats.filesystems.btrfs.pool import pool_of
from virt_bmap.formats.filesystems.btrfs.trees import READ_TREES, Log, read_log, read_trees, source_of
from virt_bmap.formats.filesystems.btrfs.verified import VerifiedReader
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage

NAME = "btrfs"
INODE = "tree << 40 | objectid; the top-level subvolume counts as tree 0, so its numbers are those of stat"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """The filesystem of a pool. Raises Corrupt where its root tree or its extent tree can't be read."""
    pool = pool_of(reader)
    superblock = pool.superblock
    source = source_of(reader, pool)
    if int(superblock["flags"]) & ondisk.SUPER_FLAG_METADUMP:
        damage.say("elsewhere", "it was restored from btrfs-image: the content of files is not there")
    found, links = read_trees(source, superblock, READ_TREES, damage)
    subvolumes = files.Subvolumes(
        files.inodes(items.join(found.inodes), links, damage),
        files.entries(items.join(found.names), links, damage),
        found.name_bytes,
    )
    log = read_log(source, links, damage) if int(superblock["log_root"]) else None
    if log and log.whole and log.found.inodes:
        subvolumes = replay.replay(log, subvolumes, damage)
    names, stubs = files.name_table(subvolumes.entries, subvolumes.name_bytes)
    extents, regular, inline = extents_of(source, pool, (found, links), subvolumes, log, damage)
    forests = [links.forest, *([log.links.forest] if log else [])]
    content = VerifiedReader(reader, source, links.roots, forests)
    stored = [*found.regular, *found.inline]
    stored += [*log.found.regular, *log.found.inline] if log else []
    content.packed = packed_of(content, source.sectorsize, regular, inline, stored)
    return Filesystem(
        type="btrfs", size=reader.size, block_size=source.sectorsize, root=ondisk.FIRST_FREE,
        state=_state(superblock, log, damage),
        reader=content,
        inodes=files.inode_table(subvolumes.inodes, stubs), names=names,
        extents=extents,
        uuid=ondisk.uuid_text(superblock["fsid"]),
        label=bytes(superblock["label"]).decode(errors="replace") or None,
        features=ondisk.feature_names(superblock),
    )  # fmt: skip


def _state(superblock: np.void, log: Log | None, damage: Damage) -> str:
    if int(superblock["flags"]) & ondisk.SUPER_FLAG_ERROR:
        damage.say("marked-damaged", "the superblock says that the kernel found errors")
    if log is None:
        return tables.CLEAN
    return tables.RECOVERED if log.whole else tables.NEEDS_RECOVERY


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
