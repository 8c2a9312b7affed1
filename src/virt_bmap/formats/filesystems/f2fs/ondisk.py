"""Structures of F2FS as they lie on a disk, and the superblock.

Sources: Linux include/linux/f2fs_fs.h; fs/f2fs/super.c (sanity_check_raw_super, sanity_check_area_boundary);
Documentation/filesystems/f2fs.rst.
"""

import zlib
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.damage import Damage

BLOCK = 4096
LOG_BLOCK = 12
SEGMENT = 512
"""Blocks of a segment: SIT entries have room for no other number."""
SUPER_OFFSET = 1024
SUPER_SIZE = BLOCK - SUPER_OFFSET
SUPERBLOCKS = (SUPER_OFFSET, BLOCK + SUPER_OFFSET)
MAGIC = 0xF2F52010
NULL_ADDR, NEW_ADDR, COMPRESS_ADDR = 0, 0xFFFFFFFF, 0xFFFFFFFE
"""Block addresses that are none: a hole, space that is promised but has no block yet, the head of a
compressed cluster."""
MAX_BLOCKS = COMPRESS_ADDR

SUPERBLOCK = struct(SUPER_SIZE, [
    (0, "magic", "<u4"), (4, "major_ver", "<u2"), (6, "minor_ver", "<u2"), (8, "log_sectorsize", "<u4"),
    (12, "log_sectors_per_block", "<u4"), (16, "log_blocksize", "<u4"), (20, "log_blocks_per_seg", "<u4"),
    (24, "segs_per_sec", "<u4"), (28, "secs_per_zone", "<u4"), (32, "checksum_offset", "<u4"),
    (36, "block_count", "<u8"), (44, "section_count", "<u4"), (48, "segment_count", "<u4"),
    (52, "segment_count_ckpt", "<u4"), (56, "segment_count_sit", "<u4"), (60, "segment_count_nat", "<u4"),
    (64, "segment_count_ssa", "<u4"), (68, "segment_count_main", "<u4"), (72, "segment0_blkaddr", "<u4"),
    (76, "cp_blkaddr", "<u4"), (80, "sit_blkaddr", "<u4"), (84, "nat_blkaddr", "<u4"),
    (88, "ssa_blkaddr", "<u4"), (92, "main_blkaddr", "<u4"), (96, "root_ino", "<u4"),
    (100, "node_ino", "<u4"), (104, "meta_ino", "<u4"), (108, "uuid", "V16"), (124, "volume_name", "V1024"),
    (1664, "cp_payload", "<u4"), (2180, "feature", "<u4"), (2201, "devs", "V544"),
    (2745, "qf_ino", "<u4", (3,)), (2758, "s_encoding", "<u2"), (3068, "crc", "<u4"),
])  # fmt: skip
CHECKPOINT = struct(192, [
    (0, "checkpoint_ver", "<u8"), (8, "user_block_count", "<u8"), (16, "valid_block_count", "<u8"),
    (24, "rsvd_segment_count", "<u4"), (28, "overprov_segment_count", "<u4"),
    (32, "free_segment_count", "<u4"), (36, "cur_node_segno", "<u4", (8,)),
    (68, "cur_node_blkoff", "<u2", (8,)), (84, "cur_data_segno", "<u4", (8,)),
    (116, "cur_data_blkoff", "<u2", (8,)), (132, "ckpt_flags", "<u4"),
    (136, "cp_pack_total_block_count", "<u4"), (140, "cp_pack_start_sum", "<u4"),
    (144, "valid_node_count", "<u4"), (148, "valid_inode_count", "<u4"), (152, "next_free_nid", "<u4"),
    (156, "sit_ver_bitmap_bytesize", "<u4"), (160, "nat_ver_bitmap_bytesize", "<u4"),
    (164, "checksum_offset", "<u4"), (168, "elapsed_time", "<u8"), (176, "alloc_type", "u1", (16,)),
])  # fmt: skip
ORPHANS = struct(BLOCK, [(0, "ino", "<u4", (1020,)), (4088, "entry_count", "<u4")])
NAT_ENTRY = struct(9, [(0, "version", "u1"), (1, "ino", "<u4"), (5, "block_addr", "<u4")])
NAT_JOURNAL = struct(13, [(0, "nid", "<u4"), (5, "ino", "<u4"), (9, "block_addr", "<u4")])
SIT_ENTRY = struct(74, [(0, "vblocks", "<u2"), (2, "valid_map", "u1", (64,)), (66, "mtime", "<u8")])
SIT_PER_BLOCK, NAT_PER_BLOCK = BLOCK // SIT_ENTRY.itemsize, BLOCK // NAT_ENTRY.itemsize
SIT_JOURNAL = struct(78, [(0, "segno", "<u4"), (4, "vblocks", "<u2"), (6, "valid_map", "u1", (64,))])
ADDRS_PER_INODE, ADDRS_PER_BLOCK, NIDS_PER_INODE, NIDS_PER_BLOCK = 923, 1018, 5, 1018
I_ADDR = 360
"""Where an inode's addresses begin; extra attributes and inline data lie at the same place."""
NODE = struct(BLOCK, [
    (0, "i_mode", "<u2"), (2, "i_advise", "u1"), (3, "i_inline", "u1"), (4, "i_uid", "<u4"),
    (8, "i_gid", "<u4"), (12, "i_links", "<u4"), (16, "i_size", "<u8"), (24, "i_blocks", "<u8"),
    (32, "i_atime", "<i8"), (40, "i_ctime", "<i8"), (48, "i_mtime", "<i8"), (56, "i_atime_nsec", "<u4"),
    (60, "i_ctime_nsec", "<u4"), (64, "i_mtime_nsec", "<u4"), (68, "i_generation", "<u4"),
    (72, "i_current_depth", "<u4"), (76, "i_xattr_nid", "<u4"), (80, "i_flags", "<u4"), (84, "i_pino", "<u4"),
    (88, "i_namelen", "<u4"), (92, "i_name", "V255"), (347, "i_dir_level", "u1"),
    (I_ADDR, "i_extra_isize", "<u2"), (362, "i_inline_xattr_size", "<u2"), (364, "i_projid", "<u4"),
    (368, "i_inode_checksum", "<u4"), (392, "i_compress_algorithm", "u1"), (393, "i_log_cluster_size", "u1"),
    (I_ADDR, "i_addr", "<u4", (ADDRS_PER_INODE,)), (4052, "i_nid", "<u4", (NIDS_PER_INODE,)),
    (4072, "nid", "<u4"), (4076, "ino", "<u4"), (4080, "flag", "<u4"), (4084, "cp_ver", "<u8"),
    (4092, "next_blkaddr", "<u4"),
])  # fmt: skip
"""An inode, and the footer that all nodes have."""
NODE_BLOCK = struct(
    BLOCK, [(0, "addr", "<u4", (ADDRS_PER_BLOCK,)), (4072, "nid", "<u4"), (4076, "ino", "<u4")]
)

