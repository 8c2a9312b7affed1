"""btrfs on-disk structures, by the names of the kernel, and the superblock.

Sources: include/uapi/linux/btrfs_tree.h and fs/btrfs/{disk-io,super}.c (v6.12); btrfs-progs
Documentation/dev/On-disk-format.rst.
"""

import hashlib

import numpy as np

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.core.checksums import crc32c, xxhash64
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import INT64_MAX, record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.damage import Damage

# ---- the superblock ----------------------------------------------------------------------------------------

SUPER_SIZE = 4096
SUPER_OFFSETS = (64 << 10, 64 << 20, 256 << 30)
"""btrfs_sb_offset(): the superblock and its two mirrors, each only on a device that is long enough."""
SUPER_CSUM_SIZE = 32
MAGIC = b"_BHRfS_M"
STRIPE_LEN = 64 << 10
"""BTRFS_STRIPE_LEN: the only one that a kernel accepts."""
RESERVED = 1 << 20
"""BTRFS_DEVICE_RANGE_RESERVED: no chunk starts below; the first 64 KiB are left to boot loaders."""
MAX_END = 1 << 62
"""Logical addresses beyond are damage: sums of two numbers below fit in int64."""

BACKUP_ROOTS = 4
"""BTRFS_NUM_BACKUP_ROOTS: of the last four transactions; older trees, as far as nobody has written over their
blocks."""
BACKUP = struct(
    168, [(0x00, "tree_root", "<u8"), (0x08, "tree_root_gen", "<u8"), (0x98, "tree_root_level", "u1")]
)
SUPERBLOCK = struct(SUPER_SIZE, [
    (0x00, "csum", "u1", (32,)), (0x20, "fsid", "u1", (16,)), (0x30, "bytenr", "<u8"), (0x38, "flags", "<u8"),
    (0x40, "magic", "S8"), (0x48, "generation", "<u8"), (0x50, "root", "<u8"), (0x58, "chunk_root", "<u8"),
    (0x60, "log_root", "<u8"), (0x90, "sectorsize", "<u4"),
    (0x94, "nodesize", "<u4"), (0xA0, "sys_chunk_array_size", "<u4"), (0xA4, "chunk_root_generation", "<u8"),
    (0xB4, "compat_ro_flags", "<u8"), (0xBC, "incompat_flags", "<u8"), (0xC4, "csum_type", "<u2"),
    (0xC6, "root_level", "u1"), (0xC7, "chunk_root_level", "u1"), (0xC8, "log_root_level", "u1"),
    (0xC9, "dev_item.devid", "<u8"), (0xD1, "dev_item.total_bytes", "<u8"),
    (0x10B, "dev_item.uuid", "u1", (16,)), (0x11B, "dev_item.fsid", "u1", (16,)), (0x12B, "label", "S256"),
    (0x23B, "metadata_uuid", "u1", (16,)),
    (0x32B, "sys_chunk_array", "u1", (2048,)),
    (0xB2B, "super_roots", "u1", (BACKUP_ROOTS * BACKUP.itemsize,)),
])  # fmt: skip

SUPER_FLAG_ERROR, SUPER_FLAG_SEEDING = 1 << 2, 1 << 32
SUPER_FLAG_METADUMP = 1 << 33 | 1 << 34
INCOMPAT_METADATA_UUID = 1 << 10
INCOMPAT = {
    1 << 0: "mixed-backref", 1 << 1: "default-subvol", 1 << 2: "mixed-bg", 1 << 3: "compress-lzo",
    1 << 4: "compress-zstd", 1 << 5: "big-metadata", 1 << 6: "extref", 1 << 7: "raid56",
    1 << 8: "skinny-metadata", 1 << 9: "no-holes", INCOMPAT_METADATA_UUID: "metadata-uuid",
    1 << 11: "raid1c34", 1 << 16: "simple-quota",
}  # fmt: skip
INCOMPAT_REFUSED = {
    1 << 12: "zoned", 1 << 13: "extent-tree-v2", 1 << 14: "raid-stripe-tree", 1 << 17: "remap-tree",
}  # fmt: skip
COMPAT_RO_FREE_SPACE_TREE_VALID = 1 << 1
COMPAT_RO = {
    1 << 0: "free-space-tree",
    1 << 1: "free-space-tree-valid",
    1 << 2: "verity",
    1 << 3: "block-group-tree",
}
CSUM_TYPES = ("crc32c", "xxhash64", "sha256", "blake2b")


SUPER_FLAGS = 0x3 | SUPER_FLAG_ERROR | SUPER_FLAG_SEEDING | SUPER_FLAG_METADUMP
"""BTRFS_SUPER_FLAG_SUPP: a kernel refuses a superblock with any other, which btrfstune sets while it changes
a filesystem (btrfs_check_super_valid)."""


def read_superblock(reader: Reader) -> tuple[np.void, Damage]:
    """The first superblock whose checksum and numbers are right, and what is wrong with it and those before
    it.

    The primary one counts where none is right in its checksum but its numbers make sense. Raises Corrupt or
    Unsupported.
    """
    damage = Damage()
    refusal: Corrupt | None = None
    fallback: np.void | None = None
    for offset in SUPER_OFFSETS:
        if offset + SUPER_SIZE > reader.size:
            break
        raw = reader.read(offset, SUPER_SIZE)
        superblock = record(raw, SUPERBLOCK)
        try:
            _sane(superblock, offset)
        except Corrupt as error:
            refusal = refusal or error
            damage.refuse(error)
            continue
        body = np.frombuffer(raw, np.uint8)[None, SUPER_CSUM_SIZE:]
        if raw.startswith(checksums(body, int(superblock["csum_type"])).tobytes()):
            if unknown := int(superblock["flags"]) & ~SUPER_FLAGS:
                words = f"superblock at byte {offset:#x}: it has flags that are not known, {unknown:#x}"
                damage.say("superblock", f"{words}: a mount refuses it", offset)
            return superblock, damage
        damage.say("checksum", f"superblock at byte {offset:#x}: its checksum is wrong", offset)
        fallback = superblock if fallback is None else fallback
    if fallback is not None:
        return fallback, damage
    raise refusal or Corrupt(f"{reader.name}: shorter than a btrfs superblock")


def _sane(superblock: np.void, offset: int) -> None:
    """Raise Corrupt where a superblock can't be used, Unsupported where its format is known and not read."""

    def wrong(name: str, value: object, expected: str) -> Corrupt:
        return Corrupt(
            f"btrfs superblock at byte {offset:#x}: {name} is {value}, not {expected}", offset, "superblock"
        )

    if bytes(superblock["magic"]) != MAGIC:
        raise wrong("magic", bytes(superblock["magic"]), str(MAGIC))
    if int(superblock["bytenr"]) != offset:
        raise wrong("bytenr", hex(int(superblock["bytenr"])), f"{offset:#x}")
    for name in ("nodesize", "sectorsize"):
        value = int(superblock[name])
        if not 4096 <= value <= 65536 or value & (value - 1):
            raise wrong(name, value, "a power of two from 4096 to 65536")
    if int(superblock["csum_type"]) >= len(CSUM_TYPES):
        raise wrong("csum_type", int(superblock["csum_type"]), "crc32c, xxhash64, sha256 or blake2b (0 to 3)")
    for name in (
        "root",
        "chunk_root",
        "log_root",
        "generation",
        "chunk_root_generation",
        "dev_item.total_bytes",
    ):
        if int(superblock[name]) > INT64_MAX - 1:
            raise wrong(name, hex(int(superblock[name])), "below 2^63")
    flags = int(superblock["incompat_flags"])
    refused = [name for bit, name in INCOMPAT_REFUSED.items() if flags & bit]
    unknown = flags & ~sum(INCOMPAT) & ~sum(INCOMPAT_REFUSED)
    if refused or unknown:
        names = " ".join([*refused, *([f"unknown bits {unknown:#x}"] if unknown else [])])
        raise Unsupported(f"btrfs with incompatible features that are not supported: {names}", offset)


def feature_names(superblock: np.void) -> str:
    """Features and checksum type, in the words of mkfs.btrfs."""
    incompat, compat_ro = int(superblock["incompat_flags"]), int(superblock["compat_ro_flags"])
    names = [name for bit, name in INCOMPAT.items() if incompat & bit] + [
        name for bit, name in COMPAT_RO.items() if compat_ro & bit
    ]
    return " ".join(names)


def metadata_fsid(superblock: np.void) -> Bytes:
    """The fsid that tree blocks carry: the first one that the filesystem had, where it was changed later."""
    own: Bytes = superblock[
        "metadata_uuid" if int(superblock["incompat_flags"]) & INCOMPAT_METADATA_UUID else "fsid"
    ]
    return own


def uuid_text(raw: Bytes) -> str:
    """16 bytes as blkid prints them."""
    digits = raw.tobytes().hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# ---- tree blocks -------------------------------------------------------------------------------------------

MAX_LEVEL = 8
HEADER_SIZE, ITEM_SIZE, KEY_PTR_SIZE = 101, 25, 33
HEADER = struct(HEADER_SIZE, [
    (0x20, "fsid", "u1", (16,)), (0x30, "bytenr", "<u8"), (0x50, "generation", "<u8"),
    (0x60, "nritems", "<u4"), (0x64, "level", "u1"),
])  # fmt: skip
ITEM = struct(ITEM_SIZE, [
    (0, "objectid", "<i8"), (8, "type", "u1"), (9, "offset", "<i8"), (17, "data_offset", "<u4"),
    (21, "data_size", "<u4"),
])  # fmt: skip
KEY_PTR = struct(KEY_PTR_SIZE, [
    (0, "objectid", "<u8"), (8, "type", "u1"), (9, "offset", "<u8"), (17, "blockptr", "<i8"),
    (25, "generation", "<i8"),
])  # fmt: skip
"""Numbers of 64 bits are read as signed: from 2^63 on they are special ids (the kernel writes -9ULL) or
damage, and then negative."""

INODE_ITEM_KEY, INODE_REF_KEY, INODE_EXTREF_KEY, DIR_LOG_INDEX_KEY = 1, 12, 13, 72
DIR_INDEX_KEY, EXTENT_DATA_KEY = 96, 108
ROOT_ITEM_KEY = 132
ROOT_REF_KEY = 156
EXTENT_ITEM_KEY = 168
METADATA_ITEM_KEY = 169
BLOCK_GROUP_ITEM_KEY = 192
EXTENT_CSUM_KEY = 128
FREE_SPACE_INFO_KEY = 198
FREE_SPACE_EXTENT_KEY, FREE_SPACE_BITMAP_KEY, DEV_ITEM_KEY, CHUNK_ITEM_KEY = 199, 200, 216, 228

ROOT_TREE = 1
EXTENT_TREE = 2
CHUNK_TREE = 3
FS_TREE = 5
CSUM_TREE = 7
FREE_SPACE_TREE = 10
BLOCK_GROUP_TREE = 11
TREE_LOG, TREE_RELOC, DATA_RELOC_TREE = -6, -8, -9
FIRST_FREE, EMPTY_SUBVOL_DIR = 256, 2
TREE_NAMES = {
    ROOT_TREE: "root tree", EXTENT_TREE: "extent tree", CHUNK_TREE: "chunk tree", 4: "device tree",
    FS_TREE: "fs tree", CSUM_TREE: "checksum tree", 8: "quota tree", 9: "uuid tree",
    FREE_SPACE_TREE: "free space tree", BLOCK_GROUP_TREE: "block group tree", TREE_LOG: "log tree",
    TREE_RELOC: "relocation tree", DATA_RELOC_TREE: "data relocation tree",
}  # fmt: skip

