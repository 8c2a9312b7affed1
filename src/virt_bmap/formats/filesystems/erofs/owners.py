"""Who owns the volume's blocks: files in one piece, in chunks and in clusters, attributes, inodes."""

import itertools
from dataclasses import dataclass

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Int, expand, ints, subtract, union
from virt_bmap.core.columns import take
from virt_bmap.core.stored import ROW, afford, allowance
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.erofs.extents import (
    ADVISE_FRAGMENT_PCLUSTER,
    ADVISE_INLINE_PCLUSTER,
    FRAGMENT_INODE,
    MAP_HEADER,
    ClusteredFiles,
    Clusters,
    physical_clusters,
)
from virt_bmap.formats.filesystems.erofs.inodes import (
    CHUNK_BASED,
    COMPRESSED_COMPACT,
    COMPRESSED_FULL,
    FLAT_INLINE,
    FLAT_PLAIN,
    HOLE,
    InodeLayout,
    InodeTree,
    flat_ranges,
    pieces,
)
from virt_bmap.formats.filesystems.erofs.superblock import (
    SUPER_OFFSET,
    SUPERBLOCK,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

INDEX_BATCH = 4 << 20
"""Bytes of indexes that are looked at together: each four of them are a row."""
CHUNK_BLKBITS, CHUNK_INDEXES = 0x1F, 0x20


@dataclass
class BlockOwners:
    """Collects extents: `data` are rows with blocks of their own, `inner` lie in blocks of inodes.

    Each row: kind, inode, file offset, bytes of the file, volume offset, bytes there, flags."""

    volume: InodeLayout
    size: int
    packed: int
    tree: InodeTree
    damage: Damage

    def __post_init__(self) -> None:
        column = self.tree.column
        self.claimed = 0
        self.data: list[tuple[Int, ...]] = []
        self.inner: list[tuple[Int, ...]] = []
        kind = column["mode"] >> 12
        self.kind = np.select(
            [column["nid"] == self.packed, kind == 0o4, kind == 0o12],
            [tables.METADATA, tables.DIRECTORY, tables.SYMLINK],
            tables.DATA,
        )
        self.blocks_used = [(column["at"], column["body"])]
        content = np.isin(kind, (0o4, 0o10, 0o12))
        self.has_content = content & (column["size"] > 0)
        self.fragment = (EMPTY, EMPTY, EMPTY)

    def packed_known(self) -> bool:
        """Whether the packed inode is there."""
        return bool((self.tree.column["nid"] == self.packed).any())

    def _where(self, *layouts: int) -> Int:
        return np.flatnonzero(np.isin(self.tree.column["layout"], layouts) & self.has_content)

    def _add(
        self, inner: bool, rows: Int, file_offset: Int, held: Int, start: Int, length: Int, flags: Int
    ) -> None:
        """Rows of the inodes at positions `rows`, but those that leave the volume."""
        inside = (start >= 0) & (length > 0) & (start <= self.size - length)
        self.damage.add(
            "outside", "[piece|pieces] of files [lies|lie] outside the volume", start[~inside & (length > 0)]
        )
        batch = (self.kind[rows], self.tree.column["nid"][rows], file_offset, held, start, length, flags)
        self._claim(int(inside.sum()))
        (self.inner if inner else self.data).append(tuple(values[inside] for values in batch))
        if inner:
            self.blocks_used.append((start[inside], (start + length)[inside]))

    def _claim(self, count: int) -> None:
        """Corrupt where there are more rows than what is stored can have: indexes that overlap,
        ends that each lie in all of the packed inode."""
        self.claimed += count
        afford(
            self.volume.reader, self.claimed * ROW, f"the rows of {plural(self.claimed, 'piece')} of files"
        )

    def flat(self) -> None:
        """Files in one piece, and tails after their inodes."""
        rows = self._where(FLAT_PLAIN, FLAT_INLINE)
        column = {name: values[rows] for name, values in self.tree.column.items()}
        start, whole, tail = flat_ranges(column, self.volume.block_size)
        zero = np.zeros(len(rows), np.int64)
        length = -(-whole // self.volume.block_size) * self.volume.block_size
        some = whole > 0
        self._add(False, rows[some], zero[some], whole[some], start[some], length[some], zero[some])
        some = tail > 0
        self._add(
            True,
            rows[some],
            whole[some],
            tail[some],
            column["body"][some],
            tail[some],
            zero[some] + tables.INLINE,
        )

    def chunks(self, devices: int) -> None:
        """Files in chunks of equal size, each anywhere, or nowhere for a hole."""
        rows = self._where(CHUNK_BASED)
        form = self.tree.column["union"][rows]
        size, body = self.tree.column["size"][rows], self.tree.column["body"][rows]
        bits = np.minimum((form & CHUNK_BLKBITS) + self.volume.block_size.bit_length() - 1, 62)
        unit = np.where(form & CHUNK_INDEXES, 8, 4)
        count = (size - 1 >> bits) + 1
        body = -(-body // unit) * unit
        good = self._affordable(body, count * unit)
        rows, bits, unit, count, body, size = (
            values[good] for values in (rows, bits, unit, count, body, size)
        )
        self._inner_tree(rows, body, count * unit)
        foreign = 0
        for part in _batches(count * unit):
            data = pieces(self.volume.reader, body[part], (count * unit)[part])
            row, nth = expand(count[part])
            base = np.cumsum((count * unit)[part]) - (count * unit)[part]
            at = base[row] + nth * unit[part][row] + np.where(unit[part][row] == 8, 4, 0)
            block = _u32(data, at)
            device = np.where(unit[part][row] == 8, _u32(data, np.maximum(at - 4, 0)) >> 16, 0) & (
                (1 << devices.bit_length()) - 1
            )
            foreign += int(((device != 0) & (block != HOLE)).sum())
            keep = (block != HOLE) & (device == 0)
            row, nth, block = row[keep], nth[keep], block[keep]
            file_offset = nth << bits[part][row]
            held = np.minimum(np.int64(1) << bits[part][row], size[part][row] - file_offset)
            length = -(-held // self.volume.block_size) * self.volume.block_size
            self._add(
                False,
                rows[part][row],
                file_offset,
                held,
                block * self.volume.block_size,
                length,
                np.zeros(len(row), np.int64),
            )
        what = "[chunk of a file lies|chunks of files lie] on another device"
        self.damage.add("elsewhere", what, count=foreign)

    def _affordable(self, at: Int, length: Int) -> np.ndarray:
        """Which indexes lie inside the volume, as long as all together are not longer than it."""
        good = (length >= 0) & (length <= self.size) & (at <= self.size - np.minimum(length, self.size))
        good &= np.cumsum(np.where(good, length, 0)) <= allowance(self.volume.reader)
        what = (
            "[index of a file lies outside the volume, or claims|indexes "
            "of files lie outside the volume, or claim] more than it has"
        )
        return self.damage.check(good, "outside", what, at)

    def _inner_tree(self, rows: Int, at: Int, length: Int) -> None:
        """Indexes after inodes."""
        flags = np.full(len(rows), tables.INLINE, np.int64)
        kind = np.full(len(rows), tables.TREE, np.int64)
        none = np.full(len(rows), -1, np.int64)
        self.inner.append((kind, self.tree.column["nid"][rows], none, none, at, length, flags))
        self.blocks_used.append((at, at + length))

    def compressed(self) -> None:
        """Files in physical clusters; the end of a file may lie after its index or in the packed inode."""
        rows = self._where(COMPRESSED_FULL, COMPRESSED_COMPACT)
        header = -(-self.tree.column["body"][rows] // 8) * 8
        good = self._affordable(header, np.full(len(rows), MAP_HEADER, np.int64))
        rows, header = rows[good], header[good]
        head = (
            pieces(self.volume.reader, header, np.full(len(rows), MAP_HEADER, np.int64))
            .reshape(-1, MAP_HEADER)
            .astype(np.int64)
        )
        low = head[:, 0] | head[:, 1] << 8 | head[:, 2] << 16 | head[:, 3] << 24
        high = head[:, 4] | head[:, 5] << 8 | head[:, 6] << 16 | (head[:, 7] & 0x7F) << 24
        whole = (head[:, 7] & FRAGMENT_INODE) != 0
        size = self.tree.column["size"][rows]
        self._inner_tree(rows[whole], header[whole], np.full(int(whole.sum()), MAP_HEADER, np.int64))
        fragments = [(rows[whole], np.zeros(int(whole.sum()), np.int64), (low | high << 32)[whole])]
        compact = self.tree.column["layout"][rows] == COMPRESSED_COMPACT
        bits = (head[:, 7] & 7) + self.volume.block_size.bit_length() - 1
        files = ClusteredFiles(
            header[~whole],
            size[~whole],
            compact[~whole],
            (head[:, 4] | head[:, 5] << 8)[~whole],
            bits[~whole],
        )
        rows, low = rows[~whole], low[~whole]
        length = files.index_end() - files.header
        good = self._affordable(files.header, length)
        files = take(files, good)
        rows, low, length = rows[good], low[good], length[good]
        self._inner_tree(rows, files.header, length)
        for part in _batches(length):
            some = take(files, part)
            data = np.append(pieces(self.volume.reader, some.header, length[part]), np.zeros(8, np.uint8))
            base = np.cumsum(length[part]) - length[part]
            clusters, broken = physical_clusters(some, data, base, self.volume.block_size)
            what = (
                "[entry of a cluster index contradicts itself|entries "
                "of cluster indexes contradict themselves]"
            )
            self.damage.add("extents", what, int(some.header[0]), broken)
            fragments.append(self._clusters(rows[part], low[part], some, clusters))
        self.fragment = tuple(np.concatenate([piece[i] for piece in fragments]) for i in range(3))  # type: ignore[assignment]

    def _clusters(self, rows: Int, low: Int, files: ClusteredFiles, found: Clusters) -> tuple[Int, Int, Int]:
        """Rows of physical clusters; returns (inode row, file offset, offset in the packed inode) of those
        that lie there."""
        advise = files.advise[found.file]
        inline = found.last & ((advise & ADVISE_INLINE_PCLUSTER) != 0)
        fragment = found.last & ~inline & ((advise & ADVISE_FRAGMENT_PCLUSTER) != 0)
        own = ~inline & ~fragment
        row = rows[found.file]
        flags = np.full(len(row), tables.COMPRESSED, np.int64)
        self._add(False, row[own], found.file_offset[own], found.file_length[own],
            (found.block * self.volume.block_size)[own], found.length[own],
                  flags[own])  # fmt: skip
        idata = (low >> 16)[found.file]
        self._add(True, row[inline], found.file_offset[inline], found.file_length[inline],
            files.index_end()[found.file][inline], idata[inline],
                  flags[inline] + tables.INLINE)  # fmt: skip
        place = low[found.file] | np.where(files.compact[found.file], 0, found.block << 32)
        return row[fragment], found.file_offset[fragment], place[fragment]

    def attributes(self, shared_base: int) -> None:
        """Attributes after inodes, and the shared ones that they refer to by number."""
        column = self.tree.column
        rows = np.flatnonzero(column["xattr_size"] > 0)
        at, size = column["xattr_at"][rows], column["xattr_size"][rows]
        none = np.full(len(rows), -1, np.int64)
        self.inner.append(
            (
                np.full(len(rows), tables.XATTR, np.int64),
                column["nid"][rows],
                none,
                none,
                at,
                size,
                none * 0 + tables.INLINE,
            )
        )
        head = pieces(self.volume.reader, at, np.full(len(rows), 12, np.int64)).reshape(-1, 12)
        count = np.minimum(head[:, 4].astype(np.int64), (size - 12) // 4)
        data = pieces(self.volume.reader, at + 12, 4 * count)
        self._claim(int(count.sum()))
        row, _ = expand(count)
        place = shared_base + 4 * _u32(data, 4 * np.arange(len(row), dtype=np.int64))
        inside = place <= self.size - 4
        self.damage.check(
            inside, "outside", "shared [attribute lies|attributes lie] outside the volume", place
        )
        row, place = row[inside], place[inside]
        entry = (
            pieces(self.volume.reader, place, np.full(len(place), 4, np.int64))
            .reshape(-1, 4)
            .astype(np.int64)
        )
        length = np.minimum(
            -(-(4 + entry[:, 0] + (entry[:, 2] | entry[:, 3] << 8)) // 4) * 4, self.size - place
        )
        none = np.full(len(row), -1, np.int64)
        kind = np.full(len(row), tables.XATTR, np.int64)
        flags = np.full(len(row), tables.INLINE | tables.SHARED, np.int64)
        self.inner.append((kind, column["nid"][rows][row], none, none, place, length, flags))
        self.blocks_used.append((place, place + length))

    def metadata(self, rows: ExtentRows, fixed: list[tuple[str, int, int]]) -> None:
        """Rows of the boot area, of structures at fixed places, and of the blocks in which inodes lie."""
        block = self.volume.block_size
        rows.add(tables.BOOT, 0, SUPER_OFFSET, part="boot area")
        taken = [(0, SUPER_OFFSET)]
        for part, start, end in fixed:
            rows.add(tables.METADATA, start, max(0, end - start), part=part)
            taken.append((start, max(start, end)))
        low = np.concatenate([pair[0] for pair in self.blocks_used]) // block * block
        high = np.minimum(
            -(-np.concatenate([pair[1] for pair in self.blocks_used]) // block) * block, self.size
        )
        # the rest of the superblock's own block holds the first inodes, or nothing
        low = np.append(low, SUPER_OFFSET // block * block)
        high = np.append(high, min(-(-(SUPER_OFFSET + SUPERBLOCK.itemsize) // block) * block, self.size))
        edges = ints([start for start, _ in taken]), ints([end for _, end in taken])
        own = subtract(low, high, *edges)
        rows.add(tables.METADATA, own[0], own[1] - own[0], part="inodes")
        self.taken = union(np.append(own[0], edges[0]), np.append(own[1], edges[1]))

    def content(self, rows: ExtentRows) -> None:
        """Rows of all that was collected, with what is shared marked."""
        kind, inode, file_offset, held, start, length, flags = _columns(self.data)
        cut = cut_shared(start, start + length)
        shared = np.zeros(len(start), bool)
        np.logical_or.at(shared, cut.row, cut.shared)
        packed_clusters = kind == tables.METADATA
        whole = (flags & tables.COMPRESSED) != 0
        marked = flags + tables.SHARED * shared
        for mine, part in ((whole & ~packed_clusters, None), (whole & packed_clusters, "packed inode")):
            rows.add(kind[mine], start[mine], length[mine], part=part, inode=inode[mine],
                file_offset=file_offset[mine], file_length=held[mine],
                     flags=marked[mine])  # fmt: skip
        row, low = cut.row, cut.start
        at, size = file_offset[row] + low - start[row], cut.end - low
        for mine, part in (
            (~whole[row] & ~packed_clusters[row], None),
            (~whole[row] & packed_clusters[row], "packed inode"),
        ):
            rows.add(kind[row][mine], low[mine], size[mine], part=part, inode=inode[row][mine],
                file_offset=at[mine],
                     flags=tables.SHARED * cut.shared[mine])  # fmt: skip
        self._fragments(rows, packed_clusters, (inode, file_offset, held, start, length, flags))
        kind, inode, file_offset, held, start, length, flags = _columns(self.inner)
        for mine, part in ((kind != tables.METADATA, None), (kind == tables.METADATA, "packed inode")):
            rows.add(kind[mine], start[mine], length[mine], inode=inode[mine], file_offset=file_offset[mine],
                file_length=held[mine],
                     flags=flags[mine], part=part)  # fmt: skip

    def _fragments(self, rows: ExtentRows, of_packed: np.ndarray, columns: tuple[Int, ...]) -> None:
        """Ends of files inside the packed inode: for each its clusters there."""
        owner, at, place = self.fragment
        if not len(owner):
            return
        _, offset, held, start, length, flags = (values[of_packed] for values in columns)
        order = np.argsort(offset, kind="stable")
        offset, held, start, length, flags = (
            values[order] for values in (offset, held, start, length, flags)
        )
        size = self.tree.column["size"][owner] - at
        first = np.searchsorted(offset + held, place, "right")
        last = np.searchsorted(offset, place + size, "left")
        self.damage.check(
            last > first, "extents", "[fragment is|fragments are] not in the packed inode", place
        )
        self._claim(int(np.maximum(last - first, 0).sum()))
        row, nth = expand(np.maximum(last - first, 0))
        cluster = first[row] + nth
        low = np.maximum(place[row], offset[cluster])
        high = np.minimum((place + size)[row], (offset + held)[cluster])
        packed = (flags[cluster] & tables.COMPRESSED) != 0
        where = np.where(packed, start[cluster], start[cluster] + low - offset[cluster])
        rows.add(
            tables.DATA,
            where,
            np.where(packed, length[cluster], high - low),
            inode=self.tree.column["nid"][owner][row],
            file_offset=at[row] + low - place[row],
            file_length=high - low,
            flags=flags[cluster] | tables.INLINE | tables.SHARED,
        )


def _columns(batches: list[tuple[Int, ...]]) -> tuple[Int, ...]:
    return tuple(np.concatenate([EMPTY, *(batch[i] for batch in batches)]) for i in range(7))


def _batches(length: Int) -> list[slice]:
    """Rows in runs of at most about INDEX_BATCH bytes."""
    edges = np.flatnonzero(np.diff(np.cumsum(length) // INDEX_BATCH, prepend=-1)).tolist()
    return [slice(low, high) for low, high in itertools.pairwise([*edges, len(length)])]


def _u32(data: np.ndarray, at: Int) -> Int:
    """Little-endian 32-bit numbers at positions `at`."""
    four = data[at[:, None] + np.arange(4)].astype(np.int64) if len(at) else np.zeros((0, 4), np.int64)
    result: Int = four @ (np.int64(1) << (8 * np.arange(4, dtype=np.int64)))
    return result
