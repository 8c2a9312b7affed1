"""The superblock."""

import numpy as np

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader

SUPERBLOCK = struct(96, [
    (0, "s_magic", "S4"), (4, "inodes", "<u4"), (8, "mkfs_time", "<u4"), (12, "block_size", "<u4"),
    (16, "fragments", "<u4"), (20, "compression", "<u2"), (22, "block_log", "<u2"), (24, "flags", "<u2"),
    (26, "no_ids", "<u2"), (28, "s_major", "<u2"), (30, "s_minor", "<u2"), (32, "root_inode", "<u8"),
    (40, "bytes_used", "<u8"), (48, "id_table_start", "<u8"), (56, "xattr_id_table_start", "<u8"),
    (64, "inode_table_start", "<u8"), (72, "directory_table_start", "<u8"),
    (80, "fragment_table_start", "<u8"), (88, "lookup_table_start", "<u8"),
])  # fmt: skip


COMPRESSOR_OPTIONS = 0x400


FLAGS = {0x001: "noI", 0x002: "noD", 0x008: "noF", 0x010: "no-fragments", 0x020: "always-use-fragments",
    0x040: "duplicates",
         0x080: "exportable", 0x100: "noX", 0x200: "no-xattrs", 0x400: "compressor-options"}  # fmt: skip


BLOCK_LOGS = range(12, 21)


def read_superblock(reader: Reader) -> np.void:
    """The superblock of a 4.0 image, or the word for what it is instead."""
    data = reader.read_clipped(0, SUPERBLOCK.itemsize)
    found = record(data, SUPERBLOCK)
    if found["s_magic"] == b"sqsh":
        raise Unsupported(
            f"{reader.name}: a big-endian squashfs {int.from_bytes(data[28:30], 'big')}.x image; only "
            "little-endian 4.0 is supported",
            0,
        )
    version = int(found["s_major"])
    if version != 4 or found["s_minor"]:
        raise Unsupported(
            f"{reader.name}: squashfs version {version}.{int(found['s_minor'])}; only 4.0 is supported", 28
        )
    if int(found["block_log"]) not in BLOCK_LOGS or int(found["block_size"]) != 1 << int(found["block_log"]):
        raise Corrupt(
            f"{reader.name}: block_size at byte 12 is {int(found['block_size'])} and block_log "
            f"{int(found['block_log'])}, not a power of two from 4 KiB to 1 MiB",
            12,
        )
    if int(found["bytes_used"]) > 2**62:
        raise Corrupt(
            f"{reader.name}: bytes_used at byte 40 is "
            f"{int(found['bytes_used']):#x}, more than any disk holds",
            40,
        )
    return found


def place_of(superblock: np.void, column: str) -> int:
    """An offset of the superblock, at most as large as leaves room for arithmetic."""
    return min(int(superblock[column]), 2**62)
