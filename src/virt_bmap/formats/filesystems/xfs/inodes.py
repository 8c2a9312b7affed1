"""Inodes: the chunks that the inode B-trees name, read a batch at a time, and what the records themselves
hold.

A chunk is 64 inodes; a sparse chunk lacks some groups of four. Only groups of four with an inode in use are
read. What the records hold inline (short directories, symlink targets, attributes, extent lists, roots of
B-trees) is taken out while the batch is in memory: on a disk full of small files that is nearly everything.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Bytes, Int, expand, union
from virt_bmap.core.columns import stack
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.allocator import AllocationGroups
from virt_bmap.formats.filesystems.xfs.btree import BATCH, MAX_LEVELS, narrow
from virt_bmap.formats.filesystems.xfs.extents import ATTR_FORK, DATA_FORK, Extents, ForkRoots, decode
from virt_bmap.formats.filesystems.xfs.names import Names, short_form, stack_names
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

GROUP = ondisk.INODES_PER_HOLEMASK_BIT
GROUPS = ondisk.INODES_PER_CHUNK // GROUP


class Inodes(NamedTuple):
    """Inodes in use; `record` is the byte where each one's record lies, `realtime` 1 where its content is on
    the other device."""

    number: Int
    record: Int
    type: Int
    mode: Int
    uid: Int
    gid: Int
    size: Int
    nlink: Int
    mtime_ns: Int
    flags: Int
    next_unlinked: Int
    realtime: Int


class InodeContents(NamedTuple):
    """What the inode records hold: extent lists, roots of fork B-trees, and names of short directories."""

    inodes: Inodes
    extents: Extents
    roots: ForkRoots
    names: Names


class _Fork(NamedTuple):
    """One fork of each inode of a batch: its format and number of extents, and the bytes [start, end) it may
    take in the batch."""

    which: int
    format: Int
    nextents: Int
    start: Int
    end: Int


class _RecordBatch(NamedTuple):
    """Records in memory: `flat` bytes, in which the record of each of `inodes` begins at `base`.

    Owners count from `known`.
    """

    geometry: Geometry
    damage: Damage
    rows: tables.ExtentRows
    flat: Bytes
    base: Int
    inodes: Inodes
    known: int


def read_inodes(
    reader: Reader, geometry: Geometry, damage: Damage, groups: AllocationGroups, rows: tables.ExtentRows
) -> InodeContents:
    """All inodes in use, and what their records hold; chunks and inline contents become `rows`."""
    parts: list[InodeContents] = []
    known = 0
    for data, number, used in _batches(reader, geometry, *_chunks(geometry, damage, groups, rows)):
        part = _contents(geometry, damage, data, number, used, known, rows)
        known += len(part.inodes.number)
        parts.append(part)
    return InodeContents(
        stack(Inodes, [part.inodes for part in parts]), stack(Extents, [part.extents for part in parts]),
        stack(ForkRoots, [part.roots for part in parts]), stack_names([part.names for part in parts]),
    )  # fmt: skip


def _chunks(
    geometry: Geometry, damage: Damage, groups: AllocationGroups, rows: tables.ExtentRows
) -> tuple[Int, Bool]:
    """Groups of four inodes of which at least one is in use: number of the first, and which of the four are
    (n, 4)."""
    agno, found = groups.chunks_agno, groups.chunks
    first = found["ir_startino"].astype(np.int64)
    low, high = first * geometry.inode_size, (first + ondisk.INODES_PER_CHUNK) * geometry.inode_size
    room = geometry.group_blocks(agno) * geometry.block_size
    number = (agno << geometry.agi_bits) | first
    place = geometry.group_offset(agno)
    good = (
        (low >= 4 * geometry.sector_size)
        & (high <= room)
        & (place + high <= geometry.limit)
        & (first % GROUP == 0)
    )
    damage.check(
        good, "inode", "inode [chunk lies outside its|chunks lie outside their] allocation group", place
    )
    order = np.argsort(np.where(good, number, -1), kind="stable")[np.count_nonzero(~good) :]
    again = np.zeros(len(order), bool)
    again[1:] = np.diff(number[order]) < ondisk.INODES_PER_CHUNK
    damage.check(
        ~again, "twice", "inode [chunk overlaps|chunks overlap] others", geometry.inode_offset(number[order])
    )
    order = order[~again]
    hole = np.zeros((len(order), GROUPS), bool)
    if geometry.has("sparse"):
        hole = (found["ir_holemask"][order, None].astype(np.int64) >> np.arange(GROUPS)) & 1 > 0
    start = number[order, None] + np.arange(0, ondisk.INODES_PER_CHUNK, GROUP)
    offset = geometry.inode_offset(start[~hole])
    begin, end = union(offset, offset + GROUP * geometry.inode_size)
    rows.add(tables.METADATA, begin, end - begin, part="inode chunk")
    free = found["ir_free"][order].astype("<u8").view(np.uint8).reshape(-1, 8)
    used = (np.unpackbits(free, axis=1, bitorder="little") == 0).reshape(-1, GROUPS, GROUP) & ~hole[
        :, :, None
    ]
    some = used.any(axis=2)
    return start[some], used[some]


def _batches(reader: Reader, geometry: Geometry, start: Int, used: Bool) -> Iterator[tuple[Bytes, Int, Bool]]:
    """Inode records in bounded batches: bytes (n, inode size), the inode number and whether it is in use, for
    each."""
    for part, data in reader.batches(geometry.inode_offset(start), GROUP * geometry.inode_size, BATCH):
        number = (start[part, None] + np.arange(GROUP)).reshape(-1)
        yield data.reshape(-1, geometry.inode_size), number, used[part].reshape(-1)


def _contents(
    geometry: Geometry,
    damage: Damage,
    data: Bytes,
    number: Int,
    used: Bool,
    known: int,
    rows: tables.ExtentRows,
) -> InodeContents:
    """What a batch of records holds.

    The owners in the result count from `known`, the inodes found in earlier batches.
    """
    dtype = ondisk.DINODE3 if geometry.crc else ondisk.DINODE
    row = np.flatnonzero(used)
    core = records(data[row, : dtype.itemsize], dtype)
    good = (core["di_magic"] == ondisk.DINODE_MAGIC) & (core["di_mode"] != 0)
    damage.check(
        good,
        "inode",
        "[inode in use has|inodes in use have] a wrong magic number or mode 0",
        geometry.inode_offset(number[row]),
    )
    if not good.all():
        row, core = row[good], core[good]
    inodes = _inodes(geometry, damage, core, number[row])
    batch = _RecordBatch(geometry, damage, rows, data.reshape(-1), row * geometry.inode_size, inodes, known)
    forks = data_fork, attr_fork = _forks(batch, core)
    _attributes_inline(batch, attr_fork)
    return InodeContents(
        inodes, stack(Extents, [_extents(batch, fork) for fork in forks]),
        stack(ForkRoots, [_roots(batch, fork) for fork in forks]), _data_inline(batch, data_fork),
    )  # fmt: skip


def _inodes(geometry: Geometry, damage: Damage, core: np.ndarray, number: Int) -> Inodes:
    """The core of each record as columns."""
    place = geometry.inode_offset(number)
    mode = core["di_mode"].astype(np.int64)
    kind = tables.type_of_mode(mode).astype(np.int64)
    kind[np.isin(number, list(geometry.hidden))] = tables.T_METADATA
    nlink = np.where(core["di_version"] == 1, core["di_onlink"], core["di_nlink"]).astype(np.int64)
    if geometry.crc:
        damage.check(
            core["di_ino"] == number, "inode", "[inode holds|inodes hold] another inode's number", place
        )
    flags = np.where(core["di_flags"] & ondisk.DIFLAG_IMMUTABLE, tables.I_IMMUTABLE, 0)
    flags |= np.where((nlink == 0) & (kind != tables.T_METADATA), tables.I_DELETED, 0)
    size = core["di_size"].astype(np.int64)
    damage.check(size >= 0, "inode", "[inode has|inodes have] a size of more than 2^63 bytes", place)
    return Inodes(
        number, place, kind, mode, core["di_uid"].astype(np.int64), core["di_gid"].astype(np.int64),
        np.maximum(size, 0), nlink, _mtime_ns(geometry, core), flags,
        core["di_next_unlinked"].astype(np.int64),
        (core["di_flags"] & ondisk.DIFLAG_REALTIME).astype(np.int64),
    )  # fmt: skip


def _mtime_ns(geometry: Geometry, core: np.ndarray) -> Int:
    """di_mtime as nanoseconds since 1970: two signed 32-bit numbers, or with bigtime nanoseconds since
    December 1901."""
    stamp = core["di_mtime"].astype(np.uint64)
    signed = stamp.view(np.int64)
    mtime: Int = (signed >> 32) * 1_000_000_000 + (signed & 0xFFFFFFFF)
    if geometry.has("bigtime"):
        last = np.uint64(np.iinfo(np.int64).max)  # bigtime reaches to 2486, the table to 2262
        epoch = np.uint64(ondisk.BIGTIME_EPOCH_NS)
        # what lies before 1970 wraps to negative, as it should
        big = (np.minimum(stamp, last + epoch) - epoch).view(np.int64)
        mtime = np.where((core["di_flags2"] & ondisk.DIFLAG2_BIGTIME) != 0, big, mtime)
    return mtime


def _forks(batch: _RecordBatch, core: np.ndarray) -> tuple[_Fork, _Fork]:
    """Where the two forks of each record lie. di_forkoff, in units of 8 bytes, divides the literal area; 0:
    all is data fork."""
    inodes, damage, size = batch.inodes, batch.damage, batch.geometry.inode_size
    literal = core.dtype.itemsize
    forkoff = core["di_forkoff"].astype(np.int64) * 8
    good = damage.check(
        literal + forkoff < size,
        "inode",
        "[inode has|inodes have] a di_forkoff outside the inode",
        inodes.record,
    )
    low, high = batch.base + literal, batch.base + size
    middle = np.where(good & (forkoff > 0), low + forkoff, high)
    data_format, attr_format = core["di_format"].astype(np.int64), core["di_aformat"].astype(np.int64)
    # device nodes keep their number where others have extents; of the rest only directories and symlinks fit
    # into the inode
    owns = np.isin(inodes.type, (tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK, tables.T_METADATA))
    fits = np.isin(inodes.type, (tables.T_DIRECTORY, tables.T_SYMLINK)) & (data_format == ondisk.FMT_LOCAL)
    fits |= (data_format == ondisk.FMT_EXTENTS) | (data_format == ondisk.FMT_BTREE)
    damage.check(
        fits | ~owns, "inode", "[inode has|inodes have] a data fork of an impossible format", inodes.record
    )
    known = (attr_format >= ondisk.FMT_LOCAL) & (attr_format <= ondisk.FMT_BTREE)
    damage.check(
        (middle == high) | known,
        "inode",
        "[inode has|inodes have] an attribute fork of an impossible format",
        inodes.record,
    )
    nextents, anextents = _extent_counts(batch.geometry, core)
    return (
        _Fork(DATA_FORK, np.where(owns & fits, data_format, ondisk.FMT_DEV), nextents, low, middle),
        _Fork(ATTR_FORK, np.where(middle < high, attr_format, ondisk.FMT_DEV), anextents, middle, high),
    )


def _extent_counts(geometry: Geometry, core: np.ndarray) -> tuple[Int, Int]:
    """Extents of data and attribute fork; inodes with large counters keep them elsewhere."""
    nextents, anextents = core["di_nextents"].astype(np.int64), core["di_anextents"].astype(np.int64)
    if geometry.has("nrext64"):
        large = (core["di_flags2"] & ondisk.DIFLAG2_NREXT64) != 0
        anextents = np.where(large, nextents, anextents)
        nextents = np.where(large, np.minimum(core["di_big_nextents"], 1 << 62).astype(np.int64), nextents)
    return nextents, anextents


def _data_inline(batch: _RecordBatch, fork: _Fork) -> Names:
    """Short directories and symlink targets in the data fork."""
    inodes, damage = batch.inodes, batch.damage
    local = np.flatnonzero(fork.format == ondisk.FMT_LOCAL)
    fits = inodes.size[local] <= (fork.end - fork.start)[local]
    local = local[
        damage.check(
            fits,
            "inode",
            "[inode is larger than its|inodes are larger than their] inline data",
            inodes.record[local],
        )
    ]
    directory = inodes.type[local] == tables.T_DIRECTORY
    for kind, mine, at in ((tables.DIRECTORY, local[directory], -1), (tables.SYMLINK, local[~directory], 0)):
        where = (inodes.record + fork.start - batch.base)[mine]
        batch.rows.add(
            kind, where, inodes.size[mine], inode=inodes.number[mine], file_offset=at, flags=tables.INLINE
        )
    mine = local[directory]
    start, end = fork.start[mine], fork.start[mine] + inodes.size[mine]
    return short_form(
        batch.flat, start, end, inodes.number[mine], inodes.record[mine], batch.geometry.has("ftype"), damage
    )


def _attributes_inline(batch: _RecordBatch, fork: _Fork) -> None:
    """Attributes in the attribute fork: struct xfs_attr_sf_hdr, two bytes of total size and the count."""
    inodes, flat = batch.inodes, batch.flat
    local = np.flatnonzero((fork.format == ondisk.FMT_LOCAL) & (fork.end - fork.start >= 4))
    start = fork.start[local]
    size = flat[start].astype(np.int64) << 8 | flat[start + 1]
    fits = size <= (fork.end - fork.start)[local]
    batch.damage.check(
        fits,
        "inode",
        "inline [attribute is larger than its|attributes are larger than their] fork",
        inodes.record[local],
    )
    some = fits & (flat[start + 2] > 0)
    mine, size = local[some], size[some]
    where = (inodes.record + fork.start - batch.base)[mine]
    batch.rows.add(tables.XATTR, where, size, inode=inodes.number[mine], flags=tables.INLINE)


def _extents(batch: _RecordBatch, fork: _Fork) -> Extents:
    """Extent lists in the records."""
    flat, place = batch.flat, batch.inodes.record
    mine = np.flatnonzero((fork.format == ondisk.FMT_EXTENTS) & (fork.nextents > 0))
    start, count = fork.start[mine], fork.nextents[mine]
    room = (fork.end[mine] - start) // ondisk.BMBT_REC_SIZE
    batch.damage.check(
        count <= room,
        "inode",
        "[inode claims more extents than it has|inodes claim more extents than they have] room for",
        place[mine],
    )
    row, step = expand(np.minimum(count, room))
    # the literal area begins on a multiple of 4, not always of 8: the words are seen from where it begins
    shift = int(start[0] % 8) if len(start) else 0
    words = flat[shift : shift + (len(flat) - shift) // 8 * 8].view(">u8")
    at = (start[row] - shift) // 8 + 2 * step
    owner = batch.known + mine[row]
    return decode(
        owner, np.full(len(owner), fork.which), words[at].astype(np.uint64), words[at + 1].astype(np.uint64)
    )


def _roots(batch: _RecordBatch, fork: _Fork) -> ForkRoots:
    """struct xfs_bmdr_block: level and number of records (2 bytes each), keys, pointers; both 8 bytes."""
    flat, place = batch.flat, batch.inodes.record
    mine = np.flatnonzero(fork.format == ondisk.FMT_BTREE)
    start = fork.start[mine]
    room = np.maximum(0, (fork.end[mine] - start - 4) // 16)
    head = flat[np.minimum(start[:, None] + np.arange(4), len(flat) - 1)].astype(np.int64)
    level, count = head[:, 0] << 8 | head[:, 1], head[:, 2] << 8 | head[:, 3]
    good = (count > 0) & (count <= room) & (level > 0) & (level < MAX_LEVELS)
    batch.damage.check(
        good, "inode", "bmbt [root in an inode has|roots in inodes have] a wrong level or count", place[mine]
    )
    mine, start, room, level, count = mine[good], start[good], room[good], level[good], count[good]
    row, step = expand(count)
    at = (start + 4 + 8 * room)[row] + 8 * step
    raw = np.ascontiguousarray(flat[at[:, None] + np.arange(8)]).view(">u8")[:, 0]
    return ForkRoots(batch.known + mine[row], np.full(len(row), fork.which), narrow(raw), level[row] - 1)


def inode_table(inodes: Inodes) -> pa.Table:
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=inodes.type, mode=inodes.mode, uid=inodes.uid,
        gid=inodes.gid, size=inodes.size, nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=inodes.flags,
        record_offset=inodes.record,
    )  # fmt: skip
