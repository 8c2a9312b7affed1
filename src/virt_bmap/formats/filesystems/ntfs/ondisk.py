"""NTFS on disk: records with the names and offsets of ntfs-3g, and the numbers that mean something.

Sources: ntfs-3g include/ntfs-3g/layout.h and logfile.h (2022.10.3); kernel fs/ntfs3/ntfs.h (v6.12); [MS-FSCC]
2.1.2.1 for reparse tags.
"""

from virt_bmap.core.layout import struct

BOOT_SECTOR = struct(512, [
    (0x03, "oem_id", "S8"),
    (0x0B, "bytes_per_sector", "<u2"),
    (0x0D, "sectors_per_cluster", "u1"),
    (0x28, "number_of_sectors", "<u8"),
    (0x30, "mft_lcn", "<u8"),
    (0x38, "mftmirr_lcn", "<u8"),
    (0x40, "clusters_per_mft_record", "i1"),
    (0x48, "volume_serial_number", "<u8"),
])  # fmt: skip
OEM_ID = b"NTFS    "

MFT_RECORD = struct(0x28, [
    (0x00, "magic", "<u4"),
    (0x04, "usa_ofs", "<u2"),
    (0x06, "usa_count", "<u2"),
    (0x08, "lsn", "<u8"),
    (0x10, "sequence_number", "<u2"),
    (0x14, "attrs_offset", "<u2"),
    (0x16, "flags", "<u2"),
    (0x18, "bytes_in_use", "<u4"),
    (0x20, "base_mft_record", "<u8"),
])  # fmt: skip
MAGIC_FILE = int.from_bytes(b"FILE", "little")
IN_USE, IS_DIRECTORY = 1, 2
STRIDE = 512
"""Bytes that one update sequence number protects, whatever the sector size."""
REFERENCE = (1 << 48) - 1
"""Mask of the record number in an MFT reference; the 16 bits above are the sequence number."""

ATTR_HEADER = struct(0x18, [
    (0x00, "type", "<u4"),
    (0x04, "length", "<u4"),
    (0x08, "non_resident", "u1"),
    (0x09, "name_length", "u1"),
    (0x0A, "name_offset", "<u2"),
    (0x0C, "flags", "<u2"),
    (0x10, "value_length", "<u4"),          # resident
    (0x14, "value_offset", "<u2"),
])  # fmt: skip
ATTR_RECORD = struct(0x40, [                # non-resident
    (0x10, "lowest_vcn", "<i8"),
    (0x18, "highest_vcn", "<i8"),
    (0x20, "mapping_pairs_offset", "<u2"),
    (0x22, "compression_unit", "u1"),
    (0x30, "data_size", "<i8"),
    (0x38, "initialized_size", "<i8"),
])  # fmt: skip
RESIDENT_HEADER, NON_RESIDENT_HEADER = 0x18, 0x40
PAIRS_AT_LEAST = 0x28
"""A run list can't begin before the fields that every piece of an attribute has; the sizes after them are
the first piece's only."""
ATTR_COMPRESSED, ATTR_ENCRYPTED = 0x00FF, 0x4000

STANDARD_INFORMATION, ATTRIBUTE_LIST, FILE_NAME = 0x10, 0x20, 0x30
VOLUME_NAME, VOLUME_INFORMATION, DATA = 0x60, 0x70, 0x80
INDEX_ROOT = 0x90
INDEX_ALLOCATION = 0xA0
BITMAP = 0xB0
REPARSE_POINT = 0xC0
EA = 0xE0
LOGGED_UTILITY_STREAM = 0x100
ATTR_END = 0xFFFFFFFF
ATTR_NAMES = {
    0x10: "$STANDARD_INFORMATION", 0x20: "$ATTRIBUTE_LIST", 0x30: "$FILE_NAME", 0x40: "$OBJECT_ID",
    0x50: "$SECURITY_DESCRIPTOR", 0x60: "$VOLUME_NAME", 0x70: "$VOLUME_INFORMATION", 0x80: "$DATA",
    0x90: "$INDEX_ROOT", 0xA0: "$INDEX_ALLOCATION", 0xB0: "$BITMAP", 0xC0: "$REPARSE_POINT",
    0xD0: "$EA_INFORMATION", 0xE0: "$EA", 0xF0: "$PROPERTY_SET", 0x100: "$LOGGED_UTILITY_STREAM",
}  # fmt: skip

STANDARD_INFORMATION_VALUE = struct(
    0x24, [(0x08, "last_data_change_time", "<u8"), (0x20, "file_attributes", "<u4")]
)
FILE_ATTR_SYSTEM = 4
FILE_NAME_VALUE = struct(0x42, [
    (0x00, "parent_directory", "<u8"),
    (0x40, "file_name_length", "u1"),
    (0x41, "file_name_type", "u1"),
])  # fmt: skip
NAME_DOS = 2
VOLUME_INFORMATION_VALUE = struct(
    0x0C, [(0x08, "major_ver", "u1"), (0x09, "minor_ver", "u1"), (0x0A, "flags", "<u2")]
)
VOLUME_IS_DIRTY = 1

MFT, LOGFILE, VOLUME, ROOT, BITMAP_FILE, BOOT, EXTEND = 0, 2, 3, 5, 6, 7, 11
SYSTEM_FILES = (
    "$MFT", "$MFTMirr", "$LogFile", "$Volume", "$AttrDef", ".", "$Bitmap", "$Boot", "$BadClus", "$Secure",
    "$UpCase", "$Extend",
)  # fmt: skip
FIRST_USER = 16
"""Records below it belong to the filesystem, those that Microsoft has kept for later included."""
MIRRORED = 4
"""Records that $MFTMirr repeats: at least these four."""

REPARSE_SYMLINK = 0xA000000C
REPARSE_MOUNT_POINT = 0xA0000003
REPARSE_WOF = 0x80000017
REPARSE_DEDUP = 0x80000013
REPARSE_LX_SYMLINK, REPARSE_AF_UNIX, REPARSE_LX_FIFO, REPARSE_LX_CHR, REPARSE_LX_BLK = (
    0xA000001D, 0x80000023, 0x80000024, 0x80000025, 0x80000026,
)  # fmt: skip

INTX_SYMBOLIC_LINK, INTX_CHARACTER_DEVICE, INTX_BLOCK_DEVICE = (
    int.from_bytes(b"Intx" + word, "little") for word in (b"LNK\1", b"CHR\0", b"BLK\0")
)
"""How Interix, and after it ntfs-3g, begins the content of a system file that stands for something else."""

RESTART_PAGE = struct(0x1E, [(0x00, "magic", "S4"), (0x18, "restart_area_offset", "<u2")])
RESTART_AREA = struct(
    0x10, [(0x00, "current_lsn", "<u8"), (0x0C, "client_in_use_list", "<u2"), (0x0E, "flags", "<u2")]
)
RESTART_PAGE_SIZE = 4096
"""The second restart page follows one system page after the first; Windows on x86 and Arm has pages of 4096
bytes."""
LOGFILE_NO_CLIENT, RESTART_VOLUME_IS_CLEAN = 0xFFFF, 2
