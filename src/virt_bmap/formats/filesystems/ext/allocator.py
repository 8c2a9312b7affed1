"""Block groups: descriptors, the metadata at fixed places, and what the bitmaps call used.

Sources: kernel Documentation/filesystems/ext4/{blockgroup,group_descr,bitmaps}.rst; fs/ext4/balloc.c
(ext4_bg_has_super, ext4_init_block_bitmap); e2fsprogs lib/ext2fs/alloc_sb.c and closefs.c
(ext2fs_super_and_bgd_loc2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, expand, subtract, union
from virt_bmap.core.checksums import crc16, crc32c
from virt_bmap.core.layout import lo_hi, records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.filesystems.ext.superblock import Superblock
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR
from virt_bmap.model.tables import FREE, METADATA, ExtentRows

DESCRIPTOR_FIELDS = [
    (0x00, "bg_block_bitmap_lo", "<u4"),
    (0x04, "bg_inode_bitmap_lo", "<u4"),
    (0x08, "bg_inode_table_lo", "<u4"),
    (0x12, "bg_flags", "<u2"),
    (0x1C, "bg_itable_unused_lo", "<u2"),
    (0x1E, "bg_checksum", "<u2"),
]  # fmt: skip
DESCRIPTOR_64_FIELDS = [
    (0x20, "bg_block_bitmap_hi", "<u4"),
    (0x24, "bg_inode_bitmap_hi", "<u4"),
    (0x28, "bg_inode_table_hi", "<u4"),
    (0x32, "bg_itable_unused_hi", "<u2"),
]  # fmt: skip
DESCRIPTOR = struct(32, DESCRIPTOR_FIELDS)
DESCRIPTOR_64 = struct(64, DESCRIPTOR_FIELDS + DESCRIPTOR_64_FIELDS)
CHECKSUM_AT = 0x1E
INODE_UNINIT, BLOCK_UNINIT = 1, 2

UNKNOWN = -(1 << 62)
"""Stands for the place of a table that no descriptor gives: less than any offset that is added makes up
for."""
BATCH = 8 << 20
"""Bytes of bitmaps read at a time: enough for half a terabyte in blocks of 4 KiB, and small when unpacked."""


class BlockGroups(NamedTuple):
    """One row a group. Places are blocks; -1 where the descriptor says something impossible."""

    block_bitmap: Int
    inode_bitmap: Int
    inode_table: Int
    blocks_unused: Bool
    """The block bitmap was never written: all is free but the metadata at known places."""
    inodes_unused: Bool
    """Likewise the inode bitmap: no inode is used."""
    table_used: Int
    """Inodes of the table that were ever used; what follows was never looked at, perhaps never zeroed."""
    table_blocks: int


# ---- where descriptors and superblocks lie -----------------------------------------------------------------


def has_super(superblock: Superblock) -> Bool:
    """For each group whether it holds a copy of the superblock."""
    if not superblock.has("sparse_super", "sparse_super2"):
        return np.ones(superblock.groups, bool)
    chosen = [0, *superblock.record["s_backup_bgs"].tolist()]
    if not superblock.has("sparse_super2"):
        chosen = [0, 1, *(base**exponent for base in (3, 5, 7) for exponent in range(1, 24))]
    found = np.zeros(superblock.groups, bool)
    found[[group for group in chosen if group < superblock.groups]] = True
    return found


def first_block(superblock: Superblock, group: Int) -> Int:
    """Where the superblock's copy of a group would lie; block 1 for the very first where blocks have 1
    KiB."""
    block: Int = superblock.first_data_block + group * superblock.blocks_per_group
    return np.where(block == 0, 1, block) if superblock.block_size == 1024 else block


@dataclass(frozen=True)
class DescriptorPlaces:
    """Blocks of the group descriptor tables as (start, count), and which of them are copies."""

    start: Int
    count: Int
    backup: Bool
    primary: Int
    """For each block of the table, the block to read it from."""
    second: Int
    """Likewise its first copy."""


def descriptor_places(superblock: Superblock) -> DescriptorPlaces:
    """Both layouts: all descriptors after each superblock, and (meta_bg) one block in the 1st, 2nd and last
    group of many."""
    group = np.arange(superblock.groups, dtype=np.int64)
    per_block = superblock.block_size // superblock.desc_size
    total = -(-superblock.groups // per_block)
    low = total
    if superblock.has("meta_bg"):
        low = min(superblock.number("s_first_meta_bg"), total)
    supers, base = has_super(superblock), first_block(superblock, group)
    meta = group // per_block >= low
    old = supers & ~meta & (low > 0)
    place = group % per_block
    new = meta & ((place == 0) | (place == 1) | (place == per_block - 1)) & superblock.has("meta_bg")
    rank = np.arange(low, dtype=np.int64)
    copies = group[old & (group > 0)]
    primary = np.concatenate([base[0] + 1 + rank, (base + supers)[new & (place == 0)]])
    second = np.concatenate(
        [base[copies[0]] + 1 + rank if len(copies) else primary[:low], (base + supers)[new & (place == 1)]]
    )
    second = np.concatenate([second, primary[len(second) :]])
    return DescriptorPlaces(
        start=np.concatenate([base[old] + 1, (base + supers)[new]]),
        count=np.concatenate([np.full(int(old.sum()), low, np.int64), np.ones(int(new.sum()), np.int64)]),
        backup=np.concatenate([group[old] > 0, place[new] > 0]), primary=primary, second=second,
    )  # fmt: skip


def read_groups(reader: Reader, superblock: Superblock, damage: Damage) -> BlockGroups:
    """All group descriptors; those that are damaged from the first copy, if it is better."""
    places = descriptor_places(superblock)
    found = _descriptors(reader, superblock, places.primary)
    block, nth = np.divmod(np.arange(superblock.groups), superblock.block_size // superblock.desc_size)
    where = places.primary[block] * superblock.block_size + nth * superblock.desc_size
    groups, bad = _parse(superblock, found)
    if bad.any() and not np.array_equal(places.second, places.primary):
        copy = _descriptors(reader, superblock, places.second).copy()
        # copies are not kept up to date: their hints may be too good
        if superblock.has("uninit_bg", "metadata_csum"):
            for hint in ("bg_flags", "bg_itable_unused_lo", "bg_itable_unused_hi"):
                if hint in (copy.dtype.names or ()):
                    copy[hint] = 0
        _, still_bad = _parse(superblock, copy)
        take = bad & ~still_bad
        damage.add(
            "copy-used",
            "group [descriptor is|descriptors are] damaged; a copy is read",
            where[take],
            severity=ERROR,
        )
        damage.add(
            "group",
            "group [descriptor is damaged, and so is its|descriptors are damaged, and so are their] copy",
            where[bad & still_bad],
        )
        groups, bad = _parse(superblock, np.where(take, copy, found))
    elif bad.any():
        damage.add("group", "group [descriptor is|descriptors are] damaged, and there is no copy", where[bad])
    _check_checksums(superblock, found, where, damage)
    return groups


def raw_descriptors(reader: Reader, superblock: Superblock) -> np.ndarray:
    """The primary descriptors as records, as they are on the disk."""
    return _descriptors(reader, superblock, descriptor_places(superblock).primary)


def _descriptors(reader: Reader, superblock: Superblock, blocks: Int) -> np.ndarray:
    """Descriptor records of all groups; zeroes where their block is outside the volume."""
    inside = superblock.inside(blocks, 1)
    data = np.zeros((len(blocks), superblock.block_size), np.uint8)
    data[inside] = reader.read_blocks(blocks[inside] * superblock.block_size, superblock.block_size)
    fields = DESCRIPTOR_FIELDS + (DESCRIPTOR_64_FIELDS if superblock.desc_size >= 64 else [])
    per_block = superblock.block_size // superblock.desc_size
    flat = data[:, : per_block * superblock.desc_size].reshape(-1)
    return records(flat, struct(superblock.desc_size, fields))[: superblock.groups]


def _parse(superblock: Superblock, raw: np.ndarray) -> tuple[BlockGroups, Bool]:
    """Descriptors as columns, and which of them point outside the volume."""
    wide = superblock.desc_size >= 64

    def joined(name: str, bits: int = 32) -> Int:
        return lo_hi(raw[name + "_lo"], raw[name + "_hi"] if wide else 0, bits)

    per_group = superblock.inodes_per_group
    table_blocks = -(-per_group * superblock.inode_size // superblock.block_size)
    hints = superblock.has("uninit_bg", "metadata_csum")
    flags = raw["bg_flags"].astype(np.int64) if hints else np.zeros(len(raw), np.int64)
    unused = joined("bg_itable_unused", 16) if hints else np.zeros(len(raw), np.int64)
    places = {}
    bad = np.zeros(len(raw), bool)
    for name, count in (("bg_block_bitmap", 1), ("bg_inode_bitmap", 1), ("bg_inode_table", table_blocks)):
        block = joined(name)
        fits = superblock.inside(block, count)
        places[name] = np.where(fits, block, -1)
        bad |= ~fits
    inodes_unused = (flags & INODE_UNINIT) != 0
    return BlockGroups(
        block_bitmap=places["bg_block_bitmap"], inode_bitmap=places["bg_inode_bitmap"],
        inode_table=places["bg_inode_table"], blocks_unused=(flags & BLOCK_UNINIT) != 0,
        inodes_unused=inodes_unused,
        table_used=np.where(inodes_unused, 0, per_group - np.clip(unused, 0, per_group)),
        table_blocks=table_blocks,
    ), bad  # fmt: skip


def _check_checksums(superblock: Superblock, raw: np.ndarray, where: Int, damage: Damage) -> None:
    """Compare bg_checksum: CRC-32C with metadata_csum, CRC-16 with uninit_bg (which ext4 ignores where both
    are set)."""
    if not superblock.has("metadata_csum", "uninit_bg") or not len(raw):
        return
    size = superblock.desc_size
    data = np.ascontiguousarray(raw).view(np.uint8).reshape(-1, size)
    number = np.arange(len(raw), dtype="<u4").view(np.uint8).reshape(-1, 4)
    if superblock.has("metadata_csum"):
        blank = data.copy()
        blank[:, CHECKSUM_AT : CHECKSUM_AT + 2] = 0
        is_ = crc32c(np.concatenate([number, blank], axis=1), superblock.checksum_seed) & 0xFFFF
    else:
        uuid = np.frombuffer(superblock.record["s_uuid"].tobytes(), np.uint8)
        parts = [
            np.broadcast_to(uuid, (len(raw), 16)),
            number,
            data[:, :CHECKSUM_AT],
            data[:, CHECKSUM_AT + 2 :],
        ]
        is_ = crc16(np.concatenate(parts, axis=1)).astype(np.uint32)
    wrong = is_ != raw["bg_checksum"]
    damage.add("checksum", "group [descriptor has|descriptors have] a wrong checksum", where[wrong])


# ---- rows --------------------------------------------------------------------------------------------------


def add_metadata(rows: ExtentRows, superblock: Superblock, groups: BlockGroups) -> tuple[Int, Int]:
    """Rows for all that lies at fixed places; returns the same as (starts, ends) in blocks, merged."""
    size, end = superblock.block_size, superblock.readable
    taken: list[tuple[Int, Int]] = []

    def add(part: str, start: Int, count: Int | int) -> None:
        low, high = union(start, np.minimum(start + count, end))
        rows.add(METADATA, low * size, (high - low) * size, part=part)
        taken.append((low, high))

    group = np.arange(superblock.groups, dtype=np.int64)
    base = first_block(superblock, group)
    supers = has_super(superblock)
    places = descriptor_places(superblock)
    add("backup superblock", base[supers & (group > 0)], 1)
    add("group descriptors", places.start[~places.backup], places.count[~places.backup])
    add("backup group descriptors", places.start[places.backup], places.count[places.backup])
    start, count = reserved_descriptors(superblock)
    add("reserved group descriptors", start, count)
    for part, place, unused in (
        ("block bitmap", groups.block_bitmap, groups.blocks_unused),
        ("inode bitmap", groups.inode_bitmap, groups.inodes_unused),
    ):  # fmt: skip
        add(part, place[(place > 0) & ~unused], 1)
        add(f"{part} (uninitialised)", place[(place > 0) & unused], 1)
    known = groups.inode_table > 0
    used = -(-groups.table_used * superblock.inode_size // size)
    add("inode table", groups.inode_table[known], used[known])
    add("inode table (unused)", (groups.inode_table + used)[known], (groups.table_blocks - used)[known])
    if (
        superblock.has("mmp")
        and superblock.inside(mmp := np.array([superblock.number("s_mmp_block") & (1 << 62) - 1]), 1).all()
    ):
        add("mmp block", mmp, 1)
    high = 2 if size == 1024 else 1
    rows.add(METADATA, 1024, high * size - 1024, part="superblock")
    taken.append((np.array([0]), np.array([high])))  # with the boot record
    return union(np.concatenate([a for a, _ in taken]), np.concatenate([b for _, b in taken]))


def reserved_descriptors(superblock: Superblock) -> tuple[Int, Int]:
    """Blocks kept after the descriptors for growing online, as (starts, counts); the resize inode lists them
    too."""
    reserved = superblock.number("s_reserved_gdt_blocks")
    if not reserved or superblock.has("meta_bg") or reserved > superblock.blocks_per_group:
        return EMPTY, EMPTY
    places = descriptor_places(superblock)
    return places.start + places.count, np.full(len(places.start), reserved, np.int64)


def ones(words: Bytes) -> tuple[Int, Int]:
    """(starts, ends), in bits, of the runs of ones in a bitmap whose length is a multiple of 8 bytes.

    Only words in which a run begins or ends are looked at bit by bit.
    """
    word = np.ascontiguousarray(words).view("<u8")
    before = np.zeros_like(word)
    before[1:] = word[:-1] >> np.uint64(63)
    edges = word ^ ((word << np.uint64(1)) | before)
    at = np.flatnonzero(edges)
    bits = np.flatnonzero(np.unpackbits(edges[at].view(np.uint8), bitorder="little"))
    points = at[bits >> 6] * 64 + (bits & 63)
    if len(points) % 2:
        points = np.append(points, len(word) * 64)
    return points[0::2], points[1::2]


def _cut_at_seams(first: Int, high: Int, width: int) -> tuple[Int, Int]:
    """Cut runs at the seams between bitmaps of `width` bits: for each piece (its bitmap, the run it comes
    from)."""
    run, step = expand((high - 1) // width - first + 1)
    return first[run] + step, run


def _bitmaps(reader: Reader, superblock: Superblock, blocks: Int, bits: int) -> Iterator[tuple[Int, Bytes]]:
    """Batches (positions in `blocks`, bitmaps of shape (n, whole words)): `bits` bits of each, the others
    zero."""
    for part, data in reader.batches(blocks * superblock.block_size, superblock.block_size, BATCH):
        clean = np.zeros((len(data), -(-bits // 64) * 8), np.uint8)
        whole, rest = divmod(bits, 8)
        clean[:, :whole] = data[:, :whole]
        if rest:
            clean[:, whole] = data[:, whole] & ((1 << rest) - 1)
        yield np.arange(part.start, part.start + len(data)), clean


def add_free(
    reader: Reader, superblock: Superblock, groups: BlockGroups, metadata: tuple[Int, Int], rows: ExtentRows
) -> tuple[Int, Int]:
    """Rows for the blocks that the bitmaps call free; returns them as (starts, ends) in blocks, merged."""
    per_group, first = superblock.blocks_per_group, superblock.first_data_block
    read = np.flatnonzero((groups.block_bitmap > 0) & ~groups.blocks_unused)
    unread = np.flatnonzero(groups.blocks_unused)
    starts, ends = [first + unread * per_group], [first + (unread + 1) * per_group]
    bits = per_group // superblock.cluster
    for position, bitmaps in _bitmaps(reader, superblock, groups.block_bitmap[read], bits):
        bitmaps = ~bitmaps
        width = bitmaps.shape[1] * 8
        low, high = ones(bitmaps.reshape(-1))
        row, nth = _cut_at_seams(low // width, high, width)
        base = row * width
        origin = first + read[position][row] * per_group
        starts.append(origin + (np.maximum(low[nth], base) - base) * superblock.cluster)
        # no padding
        ends.append(
            origin + np.minimum(np.minimum(high[nth], base + width) - base, bits) * superblock.cluster
        )
    end = superblock.readable
    low, high = union(np.concatenate(starts), np.minimum(np.concatenate(ends), end))
    if len(unread):
        low, high = subtract(
            low, high, *whole_clusters(superblock, *subtract(*metadata, *_initialised(superblock, groups)))
        )
    rows.add(FREE, low * superblock.block_size, (high - low) * superblock.block_size)
    return low, high


def _initialised(superblock: Superblock, groups: BlockGroups) -> tuple[Int, Int]:
    """The groups whose bitmap is believed, in blocks."""
    start = superblock.first_data_block + np.flatnonzero(~groups.blocks_unused) * superblock.blocks_per_group
    return start, start + superblock.blocks_per_group


def whole_clusters(superblock: Superblock, low: Int, high: Int) -> tuple[Int, Int]:
    """Ranges of blocks widened to whole clusters."""
    first, size = superblock.first_data_block, superblock.cluster
    return first + (low - first) // size * size, first - (first - high) // size * size


def used_inodes(reader: Reader, superblock: Superblock, groups: BlockGroups) -> Int:
    """Numbers of the inodes that the bitmaps call used, sorted."""
    per_group = superblock.inodes_per_group
    read = np.flatnonzero((groups.inode_bitmap > 0) & (groups.inode_table > 0) & ~groups.inodes_unused)
    found, total = [EMPTY], 0
    for position, bitmaps in _bitmaps(reader, superblock, groups.inode_bitmap[read], per_group):
        width = bitmaps.shape[1] * 8
        group = read[position]
        low, high = ones(bitmaps.reshape(-1))
        row, nth = _cut_at_seams(low // width, high, width)
        base = row * width
        first = np.maximum(low[nth], base)
        count = np.minimum(high[nth], base + width) - first
        total += int(count.sum())
        afford(reader, total * superblock.inode_size, plural(total, "inode"))
        first += group[row] * per_group + 1 - base
        numbers = np.ones(int(count.sum()), np.int64)
        ends = np.cumsum(count)
        numbers[ends - count] = first - np.append(0, (first + count - 1)[:-1])
        found.append(np.cumsum(numbers, out=numbers))
    return np.concatenate(found) if len(found) > 2 else found[-1]


def record_offsets(superblock: Superblock, groups: BlockGroups, numbers: Int) -> Int:
    """Where the records of these inodes lie, in bytes; negative where the group's table is unknown."""
    per_group, size = superblock.inodes_per_group, superblock.inode_size
    # offset = table + (number - 1 - group * per_group) * size, with what belongs to the group joined
    # beforehand
    number = np.arange(len(groups.inode_table) + 1, dtype=np.int64)
    base = np.where(
        np.append(groups.inode_table, -1) > 0,
        np.append(groups.inode_table, 0) * superblock.block_size,
        UNKNOWN,
    )
    base -= (number * per_group + 1) * size
    offset = base[np.minimum((numbers - 1) // per_group, len(groups.inode_table))]
    offset += numbers * size
    return offset
