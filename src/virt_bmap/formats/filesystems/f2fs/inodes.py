"""Inodes and the trees of direct and indirect nodes below them.

Every inode has a block of its own, which the NAT names; that block holds the first addresses of the file's
blocks, or inline data, and node numbers of further nodes: two direct, two indirect, one doubly indirect. A
level of all files' trees is one batch of reads.

Sources: Linux fs/f2fs/inode.c (do_read_inode, sanity_check_inode, f2fs_inode_chksum), node.c (get_node_path),
f2fs.h (addrs_per_page, get_inline_xattr_addrs), compress.c; include/linux/f2fs_fs.h;
Documentation/filesystems/f2fs.rst ("Compression implementation").
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int
from virt_bmap.core.checksums import ALL_ONES, crc32
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import records, widen
from virt_bmap.formats.filesystems.f2fs import inodes as nodes
from virt_bmap.formats.filesystems.f2fs.allocator import BATCH, Nat
from virt_bmap.formats.filesystems.f2fs.ondisk import (
    ADDRS_PER_BLOCK,
    ADDRS_PER_INODE,
    BLOCK,
    COMPRESS_ADDR,
    I_ADDR,
    NEW_ADDR,
    NIDS_PER_BLOCK,
    NODE,
    NODE_BLOCK,
    Superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions

INLINE_XATTR, INLINE_DATA, INLINE_DENTRY, EXTRA_ATTR, COMPRESS_RELEASED = 0x1, 0x2, 0x4, 0x20, 0x80
ADVISE_ENCRYPT, ADVISE_VERITY = 0x4, 0x40
XATTR_MAGIC = 0xF2F52011
COMPR_FL, IMMUTABLE_FL = 0x4, 0x10
DEFAULT_INLINE_XATTR, INLINE_RESERVED = 50, 1
"""Words for inline attributes where the filesystem does not let inodes choose, and those left free in front
of inline data."""
MAX_EXTRA = 36
COMPRESS_FIELDS, CHECKSUM_FIELD = 36, 12
"""Bytes of extra attributes that an inode has if it has the compression's, and the checksum."""
MIN_CLUSTER_LOG, MAX_CLUSTER_LOG = 2, 8
S_IFDIR, S_IFREG, S_IFLNK = 0o4, 0o10, 0o12
LATEST = (1 << 63) // 1_000_000_000 - 2
"""Seconds in the year 2262: the last that a count of nanoseconds since 1970 holds."""
MAX_SIZE = 1 << 62
AT_ONCE = 2048
"""Nodes taken apart at a time."""


class Inodes(NamedTuple):
    """Inodes in use as columns, by number; `extra` and `xattrs` in words of 4 bytes, `cluster` in blocks, 0
    for files that are not compressed."""

    number: Int
    block: Int
    mode: Int
    uid: Int
    gid: Int
    size: Int
    nlink: Int
    mtime_ns: Int
    flags: Int
    advise: Int
    inline: Int
    extra: Int
    xattrs: Int
    cluster: Int
    xattr_nid: Int
    has_xattrs: Int
    """Whether the space for inline attributes holds any."""

    @property
    def form(self) -> Int:
        """The file type's four bits of the mode."""
        return self.mode >> 12

    @property
    def is_inline(self) -> Bool:
        """Which have their content, or names, inside the inode's block."""
        found: Bool = (
            np.where(self.form == S_IFDIR, self.inline & INLINE_DENTRY, self.inline & INLINE_DATA) != 0
        )
        return found

    @property
    def inline_start(self) -> Int:
        """Where inline content begins in the inode's block, in bytes."""
        return I_ADDR + 4 * (self.extra + INLINE_RESERVED)

    @property
    def inline_room(self) -> Int:
        """Bytes for inline content."""
        return 4 * (ADDRS_PER_INODE - self.extra - self.xattrs - INLINE_RESERVED)

    @property
    def released(self) -> Bool:
        """Compressed files that gave back what they saved."""
        found: Bool = self.inline & COMPRESS_RELEASED != 0
        return found

    @property
    def addresses(self) -> Int:
        """Addresses in the inode's own block."""
        return _aligned(ADDRS_PER_INODE - self.extra - self.xattrs, self.cluster)

    @property
    def addresses_per_node(self) -> Int:
        return _aligned(np.full(len(self.number), ADDRS_PER_BLOCK), self.cluster)


