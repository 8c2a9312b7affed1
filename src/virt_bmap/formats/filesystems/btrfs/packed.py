"""Compressed extents: what each unpacks to, and which bytes of it files show.

An extent is compressed as a whole, at most MAX_UNCOMPRESSED bytes of a file; whoever refers to it uses a part
of what comes out, from byte `file_offset - origin` on. What comes out less is zeroes.

Sources: fs/btrfs/compression.h, zlib.c, zstd.c, lzo.c ("Btrfs LZO compression format"), inode.c
uncompress_inline() (v6.12).
"""

import zlib
from functools import partial

import numpy as np

from virt_bmap.core.arrays import Int
from virt_bmap.core.codecs import Codec, deflated, lzo1x, zstd
from virt_bmap.core.packed import Packed, Units, UnpackedReader
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs.inodes import Inline
from virt_bmap.formats.filesystems.btrfs.items import Columns
from virt_bmap.formats.filesystems.btrfs.owners import FileExtents
from virt_bmap.model import tables
from virt_bmap.model.paths import positions

MAX_UNCOMPRESSED = 128 << 10
ZLIB, LZO, ZSTD = 1, 2, 3
"""The field `compression`."""
LZO_LENGTH = 4
"""Bytes of each length in LZO's framing."""


def packed_of(
    reader: Reader, sectorsize: int, regular: FileExtents, inline: Inline, items: list[Columns]
) -> Packed | None:
    """The content that is kept compressed, None where there is none. `items` are the file extent items with
    `disk_bytenr` or `start`, `compression` and `ram_bytes`, of trees and logs.

    Left out is what claims to be what it can't: an unknown compression, more bytes than an extent may have.
    """
    mine = _is_packed(regular.flags) & (regular.kind == tables.DATA) & (regular.part == 0)
    regular = regular.select(mine)
    small = _is_packed(inline.flags)
    if not (len(regular.inode) or small.any()):
        return None
    start = np.append(regular.base, inline.start[small])
    length = np.append(regular.whole, inline.length[small])
    offset = np.append(regular.file_offset, inline.file_offset[small])
    count = np.append(regular.file_length, inline.file_length[small])
    skip = np.append(regular.file_offset - regular.origin, np.zeros(small.sum(), np.int64))
    at, first, unit = np.unique(start, return_index=True, return_inverse=True)
    compression, size = _told(items, at)
    known = np.isin(compression, (ZLIB, LZO, ZSTD)) & (size > 0) & (size <= MAX_UNCOMPRESSED)
    fits = known[unit] & (skip >= 0) & (skip + count <= size[unit])
    if not fits.any():
        return None
    number = np.cumsum(known) - 1
    kept = np.flatnonzero(known)
    units = Units(size[kept], compression[kept], np.arange(len(kept) + 1), at[kept], length[first[kept]])
    unpacked = UnpackedReader(reader, units, _codecs(sectorsize))
    return Packed(
        unpacked,
        np.append(regular.inode, inline.inode[small])[fits],
        offset[fits],
        count[fits],
        unpacked.place[number[unit[fits]]] + skip[fits],
    )


def _is_packed(flags: Int) -> np.ndarray:
    found: np.ndarray = flags & (tables.COMPRESSED | tables.ENCRYPTED) == tables.COMPRESSED
    return found


def _told(items: list[Columns], at: Int) -> tuple[Int, Int]:
    """(compression, ram_bytes) of the extents that begin at these sorted addresses; 0 where no item has
    them."""
    address = np.concatenate([rows.get("disk_bytenr", rows.get("start")) for rows in items])
    row = positions(address, at)
    there = row >= 0
    compression, size = (
        np.where(there, np.concatenate([rows[name] for rows in items])[row], 0)
        for name in ("compression", "ram_bytes")
    )
    return compression, size


# ---- what the streams look like ----------------------------------------------------------------------------


def _codecs(sectorsize: int) -> tuple[Codec, ...]:
    """By the field `compression`."""
    return (
        _filled(lambda data, size: data),
        _filled(partial(deflated, window=zlib.MAX_WBITS)),
        _filled(partial(lzo, sectorsize)),
        _filled(zstd),
    )


def _filled(codec: Codec) -> Codec:
    """With zeroes to the end, as the kernel fills what a stream does not give."""
    return lambda data, size: codec(data, size)[:size].ljust(size, b"\0")


def lzo(sectorsize: int, data: bytes, size: int) -> bytes:
    """Blocks of at most a sector each, every one behind its length; no length crosses a sector's end."""
    total = int.from_bytes(data[:LZO_LENGTH], "little")
    if not LZO_LENGTH <= total <= len(data):
        raise ValueError(f"its length is {total}")
    found, at = bytearray(), LZO_LENGTH
    while at < total and len(found) < size:
        length = int.from_bytes(data[at : at + LZO_LENGTH], "little")
        at += LZO_LENGTH
        if not 0 < length <= total - at:
            raise ValueError(f"a block of {length} bytes at byte {at}")
        found += lzo1x(data[at : at + length], min(sectorsize, size - len(found)))
        at += length
        if (left := -at % sectorsize) < LZO_LENGTH:
            at += left
    return bytes(found)
