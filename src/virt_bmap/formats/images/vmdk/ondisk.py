"""The structures of a sparse VMDK extent.

Sources: VMware "Virtual Disk Format 5.0"; QEMU block/vmdk.c.
"""

from virt_bmap.core.layout import struct

SECTOR = 512
HEADER = struct(512, [
    (0, "magicNumber", "S4"), (4, "version", "<u4"), (8, "flags", "<u4"), (12, "capacity", "<u8"),
    (20, "grainSize", "<u8"), (28, "descriptorOffset", "<u8"), (36, "descriptorSize", "<u8"),
    (44, "numGTEsPerGT", "<u4"), (48, "rgdOffset", "<u8"), (56, "gdOffset", "<u8"), (64, "overHead", "<u8"),
    (72, "uncleanShutdown", "u1"), (77, "compressAlgorithm", "<u2"),
])  # fmt: skip
REDUNDANT, ZERO_GRAINS, COMPRESSED, MARKERS = 1 << 1, 1 << 2, 1 << 16, 1 << 17
AT_END = (1 << 64) - 1
"""gdOffset of a stream: the directory's place is only known in the footer."""
MARKER = struct(16, [(0, "numSectors", "<u8"), (8, "size", "<u4"), (12, "type", "<u4")])
GRAIN_MARKER = struct(12, [(0, "lba", "<u8"), (8, "size", "<u4")])
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)
"""Types of markers of metadata."""
MAX_TABLE_ENTRIES, MAX_GRAIN, MAX_CAPACITY = 512, 2 << 20, 1 << 53
"""QEMU's limits for a grain table and a grain (in bytes); sectors of a disk."""
