"""The journal (jbd2), replayed in memory: what a mount would write to the disk first, laid over the reader as
a patch.

The log is a ring of blocks. A transaction is one or more descriptor blocks, each followed by the blocks that
it names, revoke blocks, and a commit block. Blocks of data that begin with the journal's magic are escaped,
so that whatever has the magic is one of its own: all of them are found at once, and then only their order has
to be proven.

Sources: kernel Documentation/filesystems/ext4/journal.rst; include/linux/jbd2.h; fs/jbd2/recovery.c (v6.12);
fs/ext4/fast_commit.h.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, expand, joined
from virt_bmap.core.checksums import crc32c
from virt_bmap.core.columns import take
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.mapped import Patch, PatchedReader
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.duplicates import Copy, choose
from virt_bmap.formats.filesystems.ext import extents, inodes
from virt_bmap.formats.filesystems.ext.allocator import read_groups
from virt_bmap.formats.filesystems.ext.extents import EXTENT_MAGIC
from virt_bmap.formats.filesystems.ext.superblock import (
    MAGIC,
    OFFSET,
    SIZE,
    SUPER,
    Superblock,
)
from virt_bmap.model.contract import Member
from virt_bmap.model.damage import Damage

JOURNAL_MAGIC = 0xC03B3998
DESCRIPTOR, COMMIT, SUPERBLOCK_V1, SUPERBLOCK_V2, REVOKE = 1, 2, 3, 4, 5
HEADER = struct(12, [
    (0x0, "h_magic", ">u4"),
    (0x4, "h_blocktype", ">u4"),
    (0x8, "h_sequence", ">u4"),
])  # fmt: skip
JOURNAL_SUPER = struct(1024, [
    (0x000, "h_magic", ">u4"),
    (0x004, "h_blocktype", ">u4"),
    (0x00C, "s_blocksize", ">u4"),
    (0x010, "s_maxlen", ">u4"),
    (0x014, "s_first", ">u4"),
    (0x018, "s_sequence", ">u4"),
    (0x01C, "s_start", ">u4"),
    (0x024, "s_feature_compat", ">u4"),
    (0x028, "s_feature_incompat", ">u4"),
    (0x030, "s_uuid", "V16"),
    (0x054, "s_num_fc_blks", ">u4"),
])  # fmt: skip
LARGE, CSUM_V2, CSUM_V3, FAST_COMMIT = 2, 8, 16, 32
ESCAPE, SAME_UUID, DELETED, LAST_TAG = 1, 2, 4, 8
DEFAULT_FC_BLOCKS = 256
FC_TAG_HEAD = 9
CHECKSUM_V1, CRC32_TYPE = 1, 1
CHECKSUM_AT = 0x10
"""h_chksum[0] of a commit block."""

BATCH = 16 << 20
"""Bytes of the log read at a time."""


class Log(NamedTuple):
    """An opened journal: `reader` and the byte offset in it of every block of the log."""

    reader: Reader
    place: Int
    block_size: int
    record: np.void

    def number(self, name: str) -> int:
        """A field of the journal's superblock by its on-disk name."""
        return int(self.record[name])

    @property
    def features(self) -> int:
        return self.number("s_feature_incompat") if self.number("h_blocktype") == SUPERBLOCK_V2 else 0

    @property
    def seed(self) -> int:
        return int(crc32c(np.frombuffer(self.record["s_uuid"].tobytes(), np.uint8)[None, :])[0])

    @property
    def last(self) -> int:
        """The first block after the ring: the end, or where blocks for fast commits begin."""
        fast = (self.number("s_num_fc_blks") or DEFAULT_FC_BLOCKS) if self.features & FAST_COMMIT else 0
        return max(self.number("s_first") + 1, min(self.number("s_maxlen"), len(self.place)) - fast)


class Headers(NamedTuple):
    """The journal's own blocks, in the order of the log: `at` counts blocks from s_start round the ring."""

    at: Int
    kind: Int
    sequence: Int
    data: Bytes

    def take(self, keep: np.ndarray) -> "Headers":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


