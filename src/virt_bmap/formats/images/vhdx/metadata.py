"""Headers, region table and metadata of a VHDX file.

Sources: Microsoft [MS-VHDX] v7.0 sections 2.2 "Header Section", 2.3 "Log", 2.6 "Metadata Region"; QEMU
block/vhdx.h.
"""

import uuid
from typing import NamedTuple

import numpy as np

from virt_bmap.core.checksums import ALL_ONES, crc32c_without
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford

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
HEADERS, REGION_TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
AREA = 64 * KIB
"""What the file identifier, each header and each region table takes."""
MAX_REGIONS = MAX_ITEMS = 2047
BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
SECTOR_SIZE = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PARENT = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
HAS_PARENT = 2
MAX_PARENT = 64 * KIB
MAX_SIZE = 64 << 40
"""The largest disk that the format allows, in bytes."""


class Metadata(NamedTuple):
    """Where the regions lie, as (offset, length), and what the metadata items say.

    `log_in_use`: the log has changes that the file does not have yet.
    """

    version: int
    log: tuple[int, int]
    log_in_use: bool
    bat: tuple[int, int]
    metadata: tuple[int, int]
    size: int
    block: int
    sector: int
    differencing: bool
    parent: str | None


def read_metadata(image: Reader) -> Metadata:
    """The current header, the first valid region table, the metadata items. Raises Corrupt or Unsupported."""
    head = _current_header(image)
    if int(head["Version"]) != 1:
        raise Unsupported(
            f"{image.name}: is VHDX of version {int(head['Version'])}; 1 is known", HEADERS[0] + 66
        )
    log = int(head["LogOffset"]), int(head["LogLength"])
    log_in_use = any(head["LogGuid"].tobytes())
    if log_in_use:
        afford(image, log[1], "its log")
    regions = _regions(image)
    for wanted, name in ((BAT, "block allocation table"), (METADATA_REGION, "metadata region")):
        if wanted not in regions:
            raise Corrupt(
                f"{image.name}: its VHDX region table at byte {REGION_TABLES[0]:#x} names no {name}",
                REGION_TABLES[0],
            )
    items = _items(image, regions[METADATA_REGION])
    block, flags = (int.from_bytes(items[FILE_PARAMETERS][at : at + 4], "little") for at in (0, 4))
    size, sector = (
        int.from_bytes(items[item][:length], "little") for item, length in ((DISK_SIZE, 8), (SECTOR_SIZE, 4))
    )
    if (
        block < MIB
        or block & (block - 1)
        or block > 256 * MIB
        or sector not in (512, 4096)
        or size > MAX_SIZE
    ):
        raise Corrupt(
            f"{image.name}: its VHDX metadata says {size:,} bytes in blocks of {block:,} and sectors "
            f"of {sector:,}",
            regions[METADATA_REGION][0],
        )
    differencing = bool(flags & HAS_PARENT)
    return Metadata(1, log, log_in_use, regions[BAT], regions[METADATA_REGION], size,
        block, sector, differencing,
                    _parent(image, items.get(PARENT)) if differencing else None)  # fmt: skip


def _current_header(image: Reader) -> np.void:
    """The header with the higher sequence number of those that have their signature and their checksum: while
    one is written, only the other holds."""
    raw = [image.read_clipped(at, HEADER.itemsize) for at in HEADERS]
    found = [record(data, HEADER) for data in raw if data[:4] == b"head" and is_sound(data)]
    if not found:
        raise Corrupt(
            f"{image.name}: has a VHDX header with a right checksum neither at byte {HEADERS[0]:#x} "
            f"nor at byte {HEADERS[1]:#x}",
            HEADERS[0],
        )
    return max(found, key=lambda head: int(head["SequenceNumber"]))


def is_sound(data: bytes) -> bool:
    """Is the CRC-32C at byte 4 that of all of it, taken with zeroes in its place?"""
    is_ = int(crc32c_without(np.frombuffer(data, np.uint8)[None, :], 4)[0]) ^ ALL_ONES
    return is_ == int.from_bytes(data[4:8], "little")


