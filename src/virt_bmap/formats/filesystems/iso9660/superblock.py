"""Volume descriptors, path tables and El Torito boot catalogs: what lies at known places.

Sources: ECMA-119 (4th edition) chapter 8; Joliet 1.0; "El Torito" Bootable CD-ROM Format 1.0; Linux
fs/isofs/inode.c (order of descriptors).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

SECTOR = 2048
FIRST_DESCRIPTOR = 16 * SECTOR
MAX_DESCRIPTORS = 100
"""As Linux: descriptors looked at before giving up on a terminator."""
BOOT_RECORD, PRIMARY, SUPPLEMENTARY, TERMINATOR = 0, 1, 2, 255
JOLIET_ESCAPES = (b"%/@", b"%/C", b"%/E")
JOLIET_LABEL = 16
"""Characters of a Joliet volume identifier."""
RECOGNITION = (b"BEA01", b"NSR02", b"NSR03", b"BOOT2", b"TEA01")
"""Descriptors of a UDF bridge, which follow those of ISO 9660."""

VOLUME = struct(2048, [
    (0, "type", "u1"),
    (1, "standard_identifier", "S5"),
    (6, "version", "u1"),
    (40, "volume_identifier", "V32"),
    (80, "volume_space_size", "<u4"),
    (88, "escape_sequences", "V32"),
    (128, "logical_block_size", "<u2"),
    (132, "path_table_size", "<u4"),
    (140, "type_l_path_table", "<u4"),
    (144, "optional_type_l_path_table", "<u4"),
    (148, "type_m_path_table", ">u4"),
    (152, "optional_type_m_path_table", ">u4"),
    (156, "root_directory_record", "V34"),
    (813, "creation_date", "V17"),
    (830, "modification_date", "V17"),
])  # fmt: skip

BOOT_ENTRY = struct(32, [
    (0, "boot_indicator", "u1"),
    (1, "boot_media_type", "u1"),
    (2, "section_entries", "<u2"),
    (6, "sector_count", "<u2"),
    (8, "load_rba", "<u4"),
])  # fmt: skip
EL_TORITO = b"EL TORITO SPECIFICATION"
BOOTABLE, NOT_BOOTABLE, SECTION, LAST_SECTION, EXTENSION = 0x88, 0x00, 0x90, 0x91, 0x44
MEDIA = ("no emulation", "1.2M floppy", "1.44M floppy", "2.88M floppy", "hard disk")
FLOPPY_SIZES = (0, 1_228_800, 1_474_560, 2_949_120)
PLATFORMS = {0: "x86", 1: "PowerPC", 2: "Mac", 0xEF: "EFI"}


class DirectoryTree(NamedTuple):
    """One directory tree of the volume: offset and size in bytes of its root, and where its path tables
    lie."""

    name: str
    root: int
    root_size: int
    path_tables: list[tuple[int, int]]


@dataclass
class Descriptors:
    """What the volume descriptors of the session that begins at byte `start` say; offsets and sizes in
    bytes, the size counted from there."""

    start: int
    block_size: int
    size: int
    label: str | None
    uuid: str | None
    trees: list[DirectoryTree]
    end: int
    boot_catalogs: list[int] = field(default_factory=list)


class BootImage(NamedTuple):
    """An image that El Torito boots: bytes [offset, +length) as far as the catalog tells, and what it is."""

    offset: int
    length: int
    name: str


def read_descriptors(reader: Reader, start: int = 0) -> Descriptors:
    """All descriptors from sector 16 of the session up to the terminator, those of a UDF bridge after it
    included in `end`."""
    place = start + FIRST_DESCRIPTOR
    count = max(0, min(MAX_DESCRIPTORS, (reader.size - place) // SECTOR))
    sectors = reader.read_blocks(place + SECTOR * np.arange(count, dtype=np.int64), SECTOR)
    table = records(sectors, VOLUME)
    ours = table["standard_identifier"] == b"CD001"
    last = int(np.argmin(ours)) if not ours.all() else count
    ends = np.flatnonzero(ours & (table["type"] == TERMINATOR))
    last = min(last, int(ends[0]) + 1) if len(ends) else last
    primary = [row for row in table[:last] if row["type"] == PRIMARY]
    if not primary:
        raise Corrupt(f"{reader.name}: no primary volume descriptor among the {last} descriptors from "
            f"byte {place:#x} on, so there is no root "
                      "directory to start from", place)  # fmt: skip
    main = primary[0]
    block_size = int(main["logical_block_size"])
    if block_size not in (512, 1024, 2048, 4096):
        raise Corrupt(f"{reader.name}: logical_block_size at byte {place + 128:#x} is "
            f"{block_size}, not 512, 1024, 2048 or 4096",
                      place + 128)  # fmt: skip
    supplementary = [row for row in table[:last] if row["type"] == SUPPLEMENTARY]
    trees = [_tree("ISO 9660", main, block_size)]
    trees += [
        _tree("Joliet" if is_joliet(row) else "ISO 9660:1999", row, block_size) for row in supplementary
    ]
    catalogs = [
        int.from_bytes(sector[0x47:0x4B].tobytes(), "little") * SECTOR
        for sector, row in zip(sectors[:last], table[:last], strict=True)
        if row["type"] == BOOT_RECORD and sector[7 : 7 + len(EL_TORITO)].tobytes() == EL_TORITO
    ]
    end = last
    while end < count and (
        sectors[end, 1:6].tobytes() in RECOGNITION or sectors[end, :3].tobytes() == b"MKI"
    ):
        end += 1
    joliet = next((row for row in supplementary if is_joliet(row)), None)
    return Descriptors(
        start, block_size, int(main["volume_space_size"]) * block_size, _label(main, joliet), _uuid(main),
        trees, place + end * SECTOR, catalogs,
    )  # fmt: skip


def is_joliet(descriptor: np.void) -> bool:
    """A supplementary descriptor whose escape sequences announce UCS-2 in one of Joliet's three levels."""
    return descriptor["escape_sequences"].tobytes()[:3] in JOLIET_ESCAPES