def replay(reader: Reader, superblock: Superblock, others: Sequence[Reader], damage: Damage) -> Reader:
    """The volume as it is after recovery; the same reader where none is needed, or can be done."""
    if not superblock.has("needs_recovery") or not superblock.has("has_journal"):
        return reader
    log = (
        _external(superblock, others, damage)
        if not superblock.number("s_journal_inum")
        else _internal(reader, superblock, damage)
    )
    if log is None:
        return reader
    try:
        patch = _patch(log, superblock, damage)
    except Corrupt as error:
        at = error.offset if log.reader is reader and error.offset is not None else -1
        damage.say(
            "journal",
            f"needs recovery, but {error}, so that a mount would "
            "fail: the map shows the state before recovery",
            at,
        )
        return reader
    _check_fast_commits(log, damage)
    if not len(patch.offsets):
        return reader
    note = (
        f"needs recovery: {counted(len(patch.offsets), '[block was|blocks were] replayed from the journal')} "
        "in memory, as a mount would do on the disk"
    )
    damage.say("journal-replayed", note)
    return PatchedReader(reader, patch)


def _internal(reader: Reader, superblock: Superblock, damage: Damage) -> Log | None:
    """The journal in an inode of the filesystem; its blocks as the superblock remembers them where the inode
    is damaged."""
    ignored = Damage()  # said when all is read, or of no interest
    groups = read_groups(reader, superblock, ignored)
    number = np.array([superblock.number("s_journal_inum")], np.int64)
    node, _ = inodes.read_inodes(reader, superblock, groups, number, ignored)
    saved = superblock.record["s_jnl_blocks"].astype("<u4").view(np.uint8)[None, : inodes.I_BLOCK_SIZE]
    choices = [(node.block, bool(node.flags[0] & inodes.EXTENTS_FL))] if len(node.number) else []
    if superblock.number("s_jnl_backup_type") == 1:
        choices.append((saved, saved[0, :2].tobytes() == EXTENT_MAGIC.to_bytes(2, "little")))
    for block, by_extents in choices:
        one, none = np.zeros(1, np.int64), EMPTY
        trees = (one, none) if by_extents else (none, one)
        runs, _ = extents.read_blocks_of(reader, superblock, block, trees[0], trees[1], one, ignored)
        runs = runs.take(np.argsort(runs.logical, kind="stable"))
        whole = (
            0 < int(runs.count.sum()) <= superblock.readable
            and (runs.logical == np.append(0, np.cumsum(runs.count)[:-1])).all()
        )
        if whole and (log := _opened(reader, superblock, _unrolled(superblock, runs))):
            return log
    damage.say(
        "journal", "needs recovery, but its journal can't be read: the map shows the state before recovery"
    )
    return None


def _unrolled(superblock: Superblock, runs: extents.Runs) -> Int:
    row, step = expand(runs.count)
    return (runs.start[row] + step) * superblock.block_size


