"""What `check` asks of XFS beyond what a map needs: the checksums and places that version 5 keeps in all
metadata, and the order in B-trees and hash indexes.

A second pass over the metadata whose places the tables give; the state after the log's replay, as the map
shows it.

Sources: fs/xfs/libxfs (Linux 6.12): xfs_format.h, xfs_da_format.h (headers and where their checksums lie),
xfs_cksum.h, xfs_btree.c (siblings, xfs_btree_check_block), xfs_{alloc,ialloc,rmap,refcount,bmap}_btree.c
(keys), xfs_dir2_leaf.c, xfs_da_btree.c, xfs_attr_leaf.c, xfs_dquot_buf.c.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bool, Bytes, Int, expand
from virt_bmap.core.checksums import crc32c_without
from virt_bmap.core.mapped import PatchedReader
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.proving import Compared, Places, blocks, check_names, check_targets
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.superblock import Geometry, read_geometry
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem, Proof
from virt_bmap.model.damage import Damage

INVERTED = np.uint32(0xFFFFFFFF)
SECTOR = 512
"""Blocks know their own place in units of this (xfs_daddr_t), whatever the disk's sectors."""


class Stamp(NamedTuple):
    """Where a kind of block has its checksum, its place, the filesystem's UUID, and the inode that it belongs
    to; -1: nowhere."""

    crc: int
    place: int = -1
    uuid: int = -1
    owner: int = -1


SHORT_BLOCK, LONG_BLOCK = Stamp(52, 16, 32), Stamp(64, 24, 40, 56)
DIR_BLOCK, DA_BLOCK = Stamp(4, 8, 24, 40), Stamp(12, 16, 32, 48)
REMOTE, SYMLINK = Stamp(12, 40, 16, 32), Stamp(12, 40, 16, 32)
HEADERS = {
    "superblock": Stamp(0xE0),
    "AGF": Stamp(0xD8, uuid=0x40),
    "AGI": Stamp(0x138, uuid=0x128),
    "AGFL": Stamp(32, uuid=8),
}
INODE = Stamp(0x64, uuid=0xA0)
DQUOT_SIZE, DQUOT = 136, Stamp(108, uuid=120)

DA_NODE, ATTR_LEAF, DIR_LEAF1, DIR_LEAFN = 0x3EBE, 0x3BEE, 0x3DF1, 0x3DFF
OLD = {0xFEBE: DA_NODE, 0xFBEE: ATTR_LEAF, 0xD2F1: DIR_LEAF1, 0xD2FF: DIR_LEAFN}
"""Magic numbers of version 4."""
REMOTE_MAGIC, SYMLINK_MAGIC = b"XARM", b"XSLM"


class Order(NamedTuple):
    """The keys of a kind of tree: sizes of records and keys, and where (offset, bytes) their parts lie, the
    weightiest first."""

    magic: tuple[bytes, bytes]
    record: int
    key: int
    in_record: tuple[tuple[int, int], ...]
    in_key: tuple[tuple[int, int], ...]
    long: bool = False


FLAGLESS = np.uint64((1 << 54) - 1)
"""The bits of an offset in an rmapbt that are not flags."""
TREES = {
    "bnobt": Order((b"ABTB", b"AB3B"), 8, 8, ((0, 4),), ((0, 4),)),
    "cntbt": Order((b"ABTC", b"AB3C"), 8, 8, ((4, 4), (0, 4)), ((4, 4), (0, 4))),
    "inobt": Order((b"IABT", b"IAB3"), 16, 4, ((0, 4),), ((0, 4),)),
    "finobt": Order((b"FIBT", b"FIB3"), 16, 4, ((0, 4),), ((0, 4),)),
    "rmapbt": Order((b"", b"RMB3"), 24, 40, ((0, 4), (8, 8), (16, 8)), ((0, 4), (4, 8), (12, 8))),
    "refcountbt": Order((b"", b"R3FC"), 12, 4, ((0, 4),), ((0, 4),)),
}
BMBT = Order((b"BMAP", b"BMA3"), 16, 8, ((0, 8),), ((0, 8),), long=True)
LENGTHS = {"bnobt": 4, "refcountbt": 4, "inobt": -1, "finobt": -1}
"""Where records have the length of what they describe (-1: always 64 inodes), where that must not overlap the
next one."""
MAX_SYMLINK = 65536
"""XFS_SYMLINK_MAXLEN is 1024: no extent of a link is longer than the largest block."""
NO_RECORDS = np.zeros((0, 3), np.int64)


def prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Compare all checksums, look at the order in all trees."""
    geometry = read_geometry(found.reader)
    look = _Look(found.reader, geometry, Compared(damage), damage, Places(found, geometry.block_size))
    _headers(look)
    _inodes(look, found)
    records = {}
    for part in look.places.names(tables.METADATA):
        if part in TREES:
            offset, _, _ = look.places.of_kind(tables.METADATA, part)
            records[part] = _tree(look, part, TREES[part], offset, None)
    by_place, by_size = (np.unique(records.get(part, NO_RECORDS), axis=0) for part in ("bnobt", "cntbt"))
    if not np.array_equal(by_place, by_size):
        damage.say("allocator", "the two B-trees of free space differ: by place and by size")
    offset, owner, _ = look.places.of_kind(tables.TREE)
    _tree(look, "bmbt", BMBT, offset, owner)
    _directories(look)
    _attributes(look)
    _symlinks(look)
    _quotas(look)
    check_names(found, damage)
    check_targets(found, damage)
    return [look.compared.proof("version 4 has none")]


class _Look(NamedTuple):
    reader: Reader
    geometry: Geometry
    compared: Compared
    damage: Damage
    places: Places

    def stamped(self, kind: str, stamp: Stamp, data: Bytes, offset: Int, owner: Int | None = None) -> None:
        """Compare what version 5 writes into every block: checksum, place, UUID, owner."""
        if not self.geometry.crc or not len(data):
            return
        # what comes from the log gets its checksum when it is written
        if isinstance(self.reader, PatchedReader):
            kept = np.flatnonzero(~self.reader.replaced(offset, data.shape[1]))
            self._checksums(kind, stamp, data[kept], offset[kept])
        else:
            self._checksums(kind, stamp, data, offset)
        at_home = np.ones(len(data), bool)
        if stamp.place >= 0:
            at_home &= big(data, stamp.place, 8) == (offset // SECTOR).astype(np.uint64)
        if stamp.uuid >= 0:
            at_home &= (
                data[:, stamp.uuid : stamp.uuid + 16] == np.frombuffer(self.geometry.meta_uuid, np.uint8)
            ).all(axis=1)
        if stamp.owner >= 0 and owner is not None:
            at_home &= big(data, stamp.owner, 8) == owner.astype(np.uint64)
        self.damage.check(
            at_home, "tree", f"wrong [address or owner|addresses or owners] among {kind}", offset
        )

    def _checksums(self, kind: str, stamp: Stamp, data: Bytes, offset: Int) -> None:
        if len(data):
            said = np.ascontiguousarray(data[:, stamp.crc : stamp.crc + 4]).view("<u4")[:, 0]
            self.compared.compare(kind, crc32c_without(data, stamp.crc) ^ INVERTED == said, offset)


def big(data: Bytes, at: int, size: int) -> np.ndarray:
    """A big-endian number at byte `at` of each row."""
    return np.ascontiguousarray(data[:, at : at + size]).view(f">u{size}")[:, 0].astype(np.uint64)


def _headers(look: _Look) -> None:
    """The four sectors of each group. Copies of the superblock count, too."""
    for name, stamp in HEADERS.items():
        offset, _, _ = _sectors(look, name)
        for part, data in blocks(look.reader, offset, look.geometry.sector_size):
            look.stamped(f"{name} sectors", stamp, data, offset[part])


def _sectors(look: _Look, name: str) -> tuple[Int, Int, Int]:
    return look.places.of_kind(tables.METADATA, name, unit=look.geometry.sector_size)


def _inodes(look: _Look, found: Filesystem) -> None:
    """All inodes in use."""
    offset = tables.integers(found.inodes, "record_offset")
    if look.geometry.crc:
        for part, data in blocks(look.reader, offset, look.geometry.inode_size):
            look.stamped("inodes", INODE, data, offset[part])


# ---- B-trees -----------------------------------------------------------------------------------------------


def _tree(look: _Look, name: str, order: Order, offset: Int, owner: Int | None) -> Int:
    """All blocks of one kind of tree: stamps, counts, the order of their keys, and that children begin with
    the key that leads to them.

    Returns (group, start, length) of the records of trees of free space.
    """
    found = [NO_RECORDS]
    crc, damage = look.geometry.crc, look.damage
    header = (
        (ondisk.LONG_CRC_HEADER if crc else ondisk.LONG_HEADER)
        if order.long
        else (ondisk.SHORT_CRC_HEADER if crc else ondisk.SHORT_HEADER)
    )
    stamp, width = (LONG_BLOCK, 8) if order.long else (SHORT_BLOCK, 4)
    first, keys, children = (
        [np.zeros((0, len(order.in_key)), np.uint64)],
        [np.zeros((0, len(order.in_key)), np.uint64)],
        [np.zeros(0, np.int64)],
    )
    rights, lefts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part, data in blocks(look.reader, offset, look.geometry.block_size):
        place = offset[part]
        look.stamped(f"{name} blocks", stamp, data, place, owner[part] if owner is not None else None)
        level, count = big(data, 4, 2).astype(np.int64), big(data, 6, 2).astype(np.int64)
        room = data.shape[1] - header
        most = np.where(level == 0, room // order.record, room // (order.key + width))
        good = (
            (data[:, :4] == np.frombuffer(order.magic[crc], np.uint8)).all(axis=1)
            & (count > 0)
            & (count <= most)
        )
        # a group's tree can be empty: then its root is a leaf without records
        empty = (count == 0) & (level == 0) & (not order.long)
        damage.check(
            good | empty,
            "tree",
            f"[block|blocks] of a {name} [has|have] a wrong magic number or count",
            place,
        )
        mine = np.full((len(data), len(order.in_key)), np.iinfo(np.uint64).max, np.uint64)
        for leaf in (True, False):
            at = np.flatnonzero(good & ((level == 0) == leaf))
            if not len(at):
                continue
            entries = room // (order.record if leaf else order.key + width)
            row, step = expand(count[at])
            size = order.record if leaf else order.key
            table = data[at, header : header + entries * size].reshape(len(at), entries, size)[row, step]
            values = _keys(table, order.in_record if leaf else order.in_key, name)
            if leaf and name in ("bnobt", "cntbt"):
                group = place[at[row]] // (look.geometry.agblocks * look.geometry.block_size)
                found.append(
                    np.column_stack(
                        [group, big(table, 0, 4).astype(np.int64), big(table, 4, 4).astype(np.int64)]
                    )
                )
            same = row[1:] == row[:-1]
            grows = _less(values[:-1], values[1:]) | (
                _same(values[:-1], values[1:]) if name == "rmapbt" else False
            )
            if leaf and name in LENGTHS:
                length = np.uint64(64) if LENGTHS[name] < 0 else big(table, LENGTHS[name], 4)[:-1]
                grows &= values[:-1, 0] + length <= values[1:, 0]
            bad = np.unique(at[row[1:][same & ~grows]])
            if len(bad):
                damage.add(
                    "tree",
                    f"[block|blocks] of a {name} [has|have] records out of order or overlapping",
                    int(place[bad].min()),
                    len(bad),
                )
            begins = np.append(True, ~same)[: len(row)]
            mine[at] = values[begins]
            if not leaf:
                base = header + entries * order.key
                pointer = (
                    np.ascontiguousarray(data[at, base : base + entries * width])
                    .view(f">u{width}")[row, step]
                    .astype(np.int64)
                )
                keys.append(values)
                children.append(_addresses(look, pointer, place[at[row]], order.long))
        first.append(mine)
        for kept, where in ((lefts, 8), (rights, 8 + width)):
            sibling = (
                np.ascontiguousarray(data[:, where : where + width]).view(f">i{width}")[:, 0].astype(np.int64)
            )
            kept.append(np.where(sibling == -1, -1, _addresses(look, sibling, place, order.long)))
    _children(damage, name, offset, np.concatenate(first), np.concatenate(keys), np.concatenate(children))
    _siblings(damage, name, offset, np.concatenate(lefts), np.concatenate(rights))
    return np.concatenate(found)


def _addresses(look: _Look, pointer: Int, place: Int, long: bool) -> Int:
    """Bytes of the volume to which pointers lead; those of short trees count from their group."""
    geometry = look.geometry
    if long:
        return geometry.block_offset(pointer)
    group = geometry.agblocks * geometry.block_size
    return place // group * group + pointer * geometry.block_size


def _keys(table: Bytes, parts: tuple[tuple[int, int], ...], name: str) -> np.ndarray:
    """Keys of records (n, size) as (n, parts)."""
    found = (
        np.stack([big(table, at, size) for at, size in parts], axis=1)
        if len(table)
        else np.zeros((0, len(parts)), np.uint64)
    )
    if name == "rmapbt":
        found[:, 2] &= FLAGLESS
    if name == "bmbt" and table.shape[1] == ondisk.BMBT_REC_SIZE:
        found = (found & np.uint64((1 << 63) - 1)) >> np.uint64(9)
    return found


def _less(one: np.ndarray, other: np.ndarray) -> Bool:
    """Which keys are smaller, part by part."""
    result = np.zeros(len(one), bool)
    for at in range(one.shape[1] - 1, -1, -1):
        result = (one[:, at] < other[:, at]) | ((one[:, at] == other[:, at]) & result)
    return result


def _same(one: np.ndarray, other: np.ndarray) -> Bool:
    equal: Bool = (one == other).all(axis=1)
    return equal


def _children(
    damage: Damage, name: str, offset: Int, first: np.ndarray, keys: np.ndarray, children: Int
) -> None:
    """Children that do not begin with the key that their parent has for them."""
    if not len(offset) or not len(children):
        return
    order = np.argsort(offset, kind="stable")
    at = order[np.minimum(np.searchsorted(offset[order], children), len(offset) - 1)]
    known = offset[at] == children  # what leads elsewhere was complained of by its reader
    damage.check(
        _same(first[at], keys) | ~known,
        "tree",
        f"[block of a {name} does not begin where its|blocks "
        f"of a {name} do not begin where their] parent says",
        children,
    )


def _siblings(damage: Damage, name: str, offset: Int, lefts: Int, rights: Int) -> None:
    """Blocks whose right sibling has another one to its left."""
    if not len(offset):
        return
    order = np.argsort(offset, kind="stable")
    for there, back in ((rights, lefts), (lefts, rights)):
        at = order[np.minimum(np.searchsorted(offset[order], there), len(offset) - 1)]
        good = (there == -1) | ((offset[at] == there) & (back[at] == offset))
        damage.check(
            good,
            "tree",
            f"[block of a {name} has siblings that do not know "
            f"it|blocks of a {name} have siblings that do not know them]",
            offset,
        )


# ---- directories, attributes, links, quotas ----------------------------------------------------------------


def _directories(look: _Look) -> None:
    """Directory blocks, those that hold names as well as those of the indexes."""
    geometry = look.geometry
    unit = geometry.dirblock_size
    for part, named in ((None, True), ("leaf", False), ("free index", False)):
        offset, owner, _ = look.places.of_kind(tables.DIRECTORY, part, unit=unit)
        for batch, data in blocks(look.reader, offset, unit):
            place, who = offset[batch], owner[batch]
            if named:
                known = np.isin(np.ascontiguousarray(data[:, :4]).view("S4")[:, 0], list(ondisk.DIR2_MAGICS))
                look.damage.check(
                    known,
                    "directory",
                    "[block of a directory has|blocks of directories have] a wrong magic number",
                    place,
                )
                look.stamped("directory blocks", DIR_BLOCK, data, place, who)
                _tails(look, data, place)
            elif part == "free index":
                look.stamped("free indexes of directories", DIR_BLOCK, data, place, who)
            else:
                look.stamped("hash indexes of directories", DA_BLOCK, data, place, who)
                _hashes(look, "hash indexes of directories", data, place, (DA_NODE, DIR_LEAF1, DIR_LEAFN))


def _tails(look: _Look, data: Bytes, place: Int) -> None:
    """Directories in one block: the index at its end."""
    magic = np.ascontiguousarray(data[:, :4]).view("S4")[:, 0]
    at = np.flatnonzero((magic == b"XD2B") | (magic == b"XDB3"))
    if not len(at):
        return
    data, place = data[at], place[at]
    size = data.shape[1]
    count = big(data, size - 8, 4).astype(np.int64)
    room = (size - 8 - 64) // 8
    good = look.damage.check(
        count <= room,
        "directory",
        "hash [index of a directory has|indexes of directories have] impossible counts",
        place,
    )
    data, place, count = data[good], place[good], count[good]
    begin = size - 8 - 8 * count
    _ascending(look, "hash indexes of directories", data, place, begin, count)


def _hashes(look: _Look, what: str, data: Bytes, place: Int, magics: tuple[int, ...]) -> None:
    """Nodes of hash indexes: magic, count, and that hashes grow."""
    crc, size = look.geometry.crc, data.shape[1]
    magic = big(data, 8, 2).astype(np.int64)
    if not crc:
        magic = (
            np.array([OLD.get(value, 0) for value in range(0x10000)], np.int64)[magic]
            if len(magic)
            else magic
        )
    at_count = 56 if crc else 12
    count = big(data, at_count, 2).astype(np.int64)
    begin = np.where(magic == ATTR_LEAF, 80 if crc else 32, 64 if crc else 16)
    good = np.isin(magic, magics) & (begin + 8 * count <= size)
    wrong = f"wrong magic [number or count|numbers or counts] among {what}"
    look.damage.check(good, "directory", wrong, place)
    _ascending(look, what, data[good], place[good], begin[good], count[good])


def _ascending(look: _Look, what: str, data: Bytes, place: Int, begin: Int, count: Int) -> None:
    row, step = expand(count)
    words = data.view(">u4") if data.flags.c_contiguous else np.ascontiguousarray(data).view(">u4")
    hashes = words[row, (begin[row] + 8 * step) // 4]
    bad = (row[1:] == row[:-1]) & (hashes[1:] < hashes[:-1])
    sound = np.ones(len(data), bool)
    sound[row[1:][bad]] = False
    look.damage.check(sound, "directory", f"[block|blocks] with hashes out of order among {what}", place)


def _attributes(look: _Look) -> None:
    """Blocks of attribute forks: nodes and leaves of the hash index, and remote values."""
    offset, owner, _ = look.places.of_kind(tables.XATTR)
    for batch, data in blocks(look.reader, offset, look.geometry.block_size):
        remote = (data[:, :4] == np.frombuffer(REMOTE_MAGIC, np.uint8)).all(axis=1)
        place, who = offset[batch], owner[batch]
        if look.geometry.crc:
            look.stamped("remote attribute blocks", REMOTE, data[remote], place[remote], who[remote])
        else:  # values of version 4 have no header, and may look like anything
            remote |= ~np.isin(
                big(data, 8, 2), [magic for magic in OLD if OLD[magic] in (DA_NODE, ATTR_LEAF)]
            )
        look.stamped("attribute blocks", DA_BLOCK, data[~remote], place[~remote], who[~remote])
        _hashes(look, "attribute blocks", data[~remote], place[~remote], (DA_NODE, ATTR_LEAF))


def _symlinks(look: _Look) -> None:
    """Targets outside the inode; each extent has a header, and its checksum covers the whole extent."""
    if not look.geometry.crc:
        return
    start, length, owner = look.places.ranges(tables.SYMLINK, "symlink header", whole=True)
    fits = look.damage.check(
        length <= MAX_SYMLINK, "symlink", "symbolic [link is|links are] longer than any link can be", start
    )
    start, length, owner = start[fits], length[fits], owner[fits]
    for size in np.unique(length).tolist():
        mine = np.flatnonzero(length == size)
        for batch, data in blocks(look.reader, start[mine], size):
            place = start[mine][batch]
            look.stamped("symbolic links", SYMLINK, data, place, owner[mine][batch])
            good = (data[:, :4] == np.frombuffer(SYMLINK_MAGIC, np.uint8)).all(axis=1)
            good &= big(data, 8, 4) + np.uint64(ondisk.SYMLINK_HEADER) <= np.uint64(size)
            look.damage.check(
                good,
                "symlink",
                "[header of a symbolic link has|headers of symbolic "
                "links have] a wrong magic number or length",
                place,
            )


def _quotas(look: _Look) -> None:
    """Records of quota files, as many as fit into a block."""
    geometry = look.geometry
    for name in ("user quota", "group quota", "project quota"):
        offset, _, _ = look.places.of_kind(tables.METADATA, name)
        for batch, data in blocks(look.reader, offset, geometry.block_size):
            fit = geometry.block_size // DQUOT_SIZE
            some = data[:, : fit * DQUOT_SIZE].reshape(-1, DQUOT_SIZE)
            place = (offset[batch][:, None] + np.arange(fit) * DQUOT_SIZE).reshape(-1)
            look.stamped("quota records", DQUOT, some, place)
