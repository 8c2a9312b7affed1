"""Encrypt-on-write (Windows 10 and later): bitmaps tell which chunks of a volume are encrypted.

The information has two copies; it names a bitmap for each region of the volume, and each bitmap has two
records, of which the one with the higher sequence number counts. A log beside each bitmap keeps a chunk while
it is converted.

Sources: libbde libbde/bde_eow.h, libbde_eow_block_map.c, libbde_eow_block_record.c.
"""

import zlib
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, bit_runs, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.model.damage import Damage

INFORMATION, BITMAP, RECORD = b"FVE-EOW", b"FVE-EOWBM", b"FVE-EOWBR"
EOW_INFORMATION = struct(56, [
    (0, "signature", "S8"), (8, "header_size", "<u2"), (10, "size", "<u2"), (20, "chunk_size", "<u4"),
    (24, "conversion_log_size", "<u4"), (32, "region_count", "<u4"), (36, "crc32", "<u4"),
])  # fmt: skip
EOW_BITMAP = struct(60, [
    (0, "signature", "S10"), (10, "header_size", "<u2"), (12, "size", "<u4"), (20, "region_offset", "<u8"),
    (28, "region_size", "<u8"), (36, "conversion_log_offset", "<u8"), (44, "record_offset", "<u4", (2,)),
    (52, "record_size", "<u4"), (56, "crc32", "<u4"),
])  # fmt: skip
EOW_RECORD = struct(36, [
    (0, "signature", "S10"), (10, "header_size", "<u2"), (12, "size", "<u4"), (16, "bits", "<u4"),
    (20, "sequence_number", "<u8"), (32, "crc32", "<u4"),
])  # fmt: skip
MAX_BITMAP = 64 << 10
"""Bytes of a bitmap and its records: Windows writes 1,536."""
MAX_END = 1 << 62


class Zone(NamedTuple):
    """Bytes that the volume does not show: what they are, where, and how many."""

    part: str
    start: int
    length: int


class Conversion(NamedTuple):
    """What a volume keeps for itself, and the bytes that are encrypted."""

    zones: list[Zone]
    encrypted: tuple[Int, Int]


def read_conversion(reader: Reader, offsets: list[int], sector: int, damage: Damage) -> Conversion:
    """From the first good copy of the information. Raises Corrupt where there is none, or a bitmap is
    damaged."""
    at, data = _information(reader, offsets, damage)
    head = record(data, EOW_INFORMATION)
    chunk, log = int(head["chunk_size"]), int(head["conversion_log_size"])
    if chunk == 0 or chunk % sector:
        words = f"the encrypt-on-write information at byte {at:#x} says chunk_size {chunk}"
        raise Corrupt(words, at, "superblock")
    places = np.frombuffer(data[EOW_INFORMATION.itemsize :], "<u8").tolist()
    afford(reader, len(places) * MAX_BITMAP, "the bitmaps of its encryption")
    zones = [
        Zone(f"EOW information {number}", place, -(-len(data) // sector) * sector)
        for number, place in enumerate(offsets, 1)
    ]
    starts, ends = [EMPTY], [EMPTY]
    for number, place in enumerate(places, 1):
        size, log_at, low, high = _encrypted_chunks(reader, place, chunk, sector)
        zones.append(Zone(f"EOW bitmap {number}", place, size))
        zones.append(Zone(f"EOW conversion log {number}", log_at, log))
        starts.append(low)
        ends.append(high)
    inside = [zone for zone in zones if 0 <= zone.start <= reader.size - zone.length]
    return Conversion(inside, union(np.concatenate(starts), np.concatenate(ends)))


def _information(reader: Reader, offsets: list[int], damage: Damage) -> tuple[int, bytes]:
    """(where it lies, the information with its list of bitmaps)."""
    for number, at in enumerate(offsets, 1):
        head = record(reader.read_clipped(at, EOW_INFORMATION.itemsize), EOW_INFORMATION)
        size = EOW_INFORMATION.itemsize + 8 * int(head["region_count"])
        data = reader.read_clipped(at, size) if size == int(head["size"]) else b""
        if head["signature"] == INFORMATION and data and _is_sound(data, EOW_INFORMATION, int(head["crc32"])):
            return at, data
        words = f"copy {number} of the encrypt-on-write information at byte {at:#x} is damaged"
        damage.say("copy-differs", words, at)
    raise Corrupt(
        "no copy of its encrypt-on-write information is good, so that nobody knows which chunks are "
        f"encrypted: the copies should lie at bytes {', '.join(f'{at:#x}' for at in offsets)}",
        offsets[0],
        "superblock",
    )


def _encrypted_chunks(reader: Reader, at: int, chunk: int, sector: int) -> tuple[int, int, Int, Int]:
    """(bytes of the bitmap at `at`, where its log lies, starts and ends of the encrypted bytes of its
    region)."""
    head = record(reader.read_clipped(at, EOW_BITMAP.itemsize), EOW_BITMAP)
    size, low, length = (int(head[name]) for name in ("size", "region_offset", "region_size"))
    records = head["record_offset"].tolist()
    if head["signature"] != BITMAP or size > MAX_BITMAP or max(records) > size or low % sector or (
        low + length > MAX_END
    ):  # fmt: skip
        raise Corrupt(f"the encrypt-on-write bitmap at byte {at:#x} is damaged", at, "superblock")
    data = reader.read_clipped(at, size)
    found = [record(data, EOW_RECORD, place) for place in records if place + EOW_RECORD.itemsize <= size]
    good = [
        (int(one["sequence_number"]), int(one["bits"]), place + EOW_RECORD.itemsize)
        for one, place in zip(found, records, strict=False)
        if one["signature"] == RECORD
        and _is_sound(data[place : place + int(one["size"])], EOW_RECORD, int(one["crc32"]))
    ]
    if not good or not _is_sound(data[: min(records)], EOW_BITMAP, int(head["crc32"])):
        raise Corrupt(
            f"the encrypt-on-write bitmap at byte {at:#x}, or both of its records, is damaged",
            at,
            "superblock",
        )
    _, bits, place = max(good)
    bitmap = np.frombuffer(data, np.uint8, offset=place)
    starts, ends = bit_runs(bitmap, min(bits, 8 * len(bitmap), -(-length // chunk)), value=True)
    return (
        size,
        int(head["conversion_log_offset"]),
        low + starts * chunk,
        low + np.minimum(ends * chunk, length),
    )


def _is_sound(data: bytes, kind: "np.dtype[np.void]", crc32: int) -> bool:
    """Is that the checksum, computed with its own field as zeroes?"""
    fields = kind.fields
    assert fields
    at = int(fields["crc32"][1])
    return zlib.crc32(data[:at] + bytes(4) + data[at + 4 :]) == crc32