def _external(superblock: Superblock, others: Sequence[Reader], damage: Damage) -> Log | None:
    """The journal on a device of its own, known by its UUID; of several the one that was written last."""
    wanted = superblock.record["s_journal_uuid"].tobytes()
    size = superblock.block_size
    first = 2 if size == 1024 else 1
    logs: list[Log] = []
    for other in others:
        found = record(other.read_clipped(OFFSET, SIZE), SUPER)
        if found["s_magic"] == MAGIC and found["s_uuid"].tobytes() == wanted:
            place = np.arange(first, other.size // size, dtype=np.int64) * size
            # its blocks are numbered from the device's start, its own superblock lies at block 1 (2 of 1 KiB)
            if log := _opened(other, superblock, place, first):
                logs.append(log)
    if logs:
        copies = [
            Copy(Member(at, log.reader.name, log.reader), log.number("s_sequence"), Damage())
            for at, log in enumerate(logs)
        ]
        used = choose(copies, f"the journal {wanted.hex()}", "sequence")
        damage.take(copies[used].damage)
        return logs[used]
    damage.say(
        "journal-missing",
        f"needs recovery, but its journal (a device with UUID {wanted.hex()}) is not among the disks",
    )
    return None


def _opened(reader: Reader, superblock: Superblock, place: Int, shift: int = 0) -> Log | None:
    """The journal whose superblock lies at place[0], if it has one; `shift`: the number of that block in the
    journal's own count."""
    if not len(place):
        return None
    found = record(reader.read(int(place[0]), JOURNAL_SUPER.itemsize), JOURNAL_SUPER)
    good = found["h_magic"] == JOURNAL_MAGIC and found["h_blocktype"] in (SUPERBLOCK_V1, SUPERBLOCK_V2)
    if not good or found["s_blocksize"] != superblock.block_size:
        return None
    place = np.append(np.zeros(shift, np.int64), place)[: max(1, int(found["s_maxlen"]))]
    log = Log(reader, place, superblock.block_size, found)
    return log if 0 < log.number("s_first") < len(place) and log.number("s_start") < len(place) else None


# ---- from the log to a patch -------------------------------------------------------------------------------


def _patch(log: Log, superblock: Superblock, damage: Damage) -> Patch:
    """The last committed content of every block in the log that was not revoked later."""
    size = log.block_size
    none = Patch(EMPTY, np.zeros((0, size), np.uint8))
    if log.number("s_start") == 0:  # the journal was emptied: nothing to do
        return none
    headers, tags = _walk(log)
    if not len(headers.at):
        return none
    target, flags, at, sequence, checksum = tags
    revoked, until = _revoked(log, headers)
    gone = np.zeros(len(target), bool)
    if len(revoked):
        order = np.lexsort((until, revoked))
        last = np.append(revoked[order][1:] != revoked[order][:-1], True)
        revoked, until = revoked[order][last], until[order][last]
        where = np.minimum(np.searchsorted(revoked, target), len(revoked) - 1)
        gone |= (revoked[where] == target) & (until[where] >= sequence)
    order = np.lexsort((at, target))
    keep = order[~gone[order] & (flags[order] & DELETED == 0)]
    newest = np.append(target[keep][1:] != target[keep][:-1], True)[: len(keep)]
    keep = keep[newest]
    inside = target[keep] < superblock.readable
    damage.add(
        "journal",
        "[block|blocks] in the journal [belongs|belong] outside the volume",
        target[keep][~inside] * size,
    )
    keep = keep[inside]
    data = log.reader.read_blocks(_ring(log, at[keep]), size)
    wrong = _wrong_checksums(log, data, sequence[keep], checksum[keep])
    damage.add(
        "journal", "[block|blocks] in the journal [has|have] a wrong checksum", target[keep][wrong] * size
    )
    data = data.copy()
    data[flags[keep] & ESCAPE != 0, :4] = np.frombuffer(JOURNAL_MAGIC.to_bytes(4, "big"), np.uint8)
    return Patch(target[keep][~wrong] * size, data[~wrong])


def _ring(log: Log, at: Int) -> Int:
    """Where blocks of the log lie, in bytes, counted from s_start round the ring."""
    first = log.number("s_first")
    return log.place[first + (log.number("s_start") - first + at) % (log.last - first)]


def _walk(log: Log) -> tuple[Headers, tuple[Int, Int, Int, Int, Int]]:
    """The blocks of all committed transactions, and their tags (target block, flags, place in the log,
    sequence, checksum)."""
    length = log.last - log.number("s_first")
    step = max(1, BATCH // log.block_size)
    parts: list[Headers] = []
    for begin in range(0, length, step):
        at = np.arange(begin, min(begin + step, length), dtype=np.int64)
        data = log.reader.read_blocks(_ring(log, at), log.block_size)
        header = np.ascontiguousarray(data[:, :12]).view(HEADER)[:, 0]
        mine = np.flatnonzero(header["h_magic"] == JOURNAL_MAGIC)
        kind = header["h_blocktype"][mine].astype(np.int64)
        sequence = header["h_sequence"][mine].astype(np.int64)
        parts.append(Headers(at[mine], kind, sequence, data[mine]))
        found = Headers(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("at", "kind", "sequence", "data")
            )
        )
        tags, count = _tags(log, found)
        chain = _chain(log, found, count)
        if chain < len(found.at) or begin + step >= length:
            break
    commits = np.flatnonzero(found.kind[:chain] == COMMIT)
    if log.number("h_blocktype") == SUPERBLOCK_V2 and log.number("s_feature_compat") & CHECKSUM_V1:
        commits = commits[: _good_transactions(log, found, count, commits)]
    done = int(commits[-1]) + 1 if len(commits) else 0
    row, target, flags, checksum, nth = tags
    keep = row < done
    row, nth = row[keep], nth[keep]
    return found.take(np.arange(done)), (
        target[keep], flags[keep], found.at[row] + 1 + nth, found.sequence[row], checksum[keep],
    )  # fmt: skip


def _chain(log: Log, headers: Headers, tags: Int) -> int:
    """How many of the journal's own blocks follow each other as recovery expects: place, sequence, kind,
    checksum."""
    if not len(headers.at):
        return 0
    next_at = headers.at + 1 + tags
    commits = np.cumsum(headers.kind == COMMIT) - (headers.kind == COMMIT)
    good = headers.at == np.append(0, next_at[:-1])
    good &= headers.sequence == (log.number("s_sequence") + commits) & 0xFFFFFFFF
    good &= (headers.kind == DESCRIPTOR) | (headers.kind == COMMIT) | (headers.kind == REVOKE)
    if log.features & (CSUM_V2 | CSUM_V3):
        good &= ~_wrong_headers(log, headers)
    bad = np.flatnonzero(~good)
    return int(bad[0]) if len(bad) else len(good)


def _good_transactions(log: Log, headers: Headers, tags: Int, commits: Int) -> int:
    """How many transactions have the CRC-32 that their commit block gives: of descriptors and logged blocks,
    most significant bit first.

    With asynchronous commits it is all that tells a whole transaction from one of which only the commit block
    was written.
    """
    flip = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]
    begin = 0
    for number, commit in enumerate(commits.tolist()):
        kind, size = headers.data[commit, 12:14].tolist()
        said = int(_big(headers.data[commit : commit + 1], CHECKSUM_AT, 4)[0])
        mine = begin + np.flatnonzero(headers.kind[begin:commit] == DESCRIPTOR)
        begin = commit + 1
        if not (kind or size or said):
            continue  # written by a kernel that gave none
        row, step = expand(1 + tags[mine])
        data = log.reader.read_blocks(_ring(log, headers.at[mine][row] + step), log.block_size)
        crc = (zlib.crc32(flip[data].tobytes()) ^ 0xFFFFFFFF).to_bytes(4, "little")
        if (kind, size, said) != (
            CRC32_TYPE,
            4,
            int.from_bytes(flip[np.frombuffer(crc, np.uint8)].tobytes(), "big"),
        ):
            return number
    return len(commits)


