"""Metadata blocks: at most 8 KiB each, found by walking their headers, decompressed one by one.

Sources: Linux fs/squashfs/block.c, squashfs_fs.h (compression ids, header of a metadata block), and the six
*_wrapper.c.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, expand, ints
from virt_bmap.core.codecs import lz4_block, lzma1, lzo1x, xz, zlibbed, zstd
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.packed import Codec

METADATA_SIZE = 8192
UNCOMPRESSED = 0x8000
GZIP, LZMA, LZO, XZ, LZ4, ZSTD = range(1, 7)
COMPRESSIONS = {GZIP: "gzip", LZMA: "lzma", LZO: "lzo", XZ: "xz", LZ4: "lz4", ZSTD: "zstd"}
MAX_RATIO = 64
"""Honest tables shrink some tenfold; more than this, beyond the first 16 MiB, is a bomb."""
FREE_BYTES = 16 << 20


class MetadataBlocks(NamedTuple):
    """A run of metadata blocks: where each begins on disk (bytes of the volume), how long it is there with
    its header, and where its content begins in `data`, which ends in 64 zero bytes so that fixed-size
    windows never leave it; `length` is without them."""

    disk: Int
    disk_length: Int
    compressed: np.ndarray
    start: Int
    data: Bytes
    length: int

    def position(self, block: Int, offset: Int) -> Int:
        """Where (block, offset) references lead in `data`; `block` in bytes of the volume. -1: there is no
        such block or offset."""
        if not len(self.disk):
            return np.full(len(block), -1, np.int64)
        row = np.clip(np.searchsorted(self.disk, block), 0, len(self.disk) - 1)
        at = self.start[row] + offset
        good = (self.disk[row] == block) & (offset < METADATA_SIZE) & (at < self.length)
        return np.where(good, at, -1)

    def on_disk(self, at: Int, length: Int) -> tuple[Int, Int, Int, np.ndarray]:
        """(row, volume offset, length, compressed) of what holds data[at:at+length]: whole blocks where
        compressed, else the very bytes."""
        if not len(self.start):
            return ints([]), ints([]), ints([]), np.zeros(0, bool)
        first = np.searchsorted(self.start, at, "right") - 1
        last = np.searchsorted(self.start, at + np.maximum(length, 1) - 1, "right") - 1
        row, nth = expand(last - first + 1)
        block = first[row] + nth
        ends = np.append(self.start[1:], self.length)
        low = np.maximum(at[row], self.start[block]) - self.start[block]
        high = np.minimum((at + length)[row], ends[block]) - self.start[block]
        packed = self.compressed[block]
        offset = np.where(packed, self.disk[block], self.disk[block] + 2 + low)
        return row, offset, np.where(packed, self.disk_length[block], high - low), packed


CODECS = {GZIP: zlibbed, LZMA: lzma1, LZO: lzo1x, XZ: xz, LZ4: lz4_block, ZSTD: zstd}


def codec_of(superblock: np.void) -> Codec:
    """What unpacks the image's blocks. Raises Unsupported."""
    compression = int(superblock["compression"])
    if compression not in CODECS:
        raise Unsupported(
            f"the superblock names compression {compression}, which is not one of "
            f"{', '.join(COMPRESSIONS.values())}",
            20,
        )
    return CODECS[compression]


def read_blocks(raw: Bytes, disk: int, codec: Codec, what: str) -> tuple[MetadataBlocks, int]:
    """The metadata blocks that fill `raw`, which lies at `disk` of the volume, and how many of them are
    broken (read as nothing)."""
    data = raw.tobytes()
    starts: list[tuple[int, int, bool]] = []
    at = 0
    while at + 2 <= len(data):
        header = int.from_bytes(data[at : at + 2], "little")
        length = header & (UNCOMPRESSED - 1) or UNCOMPRESSED
        if at + 2 + length > len(data):
            break
        starts.append((at, length, not header & UNCOMPRESSED))
        at += 2 + length
    parts: list[bytes] = []
    broken = int(at < len(data))
    left = MAX_RATIO * len(data) + FREE_BYTES
    for at, length, packed in starts:
        content = data[at + 2 : at + 2 + length]
        try:
            parts.append((codec(content, METADATA_SIZE) if packed else content)[:METADATA_SIZE])
        except ValueError:
            broken += 1
            parts.append(b"")
        left -= len(parts[-1])
        if left < 0:
            raise Corrupt(
                f"the {what} at byte {disk:#x} grows more than {MAX_RATIO}-fold when it is decompressed", disk
            )
    lengths = ints([len(part) for part in parts])
    joined = np.frombuffer(b"".join([*parts, bytes(64)]), np.uint8)
    return MetadataBlocks(
        ints([disk + start for start, _, _ in starts]), ints([2 + length for _, length, _ in starts]),
        np.array([packed for _, _, packed in starts], bool), np.cumsum(lengths) - lengths, joined,
        int(lengths.sum()),
    ), broken  # fmt: skip
