"""Caches: a volume's bytes lie in its origin, but for blocks that the cache holds and the origin has not been
given yet.

Sources: kernel drivers/md/dm-cache-metadata.c (struct cache_disk_superblock), dm-writecache.c (struct
wc_memory_superblock).
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, runs
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.btree import BLOCK, Store, sound
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import FREE, METADATA, ExtentRows

MAGIC = 0o6142003
SUPERBLOCK_SALT = 9031977
VALID, DIRTY = 1, 2
CLEAN_SHUTDOWN = 1
SUPERBLOCK = struct(BLOCK, [
    (0x04, "flags", "<u4"), (0x20, "magic", "<u8"), (0x28, "version", "<u4"), (0xC0, "mapping_root", "<u8"),
    (0xE8, "data_block_size", "<u4"), (0xF0, "cache_blocks", "<u4"), (0x11C, "dirty_root", "<u8"),
])  # fmt: skip
FLAG_BITS = 16

WRITECACHE_MAGIC = 0x23489321
WRITECACHE_HEADER = 64
WRITECACHE = struct(WRITECACHE_HEADER, [
    (0x00, "magic", "<u4"), (0x04, "version", "<u4"), (0x08, "block_size", "<u4"), (0x10, "n_blocks", "<u8"),
    (0x18, "seq_count", "<u8"),
])  # fmt: skip
WRITECACHE_ENTRY = struct(16, [(0x00, "original_sector", "<u8"), (0x08, "seq_count", "<u8")])
NOWHERE = (1 << 64) - 1


class Cached(NamedTuple):
    """Blocks of `size` bytes: block `origin` of the volume is held at byte `place` of the cache; `dirty`:
    only there. Sorted by `origin`."""

    size: int
    origin: Int
    place: Int
    dirty: np.ndarray
    damage: Damage


def read_cache(reader: Reader, data_size: int) -> Cached:
    """The blocks that a dm-cache holds, by its metadata. `place` counts from the start of its data."""
    raw = reader.read_clipped(0, BLOCK)
    head = record(raw, SUPERBLOCK)
    if int(head["magic"]) != MAGIC:
        raise Corrupt(
            f"the cache's superblock has the magic {int(head['magic'])} instead of {MAGIC}", 0, "superblock"
        )
    size, store = int(head["data_block_size"]) * SECTOR, Store(reader)
    if not 32 << 10 <= size <= 1 << 30:
        raise Corrupt(f"the cache's superblock says data_block_size {size} bytes", 0xE8, "superblock")
    count = min(int(head["cache_blocks"]), data_size // size)
    root = int(widen(head["mapping_root"], "mapping_root"))
    entry = store.array("cache mapping", root, count).view("<u8")[:, 0] if count else np.zeros(0, "<u8")
    held = np.flatnonzero(entry & VALID)
    origin = (entry[held] >> FLAG_BITS).astype(np.int64)
    if not sound(np.frombuffer(raw, np.uint8)[None, :], SUPERBLOCK_SALT).all():
        store.damage.say("checksum", "the cache's superblock has a wrong checksum", 0)
    # as the kernel does: dirty bits were not written, so that every block may be
    if not int(head["flags"]) & CLEAN_SHUTDOWN:
        dirty = np.ones(len(held), bool)
        if len(held):
            store.damage.say(
                "unclean", "the cache was not shut down: all that it holds counts as newer than the origin", 4
            )
    elif int(head["version"]) >= 2:
        root = int(widen(head["dirty_root"], "dirty_root"))
        bits = np.unpackbits(store.array("dirty bits", root, -(-count // 64)).reshape(-1), bitorder="little")
        dirty = bits[held].astype(bool)
    else:
        dirty = (entry[held] & DIRTY) != 0
    order = np.argsort(origin, kind="stable")
    return Cached(size, origin[order], held[order].astype(np.int64) * size, dirty[order], store.damage)


def read_writecache(reader: Reader) -> tuple[Cached, ExtentRows]:
    """The blocks that a dm-writecache holds, all of them newer than the origin, and what the cache volume's
    bytes are."""
    head = record(reader.read_clipped(0, WRITECACHE_HEADER), WRITECACHE)
    if head["magic"] != WRITECACHE_MAGIC or head["version"] != 1:
        raise Corrupt(
            f"the writecache begins with {int(head['magic']):#x} instead of {WRITECACHE_MAGIC:#x}",
            0,
            "superblock",
        )
    size, count = int(head["block_size"]), int(head["n_blocks"])
    table = WRITECACHE_HEADER + count * WRITECACHE_ENTRY.itemsize
    start = -(-table // max(size, 1)) * size
    if not SECTOR <= size <= 1 << 20 or start + count * size > reader.size:
        raise Corrupt(
            f"the writecache says it has {plural(count, 'block')} of {size:,} bytes, more than its volume",
            0x10,
            "superblock",
        )
    entries = np.frombuffer(reader.read(WRITECACHE_HEADER, table - WRITECACHE_HEADER), WRITECACHE_ENTRY)
    held = np.flatnonzero(
        (entries["original_sector"] != NOWHERE) & (entries["seq_count"] < head["seq_count"])
    )
    sector, sequence = entries["original_sector"][held], entries["seq_count"][held]
    fits = sector < np.uint64(1 << 54)
    held, sector, sequence = held[fits], sector[fits].astype(np.int64), sequence[fits]
    order = np.lexsort((sequence, sector))
    last = np.append(sector[order][1:] != sector[order][:-1], True)[: len(order)]  # the newest of each block
    held, sector = held[order][last], sector[order][last]
    rows = ExtentRows()
    rows.add(METADATA, 0, start, part="writecache entries")
    used = np.zeros(count, bool)
    used[held] = True
    low, high = runs(~used)
    rows.add(FREE, start + low * size, (high - low) * size)
    every = np.ones(len(held), bool)
    return Cached(size, sector * SECTOR // size, start + held.astype(np.int64) * size, every, Damage()), rows
