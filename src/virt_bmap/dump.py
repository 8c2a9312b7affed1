"""Copying a volume out: from a reader to a file, in batches, with holes where there are zeroes."""

from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from virt_bmap.arrays import EMPTY, Bytes, Int, complement, ints, runs
from virt_bmap.reader import Reader

BATCH = 8 << 20
"""Bytes read at once."""
GRAIN = 4096
"""Zeroes become holes in pieces of this size, the block size of nearly all filesystems that may hold the copy."""


def dump(
    reader: Reader,
    file: BinaryIO,
    sparse: bool,
    skip: tuple[Int, Int] = (EMPTY, EMPTY),
    tell: Callable[[int], None] = lambda _: None,
) -> int:
    """Write all of a volume to `file`, the bytes of `skip` as zeroes without reading them; how many bytes were read.

    `sparse`: the file is new and can seek, so that zeroes are left out. `tell` is called with the number of bytes that are done.
    """
    wanted = complement(*skip, 0, reader.size)
    for low in range(0, reader.size, BATCH):
        high = min(low + BATCH, reader.size)
        data = _batch(reader, wanted, low, high)
        if sparse:
            _write_sparse(file, low, data)
        else:
            file.write(data.data)
        tell(high)
    if sparse:
        file.truncate(reader.size)
    return int((wanted[1] - wanted[0]).sum())


def _batch(reader: Reader, wanted: tuple[Int, Int], low: int, high: int) -> Bytes:
    """Bytes [low, high), read where they are wanted and zero elsewhere."""
    first = np.searchsorted(wanted[1], low, "right")
    last = np.searchsorted(wanted[0], high, "left")
    starts, ends = np.clip(wanted[0][first:last], low, high), np.clip(wanted[1][first:last], low, high)
    if len(starts) == 1 and ends[0] - starts[0] == high - low:
        return reader.read_ranges(ints(low), ints(high - low))
    result = np.zeros(high - low, np.uint8)
    data, at = reader.read_ranges(starts, ends - starts), 0
    for start, end in zip((starts - low).tolist(), (ends - low).tolist(), strict=True):
        result[start:end] = data[at : at + end - start]
        at += end - start
    return result


def _write_sparse(file: BinaryIO, offset: int, data: Bytes) -> None:
    """Write the pieces of `data` that are not zero at their places, counted from `offset`."""
    whole = len(data) // GRAIN * GRAIN
    used = np.append(data[:whole].reshape(-1, GRAIN).any(axis=1), data[whole:].any())
    for start, end in zip(*(side.tolist() for side in runs(used)), strict=True):
        file.seek(offset + start * GRAIN)
        file.write(data[start * GRAIN : end * GRAIN].data)
