"""Nodes that were written out by fsync after the checkpoint: the next mount rolls forward over them.

They form a chain that begins where the checkpoint's log of warm nodes ends; each names the block of the next
one, and bears the checkpoint's version. What follows the last one is older, so its version differs. Of each
file only what lies before its last synced node counts.

Sources: Linux fs/f2fs/recovery.c (find_fsync_dnodes, recover_data, recover_dentry), node.h
(is_recoverable_dnode, is_fsync_dnode, is_dent_dnode, IS_DNODE, f2fs_has_xattr_block), node.c
(f2fs_start_bidx_of_node); file.c (need_do_checkpoint: what is no plain file with one link gets a checkpoint
instead).
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bool, Int, in_order, ints
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import records, widen
from virt_bmap.formats.filesystems.f2fs.allocator import CRC_RECOVERY, NOCRC_RECOVERY, Checkpoint, Nat
from virt_bmap.formats.filesystems.f2fs.ondisk import BLOCK, NIDS_PER_BLOCK, NODE, SEGMENT, Superblock

WARM_NODE = 1
FSYNC_MARK, DENTRY_MARK, OFFSET_SHIFT = 0x2, 0x4, 3
XATTR_NODE = 0xFFFFFFFF >> OFFSET_SHIFT
DOUBLY = 2 * NIDS_PER_BLOCK + 5
"""Number of the doubly indirect node among the nodes of a file; direct ones are 1, 2, and all below indirect
ones, counted in file order."""
MAX_READS = 1024
"""Segments of 2 MiB that are read to follow the chain: more than is written between two checkpoints."""


class SyncedNodes(NamedTuple):
    """Nodes of the chain, in its order: block, inode that each belongs to, its number among the nodes of the
    file, and its marks."""

    block: Int
    ino: Int
    number: Int
    mark: Int


class Chain(NamedTuple):
    """What lies after the checkpoint; `whole` whether the end was seen."""

    nodes: SyncedNodes
    whole: bool


def read_chain(volume: Superblock, checkpoint: Checkpoint) -> Chain:
    """The nodes after the checkpoint, a segment at a time."""
    head = checkpoint.record
    at = (
        volume.main
        + int(head["cur_node_segno"][WARM_NODE]) * SEGMENT
        + int(head["cur_node_blkoff"][WARM_NODE])
    )
    parts, seen = list[SyncedNodes](), dict[int, Bool]()
    segment = -1, np.zeros(0, NODE)
    reads = 0
    while volume.inside(ints(at))[0]:
        number, place = divmod(at - volume.main, SEGMENT)
        if segment[0] != number:
            if (reads := reads + 1) > MAX_READS:
                return Chain(stack(SyncedNodes, parts), False)
            start = volume.main + number * SEGMENT
            count = min(SEGMENT, volume.readable - start)
            segment = (
                number,
                records(volume.reader.read_blocks((start + np.arange(count)) * BLOCK, BLOCK), NODE),
            )
        piece = _piece(checkpoint, segment[1][place:], at)
        mine = seen.setdefault(number, np.zeros(SEGMENT, bool))[place : place + len(piece)]
        if not len(piece) or mine.any():
            break
        mine[:] = True
        flag = widen(piece["flag"], "flag")
        mark = flag & (FSYNC_MARK | DENTRY_MARK)
        parts.append(
            SyncedNodes(at + np.arange(len(piece)), widen(piece["ino"], "ino"), flag >> OFFSET_SHIFT, mark)
        )
        at = int(piece["next_blkaddr"][-1])
    return Chain(stack(SyncedNodes, parts), True)


def _piece(checkpoint: Checkpoint, rest: np.ndarray, at: int) -> np.ndarray:
    """The nodes at the beginning of `rest`, blocks from `at` on, that follow each other and bear the
    checkpoint's version."""
    mine = _bears(checkpoint, rest["cp_ver"])
    goes_on = mine & (rest["next_blkaddr"] == at + 1 + np.arange(len(rest)))
    count = len(rest) if goes_on.all() else int(np.argmin(goes_on)) + 1
    return rest[: count if mine[count - 1] else count - 1]


def _bears(checkpoint: Checkpoint, version: np.ndarray) -> Bool:
    mine = checkpoint.version
    if checkpoint.has(NOCRC_RECOVERY):
        low: Bool = version & np.uint64(0xFFFFFFFF) == np.uint64(mine & 0xFFFFFFFF)
        return low
    if checkpoint.has(CRC_RECOVERY):
        mine |= checkpoint.checksum << 32
    same: Bool = version == np.uint64(mine & 0xFFFFFFFFFFFFFFFF)
    return same


class Newer(NamedTuple):
    """What recovery puts in the place of older nodes: of each node of a file the last version.

    `named` are the blocks of new inodes that were synced with their names.
    """

    inodes: SyncedNodes
    direct: SyncedNodes
    attributes: SyncedNodes
    named: SyncedNodes

    def __bool__(self) -> bool:
        return bool(len(self.inodes.block) + len(self.direct.block) + len(self.attributes.block))


_NONE = stack(SyncedNodes, [])
NOTHING = Newer(_NONE, _NONE, _NONE, _NONE)


def newer(volume: Superblock, chain: Chain, nat: Nat, orphans: Int) -> Newer:
    """The nodes that a mount recovers: those of files that exist, or whose inode was synced with its name, up
    to the last synced one."""
    system = [0, volume.number("node_ino"), volume.number("meta_ino")]
    nodes = take(chain.nodes, ~np.isin(chain.nodes.ino, np.append(orphans, system)))
    place = np.arange(len(nodes.block))
    synced, named = nodes.mark & FSYNC_MARK != 0, (nodes.mark & DENTRY_MARK != 0) & (nodes.number == 0)
    at = nat.find(nodes.ino)
    known = (at >= 0) & (np.append(nat.nid == nat.ino, False)[at])
    files, which = np.unique(nodes.ino, return_inverse=True)
    begin, end = np.full(len(files), len(place)), np.full(len(files), -1)
    np.minimum.at(begin, which[synced & (known | named)], place[synced & (known | named)])
    late = synced & (place >= begin[which])
    np.maximum.at(end, which[late], place[late])
    good = np.flatnonzero(place <= end[which])
    key = nodes.ino[good] << 32 - OFFSET_SHIFT | nodes.number[good]
    some = take(nodes, good[last_of(key)])
    direct = _is_direct(some.number)
    names = np.flatnonzero(late & named & ~known)
    names = names[last_of(nodes.ino[names])]
    return Newer(
        take(some, some.number == 0),
        take(some, direct),
        take(some, some.number == XATTR_NODE),
        take(nodes, names),
    )


def last_of(key: Int) -> Int:
    """Where each distinct key is for the last time, in order."""
    found: Int = in_order(len(key) - 1 - np.unique(key[::-1], return_index=True)[1])
    return found


def _is_direct(number: Int) -> Bool:
    """Which numbers among a file's nodes are those of direct nodes."""
    step = NIDS_PER_BLOCK + 1
    below = (number > 3) & (number < DOUBLY) & ((number - 3) % step != 0)
    twice = (
        (number > DOUBLY + 1)
        & (number <= DOUBLY + NIDS_PER_BLOCK * step)
        & ((number - DOUBLY - 1) % step != 0)
    )
    found: Bool = (number == 1) | (number == 2) | below | twice
    return found


def first_index(number: Int) -> Int:
    """How many direct nodes lie before each, by their numbers among the file's nodes."""
    step = NIDS_PER_BLOCK + 1
    below = number - 2 - (number - 4) // step
    twice = number - 5 - (number - (2 * NIDS_PER_BLOCK + 4) - 3) // step
    found: Int = np.where(number <= 2, number - 1, np.where(number < DOUBLY, below, twice))
    return found
