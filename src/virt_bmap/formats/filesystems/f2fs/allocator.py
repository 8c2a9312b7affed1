"""The checkpoint and the two tables that it selects: NAT (where nodes lie) and SIT (which blocks are valid).

Each block of a table has two places, and a bit in the checkpoint says which of them counts; the newest
entries may lie in journals inside the checkpoint's summary blocks.

Sources: Linux fs/f2fs/checkpoint.c (validate_checkpoint, get_valid_checkpoint, get_orphan_inodes), f2fs.h
(__bitmap_ptr), segment.c (read_compacted_summaries, read_normal_summaries, build_sit_entries), segment.h
(current_sit_addr), node.h (current_nat_addr), node.c.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Bytes, Int, complement, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, records, widen
from virt_bmap.core.stored import held
from virt_bmap.formats.filesystems.f2fs.ondisk import (
    BLOCK,
    CHECKPOINT,
    NAT_ENTRY,
    NAT_JOURNAL,
    NAT_PER_BLOCK,
    NEW_ADDR,
    NULL_ADDR,
    ORPHANS,
    SEGMENT,
    SIT_ENTRY,
    SIT_JOURNAL,
    SIT_PER_BLOCK,
    Superblock,
    crc,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE

UMOUNT, ORPHAN_PRESENT, COMPACT_SUM, ERROR, FSCK, FASTBOOT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
CRC_RECOVERY, NOCRC_RECOVERY, LARGE_NAT_BITMAP = 0x40, 0x200, 0x400
BITMAPS = 192
"""Where the version bitmaps begin, and the least place of the checksum."""
SUM_JOURNAL, SUM_JOURNAL_SIZE = 3584, 507
"""A journal in a summary block lies after 512 entries of 7 bytes, and has 507 bytes; two of them begin a
compact summary."""
HOT_DATA, COLD_DATA = 0, 2
CURSEG_DATA, CURSEG_ALL = 3, 6
COUNT = 0x3FF
"""The bits of vblocks that count; above them is the type of the segment's log."""
BATCH = 32 << 20
"""Bytes of tables or nodes read at a time."""


class Checkpoint(NamedTuple):
    """The newer valid checkpoint; `start` is its first block.

    Bitmaps hold a bit for each block of NAT or SIT, most significant first.
    """

    start: int
    record: np.void
    flags: int
    blocks: int
    version: int
    checksum: int
    nat_bitmap: Bytes
    sit_bitmap: Bytes

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)


def read_checkpoint(volume: Superblock, damage: Damage) -> Checkpoint:
    """The newer of both packs. Raises Corrupt where neither is valid."""
    found = []
    for start in (volume.cp, volume.cp + SEGMENT):
        try:
            found.append(_pack(volume, start))
        except Corrupt as error:
            # of a filesystem that never wrote a second checkpoint, this pack is empty or a leftover
            damage.add(
                "copy-used",
                f"checkpoint pack is not valid, the other one is used: {error}",
                start * BLOCK,
                severity=NOTE,
            )
    if not found:
        raise Corrupt(
            f"{volume.reader.name}: F2FS has no valid checkpoint at byte {volume.cp * BLOCK:#x} or "
            f"{(volume.cp + SEGMENT) * BLOCK:#x}",
            volume.cp * BLOCK,
            "superblock",
        )
    return max(found, key=lambda pack: pack.version)


