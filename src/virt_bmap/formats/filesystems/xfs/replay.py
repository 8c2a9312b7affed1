"""Replay of the log in memory, as the kernel does it when it mounts a volume that was not unmounted.

The log is a sequence of records, cut into operations; operations of one transaction make up items (a changed
buffer, a changed inode, ...), and what was committed is applied in order of the commits. Version 5 stamps
metadata with the place in the log where it was last changed, so that what is newer on the disk is left alone.
Nothing is written: the result is a reader with some sectors replaced.

Not done are the kernel's last two steps, which make new changes: finishing operations whose intent is logged
but not their end, and freeing orphans. The first are done to the tables (`intents`); the second stay visible
as deleted inodes, consistently.

The loop runs once for each item of the log; its length is bounded by MAX_ACTIVE.

Sources: fs/xfs/xfs_log_recover.c, xfs_buf_item_recover.c, xfs_inode_item_recover.c, xfs_icreate_item.c,
libxfs/xfs_log_format.h (Linux 6.12).
"""

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bytes, ints, union
from virt_bmap.core.errors import Corrupt, FormatError, Unsupported
from virt_bmap.core.mapped import Patch, PatchedReader
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.intents import BUI, CUI, EFI, RUI, Intents, intents_of
from virt_bmap.formats.filesystems.xfs.journal import BLOCK, Log, find_log
from virt_bmap.formats.filesystems.xfs.records import records
from virt_bmap.formats.filesystems.xfs.superblock import Geometry, read_geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

MAX_ACTIVE = 128 << 20
"""Bytes between tail and head that are replayed; with them the patched sectors stay in memory."""
MAX_PATCH = 256 << 20
"""Bytes of metadata that one log may change: more than a log of MAX_ACTIVE bytes needs, unless it lies."""

# struct xlog_op_header
START, COMMIT, CONTINUE, WAS_CONT, END, UNMOUNT = 1, 2, 4, 8, 16, 32
TRAN_MAGIC = 0x5452414E

LI_INODE = 0x123B
LI_BUF = 0x123C
LI_DQUOT = 0x123D
LI_QUOTAOFF = 0x123E
LI_ICREATE = 0x123F
INTENTS = (EFI, RUI, CUI, BUI, 0x1246, 0x1248, 0x124A, 0x124C, 0x124E)
"""After those of `intents` ATTRI, XMI and those of real-time groups; the number after each says that it is
done."""

BLF_INODE_BUF, BLF_CANCEL = 1, 2
BLF_CHUNK = 128
ILOG_DBROOT, ILOG_ABROOT = 0x008, 0x100
ILOG_DFORK, ILOG_AFORK = 0x00E, 0x1C0

LSN_AND_UUID = {
    b"AB3B": (24, 32), b"AB3C": (24, 32), b"IAB3": (24, 32), b"FIB3": (24, 32), b"RMB3": (24, 32),
    b"R3FC": (24, 32), b"BMA3": (32, 40), b"XAGF": (208, 64), b"XAFL": (24, 8), b"XAGI": (320, 296),
    b"XSLM": (48, 16), b"XDB3": (16, 24), b"XDD3": (16, 24), b"XDF3": (16, 24), b"XFSB": (240, 32),
}  # fmt: skip
"""By magic number: where a buffer keeps the place in the log of its last change, and the filesystem's
UUID."""
DA_MAGICS, DA_LSN_AND_UUID = (b"\x3d\xf1", b"\x3d\xff", b"\x3b\xee", b"\x3e\xbe"), (24, 32)
"""Leaves and nodes of directories and attributes have theirs at byte 8."""

