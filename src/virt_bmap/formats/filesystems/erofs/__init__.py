"""EROFS: inodes, names and blocks as arrays, compressed files by their cluster indexes.

What is read: the superblock, inodes of both sizes from the root directory on, flat, inline, chunk-based and
compressed files (full and compact indexes, big physical clusters, inline tails, fragments in the packed
inode, deduplicated clusters), attributes inline and shared. Physical clusters are COMPRESSED rows, one each;
PLAIN ones hold the file's bytes as they are, though rotated, and are COMPRESSED rows too. Inodes, their
attributes, indexes and inline tails share blocks, so these blocks are metadata ("inodes"), and what lies in
them are INLINE rows of the inode. A fragment is shown in each file as the clusters of the packed inode that
hold it. There is no allocator: a block without owner is unknown.

Sources: Linux fs/erofs (erofs_fs.h, super.c, inode.c, data.c, dir.c, xattr.c, zmap.c);
Documentation/filesystems/erofs.rst.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int, expand, ints, subtract, union
from virt_bmap.core.columns import take
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import ROW, afford, allowance
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.erofs.clusters import (
    ADVISE_FRAGMENT_PCLUSTER,
    ADVISE_INLINE_PCLUSTER,
    FRAGMENT_INODE,
    MAP_HEADER,
    Clusters,
    Files,
    physical_clusters,
)
from virt_bmap.formats.filesystems.erofs.inodes import (
    CHUNK_BASED,
    COMPRESSED_COMPACT,
    COMPRESSED_FULL,
    FLAT_INLINE,
    FLAT_PLAIN,
    HOLE,
    Tree,
    Volume,
    flat_ranges,
    pieces,
    walk,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "erofs"
FEATURES = (
    "compact and extended inodes", "flat, inline and chunk-based files",
    "compressed files with full and compact indexes", "big physical clusters", "inline tails (ztailpacking)",
    "fragments in the packed inode", ("deduplicated clusters and chunks (as "
        "shared)"), "inline and shared xattrs",
)  # fmt: skip
REFUSED = (
    "48-bit block addresses",
    "metadata compression (metabox)",
    "data on further devices (named, not mapped)",
)
ORACLES = ("kernel FIEMAP through a loop mount", "content through a loop mount", "dump.erofs")
CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: geometry, features known",
        "inodes and directories: layout, place, order of blocks",
        "clusters: indexes, place, overlaps",
    ),
    unchecked=(
        "content of files",
        "checksum of the superblock",
    ),
)

SUPER_OFFSET = 1024
MAGIC = 0xE0F5E1E2
SUPERBLOCK = struct(128, [
    (0, "magic", "<u4"), (8, "feature_compat", "<u4"), (12, "blkszbits", "u1"), (13, "sb_extslots", "u1"),
    (14, "root_nid", "<u2"), (16, "inos", "<u8"), (24, "build_time", "<u8"), (32, "build_time_nsec", "<u4"),
    (36, "blocks", "<u4"), (40, "meta_blkaddr", "<u4"), (44, "xattr_blkaddr", "<u4"), (48, "uuid", "V16"),
    (64, "volume_name", "V16"), (80, "feature_incompat", "<u4"), (84, "available_compr_algs", "<u2"),
    (86, "extra_devices", "<u2"), (88, "devt_slotoff", "<u2"), (90, "dirblkbits", "u1"),
    (91, "xattr_prefix_count", "u1"), (92, "xattr_prefix_start", "<u4"), (96, "packed_nid", "<u8"),
])  # fmt: skip
COMPR_CFGS, CHUNKED_FILE, DEVICE_TABLE, ZTAILPACKING, FRAGMENTS, XATTR_PREFIXES = 2, 4, 8, 0x10, 0x20, 0x40
KNOWN_INCOMPAT = 0x7F
INCOMPAT = {1: "zero_padding", 2: "compr_cfgs/big_pcluster", 4: "chunked_file", 8: "device_table/compr_head2",
    16: "ztailpacking",
            32: "fragments/dedupe", 64: "xattr_prefixes", 128: "48bit", 256: "metabox"}  # fmt: skip
COMPAT = {1: "sb_chksum", 2: "mtime", 4: "xattr_filter"}
CHUNK_BLKBITS, CHUNK_INDEXES = 0x1F, 0x20
DEVICE_SLOT = 128
MAX_CONFIGS = 16
INDEX_BATCH = 4 << 20
"""Bytes of indexes that are looked at together: each four of them are a row."""


def probe(reader: Reader) -> bool:
    """The superblock's magic."""
    return reader.read_clipped(SUPER_OFFSET, 4) == MAGIC.to_bytes(4, "little")


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    superblock = read_superblock(reader)
    bits = int(superblock["blkszbits"])
    volume = Volume(
        reader,
        1 << bits,
        int(superblock["meta_blkaddr"]) << bits,
        min(int(superblock["build_time"]), 2**33) * 1_000_000_000 + int(superblock["build_time_nsec"]),
    )
    root, packed = int(superblock["root_nid"]), min(int(superblock["packed_nid"]), 2**56)
    has_packed = packed > 0 and bool(int(superblock["feature_incompat"]) & FRAGMENTS)
    tree = walk(volume, ints([root, packed] if has_packed else [root]), damage)
    if not (tree.column["mode"][tree.column["nid"] == root] >> 12 == 0o4).any():
        raise Corrupt(
            f"{reader.name}: root_nid at byte {SUPER_OFFSET + 14} is {root}, where no directory lies",
            SUPER_OFFSET + 14,
        )
    found = _Found(
        volume,
        min(int(superblock["blocks"]) << bits, reader.size),
        packed if has_packed else -1,
        tree,
        damage,
    )
    found.flat()
    found.chunks(int(superblock["extra_devices"]))
    found.compressed()
    found.attributes(int(superblock["xattr_blkaddr"]) << bits)
    rows = ExtentRows()
    found.metadata(rows, _fixed(reader, superblock, found.packed_known()))
    found.content(rows)
    if int(superblock["blocks"]) << bits > reader.size:
        damage.say(
            "truncated",
            f"the image has {reader.size} of the {int(superblock['blocks']) << bits} bytes that it claims",
            reader.size,
        )
    label = superblock["volume_name"].tobytes().split(b"\0")[0].decode("utf-8", "replace")
    uuid = superblock["uuid"].tobytes().hex()
    return Filesystem(
        type=NAME,
        size=found.size,
        block_size=1 << bits,
        root=root,
        state=tables.CLEAN,
        reader=reader,
        inodes=_inodes(tree, packed if has_packed else -1),
        names=_names(tree),
        extents=rows.table(0),
        uuid=f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}" if uuid.strip("0") else None,
        label=label or None,
        features=" ".join(
            [name for mask, name in COMPAT.items() if int(superblock["feature_compat"]) & mask]
            + [name for mask, name in INCOMPAT.items() if int(superblock["feature_incompat"]) & mask]
        )
        or None,
    )


