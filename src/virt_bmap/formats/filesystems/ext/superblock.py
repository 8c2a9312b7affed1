"""The superblock: geometry and features, checked; a copy of it where the first one is damaged.

Sources: kernel Documentation/filesystems/ext4/super.rst, fs/ext4/ext4.h, fs/ext4/super.c (checks at mount);
e2fsprogs lib/ext2fs/ext2_fs.h, lib/e2p/feature.c (names of features); util-linux
libblkid/src/superblocks/ext.c (types).
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int
from virt_bmap.core.checksums import ALL_ONES, crc32c
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats import foreign
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR

OFFSET, SIZE, MAGIC = 1024, 1024, 0xEF53

SUPER = struct(SIZE, [
    (0x000, "s_inodes_count", "<u4"),
    (0x004, "s_blocks_count_lo", "<u4"),
    (0x014, "s_first_data_block", "<u4"),
    (0x018, "s_log_block_size", "<u4"),
    (0x01C, "s_log_cluster_size", "<u4"),
    (0x020, "s_blocks_per_group", "<u4"),
    (0x024, "s_clusters_per_group", "<u4"),
    (0x028, "s_inodes_per_group", "<u4"),
    (0x038, "s_magic", "<u2"),
    (0x03A, "s_state", "<u2"),
    (0x048, "s_creator_os", "<u4"),
    (0x04C, "s_rev_level", "<u4"),
    (0x054, "s_first_ino", "<u4"),
    (0x058, "s_inode_size", "<u2"),
    (0x05A, "s_block_group_nr", "<u2"),
    (0x05C, "s_feature_compat", "<u4"),
    (0x060, "s_feature_incompat", "<u4"),
    (0x064, "s_feature_ro_compat", "<u4"),
    (0x068, "s_uuid", "V16"),
    (0x078, "s_volume_name", "S16"),
    (0x0CE, "s_reserved_gdt_blocks", "<u2"),
    (0x0D0, "s_journal_uuid", "V16"),
    (0x0E0, "s_journal_inum", "<u4"),
    (0x0E8, "s_last_orphan", "<u4"),
    (0x0FD, "s_jnl_backup_type", "u1"),
    (0x0FE, "s_desc_size", "<u2"),
    (0x104, "s_first_meta_bg", "<u4"),
    (0x10C, "s_jnl_blocks", "<u4", (17,)),
    (0x150, "s_blocks_count_hi", "<u4"),
    (0x168, "s_mmp_block", "<u8"),
    (0x240, "s_usr_quota_inum", "<u4"),
    (0x244, "s_grp_quota_inum", "<u4"),
    (0x24C, "s_backup_bgs", "<u4", (2,)),
    (0x26C, "s_prj_quota_inum", "<u4"),
    (0x270, "s_checksum_seed", "<u4"),
    (0x280, "s_orphan_file_inum", "<u4"),
    (0x3FC, "s_checksum", "<u4"),
])  # fmt: skip

COMPAT = {
    0x1: "dir_prealloc", 0x2: "imagic_inodes", 0x4: "has_journal", 0x8: "ext_attr", 0x10: "resize_inode",
    0x20: "dir_index", 0x40: "lazy_bg", 0x80: "exclude_inode", 0x100: "snapshot_bitmap",
    0x200: "sparse_super2", 0x400: "fast_commit", 0x800: "stable_inodes", 0x1000: "orphan_file",
}  # fmt: skip
INCOMPAT = {
    0x1: "compression", 0x2: "filetype", 0x4: "needs_recovery", 0x8: "journal_dev", 0x10: "meta_bg",
    0x40: "extent", 0x80: "64bit", 0x100: "mmp", 0x200: "flex_bg", 0x400: "ea_inode", 0x1000: "dirdata",
    0x2000: "metadata_csum_seed", 0x4000: "large_dir", 0x8000: "inline_data", 0x10000: "encrypt",
    0x20000: "casefold",
}  # fmt: skip
RO_COMPAT = {
    0x1: "sparse_super", 0x2: "large_file", 0x4: "btree_dir", 0x8: "huge_file", 0x10: "uninit_bg",
    0x20: "dir_nlink", 0x40: "extra_isize", 0x80: "snapshot", 0x100: "quota", 0x200: "bigalloc",
    0x400: "metadata_csum", 0x800: "replica", 0x1000: "read-only", 0x2000: "project", 0x4000: "shared_blocks",
    0x8000: "verity", 0x10000: "orphan_present",
}  # fmt: skip

EXT3_INCOMPAT = {"filetype", "needs_recovery", "meta_bg"}
EXT3_RO_COMPAT = {"sparse_super", "large_file", "btree_dir"}
UNREADABLE = {"compression": "e2compr, which was never part of Linux"}
HURD = 1
STATE_CLEAN, STATE_ERRORS = 1, 2


class Superblock(NamedTuple):
    """The checked geometry.

    Sizes in bytes where named so, else in blocks; `record` has the rest, by its on-disk names.
    """

    record: np.void
    features: frozenset[str]
    offset: int
    """Where it was read: 1024, or a backup's place."""
    block_size: int
    blocks: int
    readable: int
    """Blocks that lie wholly in the volume: less than `blocks` where the volume is truncated."""
    first_data_block: int
    blocks_per_group: int
    cluster: int
    """Blocks that one bit of a block bitmap stands for."""
    inodes: int
    inodes_per_group: int
    inode_size: int
    desc_size: int
    groups: int

    def number(self, name: str) -> int:
        """A field by its on-disk name."""
        return int(self.record[name])

    def has(self, *features: str) -> bool:
        """Whether any of these features is set, by the names that mke2fs knows."""
        return any(feature in self.features for feature in features)

    @property
    def type(self) -> str:
        """ext2, ext3 or ext4, as blkid decides it."""
        compat = set(COMPAT.values())
        if self.features - compat - EXT3_INCOMPAT - EXT3_RO_COMPAT:
            return "ext4"
        return "ext3" if self.has("has_journal") else "ext2"

    @property
    def feature_words(self) -> str:
        """The features in the order and words of dumpe2fs."""
        return " ".join(
            name
            for table in (COMPAT, INCOMPAT, RO_COMPAT)
            for name in table.values()
            if name in self.features
        )

    @property
    def uuid(self) -> str | None:
        digits = self.record["s_uuid"].tobytes().hex()
        return (
            "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
            if int(digits, 16)
            else None
        )

    @property
    def label(self) -> str | None:
        return bytes(self.record["s_volume_name"]).split(b"\0")[0].decode("utf-8", "replace") or None

    @property
    def first_inode(self) -> int:
        """The first inode number that is not reserved."""
        return self.number("s_first_ino") if self.number("s_rev_level") else 11

    @property
    def checksum_seed(self) -> int:
        """Where every metadata_csum checksum starts."""
        if self.has("metadata_csum_seed"):
            return self.number("s_checksum_seed")
        return int(crc32c(np.frombuffer(self.record["s_uuid"].tobytes(), np.uint8)[None, :])[0])

    def inside(self, start: Int, count: Int | int) -> np.ndarray:
        """Which ranges of blocks lie in the part of the filesystem that the volume holds, block 0
        excluded."""
        return (start > 0) & (start >= self.first_data_block) & (start <= self.readable - count)


