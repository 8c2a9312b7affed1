"""Physical volumes: the label, where the metadata areas lie, and the newest text in them.

Sources: lvm2 lib/label/label.h, lib/format_text/layout.h (structures), lib/misc/crc.c (a CRC-32 with a start
value of its own).
"""

import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.text import Section, parse
from virt_bmap.model.contract import Member
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

SECTOR = 512
LABEL_SCAN_SECTORS = 4
LABEL_ID = b"LABELONE"
LABEL_TYPE = b"LVM2 001"
MDA_MAGIC = b" LVM2 x[5A%r0N*>"
MDA_HEADER_SIZE = 512
INITIAL_CRC = 0xF597A6CF
PV_EXT_USED = 1
RAW_LOCN_IGNORED = 1
MAX_AREAS = 16
"""Data, metadata and boot loader areas in one header; LVM writes at most two of a kind."""
MAX_TEXT = 16 << 20
"""Bytes of metadata text, of all areas of a physical volume together; what several hold alike counts once.

LVM's areas are 1 MiB unless asked otherwise; ten thousand volumes need some MiB.
"""

LABEL_HEADER = struct(32, [
    (0x00, "id", "S8"), (0x08, "sector_xl", "<u8"), (0x10, "crc_xl", "<u4"), (0x14, "offset_xl", "<u4"),
    (0x18, "type", "S8"),
])  # fmt: skip
PV_HEADER = struct(40, [(0x00, "pv_uuid", "S32"), (0x20, "device_size_xl", "<u8")])
DISK_LOCN = struct(16, [(0x00, "offset", "<u8"), (0x08, "size", "<u8")])
PV_HEADER_EXTENSION = struct(8, [(0x00, "version", "<u4"), (0x04, "flags", "<u4")])
MDA_HEADER = struct(40, [
    (0x00, "checksum_xl", "<u4"), (0x04, "magic", "V16"), (0x14, "version", "<u4"), (0x18, "start", "<u8"),
    (0x20, "size", "<u8"),
])  # fmt: skip
RAW_LOCN = struct(
    24, [(0x00, "offset", "<u8"), (0x08, "size", "<u8"), (0x10, "checksum", "<u4"), (0x14, "flags", "<u4")]
)


@dataclass
class Pv:
    """One physical volume: areas are (offset, size) in bytes; `copies` holds the parsed text of each metadata
    area that has one.

    `used`: a group claims it, as far as its label knows; `empty`: it has metadata areas, all of them
    readable, without any text.
    """

    member: Member
    uuid: str
    label_offset: int
    used: bool
    data: list[tuple[int, int]]
    areas: list[tuple[int, int]]
    boot: list[tuple[int, int]]
    empty: bool = False
    copies: list[Section] = field(default_factory=list)
    damage: Damage = field(default_factory=Damage)

    @property
    def text_at(self) -> int:
        """The byte at which the first metadata area begins, for messages; the label's where there is none."""
        return min((start for start, _ in self.areas), default=self.label_offset)

    @property
    def newest(self) -> Section | None:
        """The group as its newest text describes it; None where it has none."""
        groups = (group for text in self.copies for group in text.sections.values())
        return max(groups, key=lambda group: group.number("seqno", 0), default=None)

    @property
    def seqno(self) -> int:
        """The state of its group that it knows; 0 where it knows none."""
        return self.newest.number("seqno", 0) if self.newest else 0


def find_label(reader: Reader) -> int:
    """The byte offset of the label, in one of the first four sectors; -1 where there is none."""
    head = reader.read_clipped(0, LABEL_SCAN_SECTORS * SECTOR)
    for at in range(0, len(head), SECTOR):
        label = record(head, LABEL_HEADER, at)
        if label["id"] == LABEL_ID and label["type"] == LABEL_TYPE:
            return at
    return -1


