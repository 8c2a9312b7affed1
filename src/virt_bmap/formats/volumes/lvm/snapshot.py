"""Snapshots of the old kind: what was overwritten in the origin, or written to the snapshot, lies in a
copy-on-write store.

Sources: kernel drivers/md/dm-snap-persistent.c (struct disk_header, struct disk_exception, area_location).
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap.core.arrays import Int, complement
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.formats.volumes.lvm.thin import merged
from virt_bmap.model.tables import FREE, METADATA, ExtentRows

MAGIC = 0x70416E53
VERSION = 1
MAX_CHUNK = 1 << 30
"""Bytes of one chunk; LVM takes 4 KiB to 512 KiB."""
HEADER_CHUNKS = 1
BATCH = 32 << 20
"""Bytes of exception areas read at once; each area must be full before the next is looked at."""
HEADER = struct(
    16,
    [(0x00, "magic", "<u4"), (0x04, "valid", "<u4"), (0x08, "version", "<u4"), (0x0C, "chunk_size", "<u4")],
)
EXCEPTION = struct(16, [(0x00, "old_chunk", "<u8"), (0x08, "new_chunk", "<u8")])


@dataclass(frozen=True)
class Exceptions:
    """`count` chunks of the origin from `old` on were put in chunks of the store from `new` on, sorted by
    `old`; `chunk` is in bytes."""

    chunk: int
    old: Int
    new: Int
    count: Int
    extents: ExtentRows
    outside: int


def read_exceptions(reader: Reader, origin_size: int) -> Exceptions:
    """All exceptions of a store. Raises Corrupt where it is not one, or was given up because it was full."""
    head = record(reader.read_clipped(0, HEADER.itemsize), HEADER)
    if head["magic"] != MAGIC or head["version"] != VERSION:
        raise Corrupt(
            f"the snapshot's store begins with {int(head['magic']):#x} instead of {MAGIC:#x}", 0, "outside"
        )
    if not head["valid"]:
        raise Corrupt(
            "the snapshot is invalid: its store was full, and the kernel gave it up",
            4,
            "marked-damaged",
        )
    chunk = int(head["chunk_size"]) * SECTOR
    if not SECTOR <= chunk <= MAX_CHUNK or chunk & (chunk - 1):
        raise Corrupt(f"the snapshot's store has chunks of {chunk} bytes", 0xC, "outside")
    each, chunks = chunk // EXCEPTION.itemsize, reader.size // chunk
    found: list[np.ndarray] = []
    areas = 0
    step = max(1, BATCH // chunk)
    while True:
        at = HEADER_CHUNKS + (each + 1) * np.arange(areas, areas + step, dtype=np.int64)
        at = at[at < chunks]
        if len(at) == 0:
            break
        table = reader.read_blocks(at * chunk, chunk).reshape(-1).view(EXCEPTION)
        end = np.flatnonzero(table["new_chunk"] == 0)
        found.append(table[: end[0]] if len(end) else table)
        areas += int(end[0]) // each + 1 if len(end) else len(at)
        if len(end):
            break
    table = np.concatenate(found) if found else np.zeros(0, EXCEPTION)
    good = (table["old_chunk"] < -(-origin_size // chunk)) & (table["new_chunk"] < chunks)
    old, new = table["old_chunk"][good].astype(np.int64), table["new_chunk"][good].astype(np.int64)
    old, first = np.unique(old, return_index=True)
    new = new[first]
    at = HEADER_CHUNKS + (each + 1) * np.arange(areas, dtype=np.int64)
    one = np.ones(len(old), np.int64)
    _, old, new, count = merged(one, old, new, one)
    return Exceptions(chunk, old, new, count, _extents(chunk, chunks, at, new, count), int((~good).sum()))


def _extents(chunk: int, chunks: int, areas: Int, new: Int, count: Int) -> ExtentRows:
    """The header, the exception areas, and the chunks that nothing was put in."""
    rows = ExtentRows()
    rows.add(METADATA, 0, chunk, part="snapshot header")
    rows.add(METADATA, areas * chunk, np.full(len(areas), chunk, np.int64), part="snapshot exceptions")
    used = np.concatenate([areas, new])
    starts, ends = complement(
        used, used + np.concatenate([np.ones(len(areas), np.int64), count]), HEADER_CHUNKS, chunks
    )
    rows.add(FREE, starts * chunk, (ends - starts) * chunk)
    return rows