def probe(reader: Reader) -> bool:
    """The magic; or, where the superblock was wiped or is damaged, a backup of a superblock with the same
    UUID."""
    data = reader.read_clipped(OFFSET, SIZE)
    found = record(data, SUPER)
    if found["s_magic"] == MAGIC:
        return not int(found["s_feature_incompat"]) & 0x8  # an external journal has the magic, but no files
    if foreign.recognise(reader):  # it was formatted anew: what looks like a backup is a leftover
        return False
    return any(_belongs(data, copy) for _, copy in _backups(reader))


def _belongs(primary: bytes, copy: bytes) -> bool:
    return not any(primary) or record(primary, SUPER)["s_uuid"] == record(copy, SUPER)["s_uuid"]


def _backups(reader: Reader) -> list[tuple[int, bytes]]:
    """(offset, bytes) of what looks like a backup superblock at the end of the first group, one place for
    each block size."""
    places = []
    for log in range(7):
        size = 1024 << log
        places.append((log, (8 * size + (1 if log == 0 else 0)) * size))
    places = [(log, offset) for log, offset in places if offset + SIZE <= reader.size]
    if not places:
        return []
    blocks = reader.read_blocks(np.array([offset for _, offset in places], np.int64), SIZE)
    found = []
    for (log, offset), block in zip(places, blocks, strict=True):
        copy = record(block.tobytes(), SUPER)
        if (
            copy["s_magic"] == MAGIC
            and copy["s_log_block_size"] == log
            and copy["s_block_group_nr"] in (0, 1)
        ):
            found.append((offset, block.tobytes()))
    return found


