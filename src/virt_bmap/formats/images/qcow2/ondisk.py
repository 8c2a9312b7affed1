"""The structures of a qcow2 image, and QEMU's limits.

Sources: QEMU docs/interop/qcow2.rst (v8.2) sections "Header", "Header extensions", "Snapshots", "Bitmaps",
"Cluster mapping"; limits from QEMU block/qcow2.h.
"""

import struct as packing

from virt_bmap.core.layout import struct

HEADER = struct(104, [
    (0, "magic", ">u4"), (4, "version", ">u4"), (8, "backing_file_offset", ">u8"),
    (16, "backing_file_size", ">u4"), (20, "cluster_bits", ">u4"), (24, "size", ">u8"),
    (32, "crypt_method", ">u4"), (36, "l1_size", ">u4"), (40, "l1_table_offset", ">u8"),
    (48, "refcount_table_offset", ">u8"), (56, "refcount_table_clusters", ">u4"), (60, "nb_snapshots", ">u4"),
    (64, "snapshots_offset", ">u8"), (72, "incompatible_features", ">u8"), (80, "compatible_features", ">u8"),
    (88, "autoclear_features", ">u8"), (96, "refcount_order", ">u4"), (100, "header_length", ">u4"),
])  # fmt: skip
V2_LENGTH = 72
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1 = 32 << 20
"""QCOW_MAX_L1_SIZE: bytes of an L1 table."""
MAX_REFCOUNT_TABLE = 8 << 20
"""QCOW_MAX_REFTABLE_SIZE, in bytes."""
MAX_SNAPSHOTS, MAX_SNAPSHOT_TABLE, MAX_SNAPSHOT_EXTRA = 65536, 64 << 20, 1024
"""QCOW_MAX_SNAPSHOTS, QCOW_MAX_SNAPSHOTS_SIZE and QCOW_MAX_SNAPSHOT_EXTRA_DATA."""
MAX_BITMAPS, MAX_BITMAP_DIRECTORY = 65535, 64 << 20
"""QCOW2_MAX_BITMAPS and QCOW2_MAX_BITMAP_DIRECTORY_SIZE."""
MAX_SIZE = 1 << 62
"""Bytes of a disk: sums with it must stay in 64 bits."""

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
INCOMPATIBLE = {
    DIRTY: "dirty",
    CORRUPT: "corrupt",
    DATA_FILE: "data-file",
    COMPRESSION: "compression",
    EXTENDED_L2: "extended-l2",
}
COMPATIBLE = {1: "lazy-refcounts"}
BITMAPS = 1
"""Autoclear: a program that does not know of bitmaps clears it, and they are void from then on."""
AUTOCLEAR = {BITMAPS: "bitmaps", 2: "data-file-raw"}
CRYPT = {0: None, 1: "AES", 2: "LUKS"}
COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}

EXT_END = 0
EXT_DATA_FILE = 0x44415441
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
CRYPTO_HEADER = packing.Struct(">QQ")
BITMAPS_HEADER = packing.Struct(">IIQQ")
SNAPSHOT = packing.Struct(">QIHHIIQII")
BITMAP = packing.Struct(">QIIBBHI")
IN_USE, AUTO = 1, 2

COPIED, COMPRESSED, ALL_ZEROS = 1 << 63, 1 << 62, 1
"""Bits of L1 and L2 entries."""
OFFSET_MASK = 0x00FFFFFFFFFFFE00
"""The offset in an L1 or L2 entry, and in one of a bitmap table."""
REFCOUNT_MASK = 0xFFFFFFFFFFFFFE00
"""The offset in an entry of the refcount table."""
SUBCLUSTERS = 32
SECTOR = 512
"""In which the length of compressed clusters is counted."""
