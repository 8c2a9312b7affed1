"""The log: where it lies, where its head and tail are, and whether the volume needs recovery.

The log is a ring of 512-byte blocks. The first word of every block is the number of the round ("cycle") in
which it was written, but in a record's first block, where it is a magic number and the cycle follows. So the
head is where the cycle number drops, which a search finds in a few reads of some hundred blocks. The last
record before the head says where the tail is; if that record is nothing but an unmount mark, nothing needs to
be recovered.

Sources: fs/xfs/xfs_log_recover.c (xlog_find_head, xlog_find_tail), fs/xfs/libxfs/xfs_log_format.h (Linux
6.12).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bool, Bytes, Int
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import INT64_MAX, record, records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.duplicates import Copy, choose
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model.contract import Member
from virt_bmap.model.damage import Damage

BLOCK = 512
"""BBSIZE: the log's unit, whatever the sector size."""
HEADER_MAGIC = 0xFEEDBABE
CYCLE_DATA = 64
"""Blocks whose first words one header keeps: of the 32 KiB that follow it."""
FANOUT = 256
"""Blocks read in one round of the search: the largest log, 2 GiB, takes three rounds."""
MAX_IN_FLIGHT = 8 * 256 * 1024 // BLOCK
"""XLOG_TOTAL_REC_SHIFT: eight buffers of 256 KiB may be written at a time, in any order, so holes can only
lie so far after the head."""
UNMOUNT_TRANS = 0x20

RECORD = struct(0x148, [
    (0x000, "h_magicno", ">u4"),
    (0x004, "h_cycle", ">u4"),
    (0x008, "h_version", ">u4"),
    (0x00C, "h_len", ">u4"),
    (0x010, "h_lsn", ">u8"),
    (0x018, "h_tail_lsn", ">u8"),
    (0x020, "h_crc", "<u4"),
    (0x028, "h_num_logops", ">u4"),
    (0x02C, "h_cycle_data", ">u4", (CYCLE_DATA,)),
    (0x12C, "h_fmt", ">u4"),
    (0x130, "h_fs_uuid", "u1", (16,)),
    (0x140, "h_size", ">u4"),
])  # fmt: skip
OP_FLAGS = 9
"""oh_flags in struct xlog_op_header."""


class Log(NamedTuple):
    """A log of `blocks` blocks at `offset` of `reader`.

    Work between `tail` and `head` (block numbers in the ring) is not in place yet.

    `clean`: nothing needs to be recovered. `lsn`: that of its last record, by which copies are told apart.
    """

    reader: Reader
    offset: int
    blocks: int
    head: int
    tail: int
    clean: bool
    lsn: int = 0

    @property
    def active(self) -> int:
        """Bytes between tail and head."""
        return (self.head - self.tail) % self.blocks * BLOCK

    def place(self, at: int) -> int:
        """The byte at which the `at`th block after the tail lies."""
        return self.offset + (self.tail + at) % self.blocks * BLOCK


