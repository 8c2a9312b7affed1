"""The FAT and the directories, read."""

from collections.abc import Iterator

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held
from virt_bmap.formats.filesystems.fat.allocator import (
    BAD,
    BROKEN,
    END,
    WHOLE,
    ClusterRuns,
    chains_of,
    read_runs,
)
from virt_bmap.formats.filesystems.fat.extents import Heap
from virt_bmap.formats.filesystems.fat.superblock import BOOT_SECTOR, ENTRY, Geometry, read_geometry
from virt_bmap.formats.filesystems.fat.tree import ROOT, DirectoryRanges, FileTree, Parse, read_tree
from virt_bmap.model.damage import Damage

MAX_DIRECTORY = 65536 * ENTRY
"""A directory may have 65,536 entries: fs/fat/fat.h (FAT_MAX_DIR_SIZE)."""


FAT_BATCH = 16 << 20
"""Bytes of the FAT that are looked at together; their arrays take some six times as much."""


def read_tables(reader: Reader, damage: Damage) -> tuple[Geometry, ClusterRuns, Heap]:
    """Boot sector and FAT."""
    geometry = read_geometry(reader.read_clipped(0, BOOT_SECTOR.itemsize), reader.name)
    _check_size(reader, geometry)
    runs = read_runs(_fat_entries(reader, geometry))
    return (
        geometry,
        runs,
        Heap(geometry.data_start, geometry.cluster_size, geometry.clusters, chains_of(runs), damage),
    )


def _check_size(reader: Reader, geometry: Geometry) -> None:
    """The FATs must be there; what is missing after them is only a problem."""
    if reader.size < geometry.data_start:
        raise Corrupt(
            f"{reader.name}: ends at byte {reader.size:#x}, inside the FATs or the root directory, which "
            f"reach to {geometry.data_start:#x}: it is truncated",
            reader.size,
            "truncated",
        )


def _fat_entries(reader: Reader, geometry: Geometry) -> Iterator[Int | int]:
    """The entries of the active FAT from cluster 2 on, in batches, as `chains` wants them."""
    start, bits = geometry.reserved + geometry.active_fat * geometry.fat_size, geometry.bits
    end, reached = geometry.clusters + 2, 2
    for at, raw in held(reader, ints(start), ints((end * bits + 7) // 8), FAT_BATCH):
        first = at * 8 // bits
        count = min(len(raw) * 8 // bits, end - first)
        if first > reached:
            yield first - reached
        yield _decoded(raw, bits, count, end)[max(0, reached - first) :]
        reached = first + count
    if reached < end:
        yield end - reached


def _decoded(raw: np.ndarray, bits: int, count: int, end: int) -> Int:
    """`count` entries of 12, 16 or 32 bits; only numbers below `end` are clusters."""
    if bits == 12:
        triple = np.append(raw, np.zeros(-len(raw) % 3, np.uint8)).reshape(-1, 3).astype(np.int64)
        low, high = triple[:, 0] | (triple[:, 1] & 15) << 8, triple[:, 1] >> 4 | triple[:, 2] << 4
        entries = np.stack([low, high], axis=1).reshape(-1)[:count]
    else:
        entries = raw.view(f"<u{bits // 8}").astype(np.int64)
    # the upper four bits of FAT32 are reserved
    highest = 0xFFF if bits == 12 else 0xFFFF if bits == 16 else 0x0FFFFFFF
    if bits == 32:
        entries &= highest
    odd = np.flatnonzero((entries >= end) | (entries == 1))
    value = entries[odd]
    entries[odd] = np.where(value >= highest - 7, END, np.where(value == highest - 8, BAD, BROKEN))
    return entries


def read_directories(reader: Reader, geometry: Geometry, heap: Heap, parser: Parse) -> FileTree:
    """The tree below the root, which has an area of its own in FAT12 and FAT16, and a chain of clusters in
    FAT32."""
    if geometry.bits == 32:
        chain = heap.chains.follow(ints(geometry.root_cluster))
        root = DirectoryRanges(
            np.full(len(chain.query), ROOT), heap.offset(chain.cluster), chain.count * heap.cluster_size,
            chain.before * heap.cluster_size,
        )  # fmt: skip
        if chain.fate[0] != WHOLE:
            words = (
                f"the chain of the root directory, from cluster {geometry.root_cluster} on, has no proper end"
            )
            heap.damage.say("extents", words, 44)
    else:
        size = geometry.data_start - geometry.root_start
        root = DirectoryRanges(ints(ROOT), ints(geometry.root_start), ints(size), ints(0))
    return read_tree(reader, root, heap.locate, parser, MAX_DIRECTORY, heap.damage)
