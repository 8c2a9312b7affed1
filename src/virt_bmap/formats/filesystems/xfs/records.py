"""The records of the log from its tail to its head, as they were before they were cut into blocks and
stamped; none of them damaged.

The checksums of all records are computed together: a busy log has thousands of small ones.

Sources: fs/xfs/xfs_log_recover.c (xlog_recover_process), xfs_log.c (xlog_cksum), libxfs/xfs_log_format.h
(Linux 6.12).
"""

from collections.abc import Iterator

import numpy as np

from virt_bmap.core import layout
from virt_bmap.core.arrays import Bool, Bytes, Int
from virt_bmap.core.checksums import ALL_ONES, crc32c, crc32c_each
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.filesystems.xfs.journal import (
    BLOCK,
    CYCLE_DATA,
    HEADER_MAGIC,
    RECORD,
    Log,
    header_blocks,
)

WORDS = BLOCK // 4
CRC_AT = 0x20
RECORD_SIZES = (328, 324)
"""XLOG_REC_SIZE: how much of the header the checksum covers, on 64-bit machines and on i386."""
EXTENDED_SIZE = 260
"""XLOG_REC_EXT_SIZE: of each further header block."""


def records(log: Log) -> Iterator[tuple[int, int, bytes]]:
    """(lsn, number of operations, body) of each record from the tail to the head, the first words of its
    blocks put back in place."""
    count = log.active // BLOCK
    data = log.reader.read_blocks(log.offset + (log.tail + np.arange(count)) % log.blocks * BLOCK, BLOCK)
    found = list(_heads(log, data))
    wrong = np.flatnonzero(~_sound(data, np.array(found, np.int64).reshape(-1, 3)))
    if len(wrong):
        place = log.place(found[wrong[0]][0])
        raise Corrupt(f"XFS log: the record at byte {place:#x} does not match its checksum", place, "journal")
    for at, body, end in found:
        head, place = layout.record(data[at].tobytes(), RECORD), log.place(at)
        kept = np.concatenate(
            [head["h_cycle_data"].view(np.uint8), data[at + 1 : body, 4 : 4 + 4 * CYCLE_DATA].reshape(-1)]
        )
        blocks = data[body:end].copy()
        stamps = np.ascontiguousarray(blocks[:, :4]).view(">u4")[:, 0]
        words = kept.reshape(-1, 4)
        if (stamps != head["h_cycle"]).any() and not _wraps(log, at, end, stamps, int(head["h_cycle"])):
            raise Corrupt(
                f"XFS log: the record at byte {place:#x} was not written completely", place, "journal"
            )
        blocks[:, :4] = words[: len(blocks)]
        yield int(head["h_lsn"]), int(head["h_num_logops"]), blocks.tobytes()[: int(head["h_len"])]


def _heads(log: Log, data: Bytes) -> Iterator[tuple[int, int, int]]:
    """(first block, first block of the body, block after it) of each record, in blocks of `data`."""
    at = 0
    while at < len(data):
        head = layout.record(data[at].tobytes(), RECORD)
        body = at + header_blocks(head)
        end = body + -(-int(head["h_len"]) // BLOCK)
        fits = end <= len(data) and end - body <= CYCLE_DATA * (body - at)
        if head["h_magicno"] != HEADER_MAGIC or not fits or head["h_fmt"] != 1:
            place = log.place(at)
            raise Corrupt(
                f"XFS log: the record at byte {place:#x} has a wrong magic number, format or length",
                place,
                "journal",
            )
        yield at, body, end
        at = end


def _sound(data: Bytes, found: Int) -> Bool:
    """Which records match their h_crc? It covers a record as it lies on the disk; mkfs.xfs and xfs_repair
    leave it 0."""
    first, body = found[:, 0], found[:, 1]
    heads = data[first]
    wanted = heads[:, CRC_AT : CRC_AT + 4].copy().view("<u4")[:, 0]
    length = layout.records(heads, RECORD)["h_len"].astype(np.int64)
    heads[:, CRC_AT : CRC_AT + 4] = 0
    words = data.reshape(-1).view("<u4")
    used = np.minimum(body - first, -(-length // (CYCLE_DATA * BLOCK)))
    sound: Bool = wanted == 0
    for size in RECORD_SIZES:
        state = crc32c(heads[:, :size])
        for further in range(1, int(used.max(initial=0))):
            state = crc32c_each(
                words, (first + further) * WORDS, np.where(further < used, EXTENDED_SIZE // 4, 0), state
            )
        state = crc32c_each(words, body * WORDS, np.where(length % 4 == 0, length // 4, 0), state)
        sound |= state ^ ALL_ONES == wanted
        if sound.all():
            break
    return sound


def _wraps(log: Log, at: int, end: int, stamps: np.ndarray, cycle: int) -> bool:
    """A record across the end of the ring: its blocks from the start of the ring carry the next cycle."""
    first = end - len(stamps)
    beyond = (log.tail + np.arange(first, end)) // log.blocks > (log.tail + at) // log.blocks
    return bool((stamps == cycle + beyond).all())
