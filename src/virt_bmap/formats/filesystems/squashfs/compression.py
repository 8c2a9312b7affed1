"""Metadata blocks: at most 8 KiB each, found by walking their headers, decompressed one by one.

Sources: Linux fs/squashfs/block.c, squashfs_fs.h (compression ids, header of a metadata block), and the six
*_wrapper.c; Linux Documentation/staging/lzo.rst for the LZO1X stream.
"""

import lzma
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bytes, Int, expand, ints
from virt_bmap.core.errors import Corrupt, Unsupported

METADATA_SIZE = 8192
UNCOMPRESSED = 0x8000
GZIP, LZMA, LZO, XZ, LZ4, ZSTD = range(1, 7)
COMPRESSIONS = {GZIP: "gzip", LZMA: "lzma", LZO: "lzo", XZ: "xz", LZ4: "lz4", ZSTD: "zstd"}
MEMORY_LIMIT = 64 << 20
"""For LZMA and XZ: their dictionaries are at most as large as a block, 1 MiB; a hostile stream may ask for 4
GiB."""
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


def decompressor(compression: int) -> Callable[[bytes], bytes]:
    """A function from the stored to the original bytes, at most METADATA_SIZE of them.

    It raises ValueError on a broken stream.
    """
    functions: dict[int, Callable[[bytes], bytes]] = {
        GZIP: _gzip,
        LZMA: _lzma,
        LZO: lzo,
        XZ: _xz,
        LZ4: _lz4,
        ZSTD: _zstd,
    }
    if compression not in functions:
        raise Unsupported(
            f"the superblock names compression {compression}, which is not one of "
            f"{', '.join(COMPRESSIONS.values())}",
            20,
        )
    return functions[compression]


def _gzip(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, METADATA_SIZE)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _lzma(data: bytes) -> bytes:
    return _lzma_of(data, lzma.FORMAT_ALONE)


def _xz(data: bytes) -> bytes:
    return _lzma_of(data, lzma.FORMAT_XZ)


def _lzma_of(data: bytes, form: int) -> bytes:
    try:
        return lzma.LZMADecompressor(form, memlimit=MEMORY_LIMIT).decompress(data, METADATA_SIZE)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(str(error)) from None


def _zstd(data: bytes) -> bytes:
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            return bytes(stream.read(METADATA_SIZE))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


def _lz4(data: bytes) -> bytes:
    """The raw LZ4 block format: a token, literals, a distance; no header says how long the result is."""
    out = bytearray()
    at, end = 0, len(data)
    try:
        while at < end:
            token = data[at]
            at += 1
            count, at = _lz4_length(data, at, token >> 4)
            out += data[at : at + count]
            at += count
            if at >= end or len(out) > METADATA_SIZE:
                break
            distance = data[at] | data[at + 1] << 8
            count, at = _lz4_length(data, at + 2, token & 15)
            _copy(out, distance, count + 4)
    except IndexError:
        raise ValueError("LZ4 stream is cut off") from None
    return bytes(out[:METADATA_SIZE])


def _lz4_length(data: bytes, at: int, count: int) -> tuple[int, int]:
    if count == 15:
        while True:
            count += data[at]
            at += 1
            if data[at - 1] != 255:
                break
    return count, at


def _copy(out: bytearray, distance: int, count: int) -> None:
    """Append `count` bytes from `distance` before the end; they may overlap what is being written."""
    if not 0 < distance <= len(out):
        raise ValueError("a distance leads before the beginning")
    if len(out) + count > 2 * METADATA_SIZE:
        raise ValueError("the block is longer than 8 KiB")
    piece = bytes(out[-distance:])
    out += (piece * (count // distance + 1))[:count]


def lzo(data: bytes) -> bytes:
    """LZO1X as Documentation/staging/lzo.rst describes it; there is no such decoder in Python or Arrow."""
    out = bytearray()
    try:
        _lzo(data, out)
    except IndexError:
        raise ValueError("LZO stream is cut off") from None
    return bytes(out[:METADATA_SIZE])


def _lzo(data: bytes, out: bytearray) -> None:
    at, state = 0, 0
    if data[0] > 17:  # the first byte alone: literals
        count = data[0] - 17
        out += data[1 : 1 + count]
        at, state = 1 + count, min(count, 4)
    while True:
        code = data[at]
        at += 1
        if code >= 64:  # short match; the high bits are its length
            if code >= 128:
                count, distance = 5 + (code >> 5 & 3), (data[at] << 3) + (code >> 2 & 7) + 1
            else:
                count, distance = 3 + (code >> 5 & 1), (data[at] << 3) + (code >> 2 & 7) + 1
            at, literals = at + 1, code & 3
        elif code >= 16:  # long match: 16..31 farther than 16 KiB, 32..63 within
            mask = 31 if code >= 32 else 7
            count, at = _lzo_length(data, at, code & mask, mask)
            low = data[at] | data[at + 1] << 8
            at, literals = at + 2, low & 3
            count += 2
            distance = (low >> 2) + 1
            if code < 32:
                distance = ((code & 8) << 11) + (low >> 2) + 16384
                if distance == 16384:
                    return
        elif state == 0:  # a run of literals
            count, at = _lzo_length(data, at, code, 15)
            out += data[at : at + count + 3]
            at, state = at + count + 3, 4
            continue
        elif state == 4:  # after a run of literals: three bytes from 2 to 3 KiB back
            count, distance = 3, (data[at] << 2) + (code >> 2) + 2049
            at, literals = at + 1, code & 3
        else:
            count, distance = 2, (data[at] << 2) + (code >> 2) + 1
            at, literals = at + 1, code & 3
        _copy(out, distance, count)
        out += data[at : at + literals]
        at, state = at + literals, literals


def _lzo_length(data: bytes, at: int, count: int, mask: int) -> tuple[int, int]:
    """A length of 0 goes on in further bytes: 255 for each zero byte, then the rest."""
    if count:
        return count, at
    count = mask
    while data[at] == 0:
        count += 255
        at += 1
    return count + data[at], at + 1


def read_blocks(
    raw: Bytes, disk: int, unpack: Callable[[bytes], bytes], what: str
) -> tuple[MetadataBlocks, int]:
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
            parts.append(unpack(content) if packed else content[:METADATA_SIZE])
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
