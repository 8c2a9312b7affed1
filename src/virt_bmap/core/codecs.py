"""Compression: packed bytes back to what they were, by libraries that each algorithm has.

A codec is given packed bytes, behind which padding may lie, and how many bytes they become at most. It
raises ValueError, in words, where they are damaged.
"""

import sys
import zlib
from collections.abc import Callable

if sys.version_info >= (3, 14):
    from compression import zstd as zstandard
else:
    from backports import zstd as zstandard

from virt_bmap.core.errors import MissingTool

Codec = Callable[[bytes, int], bytes]


def deflated(data: bytes, size: int, window: int = -12) -> bytes:
    """Deflate; by its window the headers differ (zlib.decompressobj)."""
    try:
        return zlib.decompressobj(window).decompress(data, size)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def zstd(data: bytes, size: int) -> bytes:
    """Zstandard: one frame."""
    try:
        return zstandard.ZstdDecompressor().decompress(data, size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def lzo1x(data: bytes, size: int) -> bytes:
    """One block of LZO1X. Raises MissingTool where the library is not installed."""
    try:
        import lzallright
    except ImportError as error:
        raise MissingTool("LZO needs the Python package lzallright (pip install 'virt-bmap[lzo]')") from error
    try:
        return bytes(lzallright.LZOCompressor.decompress(data, size))
    except (lzallright.LZOError, lzallright.InputNotConsumed) as error:
        raise ValueError(str(error) or "not LZO1X") from None
