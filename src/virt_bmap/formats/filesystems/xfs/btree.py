"""B-trees, many at once: one batch of reads for each level of all of them.

Short trees hold an allocation group's records, their pointers are agbno; long trees hold a fork's extents,
their pointers are fsblock. A walk takes nodes of any number of trees and levels, and needs as many rounds as
the highest of them has levels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bool, Bytes, Int, expand
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model.damage import Damage

MAX_LEVELS = 12
"""XFS_BTREE_MAXLEVELS is 9, reverse-map trees on huge groups may get 10: more is a loop or garbage."""
BATCH = 16 << 20
"""Bytes of metadata in memory at once."""


class Shape(NamedTuple):
    """How the blocks of one kind of tree look.

    Sizes in bytes; `leaves` False: the leaves' places are wanted, not their records.
    """

    name: str
    magic: tuple[bytes, bytes]
    key: int
    record: int
    long: bool = False
    leaves: bool = True

    def header(self, crc: bool) -> int:
        """Where keys or records begin in a block."""
        if self.long:
            return ondisk.LONG_CRC_HEADER if crc else ondisk.LONG_HEADER
        return ondisk.SHORT_CRC_HEADER if crc else ondisk.SHORT_HEADER


class Nodes(NamedTuple):
    """Blocks of trees: what they belong to (an index of the caller's), where they lie (fsblock), their level
    (0: leaf)."""

    owner: Int
    block: Int
    level: Int


class Walked(NamedTuple):
    """All `nodes` of the trees, and their leaves' records: `rows` (n, record size) with the `owner` of
    each."""

    nodes: Nodes
    owner: Int
    rows: Bytes


def walk(reader: Reader, geometry: Geometry, damage: Damage, shape: Shape, roots: Nodes) -> Walked:
    """Follow the trees from their root blocks down to the records."""
    seen: list[Nodes] = []
    owners, rows = [np.zeros(0, np.int64)], [np.zeros((0, shape.record), np.uint8)]
    level = _usable(geometry, damage, shape, roots, np.zeros(0, np.int64))
    known = level.block
    for _ in range(MAX_LEVELS):
        seen.append(level)
        children = []
        inner = level if shape.leaves else take(level, level.level > 0)
        for nodes, blocks in _blocks(reader, geometry, inner):
            nodes, blocks, counts = _checked(geometry, damage, shape, nodes, blocks)
            leaf = nodes.level == 0
            owner, found = _records(geometry, shape, take(nodes, leaf), blocks[leaf], counts[leaf])
            owners.append(owner)
            rows.append(found)
            children.append(_children(geometry, shape, take(nodes, ~leaf), blocks[~leaf], counts[~leaf]))
        level = _usable(geometry, damage, shape, stack(Nodes, children), known)
        if len(level.block) == 0:
            break
        known = np.concatenate([known, level.block])
    return Walked(stack(Nodes, seen), np.concatenate(owners), np.concatenate(rows))


def _blocks(reader: Reader, geometry: Geometry, nodes: Nodes) -> Iterator[tuple[Nodes, Bytes]]:
    """The nodes' blocks, a bounded batch at a time."""
    for part, blocks in reader.batches(geometry.block_offset(nodes.block), geometry.block_size, BATCH):
        yield take(nodes, part), blocks


def _usable(geometry: Geometry, damage: Damage, shape: Shape, nodes: Nodes, known: Int) -> Nodes:
    """Those nodes that lie on the volume, at a level that can be, and were not met before."""
    if len(nodes.block) == 0:
        return nodes
    good = (
        geometry.holds(nodes.block, np.ones(len(nodes.block), np.int64))
        & (nodes.level >= 0)
        & (nodes.level < MAX_LEVELS)
    )
    if not good.all():
        damage.add(
            "tree",
            f"[pointer|pointers] of a {shape.name} [leads|lead] outside the volume",
            count=int((~good).sum()),
        )
        nodes = take(nodes, good)
    _, first = np.unique(nodes.block, return_index=True)
    again = np.ones(len(nodes.block), bool)
    again[first] = False
    again |= np.isin(nodes.block, known)
    damage.check(
        ~again,
        "twice",
        f"[block|blocks] of a {shape.name} [is|are] linked twice",
        geometry.block_offset(nodes.block),
    )
    return take(nodes, ~again)


def _checked(
    geometry: Geometry, damage: Damage, shape: Shape, nodes: Nodes, blocks: Bytes
) -> tuple[Nodes, Bytes, Int]:
    """Drop blocks whose header contradicts what led to them.

    The last result: how many records or pointers each holds.
    """
    head = records(blocks, ondisk.BTREE_BLOCK)
    counts = head["bb_numrecs"].astype(np.int64)
    room = geometry.block_size - shape.header(geometry.crc)
    most = np.where(nodes.level == 0, room // shape.record, room // (shape.key + _pointer_size(shape)))
    good = head["bb_magic"] == shape.magic[geometry.crc]
    good &= (head["bb_level"] == nodes.level) & (counts <= most)
    damage.check(
        good,
        "tree",
        f"[block|blocks] of a {shape.name} [has|have] a wrong magic number, level or count",
        geometry.block_offset(nodes.block),
    )
    return (nodes, blocks, counts) if good.all() else (take(nodes, good), blocks[good], counts[good])


def _pointer_size(shape: Shape) -> int:
    return 8 if shape.long else 4


def _records(geometry: Geometry, shape: Shape, nodes: Nodes, blocks: Bytes, counts: Int) -> tuple[Int, Bytes]:
    """The records of leaves: (owner, bytes (n, record size))."""
    header = shape.header(geometry.crc)
    most = (geometry.block_size - header) // shape.record
    table = blocks[:, header : header + most * shape.record].reshape(len(blocks), most, shape.record)
    row, step = expand(counts)
    return nodes.owner[row], table[row, step]


def _children(geometry: Geometry, shape: Shape, nodes: Nodes, blocks: Bytes, counts: Int) -> Nodes:
    """The nodes that inner nodes point to."""
    header, size = shape.header(geometry.crc), _pointer_size(shape)
    most = (geometry.block_size - header) // (shape.key + size)
    base = header + most * shape.key
    table = np.ascontiguousarray(blocks[:, base : base + most * size]).view(f">u{size}")
    row, step = expand(counts)
    target = narrow(table[row, step])
    if not shape.long:
        group = nodes.block[row] >> geometry.agblklog
        # an agbno that needs more bits than a group has would name a block of another group
        target = np.where(target < geometry.agblocks, (group << geometry.agblklog) | target, -1)
    return Nodes(nodes.owner[row], target, nodes.level[row] - 1)


def narrow(pointers: np.ndarray) -> Int:
    """Pointers as int64; -1, which no check lets pass, for those that do not fit."""
    wide = pointers.astype(np.uint64)
    return np.where(wide < np.uint64(1 << 62), wide, np.uint64(0)).astype(np.int64) - (
        wide >= np.uint64(1 << 62)
    )


def fits(geometry: Geometry, starts: Int, counts: Int, agno: Int) -> Bool:
    """Do records [start, +count) in agbno lie in their group, after its first block?"""
    good: Bool = (
        (starts > 0)
        & (starts < geometry.agblocks)
        & geometry.holds((agno << geometry.agblklog) | np.maximum(starts, 0), counts)
    )
    return good
