"""Compressed files: the index of logical clusters, full or compact, as extents of physical clusters.

Nothing is decompressed.

Every logical cluster (a block, usually) of a file has an entry: HEAD and PLAIN say where a physical cluster
begins in the file and on disk, NONHEAD that the one before goes on. Compact entries pack two in 8 bytes or
sixteen in 32, with one block address for the pack.

Sources: Linux fs/erofs/zmap.c and erofs_fs.h (field and flag names); Documentation/filesystems/erofs.rst.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, expand
from virt_bmap.core.columns import take

MAP_HEADER = 8
ADVISE_COMPACTED_2B, ADVISE_BIG_PCLUSTER_1, ADVISE_BIG_PCLUSTER_2 = 1, 2, 4
ADVISE_INLINE_PCLUSTER, ADVISE_FRAGMENT_PCLUSTER = 8, 32
FRAGMENT_INODE = 0x80
PLAIN, _, NONHEAD, HEAD2 = range(4)
D0_CBLKCNT = 1 << 11
LOW_BITS = 12
"""A packed entry has as many low bits as a logical cluster needs, and room for D0_CBLKCNT."""


class ClusteredFiles(NamedTuple):
    """Compressed files with their indexes, one row each: `header` is where the map header lies, `size` the
    file's, all in bytes.

    `compact` says which of the two indexes it is, `advise` and `bits` (log2 of a logical cluster) come from
    the map header.
    """

    header: Int
    size: Int
    compact: np.ndarray
    advise: Int
    bits: Int

    def clusters(self) -> Int:
        """How many logical clusters each file has."""
        return -(-self.size // (np.int64(1) << self.bits))

    def initial(self) -> Int:
        """Compact indexes begin with this many 4-byte entries, up to a multiple of 32 bytes."""
        return (32 - (self.header + MAP_HEADER) % 32) % 32 // 4

    def packed(self) -> Int:
        """How many entries of a compact index are 2-byte ones."""
        left = self.clusters() - self.initial()
        return np.where((self.advise & ADVISE_COMPACTED_2B) != 0, np.maximum(left, 0) // 16 * 16, 0)

    def packs(self, file: Int, nth: Int) -> tuple[Int, Int, Int]:
        """(start, size, number within) of the pack that holds the nth entry of a compact index; packs are
        aligned to their size on the disk."""
        initial, packed = self.initial()[file], self.packed()[file]
        two = (nth >= initial) & (nth < initial + packed)
        rest = 4 * initial + 2 * packed + 4 * (nth - initial - packed)
        disk = (
            self.header[file]
            + MAP_HEADER
            + np.select([nth < initial, two], [4 * nth, 4 * initial + 2 * (nth - initial)], rest)
        )
        size = np.where(two, 32, 8)
        return disk // size * size, size, disk % size // np.where(two, 2, 4)

    def index_end(self) -> Int:
        """Where the index ends, in bytes of the volume, and the inline tail of a file begins: packs are
        whole."""
        count = self.clusters()
        pack, size, _ = self.packs(np.arange(len(count), dtype=np.int64), np.maximum(count - 1, 0))
        return np.where(self.compact, pack + size, self.header + 2 * MAP_HEADER + 8 * count)


class Clusters(NamedTuple):
    """Physical clusters: of which file, where in it and how much of it, where on the disk and how long there;
    `plain` ones are not compressed and `last` ones hold the end of their file, which may lie elsewhere
    (inline or in the packed inode)."""

    file: Int
    file_offset: Int
    file_length: Int
    block: Int
    length: Int
    plain: np.ndarray
    last: np.ndarray


def physical_clusters(files: ClusteredFiles, data: Bytes, base: Int, block_size: int) -> tuple[Clusters, int]:
    """The clusters of all files, whose map headers and indexes are data[base:], and how many entries make no
    sense."""
    file, nth = expand(files.clusters())
    first = np.append(True, file[1:] != file[:-1])[: len(file)]
    kind = np.zeros(len(file), np.int64)
    low = np.zeros(len(file), np.int64)
    block = np.zeros(len(file), np.int64)
    count = np.full(len(file), -1, np.int64)
    compact = files.compact[file]
    for rows, decode in ((np.flatnonzero(~compact), _full), (np.flatnonzero(compact), _compact)):
        kind[rows], low[rows], block[rows], count[rows] = decode(files, data, base, file[rows], nth[rows])
    bits = files.bits[file]
    head = kind != NONHEAD
    start = (nth << bits) + low
    bad = head & (low >= np.int64(1) << bits)
    # mkfs ends an index with a head at the end of the file
    begins = np.flatnonzero(head & ~bad & (start < files.size[file]))
    owner = file[begins]
    last = np.append(owner[1:] != owner[:-1], True)[: len(owner)]
    end = np.where(last, files.size[owner], np.append(start[begins][1:], 0)[: len(begins)])
    big = (
        files.advise[owner] & np.where(kind[begins] == HEAD2, ADVISE_BIG_PCLUSTER_2, ADVISE_BIG_PCLUSTER_1)
    ) != 0
    after = np.minimum(begins + 1, max(len(file) - 1, 0))
    same = (begins + 1 < len(file)) & (file[after] == owner) & (kind[after] == NONHEAD)
    counted = np.where(
        same & (count[after] >= 0),
        count[after],
        np.int64(1) << (files.bits[owner] - int(block_size).bit_length() + 1),
    )
    plain = kind[begins] == PLAIN
    length = np.where(big & ~plain, counted * block_size, np.int64(1) << files.bits[owner])
    broken = int(bad.sum()) + int((first & ~head).sum()) + int((end <= start[begins]).sum())
    keep = end > start[begins]
    found = Clusters(owner, start[begins], end - start[begins], block[begins], length, plain, last)
    return take(found, keep), broken


def _u(data: Bytes, at: Int, size: int) -> Int:
    """Little-endian numbers of `size` bytes at positions `at`."""
    four = data[at[:, None] + np.arange(size)].astype(np.int64)
    result: Int = four @ (np.int64(1) << (8 * np.arange(size, dtype=np.int64)))
    return result


def _full(files: ClusteredFiles, data: Bytes, base: Int, file: Int, nth: Int) -> tuple[Int, Int, Int, Int]:
    """(type, clusterofs, block, compressed blocks or -1) of z_erofs_lcluster_index entries."""
    at = base[file] + 2 * MAP_HEADER + 8 * nth
    advise, low, block = _u(data, at, 2), _u(data, at + 2, 2), _u(data, at + 4, 4)
    delta = block & 0xFFFF
    return (
        advise & 3,
        low,
        block,
        np.where(((advise & 3) == NONHEAD) & ((delta & D0_CBLKCNT) != 0), delta & (D0_CBLKCNT - 1), -1),
    )


def _compact(files: ClusteredFiles, data: Bytes, base: Int, file: Int, nth: Int) -> tuple[Int, Int, Int, Int]:
    """The same of packed entries; block addresses are the pack's plus the clusters that begin before in the
    pack."""
    pack, size, item = files.packs(file, nth)
    bit = item * np.where(size == 32, 14, 16)
    at = pack - files.header[file] + base[file]
    value = _u(data, at + bit // 8, 4) >> (bit % 8)
    bits = np.maximum(files.bits[file], LOW_BITS)
    kind, low = (value >> bits) & 3, value & ((np.int64(1) << bits) - 1)
    big = (files.advise[file] & ADVISE_BIG_PCLUSTER_1) != 0
    counted = (kind == NONHEAD) & ((low & D0_CBLKCNT) != 0)
    count = np.where(counted, low & (D0_CBLKCNT - 1), -1)
    new = np.append(True, (pack[1:] != pack[:-1]) | (file[1:] != file[:-1]))[: len(pack)]
    next_counted = np.append(counted[1:] & ~new[1:], False)[: len(counted)]
    weight = np.where(
        big, np.where(counted, count, (kind != NONHEAD) & ~next_counted), kind != NONHEAD
    ).astype(np.int64)
    before = np.cumsum(weight) - weight
    group = np.cumsum(new) - 1
    before -= before[new][group] if len(group) else before
    block = _u(data, at + size - 4, 4) + before + ~big
    return kind, low, block, count
