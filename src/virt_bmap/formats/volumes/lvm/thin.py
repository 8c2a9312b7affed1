"""Thin pools: which blocks of the pool belong to which thin volumes, and which are free.

Sources: kernel drivers/md/dm-thin-metadata.c (struct thin_disk_superblock, "two level btree"),
thin-provisioning-tools.
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap.core.arrays import Int, complement, runs, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct, widen
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.btree import BLOCK, SPACE_MAP_ROOT, Store, TreeEntries, sound
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE, WARNING
from virt_bmap.model.tables import FREE, METADATA, UNKNOWN, ExtentRows

MAGIC = 27022010
NEEDS_CHECK = 1
SUPERBLOCK_SALT = 160774
SUPERBLOCK = struct(BLOCK, [
    (0x04, "flags", "<u4"), (0x20, "magic", "<u8"), (0x28, "version", "<u4"), (0x30, "trans_id", "<u8"),
    (0x38, "held_root", "<u8"), (0x40, "data_space_map_root", "V32"),
    (0xC0, "metadata_space_map_root", "V32"), (0x140, "data_mapping_root", "<u8"),
    (0x148, "device_details_root", "<u8"), (0x150, "data_block_size", "<u4"),
])  # fmt: skip
MIN_BLOCK, MAX_BLOCK = 64 << 10, 1 << 30
"""Bytes of a pool block that the kernel takes (DATA_DEV_BLOCK_SIZE_MIN_SECTORS, _MAX_SECTORS)."""
TIME_BITS = 24


@dataclass
class ThinPool:
    """A pool's metadata, read.

    Columns, by device and virtual block: `count` virtual blocks from `virtual` on of a device lie in pool
    blocks from `block` on."""

    block_size: int
    transaction: int
    devices: Int
    device: Int
    virtual: Int
    block: Int
    count: Int
    data: ExtentRows
    metadata: ExtentRows
    damage: Damage

    def rows(self, device: int, size: int, parent: int) -> Rows:
        """The mapping rows of a thin volume of `size` bytes, whose pool's data is `parent`, by volume
        offset."""
        low, high = np.searchsorted(self.device, [device, device + 1])
        virtual, block, count = self.virtual[low:high], self.block[low:high], self.count[low:high]
        keep = virtual < -(-size // self.block_size)
        start = virtual[keep] * self.block_size
        run = np.minimum(count[keep] * self.block_size, size - start)
        return Rows.make(start, parent, block[keep] * self.block_size, run)


def merged(owner: Int, key: Int, block: Int, count: Int) -> tuple[Int, Int, Int, Int]:
    """Runs of blocks, sorted by owner and key, with those that continue each other on both sides made one."""
    order = np.lexsort((key, owner))
    owner, key, block, count = owner[order], key[order], block[order], count[order]
    new = (
        (owner[1:] != owner[:-1])
        | (key[1:] != key[:-1] + count[:-1])
        | (block[1:] != block[:-1] + count[:-1])
    )
    first = np.flatnonzero(np.append(True, new)[: len(key)])
    return owner[first], key[first], block[first], np.add.reduceat(count, first) if len(first) else count


def _runs(entries: TreeEntries) -> TreeEntries:
    """Mappings of single blocks as runs: the value is the first pool block and the number of blocks."""
    block = entries.numbers() >> TIME_BITS
    tree, key, block, count = merged(entries.tree, entries.keys, block, np.ones(len(block), np.int64))
    return TreeEntries(tree, key, np.column_stack([block, count]).view(np.uint8).reshape(-1, 16))


def read_pool(reader: Reader, data_size: int) -> ThinPool:
    """The metadata of a pool whose data volume has `data_size` bytes.

    Raises Corrupt where nothing can be read.
    """
    head = record(reader.read_clipped(0, BLOCK), SUPERBLOCK)
    if int(head["magic"]) != MAGIC:
        raise Corrupt(
            f"the thin pool's superblock has the magic {int(head['magic'])} instead of {MAGIC}",
            0,
            "superblock",
        )
    wrong = not sound(np.frombuffer(reader.read_clipped(0, BLOCK), np.uint8)[None, :], SUPERBLOCK_SALT).all()
    block_size = int(head["data_block_size"]) * SECTOR
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size % MIN_BLOCK:
        raise Corrupt(
            f"the thin pool's superblock says data_block_size {block_size} bytes", 0x150, "superblock"
        )
    store = Store(reader)
    blocks = data_size // block_size
    devices, (device, virtual, block, count) = _mappings(store, head, blocks)
    total, free = store.free_data(record(head["data_space_map_root"].tobytes(), SPACE_MAP_ROOT))
    store.walk("device details", widen(head["device_details_root"], "device_details_root").reshape(1), 24)
    free_metadata = store.free_metadata(record(head["metadata_space_map_root"].tobytes(), SPACE_MAP_ROOT))
    damage = store.damage
    if wrong:
        damage.say("checksum", "the thin pool's superblock has a wrong checksum", 0)
    if unknown := int(head["flags"]) & ~NEEDS_CHECK:
        damage.say("superblock", f"the thin pool's superblock has flags that are not known: {unknown:#x}", 4)
    if int(head["flags"]) & NEEDS_CHECK:
        damage.say(
            "marked-damaged", "the pool's metadata is marked as in need of a check", 4, severity=WARNING
        )
    if int(head["held_root"]):
        damage.say(
            "simplified", "a metadata snapshot is held; blocks that only it refers to have no owner", 0x38
        )
    data = _data_rows(
        min(total, blocks), free, union(block, block + count), block_size, damage, bool(head["held_root"])
    )
    metadata = _metadata_rows(store, free_metadata, damage, bool(head["held_root"]))
    transaction = int(widen(head["trans_id"], "trans_id"))
    return ThinPool(
        block_size,
        transaction,
        devices,
        device,
        virtual,
        block,
        count,
        data,
        metadata,
        damage,
    )


def _mappings(store: Store, head: np.void, blocks: int) -> tuple[Int, tuple[Int, Int, Int, Int]]:
    """(all device ids; device, virtual block, pool block and number of blocks of each run, by device and
    virtual block)."""
    devices = store.walk("device tree", widen(head["data_mapping_root"], "data_mapping_root").reshape(1), 8)
    entries = store.walk("mapping tree", devices.numbers(), 8, _runs)
    block, count = (
        np.ascontiguousarray(entries.values[:, at : at + 8]).view(np.int64)[:, 0] for at in (0, 8)
    )
    inside = (block >= 0) & (block + count <= blocks)
    store.bad("[maps|map] blocks outside the pool", block[~inside])
    return devices.keys, merged(
        devices.keys[entries.tree][inside], entries.keys[inside], block[inside], count[inside]
    )


def _data_rows(
    total: int, free: np.ndarray, used: tuple[Int, Int], size: int, damage: Damage, held: bool
) -> ExtentRows:
    """Free pool blocks, and those that are allocated to nobody."""
    rows = ExtentRows()
    starts, ends = runs(free[:total])
    rows.add(FREE, starts * size, (ends - starts) * size)
    starts, ends = complement(np.concatenate([starts, used[0]]), np.concatenate([ends, used[1]]), 0, total)
    if len(starts):
        rows.add(UNKNOWN, starts * size, (ends - starts) * size)
        what = "pool [block is|blocks are] allocated, but no thin volume maps [it|them]"
        count, first = int((ends - starts).sum()), int(starts[0]) * size
        damage.add("unowned", what, first, count, severity=NOTE if held else "warning")
    return rows


def _metadata_rows(store: Store, free: np.ndarray, damage: Damage, held: bool) -> ExtentRows:
    """Every block of the metadata device: what it holds, or free."""
    rows = ExtentRows()
    rows.add(METADATA, 0, BLOCK, part="thin pool superblock")
    taken = [np.zeros(1, np.int64)]
    for part in dict.fromkeys(name for name, _ in store.used):
        mine = np.setdiff1d(
            np.concatenate([blocks for name, blocks in store.used if name == part]), np.concatenate(taken)
        )
        starts, ends = union(mine, mine + 1)
        rows.add(METADATA, starts * BLOCK, (ends - starts) * BLOCK, part=f"thin pool {part}")
        taken.append(mine)
    starts, ends = runs(free)
    rows.add(FREE, starts * BLOCK, (ends - starts) * BLOCK)
    used = np.concatenate(taken)
    starts, ends = complement(np.concatenate([starts, used]), np.concatenate([ends, used + 1]), 0, len(free))
    if len(starts):
        rows.add(UNKNOWN, starts * BLOCK, (ends - starts) * BLOCK)
        what = "[block|blocks] of the pool's metadata [is|are] allocated, but nothing refers to [it|them]"
        count, first = int((ends - starts).sum()), int(starts[0]) * BLOCK
        damage.add("unowned", what, first, count, severity=NOTE if held else "warning")
    return rows