def find_log(reader: Reader, geometry: Geometry, others: Sequence[Reader], damage: Damage) -> Log | None:
    """The log with its head and tail; None where it is external and none of `others` is it, and of several
    the one that was written last.

    Corrupt where it makes no sense.
    """
    if geometry.logstart:
        start = np.array([geometry.logstart])
        if not geometry.holds(start, np.array([geometry.logblocks])).all():
            raise Corrupt(
                f"XFS superblock: sb_logstart at byte 0x30 is {geometry.logstart}, "
                f"{plural(geometry.logblocks, 'block')} from there are not on the volume",
                0x30,
            )
        return _measure(
            reader, int(geometry.block_offset(start)[0]), geometry.logblocks * geometry.block_size // BLOCK
        )
    logs = [
        _measure(other, 0, min(geometry.logblocks * geometry.block_size, other.size) // BLOCK)
        for other in others
        if _is_log_of(geometry, other)
    ]
    if not logs:
        return None
    copies = [Copy(Member(at, log.reader.name, log.reader), log.lsn, Damage()) for at, log in enumerate(logs)]
    used = choose(copies, "the log of this XFS", "log sequence number")
    damage.take(copies[used].damage)
    return logs[used]


def _is_log_of(geometry: Geometry, other: Reader) -> bool:
    head = record(other.read_clipped(0, BLOCK), RECORD)
    return bool(head["h_magicno"] == HEADER_MAGIC) and head["h_fs_uuid"].tobytes() in (
        geometry.uuid,
        geometry.meta_uuid,
    )


def _measure(reader: Reader, offset: int, blocks: int) -> Log:
    """Find head and tail of the log at `offset`."""

    def cycles(at: Int) -> Int:
        return _cycle(reader.read_blocks(offset + at * BLOCK, BLOCK))

    first, last = cycles(np.array([0, blocks - 1]))
    if first == 0:  # nothing was ever written: XFS leaves that as clean
        return Log(reader, offset, blocks, 0, 0, True)
    # written once around: the last round's blocks, then those of the round before; or, on a young log, zeroes
    head = blocks if first == last else _search(cycles, lambda cycle: cycle != first, blocks)
    window = np.arange(max(head - MAX_IN_FLIGHT, head - blocks), head)
    data = reader.read_blocks(offset + window % blocks * BLOCK, BLOCK)
    expected = np.where(window >= 0, first, first - 1)
    written = _cycle(data) == expected
    if first == 1 and (window < 0).any():  # there was no round before the first
        data, window, written = data[window >= 0], window[window >= 0], written[window >= 0]
    hole = np.flatnonzero(~written)
    if len(hole):
        data, window = data[: hole[0]], window[: hole[0]]
    return _last_record(reader, offset, blocks, data, window)


def _cycle(data: Bytes) -> Int:
    """The cycle number of each block (n, 512)."""
    words = np.ascontiguousarray(data[:, :8]).view(">u4")
    return np.where(words[:, 0] == HEADER_MAGIC, words[:, 1], words[:, 0]).astype(np.int64)


def _search(cycles: Callable[[Int], Int], behind: Callable[[Int], Bool], blocks: int) -> int:
    """The first block for which `behind` holds; it does not for block 0 and does for the last.

    Where the log is written meanwhile, its head moves on.
    """
    low, high = 0, blocks - 1
    while high - low > 1:
        at = np.unique(np.linspace(low + 1, high, min(FANOUT, high - low)).astype(np.int64))
        found = behind(cycles(at))
        if not found.any():  # not even for `high` any more
            low, high = int(at[-1]), blocks - 1
            continue
        hit = int(np.argmax(found))
        low, high = int(at[hit - 1]) if hit else low, int(at[hit])
    return high


def _last_record(reader: Reader, offset: int, blocks: int, data: Bytes, window: Int) -> Log:
    """Head and tail by the last whole record in `data`, the blocks numbered `window` (negative: before the
    ring's start)."""
    heads = records(data, RECORD)
    found = np.flatnonzero(heads["h_magicno"] == HEADER_MAGIC)
    end = int(window[-1]) + 1 if len(window) else 0
    for at in found[::-1][:2].tolist():
        head = heads[at]
        length = header_blocks(head) + -(-int(head["h_len"]) // BLOCK)
        start = int(window[at])
        if start + length != end:
            end = start  # torn: it was being written when the power went
            continue
        tail = int(head["h_tail_lsn"]) & 0xFFFFFFFF
        if tail >= blocks:
            raise Corrupt(f"XFS log: h_tail_lsn at byte {offset + start % blocks * BLOCK:#x} names block "
                f"{tail} of {blocks}",
                          offset + start % blocks * BLOCK)  # fmt: skip
        body = at + header_blocks(head)
        mark = (
            int(head["h_num_logops"]) == 1 and body < len(data) and int(data[body, OP_FLAGS]) & UNMOUNT_TRANS
        )
        lsn = min(int(head["h_lsn"]), INT64_MAX)
        return Log(reader, offset, blocks, end % blocks, tail, bool(mark), lsn)
    raise Corrupt(
        f"XFS log at byte {offset:#x}: no whole record before its head, block {end % blocks}", offset
    )


def header_blocks(head: np.void) -> int:
    """Blocks of a record's header: version 2 logs add one for each further 32 KiB of the buffer size."""
    if int(head["h_version"]) & 2 and int(head["h_size"]) > CYCLE_DATA * BLOCK:
        return min(-(-int(head["h_size"]) // (CYCLE_DATA * BLOCK)), 8)
    return 1
