"""Compression: packed bytes back to what they were, by the library of each algorithm.

Each is a `packed.Codec`. Padding behind the packed bytes does no harm but to LZ4 and LZO.
"""

import lzma
import sys
import zlib

import lz4.block
import lzallright

if sys.version_info >= (3, 14):
    from compression import zstd as zstandard
else:
    from backports import zstd as zstandard

MEMORY_LIMIT = 64 << 20
"""Bytes for a dictionary of LZMA: those of filesystems are at most as large as a block, 1 MiB; a hostile
stream may ask for 4 GiB."""


def deflated(data: bytes, size: int, window: int = -12) -> bytes:
    """Deflate; by its window the headers differ (zlib.decompressobj)."""
    try:
        return zlib.decompressobj(window).decompress(data, size)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def zlibbed(data: bytes, size: int) -> bytes:
    """Deflate with zlib's header."""
    return deflated(data, size, zlib.MAX_WBITS)


def zstd(data: bytes, size: int) -> bytes:
    """One frame of Zstandard."""
    try:
        return zstandard.ZstdDecompressor().decompress(data, size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def lzma1(data: bytes, size: int) -> bytes:
    """LZMA with the header of its old tool."""
    return _lzma(data, size, lzma.FORMAT_ALONE)


def xz(data: bytes, size: int) -> bytes:
    """XZ, with whatever filters."""
    return _lzma(data, size, lzma.FORMAT_XZ)


def _lzma(data: bytes, size: int, form: int) -> bytes:
    try:
        return lzma.LZMADecompressor(form, memlimit=MEMORY_LIMIT).decompress(data, size)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(str(error)) from None


def lz4_block(data: bytes, size: int) -> bytes:
    """One block of LZ4, of which no header says how long it becomes."""
    try:
        return bytes(lz4.block.decompress(data, uncompressed_size=size))
    except lz4.block.LZ4BlockError as error:
        raise ValueError(str(error)) from None


def lzo1x(data: bytes, size: int) -> bytes:
    """One block of LZO1X."""
    try:
        return bytes(lzallright.LZOCompressor.decompress(data, size))
    except (lzallright.LZOError, lzallright.InputNotConsumed) as error:
        raise ValueError(str(error) or "this is no LZO1X") from None