def read_superblock(reader: Reader, damage: Damage) -> Superblock:
    """The superblock at 1024, or the first backup where it is damaged. Raises Corrupt, Unsupported."""
    primary = reader.read_clipped(OFFSET, SIZE)
    try:
        if record(primary, SUPER)["s_magic"] != MAGIC:
            raise Corrupt(
                "ext superblock at byte 1024 has magic "
                f"{int(record(primary, SUPER)['s_magic']):#x}, not 0xef53",
                OFFSET,
            )
        found = _checked(primary, OFFSET, reader)
        _check_checksum(primary, found)
        return found
    except Corrupt as reason:
        for offset, copy in _backups(reader):
            if not _belongs(primary, copy) and record(primary, SUPER)["s_magic"] != MAGIC:
                continue
            try:
                found = _checked(copy, offset, reader)
            except (Corrupt, Unsupported):
                continue
            damage.say("copy-used", f"{reason}; its backup at byte {offset:#x} is used", OFFSET, ERROR)
            return found
        if reason.code != "checksum":
            raise
        damage.say("checksum", f"{reason}; no backup was found", OFFSET)
        return _checked(primary, OFFSET, reader)


def _check_checksum(data: bytes, superblock: Superblock) -> None:
    if superblock.has("metadata_csum"):
        is_ = int(crc32c(np.frombuffer(data, np.uint8)[None, :0x3FC], ALL_ONES)[0])
        if is_ != (said := superblock.number("s_checksum")):
            raise Corrupt(
                f"ext superblock at byte 1024 has checksum {is_:#010x}, but says {said:#010x}",
                OFFSET,
                "checksum",
            )


def check_size(reader: Reader, superblock: Superblock, damage: Damage) -> None:
    """Say so where the volume ends before the filesystem does."""
    damage.ends_early(superblock.blocks * superblock.block_size, reader.size)


def _features(data: np.void, offset: int) -> frozenset[str]:
    names = set()
    for field, table in (
        ("s_feature_compat", COMPAT),
        ("s_feature_incompat", INCOMPAT),
        ("s_feature_ro_compat", RO_COMPAT),
    ):
        bits = int(data[field])
        names |= {name for bit, name in table.items() if bits & bit}
        unknown = bits & ~sum(table)
        if unknown and table is INCOMPAT:
            raise Unsupported(
                f"ext superblock at byte {offset:#x} has incompatible "
                f"features {unknown:#x}, which are not known",
                offset,
            )
    if unreadable := names & set(UNREADABLE):
        word = min(unreadable)
        raise Unsupported(f"ext feature {word} ({UNREADABLE[word]}) is not supported", offset)
    return frozenset(names)


