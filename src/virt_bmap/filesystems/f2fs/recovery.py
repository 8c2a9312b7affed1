"""Nodes that were written out by fsync after the checkpoint: the next mount rolls forward over them.

They form a chain that begins where the checkpoint's log of warm nodes ends; each names the block of the next one, and bears the checkpoint's version. What
follows the last one is older, so its version differs.

Sources: Linux fs/f2fs/recovery.c (find_fsync_dnodes), node.h (is_recoverable_dnode, is_fsync_dnode).
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap.arrays import Int, ints
from virt_bmap.filesystems.f2fs.checkpoint import CRC_RECOVERY, NOCRC_RECOVERY, Checkpoint
from virt_bmap.filesystems.f2fs.ondisk import BLOCK, NODE, SEGMENT, Volume
from virt_bmap.layout import records

WARM_NODE = 1
FSYNC_MARK = 0x2
MAX_PIECES = 4096
"""Places where the chain leaves the order of blocks, and at most so many segments: each is one wait for the disk."""


@dataclass(frozen=True)
class Chain:
    """Blocks of the chain in order; `synced` which of them an fsync asked for; `whole` whether its end was seen."""

    block: Int
    synced: np.ndarray
    whole: bool


def read_chain(volume: Volume, checkpoint: Checkpoint) -> Chain:
    """The nodes behind the checkpoint."""
    at = (
        volume.main
        + int(checkpoint.record["cur_node_segno"][WARM_NODE]) * SEGMENT
        + int(checkpoint.record["cur_node_blkoff"][WARM_NODE])
    )
    blocks, marks, seen = list[Int](), list[np.ndarray](), set[int]()
    segment = -1, np.zeros(0, NODE)
    for _ in range(MAX_PIECES):
        if at in seen or not volume.inside(ints(at))[0]:
            return _chain(blocks, marks, True)
        seen.add(at)
        number, place = divmod(at - volume.main, SEGMENT)
        if segment[0] != number:
            start = volume.main + number * SEGMENT
            count = min(SEGMENT, volume.readable - start)
            segment = number, records(volume.reader.read_blocks((start + np.arange(count)) * BLOCK, BLOCK), NODE)
        rest = segment[1][place:]
        mine = _bears(checkpoint, rest["cp_ver"])
        block = at + np.arange(len(rest))
        goes_on = mine & (rest["next_blkaddr"] == block + 1)
        count = len(rest) if goes_on.all() else int(np.argmin(goes_on)) + 1
        count -= not mine[count - 1]
        if count == 0:
            return _chain(blocks, marks, True)
        blocks.append(block[:count])
        marks.append(rest["flag"][:count] & FSYNC_MARK != 0)
        if not mine[min(count, len(rest) - 1)] and count < len(rest) and goes_on[count - 1]:
            return _chain(blocks, marks, True)
        at = int(rest["next_blkaddr"][count - 1])
    return _chain(blocks, marks, False)


def _chain(blocks: list[Int], marks: list[np.ndarray], whole: bool) -> Chain:
    return Chain(np.concatenate([ints([]), *blocks]), np.concatenate([np.zeros(0, bool), *marks]), whole)


def _bears(checkpoint: Checkpoint, version: np.ndarray) -> np.ndarray:
    """Which nodes bear the checkpoint's version."""
    mine = checkpoint.version
    if checkpoint.has(NOCRC_RECOVERY):
        low: np.ndarray = version & np.uint64(0xFFFFFFFF) == np.uint64(mine & 0xFFFFFFFF)
        return low
    if checkpoint.has(CRC_RECOVERY):
        mine |= checkpoint.checksum << 32
    same: np.ndarray = version == np.uint64(mine & 0xFFFFFFFFFFFFFFFF)
    return same