CORE_SIZES = (
    2,
    2,
    1,
    1,
    2,
    4,
    4,
    4,
    2,
    2,
    8,
    8,
    8,
    8,
    8,
    8,
    4,
    4,
    2,
    1,
    1,
    4,
    2,
    2,
    4,
    4,
    4,
    8,
    8,
    8,
    4,
    12,
    8,
    8,
    16,
)
"""Sizes of the fields of struct xfs_log_dinode, which is struct xfs_dinode in the order of bytes of the
machine that wrote it."""
BYTES_NOT_SWAPPED = (12, 16)
NEXT_UNLINKED = 0x60
STAMPS = (0x20, 0x28, 0x30, 0x90)


def _swap_order(legacy_stamps: bool) -> list[int]:
    """For each byte of struct xfs_dinode the byte of struct xfs_log_dinode, written by a little-endian
    machine, that it comes from."""
    order: list[int] = []
    for size in CORE_SIZES:
        at = len(order)
        split = (4, 4) if legacy_stamps and at in STAMPS else (size,)
        for part in split:
            low = len(order)
            order += range(low, low + part) if part in BYTES_NOT_SWAPPED else reversed(range(low, low + part))
    return order


SWAP = {legacy: np.array(_swap_order(legacy)) for legacy in (False, True)}


@dataclass
class Transaction:
    """Operations between a start and a commit; `lsn` is the place of the record in which it starts."""

    lsn: int
    regions: list[bytes] = field(default_factory=list)


class Item(NamedTuple):
    """One logged change: a header and its data."""

    kind: int
    lsn: int
    regions: list[bytes]


Cancelled = Counter[tuple[int, int]]
"""How often a buffer (first sector, sectors) is still to be thrown away in the log; (first sector, 0) counts
those of all sizes."""


class ReplayedLog(NamedTuple):
    """A reader that shows the volume as the log leaves it; what a kernel would then still finish, and how
    much of that is not known here.

    `superblock_only`: all else was in place already.
    """

    reader: Reader
    items: int
    intents: Intents
    unfinished: int
    superblock_only: bool


def replay(reader: Reader, geometry: Geometry, log: Log) -> ReplayedLog:
    """The volume with its log applied.

    Unsupported where that can't be done exactly, Corrupt where the log makes no sense.
    """
    if not geometry.crc:
        raise Unsupported(
            "the log of XFS version 4 is not replayed: its metadata does not say which is newer, log or disk"
        )
    if log.active > MAX_ACTIVE:
        raise Unsupported(f"the log has {log.active:,} bytes to replay; at most {MAX_ACTIVE:,} are replayed")
    items = [item for transaction in _committed(log) for item in _in_order(_items(transaction))]
    known = {LI_INODE, LI_BUF, LI_DQUOT, LI_QUOTAOFF, LI_ICREATE, *INTENTS, *(kind + 1 for kind in INTENTS)}
    if strange := {item.kind for item in items} - known:
        raise Unsupported(f"the log holds items of type {min(strange):#x}, which are not known")
    geometry = _grown(reader, geometry, items)
    memory = _Memory(reader, geometry, items)
    cancelled: Cancelled = Counter()
    for item in items:
        if item.kind == LI_BUF and _buffer(item)[2] & BLF_CANCEL:
            cancelled.update(_cancels(item))
    for item in items:
        if item.kind == LI_BUF:
            _replay_buffer(memory, geometry, item, cancelled)
        elif item.kind == LI_INODE:
            _replay_inode(memory, geometry, item, cancelled)
        elif item.kind == LI_ICREATE:
            _replay_icreate(memory, geometry, item, cancelled)
    left = _unfinished(items)
    superblock_only = all(item.kind == LI_BUF and _buffer(item)[0] == 0 for item in items)
    return ReplayedLog(memory.reader(), len(items), *intents_of(geometry, left), superblock_only)


def _unfinished(items: list[Item]) -> list[tuple[int, bytes]]:
    """(type, data) of intents whose end is not in the log. Their numbers are addresses in the kernel's
    memory, and come again."""
    pending: dict[tuple[int, int], bytes] = {}
    for item in items:
        if item.kind in INTENTS:
            pending[item.kind, _unpack("<Q", item.regions[0], 8)[0]] = item.regions[0]
        elif item.kind - 1 in INTENTS:
            pending.pop((item.kind - 1, _unpack("<Q", item.regions[0], 8)[0]), None)
    return [(kind, data) for (kind, _), data in pending.items()]