def _wrong_headers(log: Log, headers: Headers) -> Bool:
    """Which descriptor, revoke and commit blocks have a wrong checksum: in the last four bytes, or in
    h_chksum of a commit."""
    data = headers.data.copy()
    at = np.where(headers.kind == COMMIT, CHECKSUM_AT, log.block_size - 4)
    place = at[:, None] + np.arange(4)
    row = np.arange(len(data))[:, None]
    said = data[row, place].view(">u4")[:, 0]
    data[row, place] = 0
    wrong: Bool = crc32c(data, log.seed) != said
    return wrong


def _wrong_checksums(log: Log, data: Bytes, sequence: Int, said: Int) -> Bool:
    """Which logged blocks do not have the checksum that their tag gives."""
    if not log.features & (CSUM_V2 | CSUM_V3) or not len(data):
        return np.zeros(len(data), bool)
    seed = crc32c(sequence.astype(">u4").view(np.uint8).reshape(-1, 4), log.seed)
    is_ = crc32c(data, seed).astype(np.int64)
    wrong: Bool = (is_ if log.features & CSUM_V3 else is_ & 0xFFFF) != said
    return wrong


def _tags(log: Log, headers: Headers) -> tuple[tuple[Int, Int, Int, Int, Int], Int]:
    """Tags of all descriptor blocks as (row of headers, target, flags, checksum, number within the block),
    and their count per header."""
    size = _tag_size(log)
    end = log.block_size - (4 if log.features & (CSUM_V2 | CSUM_V3) else 0)
    row: Int = np.flatnonzero(headers.kind == DESCRIPTOR)
    at, nth = np.full(len(row), HEADER.itemsize, np.int64), 0
    words = headers.data
    found = [(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)]
    while len(row):
        fits = at + size <= end
        row, at = row[fits], at[fits]
        tag = words[row[:, None], at[:, None] + np.arange(size)]
        target = _big(tag, 0, 4)
        if log.features & CSUM_V3:
            flags, checksum = _big(tag, 4, 4), _big(tag, 12, 4)
            high = _big(tag, 8, 4)
        else:
            flags, checksum = _big(tag, 6, 2), _big(tag, 4, 2)
            high = _big(tag, 8, 4) if log.features & LARGE else np.zeros(len(tag), np.int64)
        if log.features & LARGE:
            target = target | (high & 0x7FFFFFFF) << 32
        found.append((row, target, flags, checksum, np.full(len(row), nth, np.int64)))
        more = flags & LAST_TAG == 0
        at = (at + size + np.where(flags & SAME_UUID, 0, 16))[more]
        row, nth = row[more], nth + 1
    tags = joined(found, 5)
    return (tags[0], tags[1], tags[2], tags[3], tags[4]), np.bincount(
        tags[0], minlength=len(headers.at)
    ).astype(np.int64)