def _aligned(count: Int, cluster: Int) -> Int:
    return count - count % np.maximum(cluster, 1)


@dataclass(frozen=True)
class BlockRuns:
    """Blocks that follow each other in file and volume.

    `owner` is the row of the inode; `logical`, `start`, `count` and `span` are in blocks.

    `span` blocks of the file lie in `count`: fewer in a compressed cluster, each of whose runs stands for all
    of it.
    """

    owner: Int
    logical: Int
    start: Int
    count: Int
    span: Int


class Pointers(NamedTuple):
    """Numbers of nodes that files refer to: `first` is the first file block below, `depth` 0 for direct
    nodes."""

    owner: Int
    nid: Int
    first: Int
    depth: Int

    @property
    def slots(self) -> Int:
        """A number for each place in a file."""
        return self.owner << 32 | self.first


class Trees(NamedTuple):
    """Nodes that inodes refer to: row of the inode, block, and depth (0 direct)."""

    owner: Int
    block: Int
    depth: Int


@dataclass
class WalkedNodes:
    """What nodes say."""

    inodes: Inodes
    pointers: Pointers
    taken: Bool
    """Which rows of the NAT have an owner; one more for none."""
    runs: list[BlockRuns] = field(default_factory=list)
    trees: list[Trees] = field(default_factory=list)
    attributes: list[Trees] = field(default_factory=list)
    promised: int = 0
    """Addresses that count as valid blocks though they have none."""


def read(
    volume: Superblock, nat: Nat, inline_names: Callable[[Inodes, Bytes], None], damage: Damage
) -> WalkedNodes:
    """Everything that the NAT leads to."""
    found = read_inodes(volume, nat, inline_names, damage)
    follow(volume, nat, found, damage)
    add_attributes(nat, found, damage)
    return found


