"""The structures of a VHDX file.

Sources: Microsoft [MS-VHDX] v7.0 sections 2.2 "Header Section", 2.3 "Log", 2.5 "BAT", 2.6 "Metadata
Region"; QEMU block/vhdx.h.
"""

import uuid

from virt_bmap.core.layout import struct

KIB, MIB = 1 << 10, 1 << 20
HEADER = struct(4096, [
    (0, "Signature", "S4"), (4, "Checksum", "<u4"), (8, "SequenceNumber", "<u8"), (48, "LogGuid", "V16"),
    (64, "LogVersion", "<u2"), (66, "Version", "<u2"), (68, "LogLength", "<u4"), (72, "LogOffset", "<u8"),
])  # fmt: skip
REGION_TABLE = struct(16, [(0, "Signature", "S4"), (8, "EntryCount", "<u4")])
REGION = struct(
    32, [(0, "Guid", "V16"), (16, "FileOffset", "<u8"), (24, "Length", "<u4"), (28, "Required", "<u4")]
)
METADATA_TABLE = struct(32, [(0, "Signature", "S8"), (10, "EntryCount", "<u2")])
METADATA = struct(
    32, [(0, "ItemId", "V16"), (16, "Offset", "<u4"), (20, "Length", "<u4"), (24, "Flags", "<u4")]
)
ENTRY = struct(64, [
    (0, "Signature", "S4"), (4, "Checksum", "<u4"), (8, "EntryLength", "<u4"), (12, "Tail", "<u4"),
    (16, "SequenceNumber", "<u8"), (24, "DescriptorCount", "<u4"), (32, "LogGuid", "V16"),
    (48, "FlushedFileOffset", "<u8"), (56, "LastFileOffset", "<u8"),
])  # fmt: skip
DESCRIPTOR = struct(
    32,
    [
        (0, "Signature", "S4"),
        (8, "ZeroLength", "<u8"),
        (16, "FileOffset", "<u8"),
        (24, "SequenceNumber", "<u8"),
    ],
)
"""Of zeroes, or of a data sector: that holds back its bytes TRAILING and LEADING for it."""
TRAILING, LEADING = slice(4, 8), slice(8, 16)
DATA_SECTOR = struct(4096, [(0, "Signature", "S4"), (4, "SequenceHigh", "<u4"), (4092, "SequenceLow", "<u4")])
LOG_SECTOR = 4096
HEADERS, REGION_TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
AREA = 64 * KIB
"""What the file identifier, each header and each region table takes."""
MAX_REGIONS = MAX_ITEMS = 2047
BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
SECTOR_SIZE = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
HAS_PARENT = 2
MAX_PARENT = 64 * KIB
MAX_SIZE = 64 << 40
"""The largest disk that the format allows, in bytes."""
MAX_FILE = 1 << 61
"""Bytes of a file: sums with it must stay in 64 bits."""

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_V095, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 5, 6, 7
"""States of payload blocks; 5 is QEMU's name for what drafts of the format called unmapped."""
SECTORS_IN_CHUNK = 1 << 23
"""Sectors that one sector bitmap block of 1 MiB describes."""