def _tag_size(log: Log) -> int:
    if log.features & CSUM_V3:
        return 16
    return 8 + (2 if log.features & CSUM_V2 else 0) + (4 if log.features & LARGE else 0)


def _big(data: Bytes, at: int, size: int) -> Int:
    """A big-endian number of `size` bytes at byte `at` of each row."""
    part = data[:, at : at + size].astype(np.int64)
    value: Int = (part << (8 * np.arange(size - 1, -1, -1))).sum(axis=1)
    return value


def _revoked(log: Log, headers: Headers) -> tuple[Int, Int]:
    """(block, sequence): older content of the block is not to be written."""
    mine = headers.take(headers.kind == REVOKE)
    width = 8 if log.features & LARGE else 4
    limit = log.block_size - (4 if log.features & (CSUM_V2 | CSUM_V3) else 0)
    used = _big(mine.data, 12, 4)
    if (used > limit).any():  # scan_revoke_records(): -EINVAL, and nothing is recovered
        raise Corrupt(
            "a revoke block of the journal has an impossible count",
            int(_ring(log, mine.at[used > limit])[0]),
            "journal",
        )
    used = np.maximum(used, 16)
    row, step = expand((used - 16) // width)
    flat = mine.data.reshape(-1)
    place = row * log.block_size + 16 + step * width
    target = _big(flat[place[:, None] + np.arange(width)], 0, width) if len(row) else EMPTY
    return target, mine.sequence[row]


def _check_fast_commits(log: Log, damage: Damage) -> None:
    """Fast commits are not replayed; say so where there are any that a mount would replay."""
    if not log.features & FAST_COMMIT or log.last + 1 >= len(log.place) or not log.number("s_start"):
        return
    headers, _ = _walk(log)
    expected = (log.number("s_sequence") + int((headers.kind == COMMIT).sum())) & 0xFFFFFFFF
    first = int(log.place[log.last + 1])
    head = np.frombuffer(log.reader.read(first, 12), np.uint8)
    tag, tid = int(head[:2].view("<u2")[0]), int(head[8:12].view("<u4")[0])
    if tag == FC_TAG_HEAD and tid == expected:
        words = (
            "the journal holds fast commits, which are not "
            "replayed: the newest changes are missing from the map"
        )
        damage.say("not-replayed", words, first)
