"""What an ext journal still remembers: which block a block in it is a copy of, and whose a free block was.

Transactions stay in the log until the ring comes round, also those that were checkpointed long ago: here all of them are looked at, where recovery stops at the first
that is not due. ext4 clears the run list of an inode that it deletes, so an older copy of the inode's block, logged while the file was alive, is what tells its blocks.
Sources: Linux fs/jbd2/recovery.c, include/linux/jbd2.h.
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap.arrays import Bytes, Int
from virt_bmap.filesystems.ext import inodes
from virt_bmap.filesystems.ext.blocks import read_blocks_of
from virt_bmap.filesystems.ext.groups import Groups, read_groups
from virt_bmap.filesystems.ext.journal import (
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
from virt_bmap.filesystems.ext.superblock import Superblock, read_superblock
from virt_bmap.reader import Reader

MAX_FORMER = 16
"""Former owners of one block that are told, the latest first."""
MAX_ENTRIES = 1000
"""Entries with these inodes that are looked at in one batch of blocks: a hostile disk can be full of them."""
NAME_AT = 8
"""Where the name begins in a directory entry: after inode, rec_len, name_len, file_type."""


@dataclass(frozen=True)
class Copies:
    """Blocks in the log: where each lies and belongs, in bytes of the volume, and in which transaction it was written."""

    place: Int
    target: Int
    sequence: Int


@dataclass(frozen=True)
class Former:
    """An inode that held the byte, in the journal's transaction `sequence`; `names` are from directory entries, living and dead."""

    inode: int
    file_offset: int
    size: int
    mtime_ns: int
    sequence: int
    names: tuple[bytes, ...]


def copy_of(reader: Reader, offset: int) -> tuple[int, int] | None:
    """(where it belongs, transaction) of a byte in the journal, both in bytes of the volume; None where it is no copy of a block."""
    superblock = read_superblock(reader, [])
    log = _log(reader, superblock)
    if log is None:
        return None
    copies = _copies(log)
    found = np.flatnonzero(copies.place == offset - offset % log.block_size)
    return (int(copies.target[found[0]]) + offset % log.block_size, int(copies.sequence[found[0]])) if len(found) else None


def former_owners(reader: Reader, offset: int, directories: Int) -> list[Former]:
    """Whose a byte was, the latest first, as far as the journal remembers; `directories` are the offsets of all blocks that hold names now."""
    superblock = read_superblock(reader, [])
    log = _log(reader, superblock)
    if log is None:
        return []
    size = superblock.block_size
    copies = _copies(log)
    first, data = _inode_blocks(reader, superblock, read_groups(reader, superblock, []), copies)
    order = np.argsort(-first[1], kind="stable")
    found = _holding(reader, superblock, first[0][order], first[1][order], data[order], offset // size)
    numbers = [number for number, *_ in found]
    names = _names(reader, size, np.concatenate([copies.place, directories]), numbers)
    return [Former(number, logical * size + offset % size, length, mtime, sequence, names.get(number, ()))
            for number, logical, length, mtime, sequence in found]  # fmt: skip


def _log(reader: Reader, superblock: Superblock) -> Log | None:
    """The journal, where it is in the filesystem itself."""
    return _internal(reader, superblock, []) if superblock.has("has_journal") and superblock.number("s_journal_inum") else None


def _copies(log: Log) -> Copies:
    """All logged blocks that descriptors in the ring tell of; where two claim a place, the later one wrote it."""
    first, length = log.number("s_first"), log.last - log.number("s_first")
    step = max(1, BATCH // log.block_size)
    parts = [
        Headers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, log.block_size), np.uint8))
    ]
    for begin in range(0, length, step):
        at = np.arange(begin, min(begin + step, length), dtype=np.int64)
        data = log.reader.read_blocks(log.place[first + at], log.block_size)
        header = np.ascontiguousarray(data[:, : HEADER.itemsize]).view(HEADER)[:, 0]
        mine = np.flatnonzero((header["h_magic"] == JOURNAL_MAGIC) & np.isin(header["h_blocktype"], (DESCRIPTOR, COMMIT, REVOKE)))
        parts.append(
            Headers(
                at[mine], header["h_blocktype"][mine].astype(np.int64), header["h_sequence"][mine].astype(np.int64), data[mine]
            )
        )
    headers = Headers(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("at", "kind", "sequence", "data")))
    (row, target, _, _, nth), _ = _tags(log, headers)
    place, sequence = (headers.at[row] + 1 + nth) % max(1, length), headers.sequence[row]
    order = np.lexsort((-sequence, place))
    newest = order[np.append(True, place[order][1:] != place[order][:-1])[: len(order)]]
    keep = newest[~np.isin(place[newest], headers.at)]
    return Copies(log.place[first + place[keep]], target[keep] * log.block_size, sequence[keep])


