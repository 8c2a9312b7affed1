"""Chunks: which logical bytes lie on which stripes of which devices, and the pattern in which they do.

Sources: fs/btrfs/volumes.c (btrfs_map_block, map_blocks_*, btrfs_chunk_item), tree-checker.c
btrfs_check_chunk_valid() (v6.12).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, expand, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.filesystems.btrfs import ondisk, tree
from virt_bmap.formats.filesystems.btrfs.ondisk import STRIPE_LEN
from virt_bmap.formats.filesystems.btrfs.pool import LogicalRanges
from virt_bmap.model.damage import Damage


class RaidProfile(NamedTuple):
    """How the stripes of a chunk relate: `copies` of each strip, `parity` strips in each row; `striped`: any
    number of them."""

    name: str
    copies: int = 1
    parity: int = 0
    striped: bool = False


PROFILES = {
    0: RaidProfile("single"), 1 << 3: RaidProfile("RAID0", striped=True), 1 << 4: RaidProfile("RAID1", 2),
    1 << 5: RaidProfile("DUP", 2), 1 << 6: RaidProfile("RAID10", 2, striped=True),
    1 << 7: RaidProfile("RAID5", 1, 1, True), 1 << 8: RaidProfile("RAID6", 1, 2, True),
    1 << 9: RaidProfile("RAID1C3", 3),
    1 << 10: RaidProfile("RAID1C4", 4),
}  # fmt: skip
PROFILE_MASK = sum(PROFILES)
TYPES = {1: "data", 2: "system", 4: "metadata"}


class Chunk(NamedTuple):
    """Logical bytes [start, start + length) of one profile; `stripes` are (device uuid, physical offset)."""

    start: int
    length: int
    type: int
    stripes: list[tuple[bytes, int]]

    @property
    def profile(self) -> RaidProfile:
        return PROFILES[self.type & PROFILE_MASK]

    @property
    def lanes(self) -> int:
        """Strips of data in a row."""
        return (len(self.stripes) - self.profile.parity) // self.profile.copies

    @property
    def device_length(self) -> int:
        """Bytes on each device (calc_stripe_length)."""
        return -(-self.length // (self.lanes * STRIPE_LEN)) * STRIPE_LEN if self.lanes > 1 else self.length


class DeviceItem(NamedTuple):
    """What a filesystem says of a device: its size, and the filesystem that it belongs to: another one, from
    which this one has grown, where the device is a seed."""

    size: int
    fsid: bytes


def system_chunks(superblock: np.void) -> Iterator[Chunk]:
    """The chunks of sys_chunk_array: pairs of key and chunk item, enough to read the chunk tree.

    Raises Corrupt.
    """
    raw = superblock["sys_chunk_array"]
    end, at = min(int(superblock["sys_chunk_array_size"]), len(raw)), 0
    while at + ondisk.DISK_KEY.itemsize + ondisk.CHUNK_HEAD + ondisk.STRIPE_SIZE <= end:
        key = ondisk.records_at(raw, ints(at), ondisk.DISK_KEY)
        at += ondisk.DISK_KEY.itemsize
        head = ondisk.records_at(raw, ints(at), ondisk.CHUNK)
        size = ondisk.CHUNK_HEAD + int(head["num_stripes"][0]) * ondisk.STRIPE_SIZE
        if key["type"][0] != ondisk.CHUNK_ITEM_KEY or at + size > end:
            break
        damage = Damage()
        yield from chunk_items(raw, key["offset"], ints(at), ints(size), damage)
        if damage.is_damaged:
            raise Corrupt(
                f"btrfs superblock: sys_chunk_array: {damage.problems()[0].detail}", None, "mapping"
            )
        at += size
    if at < end or at == 0:
        raise Corrupt(
            f"btrfs superblock: sys_chunk_array holds no chunk at byte {at:#x} of {end:#x}", None, "mapping"
        )


def chunk_tree(
    source: tree.TreeSource, superblock: np.void, damage: Damage
) -> tuple[list[Chunk], dict[bytes, DeviceItem]]:
    """All chunks by logical address, and what is said of each device by its uuid."""
    level, generation = int(superblock["chunk_root_level"]), int(superblock["chunk_root_generation"])
    roots = tree.TreeRoots.single(ondisk.CHUNK_TREE, int(superblock["chunk_root"]), level, generation)
    forest = tree.walk(source, roots, damage)
    chunks: list[Chunk] = []
    known: dict[bytes, DeviceItem] = {}
    for leaves in tree.read_leaves(source, forest, damage):
        items = leaves.of(ondisk.CHUNK_ITEM_KEY, ondisk.CHUNK_HEAD + ondisk.STRIPE_SIZE)
        chunks += chunk_items(items.data, items.offset, items.start, items.size, damage)
        devices = leaves.of(ondisk.DEV_ITEM_KEY, ondisk.DEV_ITEM.itemsize).records(ondisk.DEV_ITEM)
        known |= {
            bytes(device["uuid"]): DeviceItem(int(device["total_bytes"]), bytes(device["fsid"]))
            for device in devices
        }
    return sorted(chunks, key=lambda chunk: chunk.start), known


def chunk_items(data: np.ndarray, start: Int, at: Int, size: Int, damage: Damage) -> Iterator[Chunk]:
    """Chunk items at `at` of `data`, logical addresses in `start`; those that make no sense are damage
    (btrfs_check_chunk_valid)."""
    head = ondisk.records_at(data, at, ondisk.CHUNK)
    count, length = head["num_stripes"].astype(np.int64), head["length"]
    fits = (count > 0) & (size >= ondisk.CHUNK_HEAD + count * ondisk.STRIPE_SIZE)
    fits &= (
        (start >= 0)
        & (length > 0)
        & (start < ondisk.MAX_END)
        & (length < ondisk.MAX_END)
        & (head["stripe_len"] == STRIPE_LEN)
    )
    damage.add(
        "mapping", "chunk [item has|items have] an impossible length, stripe_len or num_stripes", start[~fits]
    )
    start, at, head, count, length = start[fits], at[fits], head[fits], count[fits], length[fits]
    row, step = expand(count)
    stripes = ondisk.records_at(data, at[row] + ondisk.CHUNK_HEAD + step * ondisk.STRIPE_SIZE, ondisk.STRIPE)
    places = list(zip((bytes(uuid) for uuid in stripes["dev_uuid"]), stripes["offset"].tolist(), strict=True))
    first = np.cumsum(count) - count
    columns = (start.tolist(), length.tolist(), head["type"].tolist(), first.tolist(), count.tolist())
    for begin, span, kind, low, n in zip(*columns, strict=True):
        chunk = Chunk(begin, span, kind, places[low : low + n])
        if _possible(chunk):
            yield chunk
        else:
            damage.add(
                "mapping", "chunk [item has|items have] an impossible profile or number of stripes", begin
            )


def _possible(chunk: Chunk) -> bool:
    profile = PROFILES.get(chunk.type & PROFILE_MASK)
    n = len(chunk.stripes)
    if (
        profile is None
        or min(offset for _, offset in chunk.stripes) < 0
        or max(offset for _, offset in chunk.stripes) >= ondisk.MAX_END
    ):
        return False
    if not profile.striped:
        return n == profile.copies
    # strips of one row lie on different devices: this bounds the rows of a hostile chunk, too
    alone = len({uuid for uuid, _ in chunk.stripes}) == n
    return alone and n > profile.parity and (n - profile.parity) % profile.copies == 0


def without_overlaps(chunks: list[Chunk], damage: Damage) -> list[Chunk]:
    kept: list[Chunk] = []
    for chunk in chunks:
        if kept and chunk.start < kept[-1].start + kept[-1].length:
            damage.add("mapping", "[chunk begins|chunks begin] inside another chunk", chunk.start)
        else:
            kept.append(chunk)
    return kept


def ranges(chunks: list[Chunk]) -> LogicalRanges:
    chunks = sorted(chunks, key=lambda chunk: chunk.start)
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    return LogicalRanges(
        starts, starts + np.fromiter((chunk.length for chunk in chunks), np.int64, len(chunks))
    )


def end_of(chunks: list[Chunk]) -> int:
    """The size of the logical address space."""
    return max((chunk.start + chunk.length for chunk in chunks), default=0)


# ---- the pattern of a chunk --------------------------------------------------------------------------------


class Lane(NamedTuple):
    """Strips that lie together on a device: every `period`th strip of the chunk from `first` on, every
    `rows`th row from `row` on.

    `data` are the stripes (by number) that hold them, `parity` those that hold their rows' P and Q; `others`
    hold the rows' other strips.
    """

    first: int
    period: int
    row: int
    rows: int
    data: list[int]
    parity: list[int]
    others: list[int]


def lanes_of(chunk: Chunk) -> Iterator[Lane]:
    """The repeating pattern of a chunk (btrfs_map_block: map_blocks_raid0, raid1, dup, raid10, raid56_read,
    single)."""
    n, lanes, copies = len(chunk.stripes), chunk.lanes, chunk.profile.copies
    if not chunk.profile.parity:
        for k in range(lanes):
            yield Lane(k, lanes, 0, 1, list(range(k * copies, (k + 1) * copies)), [], [])
        return
    for row in range(n):
        parity = [(row + lanes + i) % n for i in range(chunk.profile.parity)]
        for k in range(lanes):
            others = [(row + (k + i) % lanes) % n for i in range(1, lanes)]
            yield Lane(row * lanes + k, n * lanes, row, n, [(row + k) % n], parity, others)