def read_inodes(
    volume: Superblock, nat: Nat, inline_names: Callable[[Inodes, Bytes], None], damage: Damage
) -> WalkedNodes:
    """All inodes by the NAT, with the addresses in their own blocks.

    `inline_names` gets directories that have their names in these, and the blocks.
    """
    rows = np.flatnonzero(nat.ino == nat.nid)
    columns, found = (
        [],
        WalkedNodes(stack(Inodes, []), stack(Pointers, []), np.append(nat.ino == nat.nid, False)),
    )
    pointers, before = [], 0
    for low in range(0, len(rows), BATCH // BLOCK):
        part = rows[low : low + BATCH // BLOCK]
        data = volume.reader.read_blocks(nat.block[part] * BLOCK, BLOCK)
        for at in range(0, len(part), AT_ONCE):
            some, block = data[at : at + AT_ONCE], part[at : at + AT_ONCE]
            good = _sound(some, nat, block, damage)
            some, block = some[good], block[good]
            inodes = _columns(volume, nat.nid[block], nat.block[block], some, damage)
            columns.append(inodes)
            pointers.append(_addresses(volume, inodes, records(some, NODE), before, found, damage))
            inline = np.flatnonzero((inodes.form == S_IFDIR) & inodes.is_inline)
            inline_names(take(inodes, inline), some[inline])
            before += len(block)
    found.inodes, found.pointers = stack(Inodes, columns), stack(Pointers, pointers)
    return found


def _sound(data: Bytes, nat: Nat, rows: Int, damage: Damage) -> Bool:
    """Which blocks are the nodes that the NAT says they are."""
    node = records(data, NODE)
    good: Bool = (node["nid"] == nat.nid[rows]) & (node["ino"] == nat.ino[rows])
    damage.check(good, "tree", "[node is|nodes are] not where the NAT says", nat.block[rows] * BLOCK)
    return good


def _columns(volume: Superblock, number: Int, block: Int, data: Bytes, damage: Damage) -> Inodes:
    raw, place = records(data, NODE), block * BLOCK
    mode, inline = widen(raw["i_mode"], "i_mode"), widen(raw["i_inline"], "i_inline")
    has_extra = inline & EXTRA_ATTR != 0
    isize = np.where(has_extra, raw["i_extra_isize"], 0).astype(np.int64)
    wanted = np.where(inline & (INLINE_XATTR | INLINE_DENTRY) != 0, DEFAULT_INLINE_XATTR, 0)
    if "flexible_inline_xattr" in volume.features:
        wanted = np.where(has_extra, raw["i_inline_xattr_size"], 0)
    xattrs = wanted.astype(np.int64)
    good = (
        (isize <= MAX_EXTRA) & (isize % 4 == 0) & (isize // 4 + xattrs + INLINE_RESERVED <= ADDRS_PER_INODE)
    )
    size = np.minimum(raw["i_size"], np.uint64(MAX_SIZE + 1)).astype(np.int64)
    packed = (
        (raw["i_flags"] & COMPR_FL != 0)
        & (mode >> 12 == S_IFREG)
        & (isize >= COMPRESS_FIELDS)
        & ("compression" in volume.features)
    )
    log = np.where(packed, raw["i_log_cluster_size"], MIN_CLUSTER_LOG).astype(np.int64)
    good &= (log >= MIN_CLUSTER_LOG) & (log <= MAX_CLUSTER_LOG) & (size <= MAX_SIZE)
    damage.check(
        good, "inode", "[inode has|inodes have] an impossible size, extra attributes or clusters", place
    )
    if "inode_checksum" in volume.features:
        _check_checksums(volume, data, raw, isize >= CHECKSUM_FIELD, place, damage)
    extra, xattrs = np.where(good, isize // 4, 0), np.where(good, xattrs, 0)
    begin = I_ADDR + 4 * (ADDRS_PER_INODE - np.where(xattrs > 0, xattrs, 1))
    head = np.ascontiguousarray(data[np.arange(len(data))[:, None], begin[:, None] + np.arange(4)]).view(
        "<u4"
    )[:, 0]
    seconds = np.clip(raw["i_mtime"], -LATEST, LATEST).astype(np.int64)
    return Inodes(
        number=number, block=block, mode=mode, uid=widen(raw["i_uid"], "i_uid"),
        gid=widen(raw["i_gid"], "i_gid"), size=np.where(size <= MAX_SIZE, size, 0),
        nlink=widen(raw["i_links"], "i_links"),
        mtime_ns=seconds * 1_000_000_000 + np.minimum(raw["i_mtime_nsec"], 999_999_999).astype(np.int64),
        flags=widen(raw["i_flags"], "i_flags"), advise=widen(raw["i_advise"], "i_advise"), inline=inline,
        extra=extra, xattrs=xattrs,
        cluster=np.where(packed & good, np.int64(1) << np.minimum(log, MAX_CLUSTER_LOG), 0),
        xattr_nid=widen(raw["i_xattr_nid"], "i_xattr_nid"),
        has_xattrs=((inline & INLINE_XATTR != 0) & (xattrs > 0) & (head == XATTR_MAGIC)).astype(np.int64),
    )  # fmt: skip


def _check_checksums(
    volume: Superblock, data: Bytes, raw: np.ndarray, have: Bool, place: Int, damage: Damage
) -> None:
    rows = np.flatnonzero(have)
    uuid = np.frombuffer(volume.record["uuid"].tobytes(), np.uint8)[None]
    seed = crc32(uuid, ALL_ONES).repeat(len(rows))
    for name in ("ino", "i_generation"):
        seed = crc32(np.ascontiguousarray(raw[name][rows]).view(np.uint8).reshape(-1, 4), seed)
    whole = data[rows]
    whole[:, I_ADDR + 8 : I_ADDR + 12] = 0
    damage.check(
        crc32(whole, seed) == raw["i_inode_checksum"][rows],
        "checksum",
        "[inode has|inodes have] a wrong checksum",
        place[rows],
    )


def _addresses(
    volume: Superblock, inodes: Inodes, raw: np.ndarray, before: int, found: WalkedNodes, damage: Damage
) -> Pointers:
    """Runs of the addresses in inodes go to `found`; returns the nodes that they refer to."""
    rows = np.flatnonzero(np.isin(inodes.form, (S_IFDIR, S_IFREG, S_IFLNK)) & ~inodes.is_inline)
    some, raw = take(inodes, rows), raw[rows]
    runs, promised = _runs(
        volume, raw["i_addr"], some, some.extra, some.addresses, some.block * BLOCK, damage
    )
    found.runs.append(BlockRuns(before + rows[runs.owner], runs.logical, runs.start, runs.count, runs.span))
    found.promised += promised
    row, column = np.nonzero(raw["i_nid"])
    per_node = some.addresses_per_node
    above = np.stack(
        [
            np.zeros(len(rows), np.int64),
            per_node,
            2 * per_node,
            (2 + NIDS_PER_BLOCK) * per_node,
            (2 + 2 * NIDS_PER_BLOCK) * per_node,
        ],
        1,
    )
    depth = np.array([0, 0, 1, 1, 2])
    return Pointers(
        before + rows[row],
        widen(raw["i_nid"][row, column], "i_nid"),
        (some.addresses[:, None] + above)[row, column],
        depth[column],
    )


def _runs(
    volume: Superblock, table: np.ndarray, owners: Inodes, skip: Int, room: Int, place: Int, damage: Damage
) -> tuple[BlockRuns, int]:
    """Runs of a table (n, k) of addresses of blocks of `owners`, of which `room[i]` after `skip[i]` count.

    Their owner is the row of the table, `logical` counts from its first address. Also returned is how many
    addresses promise blocks.
    """
    cluster = owners.cluster
    row, column = np.nonzero(table)
    slot = column - skip[row]
    keep = np.flatnonzero((slot >= 0) & (slot < room[row]))
    row, column, slot = row[keep], column[keep], slot[keep]
    value = widen(table[row, column], "address")
    size = np.maximum(cluster[row], 1)
    head = slot - slot % size
    packed = (cluster[row] > 0) & (table[row, skip[row] + head] == COMPRESS_ADDR)
    promise = value >= COMPRESS_ADDR
    counted = (value == NEW_ADDR) | ((value == COMPRESS_ADDR) & ~owners.released[row])
    good = damage.check(
        promise | volume.inside(value),
        "outside",
        "[block|blocks] of files [lies|lie] outside the main area or the volume",
        place[row],
    )
    damage.check(
        (value != COMPRESS_ADDR) | (packed & (slot == head)),
        "extents",
        "[head of a compressed cluster is|heads of compressed clusters are] where none can be",
        place[row],
    )
    keep = np.flatnonzero(good & ~promise)
    row, slot, value, packed, head, size = (values[keep] for values in (row, slot, value, packed, head, size))
    logical = np.where(packed, head, slot)
    new = np.append(
        True,
        (row[1:] != row[:-1])
        | (value[1:] != value[:-1] + 1)
        | (packed[1:] != packed[:-1])
        | np.where(packed[1:], head[1:] != head[:-1], slot[1:] != slot[:-1] + 1),
    )[: len(row)]
    first = np.flatnonzero(new)
    count = np.diff(np.append(first, len(row)))
    return BlockRuns(
        row[first], logical[first], value[first], count, np.where(packed[first], size[first], count)
    ), int(counted.sum())


def follow(
    volume: Superblock, nat: Nat, found: WalkedNodes, damage: Damage, replaced: Int = EMPTY
) -> Pointers:
    """Read the trees below all inodes, level by level; nodes and runs are added to `found`.

    A node serves one file, once.

    Pointers to direct nodes whose `slots` are among `replaced` are not followed but returned.
    """
    level, dropped = found.pointers, []
    while len(level.nid):
        gone = (level.depth == 0) & np.isin(level.slots, replaced)
        dropped.append(take(level, gone))
        level, at = claim(nat, found, take(level, ~gone), damage)
        below = []
        for low in range(0, len(at), BATCH // BLOCK):
            part = slice(low, low + BATCH // BLOCK)
            data = volume.reader.read_blocks(nat.block[at[part]] * BLOCK, BLOCK)
            good = _sound(data, nat, at[part], damage)
            below.append(
                add_level(
                    volume,
                    found,
                    take(take(level, part), good),
                    data[good],
                    nat.block[at[part]][good],
                    damage,
                )
            )
        level = stack(Pointers, below)
    return stack(Pointers, dropped)


def add_attributes(nat: Nat, found: WalkedNodes, damage: Damage) -> None:
    """The attribute nodes that inodes refer to are added to `found`."""
    owner = np.flatnonzero(found.inodes.xattr_nid)
    none = np.zeros(len(owner), np.int64)
    wanted, at = claim(nat, found, Pointers(owner, found.inodes.xattr_nid[owner], none, none), damage)
    found.attributes.append(Trees(wanted.owner, nat.block[at], np.zeros(len(at), np.int64)))


def claim(nat: Nat, found: WalkedNodes, level: Pointers, damage: Damage) -> tuple[Pointers, Int]:
    """The pointers to nodes that belong to the inode and that no other pointer had before, in the order of
    their blocks, with rows of the NAT."""
    at, inodes, taken = nat.find(level.nid), found.inodes, found.taken
    place = inodes.block[level.owner] * BLOCK
    good = (at >= 0) & (np.append(nat.ino, -1)[at] == inodes.number[level.owner]) & ~taken[at]
    first = np.zeros(len(at), bool)
    first[np.unique(at, return_index=True)[1]] = True
    good = damage.check(
        good & first,
        "tree",
        "[reference to a node leads|references to nodes lead] to none, or to one of another inode",
        place,
    )
    keep = np.flatnonzero(good)
    keep = keep[np.argsort(nat.block[at[keep]], kind="stable")]
    taken[at[keep]] = True
    return take(level, keep), at[keep]


def add_level(
    volume: Superblock, found: WalkedNodes, level: Pointers, data: Bytes, block: Int, damage: Damage
) -> Pointers:
    """The nodes in these blocks, and the runs of direct ones, are added to `found`; returns what indirect
    nodes refer to."""
    found.trees.append(Trees(level.owner, block, level.depth))
    table = records(data, NODE_BLOCK)["addr"]
    per_node = found.inodes.addresses_per_node[level.owner]
    direct, above = np.flatnonzero(level.depth == 0), np.flatnonzero(level.depth)
    for rows in np.array_split(direct, -(-len(direct) // AT_ONCE)) if len(direct) else []:
        none = np.zeros(len(rows), np.int64)
        owners = take(found.inodes, level.owner[rows])
        runs, promised = _runs(volume, table[rows], owners, none, per_node[rows], block[rows] * BLOCK, damage)
        found.runs.append(
            BlockRuns(
                level.owner[rows[runs.owner]],
                level.first[rows[runs.owner]] + runs.logical,
                runs.start,
                runs.count,
                runs.span,
            )
        )
        found.promised += promised
    row, column = np.nonzero(table[above])
    row = above[row]
    depth = level.depth[row] - 1
    span = per_node[row] * np.where(depth > 0, NIDS_PER_BLOCK, 1)
    return Pointers(
        level.owner[row], widen(table[row, column], "nid"), level.first[row] + column * span, depth
    )


def without_links(inodes: Inodes, lost: Int) -> Inodes:
    """Inodes with a link less for each name that they lost."""
    nlink = np.append(inodes.nlink, 0)
    np.subtract.at(nlink, positions(inodes.number, lost), 1)
    return inodes._replace(nlink=np.maximum(nlink[:-1], 0))


def types_of(volume: Superblock, inodes: Inodes) -> np.ndarray:
    """Codes of tables.TYPES."""
    types = tables.type_of_mode(inodes.mode).copy()
    if "quota" in volume.features:
        types[np.isin(inodes.number, volume.record["qf_ino"])] = tables.T_METADATA
    return types


def inode_table(inodes: Inodes, types: np.ndarray, orphans: Int) -> pa.Table:
    own = types != tables.T_METADATA
    flags = np.where(((inodes.nlink == 0) & own) | np.isin(inodes.number, orphans), tables.I_DELETED, 0)
    for has, meaning in (
        (inodes.advise & nodes.ADVISE_ENCRYPT, tables.I_ENCRYPTED), (inodes.cluster, tables.I_COMPRESSED),
        (inodes.flags & nodes.IMMUTABLE_FL, tables.I_IMMUTABLE),
        (inodes.advise & nodes.ADVISE_VERITY, tables.I_VERITY),
    ):  # fmt: skip
        flags |= np.where(has != 0, meaning, 0)
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=types, mode=inodes.mode, uid=inodes.uid, gid=inodes.gid,
        size=inodes.size, nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=flags,
        record_offset=inodes.block * BLOCK,
    )  # fmt: skip