FEATURES = {
    0x1: "encrypt", 0x2: "blkzoned", 0x8: "extra_attr", 0x10: "project_quota", 0x20: "inode_checksum",
    0x40: "flexible_inline_xattr", 0x80: "quota", 0x100: "inode_crtime", 0x200: "lost_found", 0x400: "verity",
    0x800: "sb_checksum", 0x1000: "casefold", 0x2000: "compression", 0x4000: "ro",
}  # fmt: skip
"""In the words of mkfs.f2fs; 4, once for Android's atomic writes, means nothing to the kernel."""
ATOMIC_WRITE, SB_CHECKSUM = 0x4, 0x800


def crc(data: bytes, seed: int = MAGIC) -> int:
    """CRC-32 as F2FS uses it: begun with `seed`, not inverted at the end."""
    return ~zlib.crc32(data, ~seed & 0xFFFFFFFF) & 0xFFFFFFFF


class Superblock(NamedTuple):
    """What the superblock says.

    Places and counts are in blocks; `cp`, `sit`, `nat`, `ssa` and `main` begin where the one before ends.
    """

    reader: Reader
    record: np.void
    features: frozenset[str]
    block_count: int
    segment0: int
    cp: int
    sit: int
    nat: int
    ssa: int
    main: int
    main_segments: int

    @property
    def main_end(self) -> int:
        return self.main + self.main_segments * SEGMENT

    def number(self, name: str) -> int:
        """A field by its on-disk name."""
        return int(self.record[name])

    @property
    def readable(self) -> int:
        """The end of the part of the main area that the volume holds."""
        return min(self.main_end, self.reader.size // BLOCK)

    def inside(self, block: Int) -> Bool:
        """Which block addresses lie in the main area and can be read."""
        return (block >= self.main) & (block < self.readable)

    @property
    def uuid(self) -> str | None:
        digits = self.record["uuid"].tobytes().hex()
        return (
            "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
            if int(digits, 16)
            else None
        )

    @property
    def label(self) -> str | None:
        return self.record["volume_name"].tobytes().decode("utf-16-le", "replace").split("\0")[0] or None

    @property
    def feature_words(self) -> str | None:
        return " ".join(name for name in FEATURES.values() if name in self.features) or None


def read_superblock(reader: Reader, damage: Damage) -> Superblock:
    """The first superblock, or its copy in the second block where that one is damaged.

    Raises Corrupt, Unsupported.
    """
    reason = None
    for offset in SUPERBLOCKS:
        try:
            found = _checked(reader, offset)
        except Corrupt as error:
            if reason:
                raise reason from None
            reason = error
            continue
        if reason:
            damage.add(
                "superblock",
                f"superblock is damaged, its copy at byte {offset:#x} is used: {reason}",
                SUPER_OFFSET,
            )
        elif reader.read_clipped(SUPERBLOCKS[0], SUPER_SIZE) != reader.read_clipped(
            SUPERBLOCKS[1], SUPER_SIZE
        ):
            _check_copy(reader, damage)
        return found
    raise AssertionError


def _check_copy(reader: Reader, damage: Damage) -> None:
    try:
        _checked(reader, SUPERBLOCKS[1])
    except (Corrupt, Unsupported) as error:
        damage.say("copy-differs", f"the copy of the superblock is damaged: {error}", SUPERBLOCKS[1])


def _checked(reader: Reader, offset: int) -> Superblock:
    """The superblock at `offset` with every number in range that later arithmetic relies on."""
    data = reader.read_clipped(offset, SUPER_SIZE)
    raw = record(data, SUPERBLOCK)
    where = f"{reader.name}: F2FS superblock at byte {offset}"
    if raw["magic"] != MAGIC:
        raise Corrupt(f"{where} has magic {int(raw['magic']):#x}, not {MAGIC:#x}", offset)
    at = int(raw["checksum_offset"])
    feature = int(raw["feature"])
    if feature & SB_CHECKSUM and (at != SUPER_SIZE - 4 or crc(data[:at]) != int(raw["crc"])):
        raise Corrupt(
            f"{where} has checksum {crc(data[: SUPER_SIZE - 4]):#010x}, but says {int(raw['crc']):#010x}",
            offset,
        )
    if unknown := feature & ~sum(FEATURES) & ~ATOMIC_WRITE:
        raise Unsupported(f"{where} has features {unknown:#x}, which are not known", offset + 2180)
    if (size := int(raw["log_blocksize"])) != LOG_BLOCK:
        kind = Unsupported if 12 < size <= 16 else Corrupt
        raise kind(f"{where}: blocks of 2^{size} bytes; 4096 is supported", offset + 16)
    if int(raw["log_blocks_per_seg"]) != 9:
        raise Corrupt(f"{where}: log_blocks_per_seg is {int(raw['log_blocks_per_seg'])}, not 9", offset + 20)
    if raw["devs"].tobytes()[68:69] != b"\0":
        raise Unsupported(f"{where}: on several devices, which is not supported", offset + 2201)
    return _areas(reader, raw, where, offset)


def _areas(reader: Reader, raw: np.void, where: str, offset: int) -> Superblock:
    names = ("cp", "sit", "nat", "ssa", "main")
    starts = [int(raw[f"{name}_blkaddr"]) for name in names]
    counts = [int(raw[f"segment_count_{name}"]) for name in ("ckpt", "sit", "nat", "ssa", "main")]
    first = int(raw["segment0_blkaddr"])
    ends = [start + count * SEGMENT for start, count in zip(starts, counts, strict=True)]
    end = first + int(raw["segment_count"]) * SEGMENT
    if starts != [first, *ends[:-1]] or not 2 <= first <= ends[-1] <= end <= MAX_BLOCKS:
        raise Corrupt(
            f"{where}: areas at blocks {first}, {', '.join(map(str, starts))} that end at {ends[-1]} of "
            f"{end} do not follow each other",
            offset + 72,
        )
    if min(counts[:3]) < 2 or counts[4] < 1 or counts[1] % 2 or counts[2] % 2:
        raise Corrupt(
            f"{where}: areas of {', '.join(map(str, counts))} segments, which is impossible", offset + 52
        )
    if counts[4] > counts[1] // 2 * SEGMENT * SIT_PER_BLOCK:
        raise Corrupt(f"{where}: {plural(counts[4], 'segment')}, but a SIT of {counts[1]}", offset + 56)
    if int(raw["cp_payload"]) >= SEGMENT - 8:
        raise Corrupt(
            f"{where}: cp_payload is {int(raw['cp_payload'])}, more than a segment holds",
            offset + 1664,
        )
    blocks = int(raw["block_count"])
    if not ends[-1] <= blocks <= MAX_BLOCKS:
        raise Corrupt(f"{where}: block_count is {blocks}, but the main area ends at {ends[-1]}", offset + 36)
    if reader.size < starts[4] * BLOCK:
        raise Corrupt(
            f"{reader.name}: ends at byte {reader.size:#x}, before the main area of F2FS at "
            f"{starts[4] * BLOCK:#x}: it is truncated",
            reader.size,
            "truncated",
        )
    words = frozenset(name for bit, name in FEATURES.items() if int(raw["feature"]) & bit)
    cp, sit, nat, ssa, main = starts
    return Superblock(reader, raw, words, blocks, first, cp, sit, nat, ssa, main, counts[4])
