"""Compressed extents: what each unpacks to, and which bytes of it files show.

An extent is compressed as a whole, at most MAX_UNCOMPRESSED bytes of a file; whoever refers to it uses a part
of what comes out, from byte `file_offset - origin` on. What comes out less is zeroes.

Sources: fs/btrfs/compression.h, zlib.c, zstd.c, lzo.c ("Btrfs LZO compression format"), inode.c
uncompress_inline() (v6.12).
"""

from functools import partial

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int
from virt_bmap.core.codecs import lzo1x, zlibbed, zstd
from virt_bmap.core.columns import take
from virt_bmap.core.packed import Codec, PackedRows, unpacked
from virt_bmap.core.reader import Packed, Reader
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
    regular, small = regular.select(mine), take(inline, _is_packed(inline.flags))
    start = np.append(regular.base, small.start)
    compression, size = _told(items, start)
    rows = PackedRows(
        np.append(regular.inode, small.inode),
        np.append(regular.file_offset, small.file_offset),
        np.append(regular.file_length, small.file_length),
        np.append(regular.file_offset - regular.origin, np.zeros(len(small.inode), np.int64)),
        start,
        np.append(regular.whole, small.length),
        compression,
    )
    fits = np.isin(compression, (ZLIB, LZO, ZSTD)) & (size > 0) & (size <= MAX_UNCOMPRESSED)
    fits &= (rows.skip >= 0) & (rows.skip + rows.length <= size)
    return unpacked(reader, take(rows, fits), size[fits], _codecs(sectorsize))


def _is_packed(flags: Int) -> np.ndarray:
    found: np.ndarray = flags & (tables.COMPRESSED | tables.ENCRYPTED) == tables.COMPRESSED
    return found


def _told(items: list[Columns], at: Int) -> tuple[Int, Int]:
    """(compression, ram_bytes) of the extents that begin at these addresses; 0 where no item has them."""
    address = np.concatenate([EMPTY, *(rows.get("disk_bytenr", rows.get("start")) for rows in items)])
    row = positions(address, at)
    compression, size = (
        np.where(row >= 0, np.concatenate([EMPTY, *(rows[name] for rows in items), [0]])[row], 0)
        for name in ("compression", "ram_bytes")
    )
    return compression, size


# ---- what the streams look like ----------------------------------------------------------------------------


def _codecs(sectorsize: int) -> tuple[Codec, ...]:
    """By the field `compression`."""
    return (
        _filled(lambda data, size: data),
        _filled(zlibbed),
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
