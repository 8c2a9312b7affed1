"""Footer and dynamic disk header of a VHD, checked.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0; QEMU block/vpc.c (v10.0)
for how large a disk is.
"""

from typing import NamedTuple

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.vhd.ondisk import FOOTER, HEADER, SECTOR, TYPES

SIZE_BY_GEOMETRY = (b"vpc ", b"qemu")
"""Programs whose disks have as many sectors as their geometry: Virtual PC, and old
QEMU.

All others' have `current_size` bytes: Hyper-V ("win "), Azure ("wa"), Disk2vhd ("d2v "), XenServer ("tap"),
XenConverter ("CTXS"), VirtualBox ("vbox"), newer QEMU ("qem2"). QEMU itself knows Azure's since 10.0.
"""
MAX_GEOMETRY = 65535 * 16 * 255
MAX_SIZE = 1 << 62
"""Bytes of a disk: sums with it must stay in 64 bits."""


class Footer(NamedTuple):
    """What matters of the footer and, unless the image is fixed, of the dynamic disk header."""

    kind: str
    size: int
    by_geometry: bool
    header: int
    table: int = 0
    entries: int = 0
    block: int = 0
    wrong: bool = False
    """A checksum does not hold."""


def read_footer(image: Reader) -> Footer:
    """The footer at the end, or its copy at the start; sizes as QEMU takes them.

    Raises Corrupt or Unsupported.
    """
    if image.size < SECTOR:
        raise Corrupt(f"{image.name}: is too short for a VHD: {image.size} bytes", 0)
    places = [at for at in (0, image.size - SECTOR) if image.read(at, 8) == b"conectix"]
    if not places:
        raise Corrupt(f"{image.name}: has no VHD footer at its start or at its end", image.size - SECTOR)
    sector = image.read(places[0], SECTOR)
    raw = record(sector, FOOTER)
    wrong = checksum(sector, 64) != int(raw["checksum"])
    kind = TYPES.get(int(raw["disk_type"]))
    if kind is None or (kind != "fixed" and places[0] != 0):
        raise Unsupported(
            f"{image.name}: its VHD footer at byte {places[0]:#x} says type {int(raw['disk_type'])}; fixed, "
            "dynamic and differencing are supported",
            places[0] + 60,
        )
    sectors = int(raw["cylinder"]) * int(raw["heads"]) * int(raw["sectors"])
    by_geometry = raw["creator_application"].tobytes() in SIZE_BY_GEOMETRY and sectors != MAX_GEOMETRY
    size = (sectors if by_geometry else int(raw["current_size"]) // SECTOR) * SECTOR
    if size > MAX_SIZE:
        raise Corrupt(f"{image.name}: its VHD footer says that the disk has {size:#x} bytes", places[0] + 48)
    if kind == "fixed":
        return Footer(kind, size, by_geometry, 0, wrong=wrong)
    at = int(raw["data_offset"])
    if at + HEADER.itemsize > image.size:
        raise Corrupt(
            f"{image.name}: its dynamic disk header at byte {at:#x} lies beyond the end of the file", 16
        )
    head = record(image.read(at, HEADER.itemsize), HEADER)
    table, entries, block = (int(head[name]) for name in ("table_offset", "max_table_entries", "block_size"))
    if (
        bytes(head["cookie"]) != b"cxsparse"
        or block < SECTOR
        or block & (block - 1)
        or table + entries * 4 > image.size
    ):
        raise Corrupt(
            f"{image.name}: its dynamic disk header at byte "
            f"{at:#x} is damaged: {plural(entries, 'block')} of "
            f"{block:,} bytes, table at byte {table:#x}",
            at,
        )
    if not size <= entries * block <= MAX_SIZE:
        raise Corrupt(
            f"{image.name}: its {plural(entries, 'block')} of {block:,} bytes make no disk of {size:,}",
            at + 28,
        )
    wrong |= checksum(image.read(at, HEADER.itemsize), 36) != int(head["checksum"])
    return Footer(kind, size, by_geometry, at, table, entries, block, wrong)


def marked(image: Reader) -> Mark | None:
    """A machine that was saved has not written everything that it would have at its end."""
    foot = record(image.read_clipped(max(0, image.size - SECTOR), SECTOR), FOOTER)
    if foot["cookie"] != b"conectix" or not foot["saved_state"]:
        return None
    words = "its machine was saved, not shut down: what it still had in memory is missing"
    return Mark("unclean", f"{image.name}: {words}")


def options(image: Reader) -> dict[str, str]:
    """How QEMU is to take the disk's size: which creators it knows depends on its version."""
    return {"force_size_calc": "chs" if read_footer(image).by_geometry else "current_size"}


def checksum(data: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes but the checksum's own, which lie at `at`."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF
