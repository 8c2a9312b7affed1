"""Forks: where the blocks of an inode lie.

The data fork holds content, the attribute fork extended attributes.

Both keep their extents either in the inode itself or in a B-tree whose root lies in the inode.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, in_order
from virt_bmap.core.columns import take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.btree import Nodes, Shape, walk
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

DATA_FORK, ATTR_FORK = 0, 1
BMBT = Shape("bmbt", (b"BMAP", b"BMA3"), 8, ondisk.BMBT_REC_SIZE, long=True)


@dataclass(frozen=True)
class Extents:
    """Extents in blocks. `owner` is the inode's row in the table of inodes; `block` is an fsblock;
    `unwritten` is 0 or 1."""

    owner: Int
    fork: Int
    file_block: Int
    block: Int
    count: Int
    unwritten: Int


class ForkRoots(NamedTuple):
    """What the roots of fork B-trees point to: blocks (fsblock) at `level` (0: leaf)."""

    owner: Int
    fork: Int
    block: Int
    level: Int


def decode(owner: Int, fork: Int, high: np.ndarray, low: np.ndarray) -> Extents:
    """struct xfs_bmbt_rec, given as two native uint64 words."""
    shift, mask = np.uint64, np.uint64
    return Extents(
        owner, fork, ((high >> shift(9)) & mask((1 << 54) - 1)).astype(np.int64),
        (((high & mask(0x1FF)) << shift(43)) | (low >> shift(21))).astype(np.int64),
        (low & mask(ondisk.MAX_BMBT_BLOCKS)).astype(np.int64), (high >> shift(63)).astype(np.int64),
    )  # fmt: skip


def tree_extents(
    reader: Reader, geometry: Geometry, damage: Damage, roots: ForkRoots, number: Int, rows: tables.ExtentRows
) -> Extents:
    """The extents that fork B-trees list; their blocks become `rows`.

    `number` are the inode numbers of all owners.
    """
    owner = roots.owner * 2 + roots.fork
    walked = walk(reader, geometry, damage, BMBT, Nodes(owner, roots.block, roots.level))
    nodes = walked.nodes
    rows.add(
        tables.TREE, geometry.block_offset(nodes.block), geometry.block_size, inode=number[nodes.owner >> 1]
    )
    words = walked.rows.view(">u8").astype(np.uint64)
    return decode(walked.owner >> 1, walked.owner & 1, words[:, 0], words[:, 1])


def usable(geometry: Geometry, damage: Damage, extents: Extents, elsewhere: Int, record: Int) -> Extents:
    """The extents that can be: on this volume, not on the real-time device (`elsewhere`, by inode), file
    offsets that fit.

    `record` are the places of the inodes, for messages.
    """
    away = (elsewhere[extents.owner] != 0) & (extents.fork == DATA_FORK)
    if away.any():
        blocks = int(extents.count[away].sum())
        damage.add(
            "elsewhere",
            "[block of a file lies|blocks of files lie] on the real-time device, which is not part of this "
            f"volume ({plural(len(np.unique(extents.owner[away])), 'file')})",
            count=blocks,
        )
        extents = take(extents, ~away)
    most = (np.iinfo(np.int64).max // geometry.block_size) - ondisk.MAX_BMBT_BLOCKS
    good = geometry.holds(extents.block, extents.count) & (extents.file_block < most)
    damage.check(
        good,
        "outside",
        "[extent of an inode lies outside the volume or "
        "is|extents of inodes lie outside the volume or are] empty",
        record[extents.owner],
    )
    same = (extents.owner[1:] == extents.owner[:-1]) & (extents.fork[1:] == extents.fork[:-1])
    apart = np.append(True, ~same | (extents.file_block[1:] >= extents.file_block[:-1] + extents.count[:-1]))[
        : len(good)
    ]
    damage.check(
        apart,
        "extents",
        "[extent of an inode is out of order or overlaps|extents "
        "of inodes are out of order or overlap] in the file",
        record[extents.owner],
    )
    return extents if good.all() else take(extents, good)


def split(extents: tuple[Int, Int], shared: tuple[Int, Int], damage: Damage) -> tuple[Int, Int, Int, Int]:
    """Cut byte ranges (start, length) where sharing begins or ends: (row, start, length, shared or not) of
    the pieces."""
    start, length = extents
    if len(shared[0]) == 0:
        return np.arange(len(start)), start, length, np.zeros(len(start), np.int64)
    end = start + length
    points = in_order(np.concatenate(shared))
    low, high = np.searchsorted(points, start, "right"), np.searchsorted(points, end, "left")
    cuts = np.maximum(0, high - low)
    # every cut borders bytes with one owner, so two rows can't both be cut around the same gap
    if int(cuts.sum()) > 2 * len(points) + 2:
        damage.say("tree", "the reference counts cut extents at more places than there can be")
        cuts[:] = 0
    row = np.repeat(np.arange(len(start)), cuts + 1)
    step = np.arange(len(row)) - np.repeat(np.cumsum(cuts + 1) - cuts - 1, cuts + 1)
    at = low[row] + step
    piece_start = np.where(step == 0, start[row], points[np.clip(at - 1, 0, len(points) - 1)])
    piece_end = np.where(step == cuts[row], end[row], points[np.clip(at, 0, len(points) - 1)])
    inside = np.searchsorted(shared[0], piece_start, "right") > np.searchsorted(
        shared[1], piece_start, "right"
    )
    return row, piece_start, piece_end - piece_start, np.where(inside, tables.SHARED, 0)