def _inode_blocks(reader: Reader, superblock: Superblock, groups: Groups, copies: Copies) -> tuple[tuple[Int, Int], Bytes]:
    """Of the copies that are blocks of inode tables: (number of the first inode, transaction), and their bytes."""
    size = superblock.block_size
    start = groups.inode_table * size
    order = np.argsort(start, kind="stable")
    at = order[np.maximum(np.searchsorted(start[order], copies.target, "right") - 1, 0)]
    inside = (start[at] > 0) & (copies.target >= start[at]) & (copies.target < start[at] + groups.table_blocks * size)
    number = at * superblock.inodes_per_group + (copies.target - start[at]) // superblock.inode_size + 1
    return (number[inside], copies.sequence[inside]), reader.read_blocks(copies.place[inside], size)


def _holding(
    reader: Reader, superblock: Superblock, first: Int, sequence: Int, data: Bytes, block: int
) -> list[tuple[int, int, int, int, int]]:
    """(inode, logical block, size, mtime, transaction) of the inodes whose logged records hold a block, each once."""
    each = superblock.block_size // superblock.inode_size
    raw = data.reshape(-1, superblock.inode_size)
    columns = dict(inodes._fields(superblock, raw))
    number = (first[:, None] + np.arange(each)).ravel()
    sequence = np.repeat(sequence, each)
    alive = (columns["mode"] != 0) & (columns["nlink"] > 0) & (columns["flags"] & inodes.INLINE_DATA_FL == 0)
    by_extents = columns["flags"] & inodes.EXTENTS_FL != 0
    plain = np.ascontiguousarray(columns["block"])
    extents, pointers = (
        np.flatnonzero(alive & by_extents),
        np.flatnonzero(alive & ~by_extents & np.isin(columns["mode"] >> 12, (4, 8))),
    )
    # each older copy by itself: the same tree block in two of them is no damage
    runs, _ = read_blocks_of(reader, superblock, plain, extents, pointers, np.zeros(len(raw), np.int64), [])
    here = np.flatnonzero((runs.start <= block) & (block < runs.start + runs.count))
    found: dict[int, tuple[int, int, int, int, int]] = {}
    for row, at in zip(runs.owner[here].tolist(), here.tolist(), strict=True):
        inode = int(number[row])
        logical = int(runs.logical[at]) + block - int(runs.start[at])
        told = (inode, logical, int(columns["size"][row]), int(columns["mtime_ns"][row]), int(sequence[row]))
        if inode not in found or found[inode][4] < told[4]:
            found[inode] = told
    return sorted(found.values(), key=lambda told: -told[4])[:MAX_FORMER]


def _names(reader: Reader, size: int, places: Int, numbers: list[int]) -> dict[int, tuple[bytes, ...]]:
    """The names that directory entries in these blocks give to the inodes: entries stay behind a deleted file in the room of the one before."""
    found: dict[int, dict[bytes, None]] = {number: {} for number in numbers}
    step = max(1, BATCH // size)
    for begin in range(0, len(places) if numbers else 0, step):
        data = reader.read_blocks(places[begin : begin + step], size)
        words = np.ascontiguousarray(data).view("<u4")
        row, at = np.nonzero(np.isin(words[:, :-1], numbers))
        at = at * 4
        length = data[row, at + 4] | data[row, at + 5].astype(np.int64) << 8
        named = data[row, at + 6].astype(np.int64)
        good = (length % 4 == 0) & (named > 0) & (NAME_AT + named <= length) & (length <= size - at)
        for block, begins, count in list(zip(row[good].tolist(), at[good].tolist(), named[good].tolist(), strict=True))[
            :MAX_ENTRIES
        ]:
            name = data[block, begins + NAME_AT : begins + NAME_AT + count].tobytes()
            if not {0, ord("/")} & set(name):
                found[int(words[block, begins // 4])][name] = None
    return {number: tuple(name for name in names if name not in (b".", b"..")) for number, names in found.items()}
