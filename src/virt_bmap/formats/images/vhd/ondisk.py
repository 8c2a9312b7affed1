"""The structures of a VHD.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0.
"""

from virt_bmap.core.layout import struct

FOOTER = struct(512, [
    (0, "cookie", "S8"), (12, "file_format_version", ">u4"), (16, "data_offset", ">u8"),
    (28, "creator_application", "V4"), (48, "current_size", ">u8"), (56, "cylinder", ">u2"),
    (58, "heads", "u1"), (59, "sectors", "u1"), (60, "disk_type", ">u4"), (64, "checksum", ">u4"),
    (84, "saved_state", "u1"),
])  # fmt: skip
HEADER = struct(1024, [
    (0, "cookie", "S8"), (16, "table_offset", ">u8"), (28, "max_table_entries", ">u4"),
    (32, "block_size", ">u4"), (36, "checksum", ">u4"), (576, "parent_locator_entries", "V192"),
])  # fmt: skip
LOCATOR = struct(
    24,
    [
        (0, "platform_code", "S4"),
        (4, "data_space", ">u4"),
        (8, "data_length", ">u4"),
        (16, "data_offset", ">u8"),
    ],
)
SECTOR = 512
TYPES = {2: "fixed", 3: "dynamic", 4: "differencing"}
UNUSED = 0xFFFFFFFF