def _grown(reader: Reader, geometry: Geometry, items: list[Item]) -> Geometry:
    """The geometry by the superblock as the log leaves it: a filesystem that was just grown has groups of
    which the one on the disk does not know."""
    mine = [item for item in items if item.kind == LI_BUF and _buffer(item)[0] == 0]
    memory = _Memory(reader, geometry, mine)
    for item in mine:
        _replay_buffer(memory, geometry, item, Counter())
    return read_geometry(memory.reader()) if mine else geometry


# ---- operations, transactions, items -----------------------------------------------------------------------


def _unpack(form: str, data: bytes, at: int = 0) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, data, at)
    except struct.error:
        raise Corrupt(f"XFS log: an item of {len(data)} bytes is too short", code="journal") from None


def _committed(log: Log) -> Iterator[Transaction]:
    """Transactions in the order of their commits."""
    open_: dict[int, Transaction] = {}
    for lsn, operations, body in records(log):
        at = 0
        for _ in range(operations):  # what lies after them in the record is not defined
            tid, length, _, flags = _unpack(">IIBB", body, at)
            region = body[at + 12 : at + 12 + length]
            if len(region) < length:
                raise Corrupt(
                    f"XFS log: an operation in the record with LSN {lsn:#x} is longer than the record",
                    code="journal",
                )
            at += 12 + length
            if flags & START:
                open_[tid] = Transaction(lsn)
            elif tid not in open_:  # its start lies before the tail: it is in place
                continue
            elif flags & COMMIT:
                yield open_.pop(tid)
            elif flags & UNMOUNT:
                del open_[tid]
            elif flags & WAS_CONT and open_[tid].regions:
                open_[tid].regions[-1] += region
            else:
                open_[tid].regions.append(region)


def _items(transaction: Transaction) -> list[Item]:
    """The first region is the transaction's header; each item's first region says how many it has."""
    regions = transaction.regions
    if regions and _unpack("<I", regions[0])[0] != TRAN_MAGIC:
        raise Corrupt(f"XFS log: a transaction at LSN {transaction.lsn:#x} lacks its header", code="journal")
    items, at = [], 1
    while at < len(regions):
        kind, size = _unpack("<HH", regions[at])
        if not 0 < size <= len(regions) - at:
            raise Corrupt(
                f"XFS log: an item of type {kind:#x} at LSN {transaction.lsn:#x} has {size} regions",
                code="journal",
            )
        items.append(Item(kind, transaction.lsn, regions[at : at + size]))
        at += size
    return items


def _in_order(items: list[Item]) -> list[Item]:
    """As xlog_recover_reorder_trans: buffers and new inode chunks, other items, buffers of inodes, cancelled
    buffers."""

    def rank(item: Item) -> int:
        if item.kind == LI_ICREATE:
            return 0
        if item.kind != LI_BUF:
            return 1
        flags = _buffer(item)[2]
        return 3 if flags & BLF_CANCEL else 2 if flags & BLF_INODE_BUF else 0

    return sorted(items, key=rank)


def _buffer(item: Item) -> tuple[int, int, int]:
    """struct xfs_buf_log_format: (first sector, sectors, flags)."""
    flags, length, sector = _unpack("<HHq", item.regions[0], 4)
    return sector, length, flags


def _cancels(item: Item) -> list[tuple[int, int]]:
    sector, count, _ = _buffer(item)
    return [(sector, count), (sector, 0)]


# ---- the sectors that change -------------------------------------------------------------------------------


