"""From records to files: which record belongs to which, what each file is, and the names that lead to it.

A reference holds a record number and the sequence number that the record had. One that has been used again
since has another, so that neither a stale extension record nor a name in a directory that is gone can claim
what is not theirs.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.mft import Mft
from virt_bmap.formats.filesystems.ntfs.records import FileNames, Records
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

MAX_EXTEND_DEPTH = 8
"""Levels of directories below $Extend; Windows makes three ($RmMetadata/$TxfLog/...)."""
TYPE_OF_TAG = {
    ntfs.REPARSE_SYMLINK: tables.T_SYMLINK, ntfs.REPARSE_MOUNT_POINT: tables.T_SYMLINK,
    ntfs.REPARSE_LX_SYMLINK: tables.T_SYMLINK, ntfs.REPARSE_AF_UNIX: tables.T_SOCKET,
    ntfs.REPARSE_LX_FIFO: tables.T_FIFO, ntfs.REPARSE_LX_CHR: tables.T_CHAR,
    ntfs.REPARSE_LX_BLK: tables.T_BLOCK,
}  # fmt: skip
TYPE_OF_START = {
    ntfs.INTX_SYMBOLIC_LINK: tables.T_SYMLINK, ntfs.INTX_CHARACTER_DEVICE: tables.T_CHAR,
    ntfs.INTX_BLOCK_DEVICE: tables.T_BLOCK,
}  # fmt: skip


def owner_of(records: Records, number: Int) -> tuple[Int, Bool]:
    """(the base record of each record, whether both are in use and belong together)."""
    reference = records.base[number]
    extension = reference != 0
    owner = np.where(extension, reference & ntfs.REFERENCE, number)
    inside = owner < len(records.base)
    owner = np.where(inside, owner, 0)
    good = inside & records.in_use[number] & records.in_use[owner] & (records.base[owner] == 0)
    return owner, good & (~extension | is_current(records, reference, owner))


def is_current(records: Records, reference: Int, number: Int) -> Bool:
    """Whether references still mean the record `number` that they lead to; sequence number 0 is not checked
    by anyone."""
    sequence = (reference >> 48) & 0xFFFF
    current: Bool = (sequence == 0) | (sequence == records.sequence[number])
    return current


@dataclass
class NameTree:
    """Names whose directory is known, and for each record (dense) how many names lead to it.

    `live` and `deleted` say which are inodes.
    """

    parent: Int
    inode: Int
    name: Ragged
    links: Int
    live: Bool
    deleted: Bool
    in_trash: Bool
    metadata: Bool


def read_tree(mft: Mft, damage: Damage) -> NameTree:
    """Who is called what, and which inodes are the filesystem's own."""
    records, names = mft.records, mft.names
    count = len(mft)
    live = records.in_use & (records.base == 0)
    owner, good = owner_of(records, names.record)
    gone = records.usable[names.record] & ~records.in_use[names.record] & (records.base[names.record] == 0)
    owner = np.where(gone, names.record, owner)
    deleted = np.zeros(count, bool)
    deleted[owner[gone]] = True
    parent, reached = _directories(records, names, gone)
    lost = good & ~reached
    damage.add(
        "orphan-name",
        "[name lies|names lie] in a directory that is gone or never was one",
        record_offset(mft, names.record[lost]),
    )
    keep = np.flatnonzero((good | gone) & reached & ~((owner == ntfs.ROOT) & (parent == ntfs.ROOT)))
    links = np.bincount(owner[good | gone], minlength=count)
    name = names.name.take(keep) if len(keep) < len(owner) else names.name
    parent, owner = parent[keep], owner[keep]
    metadata, trash = _own(parent, owner, name, live)
    return NameTree(parent, owner, name, links, live, deleted, trash, metadata)


def _directories(records: Records, names: FileNames, gone: Bool) -> tuple[Int, Bool]:
    """(the directory of each name, whether it is still that one).

    A deleted file may lie in a deleted directory, whose number went up by one.
    """
    number = names.parent & ntfs.REFERENCE
    inside = number < len(records.base)
    number = np.where(inside, number, 0)
    same = is_current(records, names.parent, number)
    before = records.sequence[number] == ((names.parent >> 48) + 1) & 0xFFFF
    there = inside & records.directory[number] & (records.base[number] == 0)
    return number, there & (
        (records.in_use[number] & same) | (gone & ~records.in_use[number] & (same | before))
    )


def _own(parent: Int, inode: Int, name: Ragged, live: Bool) -> tuple[Bool, Bool]:
    """(the filesystem's own inodes, those in $Extend/$Deleted: deleted while they were open)."""
    own, trash = np.zeros(len(live), bool), np.zeros(len(live), bool)
    own[: ntfs.FIRST_USER] = True
    own[ntfs.ROOT : ntfs.ROOT + 1] = False
    below = np.zeros(len(live), bool)
    below[ntfs.EXTEND : ntfs.EXTEND + 1] = True
    in_extend = np.flatnonzero(parent == ntfs.EXTEND)
    bins = inode[in_extend[name.take(in_extend).equal(b"$Deleted")]]
    for _ in range(MAX_EXTEND_DEPTH):
        children = inode[below[parent] & ~np.isin(parent, bins)]
        if below[children].all():
            break
        below[children] = True
    trash[inode[np.isin(parent, bins)]] = True
    own |= below & ~trash
    return own & live, trash & live


def record_offset(mft: Mft, number: Int) -> Int:
    size = mft.system.size
    _, _, places, _ = mft.stream.place(number * size, np.full(len(number), 1, np.int64))
    return places


def inode_types(mft: Mft, tree: NameTree, tags: Int, starts: Int) -> np.ndarray:
    """The code of tables.TYPES of every record; `tags` are reparse tags, `starts` the content of system
    files, 0 where there is none."""
    types = np.full(len(mft), tables.T_FILE, np.int8)
    types[mft.records.directory] = tables.T_DIRECTORY
    for values, meaning in ((tags, TYPE_OF_TAG), (starts, TYPE_OF_START)):
        for value, code in meaning.items():
            types[values == value] = code
    types[tree.metadata & ~mft.records.directory] = tables.T_METADATA
    return types


def inode_table(mft: Mft, tree: NameTree, types: np.ndarray, sizes: Int, flags: Int) -> pa.Table:
    """The table `inodes`; `sizes` and `flags` are by record number."""
    number = np.flatnonzero(tree.live | tree.deleted)
    dead = tree.deleted | tree.in_trash
    return tables.make(
        "inodes", volume=0, inode=number, type=types[number], mode=-1, uid=-1, gid=-1, size=sizes[number],
        nlink=tree.links[number], mtime_ns=mft.records.mtime_ns[number],
        flags=(flags | np.where(dead, tables.I_DELETED, 0))[number], record_offset=record_offset(mft, number),
    )  # fmt: skip


def name_table(tree: NameTree) -> pa.Table:
    """The table `names`."""
    return tables.make("names", volume=0, parent=tree.parent, inode=tree.inode, name=tree.name.arrow())