def _checked(data: bytes, offset: int, reader: Reader) -> Superblock:
    """The superblock with every number that later arithmetic relies on in range."""
    raw = record(data, SUPER)

    def field(name: str, low: int, high: int, multiple: int = 1) -> int:
        value = int(raw[name])
        if not low <= value <= high or value % multiple:
            also = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise Corrupt(
                f"ext superblock at byte {offset:#x}: {name} is {value}, not {low} to {high}{also}", offset
            )
        return value

    features = _features(raw, offset)
    block_size = 1024 << field("s_log_block_size", 0, 6)
    cluster = 1
    if "bigalloc" in features:
        cluster = 1 << (
            field("s_log_cluster_size", int(raw["s_log_block_size"]), 19) - int(raw["s_log_block_size"])
        )
        field("s_clusters_per_group", 8, 8 * block_size, 8)
    blocks_per_group = field("s_blocks_per_group", 8, 8 * block_size * cluster, 8 * cluster)
    inodes_per_group = field("s_inodes_per_group", 1, 8 * block_size)
    inode_size, desc_size = 128, 32
    if int(raw["s_rev_level"]):
        inode_size = field("s_inode_size", 128, block_size, 128)
        if inode_size & (inode_size - 1):
            raise Corrupt(
                f"ext superblock at byte {offset:#x}: s_inode_size is {inode_size}, not a power of two",
                offset,
            )
    if "64bit" in features:
        desc_size = field("s_desc_size", 64, min(block_size, 1024), 64)
        if desc_size & (desc_size - 1):
            raise Corrupt(
                f"ext superblock at byte {offset:#x}: s_desc_size is {desc_size}, not a power of two", offset
            )
    blocks = int(raw["s_blocks_count_lo"]) + (
        (int(raw["s_blocks_count_hi"]) << 32) if "64bit" in features else 0
    )
    if blocks > (1 << 62) // block_size:
        raise Corrupt(
            f"ext superblock at byte {offset:#x}: s_blocks_count is {blocks:#x}, more than any disk holds",
            offset,
        )
    first = field("s_first_data_block", 0, min(1, blocks - 1))
    readable = min(blocks, reader.size // block_size)
    if readable <= first:
        raise Corrupt(
            f"ext superblock at byte {offset:#x}: the volume of "
            f"{reader.size:,} bytes is too small for a single group",
            offset,
        )
    groups = min(-(-(blocks - first) // blocks_per_group), -(-readable // blocks_per_group))
    afford(reader, groups * desc_size, f"{groups:,} group descriptors")
    if groups * inodes_per_group * inode_size > readable * block_size:
        raise Corrupt(
            f"ext superblock at byte {offset:#x}: {groups} tables "
            f"of {plural(inodes_per_group, 'inode')} do not fit",
            offset,
        )
    return Superblock(
        record=raw, features=features, offset=offset, block_size=block_size, blocks=blocks, readable=readable,
        first_data_block=first, blocks_per_group=blocks_per_group, cluster=cluster,
        inodes=int(raw["s_inodes_count"]), inodes_per_group=inodes_per_group, inode_size=inode_size,
        desc_size=desc_size, groups=groups,
    )  # fmt: skip


def volume_state(superblock: Superblock, is_recovered: bool, damage: Damage) -> str:
    state = superblock.number("s_state")
    if state & STATE_ERRORS:
        damage.say(
            "marked-damaged", "the kernel found errors and says so in the superblock (s_state)", OFFSET
        )
    if is_recovered:
        return tables.RECOVERED
    if superblock.has("needs_recovery"):
        return tables.NEEDS_RECOVERY
    if not state & STATE_CLEAN:
        return tables.IN_USE
    # an unmount leaves no orphans: these are files that were deleted while open, on a filesystem that is
    # still mounted (ext4_freeze)
    orphans = superblock.number("s_last_orphan") or superblock.has("orphan_present")
    return tables.FROZEN if orphans else tables.CLEAN