class _Memory:
    """All sectors that the log may change, read once."""

    def __init__(self, reader: Reader, geometry: Geometry, items: list[Item]) -> None:
        ranges = [_range(geometry, item) for item in items if item.kind in (LI_BUF, LI_INODE, LI_ICREATE)]
        for low, size in ranges:
            if not 0 <= low <= geometry.limit - size or size < 0:
                raise Corrupt(
                    f"XFS log: an item changes bytes {low:#x}+{size:#x}, outside the volume", code="journal"
                )
        start, length = ints([low for low, _ in ranges]), ints([size for _, size in ranges])
        first, last = start // BLOCK * BLOCK, -(-(start + length) // BLOCK) * BLOCK
        self._starts, ends = union(first, last)
        if int((ends - self._starts).sum()) > MAX_PATCH:
            raise Corrupt(f"XFS log: its items change more than {MAX_PATCH} bytes", code="journal")
        self._base = reader
        self._ends = ends
        self._places = np.cumsum(ends - self._starts) - (ends - self._starts)
        self._first, self._place = self._starts.tolist(), self._places.tolist()
        self.data = bytearray(reader.read_ranges(self._starts, ends - self._starts).tobytes())

    def at(self, offset: int) -> int:
        """Where a byte of the volume lies in `data`."""
        row = bisect_right(self._first, offset) - 1
        return int(self._place[row] + offset - self._first[row])

    def get(self, offset: int, length: int) -> bytes:
        """Bytes of the volume as they are now."""
        at = self.at(offset)
        return bytes(self.data[at : at + length])

    def put(self, offset: int, data: bytes, limit: int) -> None:
        """Change bytes of the volume; `limit` is the end of the buffer or inode that they must lie in."""
        if offset + len(data) > limit:
            raise Corrupt(
                f"XFS log: an item writes {len(data)} bytes at {offset:#x}, beyond the end of its buffer",
                code="journal",
            )
        at = self.at(offset)
        self.data[at : at + len(data)] = data

    def reader(self) -> Reader:
        """The volume with these sectors in place."""
        blocks: Bytes = np.frombuffer(bytes(self.data), np.uint8).reshape(-1, BLOCK)
        row = np.repeat(np.arange(len(self._starts)), (self._ends - self._starts) // BLOCK)
        offsets = np.arange(len(blocks)) * BLOCK - self._places[row] + self._starts[row]
        return PatchedReader(self._base, Patch(offsets, blocks)) if len(blocks) else self._base


def _range(geometry: Geometry, item: Item) -> tuple[int, int]:
    """(start, length) in bytes of what an item may change."""
    if item.kind == LI_BUF:
        sector, count, _ = _buffer(item)
        return sector * BLOCK, count * BLOCK
    if item.kind == LI_INODE:
        sector, _, inside = _unpack("<qii", item.regions[0], 40)
        return sector * BLOCK + inside, geometry.inode_size
    group, block, _, _, length = _unpack(">IIIII", item.regions[0], 4)
    return (group * geometry.agblocks + block) * geometry.block_size, length * geometry.block_size


# ---- items -------------------------------------------------------------------------------------------------


def _replay_buffer(memory: _Memory, geometry: Geometry, item: Item, cancelled: Cancelled) -> None:
    """Copy the logged pieces of a buffer, unless it was thrown away later or is newer on the disk."""
    sector, count, flags = _buffer(item)
    if flags & BLF_CANCEL:
        cancelled.subtract(_cancels(item))
        return
    if cancelled[sector, count] > 0:
        return
    start, end = sector * BLOCK, (sector + count) * BLOCK
    newer = not flags & BLF_INODE_BUF and _lsn(memory.get(start, min(end - start, 512)), geometry) >= item.lsn
    if newer:
        return
    for at, piece in _pieces(item):
        if flags & BLF_INODE_BUF:
            _unlinked(memory, geometry, start, at, piece, end)
        else:
            memory.put(start + at, piece, end)


def _lsn(head: bytes, geometry: Geometry) -> int:
    """Where in the log this buffer, as it is on the disk, was changed last; -1 where it is older than
    anything or does not say."""
    where = DA_LSN_AND_UUID if head[8:10] in DA_MAGICS else LSN_AND_UUID.get(head[:4])
    if where is None:
        return -1
    uuid = geometry.uuid if head[:4] == b"XFSB" else geometry.meta_uuid
    if head[where[1] : where[1] + 16] != uuid:
        return -1
    lsn = int.from_bytes(head[where[0] : where[0] + 8], "big")
    return lsn if 0 < lsn < 1 << 63 else -1


def _pieces(item: Item) -> Iterator[tuple[int, bytes]]:
    """(offset in the buffer, bytes) of what was logged: one region for each run of bits of the map, a bit for
    128 bytes."""
    (words,) = _unpack("<I", item.regions[0], 16)
    bits = int.from_bytes(item.regions[0][20 : 20 + 4 * words], "little")
    at = 0
    for region in item.regions[1:]:
        if not bits >> at:
            raise Corrupt("XFS log: a buffer item has more data than its map has bits", code="journal")
        rest = bits >> at
        at += (rest & -rest).bit_length() - 1
        rest = bits >> at
        run = (~rest & (rest + 1)).bit_length() - 1
        run = min(run, len(region) // BLF_CHUNK)
        yield at * BLF_CHUNK, region[: run * BLF_CHUNK]
        at += run


def _unlinked(memory: _Memory, geometry: Geometry, start: int, at: int, piece: bytes, end: int) -> None:
    """Of a buffer of inodes only the links between orphans are taken: what else changed is in inode items."""
    size = geometry.inode_size
    for field_at in range(
        (at - NEXT_UNLINKED + size - 1) // size * size + NEXT_UNLINKED, at + len(piece) - 3, size
    ):
        if field_at >= at:
            memory.put(start + field_at, piece[field_at - at : field_at - at + 4], end)


def _replay_inode(memory: _Memory, geometry: Geometry, item: Item, cancelled: Cancelled) -> None:
    """struct xfs_inode_log_format, the core, and what was logged of the forks."""
    (fields,) = _unpack("<I", item.regions[0], 4)
    sector, length, _ = _unpack("<qii", item.regions[0], 40)
    if cancelled[sector, length] > 0 or len(item.regions) < 2:
        return
    start, size = _range(geometry, item)
    now = memory.get(start, size)
    lsn = int.from_bytes(now[0x70:0x78], "big")
    if now[:2] == ondisk.DINODE_MAGIC and 0 < lsn < 1 << 63 and lsn > item.lsn:
        return
    core = item.regions[1]
    if len(core) < ondisk.DINODE3.itemsize or core[:2] != ondisk.DINODE_MAGIC[::-1]:
        raise Corrupt(f"XFS log: an inode item for byte {start:#x} lacks the inode", start, "journal")
    legacy = not _unpack("<Q", core, 0x78)[0] & ondisk.DIFLAG2_BIGTIME
    swapped = bytearray(np.frombuffer(core, np.uint8)[SWAP[legacy]].tobytes())
    swapped[NEXT_UNLINKED : NEXT_UNLINKED + 4] = now[NEXT_UNLINKED : NEXT_UNLINKED + 4]
    memory.put(start, bytes(swapped), start + size)
    literal, forkoff = start + ondisk.DINODE3.itemsize, swapped[0x52] * 8
    middle = literal + forkoff if forkoff else start + size
    regions = iter(item.regions[2:])
    for which, root, low, high in (
        (ILOG_DFORK, ILOG_DBROOT, literal, middle),
        (ILOG_AFORK, ILOG_ABROOT, middle, start + size),
    ):
        if fields & which:
            region = next(regions, b"")
            memory.put(
                low, _root(region, high - low) if fields & root else region[: max(0, high - low)], high
            )


def _root(block: bytes, room: int) -> bytes:
    """The root of a fork's B-tree: logged as a whole block with its header, kept in the inode without
    (xfs_bmbt_to_bmdr)."""
    level, count = _unpack(">HH", block, 4)
    header = ondisk.LONG_CRC_HEADER
    most, fit = (len(block) - header) // 16, (room - 4) // 16
    if count > most or count > fit:
        raise Corrupt(
            f"XFS log: the root of a bmbt holds {plural(count, 'record')}, but has room for {min(most, fit)}",
            code="journal",
        )
    keys = block[header : header + 8 * count].ljust(8 * fit, b"\0")
    pointers = block[header + 8 * most : header + 8 * most + 8 * count].ljust(8 * fit, b"\0")
    return struct.pack(">HH", level, count) + keys + pointers


def _replay_icreate(memory: _Memory, geometry: Geometry, item: Item, cancelled: Cancelled) -> None:
    """A new chunk of inodes: each gets its number and is free (xfs_ialloc_inode_init)."""
    group, block, count, size, _, generation = _unpack(">IIIIII", item.regions[0], 4)
    start, room = _range(geometry, item)
    most = max(ondisk.INODES_PER_CHUNK, 1 << geometry.inopblog)
    if size != geometry.inode_size or count > most or count * size > room:
        raise Corrupt(
            f"XFS log: a new inode chunk of {plural(count, 'inode')} of {size} bytes", start, "journal"
        )
    if any(cancelled[at // BLOCK, 0] > 0 for at in range(start, start + count * size, geometry.block_size)):
        return
    first = (group << geometry.agi_bits) | (block << geometry.inopblog)
    for number in range(count):
        inode = bytearray(size)
        inode[0:2], inode[4], inode[0x5C:0x60] = ondisk.DINODE_MAGIC, 3, generation.to_bytes(4, "big")
        inode[NEXT_UNLINKED : NEXT_UNLINKED + 4] = b"\xff" * 4
        inode[0x98:0xA0], inode[0xA0:0xB0] = (first + number).to_bytes(8, "big"), geometry.meta_uuid
        memory.put(start + number * size, bytes(inode), start + room)


def recovered(
    reader: Reader, geometry: Geometry, others: Sequence[Reader], damage: Damage
) -> tuple[Reader, str, Intents]:
    """The volume as it is once its log is replayed, its state, and what is then still to be finished."""
    try:
        log = find_log(reader, geometry, others, damage)
    except Corrupt as error:
        damage.say("journal", f"the log can't be followed: {error}", error.offset)
        return reader, tables.NEEDS_RECOVERY, Intents()
    if log is None:
        damage.say(
            "journal-missing",
            "the log is on another device, which is not among "
            "the disks: it may hold changes that are not in place",
        )
        return reader, tables.NEEDS_RECOVERY, Intents()
    if log.clean:
        return reader, tables.CLEAN, Intents()
    from virt_bmap.formats.filesystems.xfs.replay import (
        replay,  # most volumes were unmounted, and do without it
    )

    try:
        done = replay(reader, geometry, log)
    except FormatError as error:
        damage.say("not-replayed", f"a log with {log.active:,} bytes of changes was not replayed: {error}")
        return reader, tables.NEEDS_RECOVERY, Intents()
    # xfs_fs_freeze empties the log, then logs the superblock so that orphans are freed after a crash
    if done.superblock_only:
        return done.reader, tables.FROZEN, Intents()
    damage.add(
        "journal-replayed",
        "[change|changes] of the log [is|are] applied in memory; the image itself is unchanged",
        count=done.items,
    )
    if done.unfinished:
        text = (
            "[operation|operations] of the log [was|were] begun and not ended: a kernel would complete "
            "[it|them], and what [it frees|they free] is still shown as it was"
        )
        damage.add("not-replayed", text, count=done.unfinished)
    return done.reader, tables.RECOVERED, done.intents