def read_pv(member: Member, texts: dict[str, Section]) -> Pv:
    """The label and all metadata areas of one physical volume. `texts` are those that were parsed, of other
    physical volumes, too: most areas of a group hold the same.

    Raises Corrupt where the label can't be used.
    """
    at = find_label(member.reader)
    sector = member.reader.read_clipped(at, SECTOR)
    label = record(sector, LABEL_HEADER)
    start = int(label["offset_xl"])
    if not LABEL_HEADER.itemsize <= start <= SECTOR - PV_HEADER.itemsize:
        raise Corrupt(
            f"the LVM label at byte {at:#x} places its header at {start}, outside its sector",
            at,
            "superblock",
        )
    header = record(sector, PV_HEADER, start)
    pv = Pv(member, dashed(bytes(header["pv_uuid"])), at, True, [], [], [])
    if _crc(sector[0x14:]) != int(label["crc_xl"]):
        pv.damage.say(
            "checksum", f"the checksum of the LVM label at byte {at:#x} is wrong", at, severity=WARNING
        )
    at = start + PV_HEADER.itemsize
    pv.data, at = _areas(sector, at)
    pv.areas, at = _areas(sector, at)
    if at + PV_HEADER_EXTENSION.itemsize <= SECTOR:
        extension = record(sector, PV_HEADER_EXTENSION, at)
        pv.boot, _ = _areas(sector, at + PV_HEADER_EXTENSION.itemsize) if extension["version"] else ([], 0)
        pv.used = extension["version"] < 2 or bool(extension["flags"] & PV_EXT_USED)  # version 1 does not say
        pv.empty = bool(pv.areas) and extension["version"] < 2
    pv.areas = _apart(pv, [area for area in pv.areas if _inside(pv, "metadata area", *area)])
    pv.boot = [area for area in pv.boot if _inside(pv, "boot loader area", *area)]
    left = MAX_TEXT
    for offset, size in pv.areas:
        try:
            if text := _read_text(pv, offset, size):
                pv.empty = False
                if text not in texts:
                    left -= len(text)
                    if left < 0:
                        raise Corrupt(f"the LVM metadata areas hold more than {MAX_TEXT:,} bytes of text")
                    texts[text] = parse(text)
                pv.copies.append(texts[text])
        except Corrupt as error:
            pv.empty = False
            pv.damage.say("copy-differs", str(error), offset)
    return pv


def dashed(uuid: bytes) -> str:
    """A 32 character id as LVM prints it: groups of 6, 4, 4, 4, 4, 4, 6."""
    text = uuid.ljust(32, b"?").decode("ascii", "backslashreplace")
    bounds = (0, 6, 10, 14, 18, 22, 26, len(text))
    return "-".join(text[low:high] for low, high in pairwise(bounds))


def _crc(data: bytes) -> int:
    return zlib.crc32(data, INITIAL_CRC ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _areas(sector: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
    """A list of areas that an entry of zeroes ends, and the offset after it."""
    found: list[tuple[int, int]] = []
    while at + DISK_LOCN.itemsize <= SECTOR and len(found) < MAX_AREAS:
        area = record(sector, DISK_LOCN, at)
        at += DISK_LOCN.itemsize
        if not area["offset"]:
            break
        found.append((int(area["offset"]), int(area["size"])))
    return found, at


def _inside(pv: Pv, what: str, offset: int, size: int) -> bool:
    inside = size > 0 and offset + size <= pv.member.reader.size
    if not inside:
        pv.damage.say("outside", f"the {what} at {offset:#x}+{size:#x} lies outside the physical volume")
    return inside


def _apart(pv: Pv, areas: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The areas that share no bytes with one before them: each byte of a text is read once."""
    apart: list[tuple[int, int]] = []
    for offset, size in areas:
        if all(offset + size <= start or start + length <= offset for start, length in apart):
            apart.append((offset, size))
        else:
            words = f"the metadata area at {offset:#x}+{size:#x} overlaps another one: it is not read"
            pv.damage.say("two-owners", words, offset)
    return apart


def _read_text(pv: Pv, offset: int, size: int) -> str:
    """The committed text of the metadata area at `offset`; empty where there is none. Raises Corrupt."""
    reader = pv.member.reader
    if size < MDA_HEADER_SIZE:
        raise Corrupt(f"the LVM metadata area at byte {offset:#x} has {size} bytes, less than its header")
    head = reader.read(offset, MDA_HEADER_SIZE)
    header = record(head, MDA_HEADER)
    if header["magic"].tobytes() != MDA_MAGIC:
        raise Corrupt(
            f"the LVM metadata area at byte {offset:#x} has the magic {header['magic'].tobytes()!r} "
            f"instead of {MDA_MAGIC!r}"
        )
    if _crc(head[4:]) != int(header["checksum_xl"]):
        pv.damage.say(
            "checksum", f"the checksum of the LVM metadata header at {offset:#x} is wrong", offset, WARNING
        )
    ring = record(head, RAW_LOCN, MDA_HEADER.itemsize)
    start, length = int(ring["offset"]), int(ring["size"])
    if start == 0 or length == 0 or ring["flags"] & RAW_LOCN_IGNORED:
        return ""
    if not MDA_HEADER_SIZE <= start < size or length > min(size - MDA_HEADER_SIZE, MAX_TEXT):
        raise Corrupt(
            f"the LVM metadata area at byte {offset:#x} places its text at {start:#x}+{length:#x}, "
            "outside itself"
        )
    # the area is a ring: what does not fit at its end goes on after the header
    first = min(length, size - start)
    text = reader.read_ranges(
        np.array([offset + start, offset + MDA_HEADER_SIZE]), np.array([first, length - first])
    ).tobytes()
    if _crc(text) != int(ring["checksum"]):
        raise Corrupt(f"the checksum of the LVM metadata text at byte {offset + start:#x} is wrong")
    return text.rstrip(b"\0").decode(errors="backslashreplace")