def _pack(volume: Superblock, start: int) -> Checkpoint:
    where = f"checkpoint at byte {start * BLOCK:#x}"
    payload = volume.number("cp_payload")
    data = volume.reader.read(start * BLOCK, BLOCK * (1 + payload))
    head = _sound(data[:BLOCK], where)
    count, first = int(head["cp_pack_total_block_count"]), int(head["cp_pack_start_sum"])
    if not 2 + payload <= count <= SEGMENT or not 1 + payload <= first < count:
        raise Corrupt(f"{where} has {plural(count, 'block')} and summaries at {first}", start * BLOCK)
    last = _sound(volume.reader.read((start + count - 1) * BLOCK, BLOCK), f"end of the {where}")
    if last["checkpoint_ver"] != head["checkpoint_ver"]:
        raise Corrupt(
            f"{where} has version {int(head['checkpoint_ver']):#x}, but ends with "
            f"{int(last['checkpoint_ver']):#x}",
            start * BLOCK,
        )
    flags = int(head["ckpt_flags"])
    sizes = [int(head[f"{table}_ver_bitmap_bytesize"]) for table in ("sit", "nat")]
    need = [volume.number(f"segment_count_{table}") // 2 * SEGMENT // 8 for table in ("sit", "nat")]
    if sizes != need:
        raise Corrupt(
            f"{where} has version bitmaps of {sizes[0]} and {sizes[1]} bytes, not of {need[0]} and {need[1]}",
            start * BLOCK,
        )
    sit, nat = BITMAPS, BITMAPS + sizes[0]
    if flags & LARGE_NAT_BITMAP:
        nat, sit = BITMAPS + 4, BITMAPS + 4 + sizes[1]
    elif payload:
        nat, sit = BITMAPS, BLOCK
    if max(sit + sizes[0], nat + sizes[1]) > len(data):
        raise Corrupt(f"{where} has no room for its version bitmaps", start * BLOCK)
    bits = np.frombuffer(data, np.uint8)
    nat_bitmap, sit_bitmap = bits[nat : nat + sizes[1]], bits[sit : sit + sizes[0]]
    return Checkpoint(
        start, head, flags, count, int(head["checkpoint_ver"]), _said(data, head), nat_bitmap, sit_bitmap
    )


def _sound(data: bytes, where: str) -> np.void:
    """The head of a block of a checkpoint, where its checksum is right."""
    head = record(data, CHECKPOINT)
    at = int(head["checksum_offset"])
    if not BITMAPS <= at <= BLOCK - 4:
        raise Corrupt(f"{where} has checksum_offset {at}")
    value = crc(data[:at])
    if at < BLOCK - 4:
        value = crc(data[at + 4 :], value)
    if value != _said(data, head):
        raise Corrupt(f"{where} has a wrong checksum")
    return head


def _said(data: bytes, head: np.void) -> int:
    at = int(head["checksum_offset"])
    return int.from_bytes(data[at : at + 4], "little")


def read_orphans(volume: Superblock, checkpoint: Checkpoint, damage: Damage) -> Int:
    """Inodes that were deleted while open: recovery frees them."""
    first = 1 + volume.number("cp_payload")
    count = int(checkpoint.record["cp_pack_start_sum"]) - first
    if not checkpoint.has(ORPHAN_PRESENT) or count <= 0:
        return EMPTY
    place = (checkpoint.start + first + np.arange(count)) * BLOCK
    blocks = records(volume.reader.read_blocks(place, BLOCK), ORPHANS)
    entries = widen(blocks["entry_count"], "entry_count")
    good = damage.check(
        entries <= 1020,
        "orphan-list",
        "[block of orphan inodes claims more than it "
        "holds|blocks of orphan inodes claim more than they hold]",
        place,
    )
    rows, columns = np.nonzero(np.arange(1020) < np.where(good, entries, 0)[:, None])
    found: Int = np.unique(widen(blocks["ino"][rows, columns], "ino"))
    return found


def read_journals(
    volume: Superblock, checkpoint: Checkpoint, damage: Damage
) -> tuple[np.ndarray, np.ndarray]:
    """(NAT_JOURNAL, SIT_JOURNAL) records: entries that are newer than the tables."""
    first = checkpoint.start + int(checkpoint.record["cp_pack_start_sum"])
    if checkpoint.has(COMPACT_SUM):
        block = volume.reader.read(first * BLOCK, BLOCK)
        both = [(first * BLOCK + low, block[low : low + SUM_JOURNAL_SIZE]) for low in (0, SUM_JOURNAL_SIZE)]
    else:
        logs = CURSEG_ALL if checkpoint.has(UMOUNT | FASTBOOT) else CURSEG_DATA
        base = max(checkpoint.start, checkpoint.start + checkpoint.blocks - logs - 1)
        places = [(base + kind) * BLOCK + SUM_JOURNAL for kind in (HOT_DATA, COLD_DATA)]
        both = [(place, volume.reader.read(place, SUM_JOURNAL_SIZE)) for place in places]
    found = []
    for (place, data), dtype in zip(both, (NAT_JOURNAL, SIT_JOURNAL), strict=True):
        count = int.from_bytes(data[:2], "little")
        room = (SUM_JOURNAL_SIZE - 2) // dtype.itemsize
        if count > room:
            damage.add(
                "allocator",
                "journal in a summary block claims "
                f"{plural(count, 'entry', 'entries')}, but has room for {room}",
                place,
            )
        found.append(np.frombuffer(data, dtype, min(count, room), 2))
    return found[0], found[1]


# ---- NAT ---------------------------------------------------------------------------------------------------


class Nat(NamedTuple):
    """Where nodes lie: sorted node numbers, the inode that each belongs to, and its block."""

    nid: Int
    ino: Int
    block: Int

    def find(self, nid: Int) -> Int:
        """The row of each node number, -1 where the table has none."""
        if not len(self.nid):
            return np.full(len(nid), -1, np.int64)
        at = np.minimum(np.searchsorted(self.nid, nid), len(self.nid) - 1)
        return np.where(self.nid[at] == nid, at, -1)

    def with_inodes(self, ino: Int, block: Int) -> "Nat":
        """The table with these inodes in these blocks; their numbers are distinct."""
        rest = ~np.isin(self.nid, ino)
        nid = np.append(self.nid[rest], ino)
        order = np.argsort(nid, kind="stable")
        return Nat(
            nid[order], np.append(self.ino[rest], ino)[order], np.append(self.block[rest], block)[order]
        )


def read_nat(volume: Superblock, checkpoint: Checkpoint, journal: np.ndarray, damage: Damage) -> Nat:
    """All nodes that are in use and lie in the main area, but those of the inodes that have no blocks
    (node_ino, meta_ino)."""
    chosen = np.unpackbits(checkpoint.nat_bitmap).astype(np.int64)
    number = np.arange(len(chosen), dtype=np.int64)
    place = volume.nat + number // SEGMENT * 2 * SEGMENT + number % SEGMENT + chosen * SEGMENT
    parts = [
        (
            widen(journal["nid"], "nid"),
            widen(journal["ino"], "ino"),
            widen(journal["block_addr"], "block_addr"),
        )
    ]
    for low, data in _blocks(volume, place):
        entries = (
            np.ascontiguousarray(data[:, : NAT_PER_BLOCK * NAT_ENTRY.itemsize]).reshape(-1).view(NAT_ENTRY)
        )
        used = np.flatnonzero(entries["block_addr"])
        some = entries[used]
        parts.append(
            (used + low * NAT_PER_BLOCK, widen(some["ino"], "ino"), widen(some["block_addr"], "block_addr"))
        )
    nid, ino, block = (np.concatenate([part[i] for part in parts]) for i in range(3))
    last = len(journal)
    newest = np.full(len(nid), True)
    newest[last:] = ~np.isin(nid[last:], nid[:last])
    order = np.flatnonzero(newest)
    order = order[np.argsort(nid[order], kind="stable")]
    # of two journal entries the later one counts
    order = order[np.append(nid[order][1:] != nid[order][:-1], True)[: len(order)]]
    system = (nid == volume.number("node_ino")) | (nid == volume.number("meta_ino")) | (nid == 0)
    order = order[~system[order] & (block[order] != NULL_ADDR) & (block[order] != NEW_ADDR)]
    nid, ino, block = nid[order], ino[order], block[order]
    where = np.full(len(block), volume.nat * BLOCK)
    keep = np.flatnonzero(
        damage.check(
            volume.inside(block), "tree", "[node lies|nodes lie] outside the main area, by the NAT", where
        )
    )
    return Nat(nid[keep], ino[keep], block[keep])


def _blocks(volume: Superblock, place: Int) -> Iterator[tuple[int, Bytes]]:
    """(number of the first, blocks) of a table in batches; blocks in holes are left out, whose entries are
    not in use."""
    for at, data in held(volume.reader, place * BLOCK, np.full(len(place), BLOCK), BATCH):
        yield at // BLOCK, data.reshape(-1, BLOCK)


# ---- SIT ---------------------------------------------------------------------------------------------------


class Sit(NamedTuple):
    """Which blocks of the main area are valid: the segments that have any, sorted, and their bitmaps of 64
    bytes, most significant bit first."""

    segment: Int
    valid: Bytes

    @property
    def blocks(self) -> int:
        """How many blocks are valid."""
        return int(np.bitwise_count(self.valid).sum(dtype=np.int64))

    def free(self, volume: Superblock) -> tuple[Int, Int]:
        """(starts, ends) in blocks of what nobody needs."""
        empty = complement(self.segment, self.segment + 1, 0, volume.main_segments)
        starts, ends = [empty[0] * SEGMENT], [empty[1] * SEGMENT]
        step = BATCH // SEGMENT
        for low in range(0, len(self.segment), step):
            unused = np.unpackbits(self.valid[low : low + step], axis=1) == 0
            around = np.pad(unused, ((0, 0), (1, 1)))
            for found, neighbour, shift in ((starts, around[:, :-2], 0), (ends, around[:, 2:], 1)):
                row, column = np.nonzero(unused & ~neighbour)
                found.append(self.segment[low + row] * SEGMENT + column + shift)
        first, behind = union(np.concatenate(starts), np.concatenate(ends))
        return first + volume.main, behind + volume.main


def read_sit(volume: Superblock, checkpoint: Checkpoint, journal: np.ndarray, damage: Damage) -> Sit:
    """The SIT, with the journal's entries in place."""
    count = -(-volume.main_segments // SIT_PER_BLOCK)
    chosen = np.unpackbits(checkpoint.sit_bitmap, count=count).astype(np.int64)
    place = volume.sit + np.arange(count) + chosen * (volume.number("segment_count_sit") // 2 * SEGMENT)
    newer = widen(journal["segno"], "segno")
    where = np.full(len(newer), checkpoint.start * BLOCK)
    damage.check(
        newer < volume.main_segments,
        "allocator",
        "[entry|entries] of the SIT's journal [is for a segment "
        "that doesn't|are for segments that don't] exist",
        where,
    )
    parts = [(newer, journal["valid_map"], journal["vblocks"])]
    for low, data in _blocks(volume, place):
        entries = (
            np.ascontiguousarray(data[:, : SIT_PER_BLOCK * SIT_ENTRY.itemsize]).reshape(-1).view(SIT_ENTRY)
        )
        number = low * SIT_PER_BLOCK + np.arange(len(entries))
        used = np.flatnonzero(
            ((entries["vblocks"] & COUNT != 0) | entries["valid_map"].any(axis=1)) & ~np.isin(number, newer)
        )
        parts.append((number[used], entries["valid_map"][used], entries["vblocks"][used]))
    segment, valid, claimed = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order = np.argsort(segment, kind="stable")
    order = order[
        (segment[order] < volume.main_segments) & np.append(np.diff(segment[order]) != 0, True)[: len(order)]
    ]
    segment, valid, claimed = segment[order], valid[order], claimed[order] & COUNT
    damage.check(
        np.bitwise_count(valid).sum(axis=1) == claimed,
        "allocator",
        "[segment does not have as many valid blocks as its SIT entry says|segments do not have as many "
        "valid blocks as their SIT entries say]",
        (volume.main + segment * SEGMENT) * BLOCK,
    )
    return Sit(segment, valid)
