"""Warm a disk by a profile: read what a boot will need, in the order of its need, in few large requests with
many in flight.

Reading is all it takes: it fills the page cache below a file or block device, the cache filter of an NBD
server, or whatever else lies between.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from virt_bmap.accesses.profile.saved import Profile
from virt_bmap.accesses.profile.summary import disk_ranges
from virt_bmap.core.arrays import Int, expand, subtract, union
from virt_bmap.core.errors import MapError
from virt_bmap.core.reader import Reader
from virt_bmap.open.raw import RawReader

BATCH = 32 << 20
"""Bytes that are asked for together.

What a boot needs first is read first; within a batch the order is the disk's, and neighbours are merged.
"""
GAP = 256 << 10
"""Bytes between two ranges that are read as well, to save a request: at 5 ms a request, any link of more than
50 MB/s gains by that."""
PIECE = 1 << 20
"""Bytes of one request to a file or device."""
THREADS = 16
"""Requests under way to a file or device; an NBD reader keeps its own number."""


class Warmed(NamedTuple):
    """What was read: bytes, of which `needed` were in the
    profile, in how many ranges, and the seconds that took."""

    bytes: int
    needed: int
    ranges: int
    seconds: float


def replay(profile: Profile, reader: Reader, disk: int = 1, common: bool = False) -> Warmed:
    """Read from `reader` what a profile needs of disk number `disk`.

    MapError where the disk is another one.
    """
    if disk <= len(profile.sizes) and profile.sizes[disk - 1] != reader.size:
        raise MapError(
            f"{reader.name}: has {reader.size:,} bytes, but the profile is of a disk of "
            f"{profile.sizes[disk - 1]:,}: it is another disk's profile"
        )
    starts, ends = disk_ranges(profile, disk, common)
    if len(ends) and int(ends.max()) > reader.size:
        raise MapError(
            f"{reader.name}: has {reader.size:,} bytes, but the profile has accesses up to byte "
            f"{int(ends.max()):,}: it is another disk's profile"
        )
    began, batches = time.monotonic(), list(_batches(starts, ends))
    needed = union(starts, ends)
    with ThreadPoolExecutor(THREADS) as pool:
        for low, high in batches:
            if isinstance(reader, RawReader):
                list(pool.map(lambda piece: reader.read(*piece), _pieces(low, high)))
            else:
                reader.read_ranges(low, high - low)
    whole = sum(int((high - low).sum()) for low, high in batches)
    return Warmed(
        whole,
        int((needed[1] - needed[0]).sum()),
        sum(len(low) for low, _ in batches),
        time.monotonic() - began,
    )


def _batches(starts: Int, ends: Int) -> Iterator[tuple[Int, Int]]:
    """The ranges cut into batches in the order given, each sorted and merged; what an earlier batch has read
    is left out."""
    read: tuple[Int, Int] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    cut = np.searchsorted(
        np.cumsum(ends - starts), np.arange(BATCH, int((ends - starts).sum()) + BATCH, BATCH), "left"
    )
    bounds = np.unique(np.concatenate([[0], cut + 1, [len(starts)]]))
    for low, high in zip(bounds[:-1].tolist(), np.minimum(bounds[1:], len(starts)).tolist(), strict=True):
        batch = subtract(*union(starts[low:high], ends[low:high], GAP), *read)
        if len(batch[0]):
            read = union(np.concatenate([read[0], batch[0]]), np.concatenate([read[1], batch[1]]))
            yield batch


def _pieces(starts: Int, ends: Int) -> list[tuple[int, int]]:
    """(offset, length) of requests of at most PIECE bytes."""
    row, step = expand(-(-(ends - starts) // PIECE))
    offset = starts[row] + step * PIECE
    return list(zip(offset.tolist(), np.minimum(PIECE, ends[row] - offset).tolist(), strict=True))
