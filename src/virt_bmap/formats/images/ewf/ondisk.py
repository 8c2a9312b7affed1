"""The structures of Expert Witness segment files, version 1: E01, and SMART's s01.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)" (0.0.86); ASR Data, "SMART Expert Witness
Compression Format".
"""

from virt_bmap.core.layout import struct

SIGNATURE = b"EVF\x09\x0d\x0a\xff\0"
FILE_HEADER = struct(13, [(0, "signature", "S8"), (8, "fields_start", "u1"), (9, "segment_number", "<u2")])
SECTION = struct(76, [
    (0, "type", "S16"), (16, "next_offset", "<u8"), (24, "size", "<u8"), (72, "checksum", "<u4"),
])  # fmt: skip
NEXT, DONE = "next", "done"
"""The last section of a segment: another one follows, or none."""
VOLUME = struct(80, [
    (0, "media_type", "u1"), (4, "chunk_count", "<u4"), (8, "sectors_per_chunk", "<u4"),
    (12, "bytes_per_sector", "<u4"), (16, "sector_count", "<u8"), (36, "media_flags", "u1"),
    (52, "compression_level", "u1"), (56, "error_granularity", "<u4"), (64, "set_identifier", "V16"),
])  # fmt: skip
LONG_VOLUME, SHORT_VOLUME = 1052, 94
"""Bytes of a volume section's data, as EnCase and as the specification have it."""
TABLE_HEADER = struct(24, [(0, "entry_count", "<u4"), (8, "base_offset", "<u8"), (20, "checksum", "<u4")])
TABLE_ENTRY = struct(4, [(0, "chunk_data_offset", "<u4")])
ENTRY = TABLE_ENTRY.itemsize
PACKED, PLACE = 1 << 31, (1 << 31) - 1
"""The bit of an entry that says compressed, and those that say where."""
CHECKSUM = 4
"""Bytes of an Adler-32."""
ERRORS, ERROR = (
    struct(520, [(0, "entry_count", "<u4"), (516, "checksum", "<u4")]),
    struct(8, [(0, "first_sector", "<u4"), (4, "sector_count", "<u4")]),
)
SESSIONS, SESSION = (
    struct(36, [(0, "session_count", "<u4"), (32, "checksum", "<u4")]),
    struct(32, [(0, "flags", "<u4"), (4, "first_sector", "<u4")]),
)
AUDIO = 1
"""Flag of a session."""
HASH = struct(36, [(0, "md5", "V16"), (32, "checksum", "<u4")])
DIGEST = struct(80, [(0, "md5", "V16"), (16, "sha1", "V20"), (76, "checksum", "<u4")])
MEDIA = {0: "removable", 1: "fixed", 3: "optical", 0x0E: "logical", 0x10: "memory"}
LOGICAL = 0x0E
PHYSICAL, FASTBLOC, TABLEAU = 2, 4, 8
"""Media flags: a whole device, and whose write blocker stood before it."""
LEVELS = {0: "none", 1: "fast", 2: "best"}
MAX_CHUNK = 64 << 20
"""Bytes of a chunk: 32,768 sectors, which is EnCase's limit, of 2,048 bytes."""
MAX_SIZE = 1 << 62
"""Bytes of a disk: sums with it must stay in 64 bits."""
MAX_SECTIONS = 1 << 17
"""Sections of a segment. A table lists at least 16,375 chunks, so these are some 20 TiB in one file; most
programs write segments of 2 GiB at most, and none more than some thousand sections."""
MAX_TEXT = 1 << 20
"""Bytes of text about the case: EnCase stops at 3,000 characters a value."""