def _tree(name: str, descriptor: np.void, block_size: int) -> DirectoryTree:
    root = descriptor["root_directory_record"].tobytes()
    extent = int.from_bytes(root[2:6], "little") + root[1]
    size = int(descriptor["path_table_size"])
    places = [
        int(descriptor[column])
        for column in VOLUME.names or ()
        if "path_table" in column and not column.endswith("size")
    ]
    return DirectoryTree(name, extent * block_size, int.from_bytes(root[10:14], "little"),
                [(place * block_size, size) for place in places if place])  # fmt: skip


def _label(primary: np.void, joliet: np.void | None) -> str | None:
    """As blkid: Joliet's 16 characters where there are any, and the rest of the primary one where they are
    only its beginning."""
    plain: str = primary["volume_identifier"].tobytes().decode("ascii", "replace").split("\0")[0]
    if joliet is None:
        return plain.rstrip() or None
    wide: str = joliet["volume_identifier"].tobytes().decode("utf-16-be", "replace").split("\0")[0]
    same = len(wide) == JOLIET_LABEL and all(
        b in (a, a.upper(), "_") for a, b in zip(wide, plain[:JOLIET_LABEL].ljust(JOLIET_LABEL), strict=True)
    )
    return (wide + plain[JOLIET_LABEL:] if same else wide).rstrip() or None


def _uuid(primary: np.void) -> str | None:
    """The date of modification, or else of creation, in the form that blkid gives as UUID."""
    for column in ("modification_date", "creation_date"):
        digits = primary[column].tobytes()[:16]
        if digits.isdigit() and digits.strip(b"0"):
            text = digits.decode()
            return "-".join([text[:4], *(text[i : i + 2] for i in range(4, 16, 2))])
    return None


def read_boot_catalog(reader: Reader, catalog: int, damage: Damage) -> tuple[int, list[BootImage]]:
    """The catalog's length in bytes (0: not readable) and the images it names, at most one sector of
    entries."""
    if catalog > reader.size - SECTOR:
        damage.say(
            "boot-catalog", f"the El Torito boot catalog at {catalog:#x} lies outside the volume", catalog
        )
        return 0, []
    data = reader.read(catalog, SECTOR)
    words = np.frombuffer(data[:32], "<u2").astype(np.int64)
    if data[0] != 1 or data[30:32] != b"\x55\xaa" or int(words.sum()) & 0xFFFF:
        damage.say(
            "boot-catalog",
            f"the El Torito validation entry at {catalog:#x} is not valid",
            catalog,
            severity=WARNING,
        )
        return SECTOR, []
    images: list[BootImage] = []
    platform, left = data[1], 1
    for at in range(32, SECTOR, 32):
        entry = record(data, BOOT_ENTRY, at)
        indicator = int(entry["boot_indicator"])
        if indicator in (SECTION, LAST_SECTION):
            platform, left = data[at + 1], int(entry["section_entries"])
        elif left and indicator in (BOOTABLE, NOT_BOOTABLE):
            left -= 1
            if image := _boot_image(reader, entry, PLATFORMS.get(platform, f"platform {platform:#x}")):
                images.append(image)
        elif indicator != EXTENSION and not left:
            break
    return SECTOR, images


def _boot_image(reader: Reader, entry: np.void, platform: str) -> BootImage | None:
    offset = int(entry["load_rba"]) * SECTOR
    media = int(entry["boot_media_type"]) & 15
    if offset == 0 or offset > reader.size - 512 or media >= len(MEDIA):
        return None
    length = int(entry["sector_count"]) * 512
    if 0 < media < len(FLOPPY_SIZES):
        length = FLOPPY_SIZES[media]
    elif media == 4:
        first = reader.read(offset, 512)[446:462]
        length = (int.from_bytes(first[8:12], "little") + int.from_bytes(first[12:16], "little")) * 512
    return BootImage(
        offset,
        min(max(length, 512), reader.size - offset),
        f"El Torito {platform} boot image, {MEDIA[media]}",
    )


def sorted_ranges(ranges: list[tuple[int, int]]) -> tuple[Int, Int]:
    """Pairs (start, end) as two arrays."""
    return ints([start for start, _ in ranges] or []), ints([end for _, end in ranges] or [])