def damaged(image: Reader) -> list[int]:
    """Where a header or region table lies that is not as it was written, though another one is."""
    places = [(at, HEADER.itemsize) for at in HEADERS] + [(at, AREA) for at in REGION_TABLES]
    return [at for at, size in places if not is_sound(image.read_clipped(at, size))]


def _regions(image: Reader) -> dict[uuid.UUID, tuple[int, int]]:
    for at in REGION_TABLES:
        raw = image.read_clipped(at, AREA)
        head = record(raw, REGION_TABLE)
        count = int(head["EntryCount"])
        if bytes(head["Signature"]) != b"regi" or count > MAX_REGIONS or not is_sound(raw):
            continue
        found = {}
        for entry in (
            record(raw, REGION, REGION_TABLE.itemsize + nth * REGION.itemsize) for nth in range(count)
        ):
            guid = uuid.UUID(bytes_le=entry["Guid"].tobytes())
            offset = int(entry["FileOffset"])
            length = int(entry["Length"])
            if guid not in (BAT, METADATA_REGION) and entry["Required"]:
                raise Unsupported(
                    f"{image.name}: has a VHDX region of the unknown kind {guid} that must be understood", at
                )
            if offset + length > image.size or offset < REGION_TABLES[1] + AREA:
                raise Corrupt(
                    f"{image.name}: its VHDX region at bytes {offset:#x}-{offset + length:#x} does "
                    "not fit into the file",
                    at,
                )
            found[guid] = offset, length
        return found
    raise Corrupt(
        f"{image.name}: has a VHDX region table neither at byte {REGION_TABLES[0]:#x} nor at byte "
        f"{REGION_TABLES[1]:#x}",
        REGION_TABLES[0],
    )


def _items(image: Reader, region: tuple[int, int]) -> dict[uuid.UUID, bytes]:
    start, size = region
    raw = image.read_clipped(start, AREA)
    head = record(raw, METADATA_TABLE)
    count = int(head["EntryCount"])
    if bytes(head["Signature"]) != b"metadata" or count > MAX_ITEMS:
        raise Corrupt(f"{image.name}: its VHDX metadata table at byte {start:#x} is damaged", start)
    found = {}
    for entry in (
        record(raw, METADATA, METADATA_TABLE.itemsize + nth * METADATA.itemsize) for nth in range(count)
    ):
        offset, length = int(entry["Offset"]), int(entry["Length"])
        if offset + length > size:
            raise Corrupt(
                f"{image.name}: a VHDX metadata item at byte {start + offset:#x}, {length} bytes "
                "long, leaves its region",
                start,
            )
        found[uuid.UUID(bytes_le=entry["ItemId"].tobytes())] = image.read(
            start + offset, min(length, MAX_PARENT)
        )
    if missing := [item for item in (FILE_PARAMETERS, DISK_SIZE, SECTOR_SIZE) if item not in found]:
        raise Corrupt(f"{image.name}: its VHDX metadata at byte {start:#x} lacks item {missing[0]}", start)
    return found


def _parent(image: Reader, data: bytes | None) -> str | None:
    """The relative path of the parent locator, or the absolute one: keys and values in UTF-16."""
    if data is None or len(data) < 20:
        return None
    pairs = {}
    for at in range(20, min(len(data), 20 + 12 * int.from_bytes(data[18:20], "little")) - 11, 12):
        key, value = (int.from_bytes(data[at + low : at + low + 4], "little") for low in (0, 4))
        key_size, value_size = (int.from_bytes(data[at + low : at + low + 2], "little") for low in (8, 10))
        pairs[data[key : key + key_size].decode("utf-16-le", "replace")] = data[
            value : value + value_size
        ].decode("utf-16-le", "replace")
    name = pairs.get("relative_path") or pairs.get("absolute_win32_path")
    return name.replace("\\", "/") if name else None
