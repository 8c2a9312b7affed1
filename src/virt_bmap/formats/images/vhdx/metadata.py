"""The metadata region of a VHDX file: the disk's size, its blocks and sectors, its parent.

Sources: Microsoft [MS-VHDX] v7.0 section 2.6 "Metadata Region".
"""

import uuid
from typing import Any, NamedTuple

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.vhdx.header import Region, read_header, read_regions
from virt_bmap.formats.images.vhdx.ondisk import (
    AREA,
    DISK_SIZE,
    FILE_PARAMETERS,
    HAS_PARENT,
    MAX_ITEMS,
    MAX_PARENT,
    MAX_SIZE,
    METADATA,
    METADATA_TABLE,
    MIB,
    PARENT_LOCATOR,
    SECTOR_SIZE,
    SECTORS_IN_CHUNK,
)

REQUIRED = (FILE_PARAMETERS, DISK_SIZE, SECTOR_SIZE)


class Metadata(NamedTuple):
    """What the metadata items say; sizes in bytes."""

    size: int
    block: int
    sector: int
    differencing: bool
    parent: str | None

    @property
    def chunk(self) -> int:
        """Payload blocks whose sectors one sector bitmap block describes."""
        return SECTORS_IN_CHUNK * self.sector // self.block

    def facts(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "subformat": "differencing" if self.differencing else "dynamic or fixed",
            "sector_size": self.sector,
        }


def read_metadata(image: Reader, region: Region) -> Metadata:
    """Raises Corrupt."""
    items = _items(image, region)
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
            f"{image.name}: its VHDX metadata says {size:,} bytes, "
            f"blocks of {block:,} bytes, sectors of {sector:,}",
            region[0],
        )
    differencing = bool(flags & HAS_PARENT)
    parent = _parent(items.get(PARENT_LOCATOR)) if differencing else None
    return Metadata(size, block, sector, differencing, parent)


def parent(image: Reader) -> str | None:
    """The name of a differencing image's parent; Unsupported where it has none that can be followed."""
    read_header(image)  # raises, too: what a header claims of the log is QEMU's to search
    region = read_regions(image).metadata
    about = read_metadata(image, region)
    if about.differencing and not about.parent:
        raise Unsupported(
            f"{image.name}: is a differencing VHDX that names its "
            "parent by neither a relative nor an absolute path",
            region[0],
        )
    return about.parent


def _items(image: Reader, region: Region) -> dict[uuid.UUID, bytes]:
    """Those that are asked for."""
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
                f"{image.name}: a VHDX metadata item at byte "
                f"{start + offset:#x}, {length} bytes long, leaves its region",
                start,
            )
        item = uuid.UUID(bytes_le=entry["ItemId"].tobytes())
        if item in (*REQUIRED, PARENT_LOCATOR):
            found[item] = image.read(start + offset, min(length, MAX_PARENT))
    if missing := [item for item in REQUIRED if item not in found]:
        raise Corrupt(f"{image.name}: its VHDX metadata at byte {start:#x} lacks item {missing[0]}", start)
    return found


def _parent(data: bytes | None) -> str | None:
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