INODE_ITEM = struct(160, [
    (0, "generation", "<i8"), (16, "size", "<i8"), (40, "nlink", "<u4"), (44, "uid", "<u4"),
    (48, "gid", "<u4"), (52, "mode", "<u4"), (64, "flags", "<u8"), (136, "mtime.sec", "<i8"),
    (144, "mtime.nsec", "<u4"),
])  # fmt: skip
INODE_IMMUTABLE, INODE_COMPRESS, INODE_RO_VERITY = 1 << 6, 1 << 11, 1 << 32
DIR_ITEM = struct(30, [
    (0, "location.objectid", "<i8"), (8, "location.type", "u1"), (27, "name_len", "<u2"),
])  # fmt: skip
INODE_REF = struct(10, [(0, "index", "<i8"), (8, "name_len", "<u2")])
INODE_EXTREF = struct(18, [(0, "parent", "<i8"), (8, "index", "<i8"), (16, "name_len", "<u2")])
DIR_LOG_ITEM = struct(8, [(0, "end", "<i8")])
FILE_EXTENT_INLINE, FILE_EXTENT_PREALLOC = 0, 2
FILE_EXTENT_HEAD = struct(
    21, [(8, "ram_bytes", "<i8"), (16, "compression", "u1"), (17, "encryption", "u1"), (20, "type", "u1")]
)
FILE_EXTENT = struct(53, [
    (8, "ram_bytes", "<i8"), (16, "compression", "u1"), (17, "encryption", "u1"), (20, "type", "u1"),
    (21, "disk_bytenr", "<i8"), (29, "disk_num_bytes", "<i8"), (37, "offset", "<i8"),
    (45, "num_bytes", "<i8"),
])  # fmt: skip
ROOT_ITEM = struct(239, [
    (160, "generation", "<i8"), (168, "root_dirid", "<i8"), (176, "bytenr", "<i8"), (216, "refs", "<u4"),
    (220, "drop_progress.objectid", "<u8"), (228, "drop_progress.type", "u1"),
    (229, "drop_progress.offset", "<u8"), (237, "drop_level", "u1"), (238, "level", "u1"),
])  # fmt: skip
ROOT_REF = struct(18, [(0, "dirid", "<i8")])
EXTENT_ITEM = struct(24, [(16, "flags", "<u8")])
EXTENT_FLAG_DATA = 1
BLOCK_GROUP_ITEM = struct(24, [(0, "used", "<i8")])
DEV_ITEM = struct(98, [
    (0, "devid", "<i8"), (8, "total_bytes", "<i8"), (66, "uuid", "u1", (16,)), (82, "fsid", "u1", (16,)),
])  # fmt: skip

CHUNK_HEAD, STRIPE_SIZE = 48, 32
CHUNK = struct(CHUNK_HEAD, [
    (0, "length", "<i8"), (16, "stripe_len", "<i8"), (24, "type", "<u8"), (44, "num_stripes", "<u2"),
    (46, "sub_stripes", "<u2"),
])  # fmt: skip
STRIPE = struct(STRIPE_SIZE, [(0, "devid", "<i8"), (8, "offset", "<i8"), (16, "dev_uuid", "u1", (16,))])
DISK_KEY = struct(17, [(0, "objectid", "<i8"), (8, "type", "u1"), (9, "offset", "<i8")])


def records_at(data: Bytes, starts: Int, dtype: np.dtype[np.void]) -> np.ndarray:
    """Records of `dtype` at any byte offsets of a flat array.

    They must lie inside it: callers check the item's size first.
    """
    size = dtype.itemsize
    if len(starts) == 0:
        return np.zeros(0, dtype)
    # one void a byte, each reaching over its neighbours: a gather then copies whole records, not bytes
    windows = np.ndarray((len(data) - size + 1,), np.dtype((np.void, size)), data.data, strides=(1,))
    found: np.ndarray = windows[starts].view(dtype)
    return found


# ---- checksums ---------------------------------------------------------------------------------------------

CSUM_SIZES = (4, 8, 32, 32)
"""Bytes that each of CSUM_TYPES takes in the checksum tree."""


def checksums(data: Bytes, csum_type: int) -> Bytes:
    """The checksum of each row of an (n, size) array, as bytes of shape (n, CSUM_SIZES[csum_type])."""
    if csum_type == 0:
        return (~crc32c(data)).astype("<u4").view(np.uint8).reshape(len(data), 4)
    if csum_type == 1:
        return xxhash64(data).astype("<u8").view(np.uint8).reshape(len(data), 8)
    hashes = (hashlib.sha256(row) if csum_type == 2 else hashlib.blake2b(row, digest_size=32) for row in data)
    return np.frombuffer(b"".join(one.digest() for one in hashes), np.uint8).reshape(len(data), 32)