def read_superblock(reader: Reader) -> np.void:
    """The superblock, where its features are all known."""
    found = record(reader.read_clipped(SUPER_OFFSET, SUPERBLOCK.itemsize), SUPERBLOCK)
    unknown = int(found["feature_incompat"]) & ~KNOWN_INCOMPAT
    if unknown:
        words = " ".join(INCOMPAT.get(1 << bit, f"{1 << bit:#x}") for bit in range(32) if unknown >> bit & 1)
        raise Unsupported(f"{reader.name}: EROFS with features that are not read: {words}", SUPER_OFFSET + 80)
    if not 9 <= int(found["blkszbits"]) <= 16 or found["dirblkbits"]:
        raise Corrupt(f"{reader.name}: blkszbits at byte {SUPER_OFFSET + 12} is {int(found['blkszbits'])} "
            f"and dirblkbits {int(found['dirblkbits'])}, not "
                      "9 to 16 and 0", SUPER_OFFSET + 12)  # fmt: skip
    return found


def _fixed(reader: Reader, superblock: np.void, packed: bool) -> list[tuple[str, int, int]]:
    """(part, start, end) of what lies at places that the superblock names."""
    incompat = int(superblock["feature_incompat"])
    end = SUPER_OFFSET + SUPERBLOCK.itemsize + 16 * int(superblock["sb_extslots"])
    found = [("superblock", SUPER_OFFSET, end)]
    if incompat & COMPR_CFGS and int(superblock["available_compr_algs"]):
        at = end
        for bit in range(MAX_CONFIGS):
            if int(superblock["available_compr_algs"]) >> bit & 1:
                at += 2 + int.from_bytes(reader.read_clipped(at, 2), "little")
        found.append(("compression configurations", end, at))
    if incompat & DEVICE_TABLE and int(superblock["extra_devices"]):
        at = int(superblock["devt_slotoff"]) * DEVICE_SLOT
        found.append(("device table", at, at + DEVICE_SLOT * int(superblock["extra_devices"])))
    if incompat & XATTR_PREFIXES and int(superblock["xattr_prefix_count"]) and not packed:
        start = at = int(superblock["xattr_prefix_start"]) * 4
        for _ in range(int(superblock["xattr_prefix_count"])):
            at += 2 + int.from_bytes(reader.read_clipped(at, 2), "little")
            at = -(-at // 4) * 4
        found.append(("xattr prefixes", start, at))
    return [(part, start, min(stop, reader.size)) for part, start, stop in found]


@dataclass
class _Found:
    """Collects extents: `data` are rows with blocks of their own, `inner` lie in blocks of inodes.

    Each row: kind, inode, file offset, bytes of the file, volume offset, bytes there, flags."""

    volume: Volume
    size: int
    packed: int
    tree: Tree
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
        self.damage.add("outside", "pieces of files lie outside the volume", start[~inside & (length > 0)])
        batch = (self.kind[rows], self.tree.column["nid"][rows], file_offset, held, start, length, flags)
        self._claim(int(inside.sum()))
        (self.inner if inner else self.data).append(tuple(values[inside] for values in batch))
        if inner:
            self.blocks_used.append((start[inside], (start + length)[inside]))

    def _claim(self, count: int) -> None:
        """Corrupt where there are more rows than what is stored can honestly have: indexes over each other,
        ends that each lie in all of the packed inode."""
        self.claimed += count
        afford(self.volume.reader, self.claimed * ROW, f"the rows of {self.claimed:,} pieces of files")

    def flat(self) -> None:
        """Files in one piece, and tails behind their inodes."""
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
        if foreign:
            self.damage.say("elsewhere", f"{foreign} chunks of files lie on another device")

    def _affordable(self, at: Int, length: Int) -> np.ndarray:
        """Which indexes lie inside the volume, as long as all together are not longer than it."""
        good = (length >= 0) & (length <= self.size) & (at <= self.size - np.minimum(length, self.size))
        good &= np.cumsum(np.where(good, length, 0)) <= allowance(self.volume.reader)
        what = "indexes of files lie outside the volume, or claim more than it has"
        return self.damage.check(good, "outside", what, at)

    def _inner_tree(self, rows: Int, at: Int, length: Int) -> None:
        """Indexes behind inodes."""
        flags = np.full(len(rows), tables.INLINE, np.int64)
        kind = np.full(len(rows), tables.TREE, np.int64)
        none = np.full(len(rows), -1, np.int64)
        self.inner.append((kind, self.tree.column["nid"][rows], none, none, at, length, flags))
        self.blocks_used.append((at, at + length))

    def compressed(self) -> None:
        """Files in physical clusters; the end of a file may lie behind its index or in the packed inode."""
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
        files = Files(
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
            what = "entries of cluster indexes contradict themselves"
            self.damage.add("extents", what, int(some.header[0]), broken)
            fragments.append(self._clusters(rows[part], low[part], some, clusters))
        self.fragment = tuple(np.concatenate([piece[i] for piece in fragments]) for i in range(3))  # type: ignore[assignment]

    def _clusters(self, rows: Int, low: Int, files: Files, found: Clusters) -> tuple[Int, Int, Int]:
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
        """Attributes behind inodes, and the shared ones that they refer to by number."""
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
        self.damage.check(inside, "outside", "shared attributes lie outside the volume", place)
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
        self.damage.check(last > first, "extents", "fragments are not in the packed inode", place)
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


def _inodes(tree: Tree, packed: int) -> pa.Table:
    column = tree.column
    kind = tables.type_of_mode(column["mode"])
    compressed = np.isin(column["layout"], (COMPRESSED_FULL, COMPRESSED_COMPACT))
    return tables.make(
        "inodes", volume=np.zeros(len(kind), np.int64), inode=column["nid"],
        type=np.where(column["nid"] == packed, tables.T_METADATA, kind).astype(np.uint8), mode=column["mode"],
        uid=column["uid"], gid=column["gid"], size=column["size"], nlink=column["nlink"],
        mtime_ns=column["mtime_ns"], flags=compressed * np.int64(tables.I_COMPRESSED),
        record_offset=column["at"],
    )  # fmt: skip


def _names(tree: Tree) -> pa.Table:
    offsets = np.append(0, np.cumsum(tree.name_length)).astype(np.int32)
    names = pa.Array.from_buffers(
        pa.binary(), len(tree.name_length), [None, pa.py_buffer(offsets), pa.py_buffer(tree.name)]
    )
    return tables.make(
        "names", volume=np.zeros(len(names), np.int64), parent=tree.parent, inode=tree.child, name=names
    )


def _structures() -> Structures:
    return {
        "superblock": Structure(SUPERBLOCK),
    }


FORMAT = FilesystemFormat(NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
