"""What an ext filesystem still remembers: which block a block in its journal is a copy of, and whose a free
block was.

Transactions stay in the log until the ring comes round, also those that were checkpointed long ago: here all
of them are looked at, where recovery stops at the first that is not due. ext4 clears the run list of an inode
that it deletes, so an older copy of the inode's block, logged while the file was alive, is what tells its
blocks. Without extents (ext2, ext3) an inode that was deleted may keep its pointers, too: old kernels and
libext2fs (fuse2fs, debugfs) leave them. Names come from directory entries, living and dead: an entry stays
behind in the room of the one before it.

Sources: Linux fs/jbd2/recovery.c, include/linux/jbd2.h, fs/ext4/namei.c ext4_generic_delete_entry();
e2fsprogs debugfs/debugfs.c kill_file_by_inode().
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, touching
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.common.past import MAX_NAMED
from virt_bmap.formats.filesystems.ext import inodes
from virt_bmap.formats.filesystems.ext.allocator import BlockGroups, read_groups, record_offsets, used_inodes
from virt_bmap.formats.filesystems.ext.extents import read_blocks_of
from virt_bmap.formats.filesystems.ext.journal import (
    BATCH,
    COMMIT,
    DESCRIPTOR,
    HEADER,
    JOURNAL_MAGIC,
    REVOKE,
    Headers,
    Log,
    _internal,
    _tags,
)
from virt_bmap.formats.filesystems.ext.superblock import Superblock, read_superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

MAX_ENTRIES = 1000
"""Entries with these inodes that are looked at in one batch of blocks: a hostile disk can be full of them."""
NAME_AT = 8
"""Where the name begins in a directory entry: after inode, rec_len, name_len, file_type."""


class LoggedBlocks(NamedTuple):
    """Blocks in the log: where each lies and belongs, in bytes of the volume, and in which transaction it was
    written."""

    place: Int
    target: Int
    sequence: Int


class Remembered(NamedTuple):
    """Records of inodes as they once were: `number` of each, the transaction (`sequence`, -1: none) that
    wrote it, and its bytes, (n, inode_size)."""

    number: Int
    sequence: Int
    raw: Bytes


def copy_of(reader: Reader, offset: int) -> tuple[int, int] | None:
    """(where it belongs, transaction) of a byte in the journal, both in bytes of the volume; None where it is
    no copy of a block."""
    superblock = read_superblock(reader, Damage())
    log = _log(reader, superblock)
    if log is None:
        return None
    copies = _copies(log)
    found = np.flatnonzero(copies.place == offset - offset % log.block_size)
    return (
        (int(copies.target[found[0]]) + offset % log.block_size, int(copies.sequence[found[0]]))
        if len(found)
        else None
    )


def former(reader: Reader, extents: pa.Table, starts: Int, ends: Int) -> pa.Table:
    """Whose the bytes [starts[i], ends[i]) were, as far as the journal and records of deleted inodes
    remember."""
    superblock = read_superblock(reader, Damage())
    groups = read_groups(reader, superblock, Damage())
    log = _log(reader, superblock)
    copies = _copies(log) if log else None
    known = {}
    if copies:
        known["journal"] = _logged(reader, superblock, groups, copies)
    if not superblock.has("extent"):
        known["record of the deleted inode"] = _deleted(reader, superblock, groups)
    table = tables.concat(
        "former", [_holding(reader, superblock, which, starts, ends, who) for who, which in known.items()]
    )
    places = np.concatenate(
        [copies.place if copies else EMPTY, directory_blocks(extents, superblock.block_size)]
    )
    return _named(
        table, _names(reader, superblock.block_size, places, np.unique(tables.integers(table, "inode")))
    )


def directory_blocks(extents: pa.Table, size: int) -> Int:
    """Where all blocks lie that hold names now."""
    mine = (tables.codes(extents, "kind") == tables.DIRECTORY) & (
        tables.integers(extents, "flags") & tables.INLINE == 0
    )
    start, length = tables.integers(extents, "volume_offset")[mine], tables.integers(extents, "length")[mine]
    row, step = expand(length // size)
    places: Int = start[row] + step * size
    return places


def _log(reader: Reader, superblock: Superblock) -> Log | None:
    """The journal, where it is in the filesystem itself."""
    return (
        _internal(reader, superblock, Damage())
        if superblock.has("has_journal") and superblock.number("s_journal_inum")
        else None
    )


def _copies(log: Log) -> LoggedBlocks:
    """All logged blocks that descriptors in the ring tell of; where two claim a place, the later one wrote
    it."""
    first, length = log.number("s_first"), log.last - log.number("s_first")
    step = max(1, BATCH // log.block_size)
    parts = [
        Headers(
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros((0, log.block_size), np.uint8),
        )
    ]
    for begin in range(0, length, step):
        at = np.arange(begin, min(begin + step, length), dtype=np.int64)
        data = log.reader.read_blocks(log.place[first + at], log.block_size)
        header = np.ascontiguousarray(data[:, : HEADER.itemsize]).view(HEADER)[:, 0]
        mine = np.flatnonzero(
            (header["h_magic"] == JOURNAL_MAGIC)
            & np.isin(header["h_blocktype"], (DESCRIPTOR, COMMIT, REVOKE))
        )
        parts.append(
            Headers(
                at[mine],
                header["h_blocktype"][mine].astype(np.int64),
                header["h_sequence"][mine].astype(np.int64),
                data[mine],
            )
        )
    headers = Headers(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("at", "kind", "sequence", "data")
        )
    )
    (row, target, _, _, nth), _ = _tags(log, headers)
    place, sequence = (headers.at[row] + 1 + nth) % max(1, length), headers.sequence[row]
    order = np.lexsort((-sequence, place))
    newest = order[np.append(True, place[order][1:] != place[order][:-1])[: len(order)]]
    keep = newest[~np.isin(place[newest], headers.at)]
    return LoggedBlocks(log.place[first + place[keep]], target[keep] * log.block_size, sequence[keep])


def _logged(reader: Reader, superblock: Superblock, groups: BlockGroups, copies: LoggedBlocks) -> Remembered:
    """The records of living inodes in the copies of blocks of inode tables."""
    size, each = superblock.block_size, superblock.block_size // superblock.inode_size
    start = groups.inode_table * size
    order = np.argsort(start, kind="stable")
    at = order[np.maximum(np.searchsorted(start[order], copies.target, "right") - 1, 0)]
    inside = (
        (start[at] > 0)
        & (copies.target >= start[at])
        & (copies.target < start[at] + groups.table_blocks * size)
    )
    first = (at * superblock.inodes_per_group + (copies.target - start[at]) // superblock.inode_size + 1)[
        inside
    ]
    raw = reader.read_blocks(copies.place[inside], size).reshape(-1, superblock.inode_size)
    columns = inodes.columns_of(superblock, raw)
    alive = np.flatnonzero((columns["mode"] != 0) & (columns["nlink"] > 0))
    number = (first[:, None] + np.arange(each)).ravel()
    return Remembered(number[alive], np.repeat(copies.sequence[inside], each)[alive], raw[alive])


def _deleted(reader: Reader, superblock: Superblock, groups: BlockGroups) -> Remembered:
    """The records of inodes that no bitmap calls used, but that still say what they were and point at
    something."""
    numbers = _unused(reader, superblock, groups)
    found = [(EMPTY, np.zeros((0, superblock.inode_size), np.uint8))]
    offsets = record_offsets(superblock, groups, numbers)
    inside = (offsets >= 0) & (offsets <= reader.size - superblock.inode_size)
    numbers, offsets = numbers[inside], offsets[inside]
    for part, raw in reader.batches(offsets, superblock.inode_size, BATCH):
        columns = inodes.columns_of(superblock, raw)
        dead = (columns["mode"] != 0) & (columns["nlink"] == 0) & columns["block"].any(axis=1)
        found.append((numbers[part][dead], raw[dead]))
    number, records = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return Remembered(number, np.full(len(number), -1, np.int64), records)


def _unused(reader: Reader, superblock: Superblock, groups: BlockGroups) -> Int:
    """The inodes that no bitmap calls used, of groups whose table is more than a hole."""
    count, table = superblock.inodes_per_group, groups.inode_table * superblock.block_size
    stored = np.flatnonzero(touching(table, table + count * superblock.inode_size, *reader.stored()))
    afford(reader, len(stored) * count * superblock.inode_size, "unused inodes")
    unused = np.ones((len(stored), count), bool)
    used = used_inodes(reader, superblock, groups) - 1
    at = np.searchsorted(stored, used // count)
    known = np.append(stored, -1)[at] == used // count
    unused[at[known], used[known] % count] = False
    group, place = np.nonzero(unused)
    numbers: Int = stored[group] * count + place + 1
    return numbers


def _holding(
    reader: Reader, superblock: Superblock, known: Remembered, starts: Int, ends: Int, said_by: str
) -> pa.Table:
    """The table `former`, without names, of the runs of these records that touch the ranges; of several that
    say the same the latest."""
    size, columns = superblock.block_size, inodes.columns_of(superblock, known.raw)
    with_blocks = columns["flags"] & inodes.INLINE_DATA_FL == 0
    by_extents = columns["flags"] & inodes.EXTENTS_FL != 0
    extents = np.flatnonzero(with_blocks & by_extents)
    pointers = np.flatnonzero(with_blocks & ~by_extents & np.isin(columns["mode"] >> 12, (4, 8)))
    # each older copy by itself: the same tree block in two of them is not damage
    none = np.zeros(len(known.raw), np.int64)
    runs, _ = read_blocks_of(reader, superblock, columns["block"], extents, pointers, none, Damage())
    here = np.flatnonzero(touching(runs.start * size, (runs.start + runs.count) * size, starts, ends))
    row = runs.owner[here]
    order = np.lexsort((-known.sequence[row], runs.start[here], runs.logical[here], known.number[row]))
    here, row = here[order], row[order]
    keys = np.stack([known.number[row], runs.logical[here], runs.start[here]])
    new = np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))[: len(row)]
    here, row = here[new][:MAX_NAMED], row[new][:MAX_NAMED]
    return tables.make(
        "former", volume_offset=runs.start[here] * size, length=runs.count[here] * size,
        inode=known.number[row], names=_no_names(len(row)), part=None, file_offset=runs.logical[here] * size,
        size=columns["size"][row], mtime_ns=columns["mtime_ns"][row], said_by=said_by,
        sequence=known.sequence[row], doubt=None,
    )  # fmt: skip


def _no_names(count: int) -> pa.Array:
    return pa.array([[]] * count, tables.SCHEMAS["former"].field("names").type)


def _named(table: pa.Table, names: dict[int, tuple[bytes, ...]]) -> pa.Table:
    """The table with the names of its inodes."""
    at = table.schema.get_field_index("names")
    field = table.schema.field(at)
    lists = [names.get(number, ()) for number in table.column("inode").to_pylist()]
    return table.set_column(at, field, pa.array(lists, field.type))


def _names(reader: Reader, size: int, places: Int, numbers: Int) -> dict[int, tuple[bytes, ...]]:
    """The names that directory entries in these blocks, living and dead, give to the inodes."""
    found: dict[int, dict[bytes, None]] = {number: {} for number in numbers.tolist()}
    step = max(1, BATCH // size)
    for begin in range(0, len(places) if len(numbers) else 0, step):
        data = reader.read_blocks(places[begin : begin + step], size)
        words = np.ascontiguousarray(data).view("<u4")
        row, at = np.nonzero(np.isin(words[:, :-1], numbers))
        at = at * 4
        length = data[row, at + 4] | data[row, at + 5].astype(np.int64) << 8
        named = data[row, at + 6].astype(np.int64)
        good = (length % 4 == 0) & (named > 0) & (NAME_AT + named <= length) & (length <= size - at)
        for block, begins, count in list(
            zip(row[good].tolist(), at[good].tolist(), named[good].tolist(), strict=True)
        )[:MAX_ENTRIES]:
            name = data[block, begins + NAME_AT : begins + NAME_AT + count].tobytes()
            if not {0, ord("/")} & set(name):
                found[int(words[block, begins // 4])][name] = None
    return {
        number: tuple(name for name in names if name not in (b".", b"..")) for number, names in found.items()
    }
