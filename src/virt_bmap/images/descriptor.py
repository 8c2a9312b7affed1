"""The text descriptor of a VMDK, in a file of its own or embedded.

Sources: VMware "Virtual Disk Format 5.0", section "The Descriptor File"; QEMU block/vmdk.c (vmdk_parse_extents, vmdk_open_vmdk4).
"""

import re
import struct
from typing import NamedTuple

from virt_bmap.reader import Reader

SECTOR = 512
MAGIC, START = b"KDMV", b"# Disk DescriptorFile"
MAX_DESCRIPTOR = 1 << 20
"""Bytes; QEMU's limit for a descriptor of its own. Real ones have some hundreds."""
NO_PARENT = "ffffffff"
EXTENT = re.compile(r'^(RW|RDONLY|NOACCESS)[ \t]+(\d{1,18})[ \t]+(\w+)(?:[ \t]+"([^"\n]*)"(?:[ \t]+(\d{1,18}))?)?', re.MULTILINE)


class Extent(NamedTuple):
    """One line: `sectors` of 512 bytes of the disk, in a file from sector `offset` on (type FLAT and VMFS), or none (ZERO)."""

    access: str
    sectors: int
    type: str
    file: str | None
    offset: int


class Descriptor(NamedTuple):
    """What the descriptor says; `start` and `length` are its bytes in the file, as far as they are text."""

    start: int
    length: int
    create_type: str | None
    parent: str | None
    extents: list[Extent]


def find(image: Reader) -> tuple[Descriptor | None, bool]:
    """(descriptor, is it what describes the whole disk): an embedded one only repeats what the sparse header says, unless that has a capacity of 0."""
    head = image.read_clipped(0, SECTOR)
    if head.startswith(START):
        return parse(image.read_clipped(0, min(image.size, MAX_DESCRIPTOR)), 0), True
    if head[:4] != MAGIC:
        return None, False
    capacity, at, sectors = struct.unpack_from("<Q8xQQ", head, 12)
    if at == 0 or at * SECTOR >= image.size:
        return None, False
    return parse(image.read_clipped(at * SECTOR, min(sectors * SECTOR, MAX_DESCRIPTOR)), at * SECTOR), capacity == 0


def parse(data: bytes, start: int) -> Descriptor:
    """The lines that matter; others are comments and geometry."""
    text = data.split(b"\0", 1)[0].decode("latin-1")

    def value(key: str) -> str | None:
        found = re.search(rf'^{key}[ \t]*=[ \t]*"?([^"\r\n]*?)"?[ \t]*$', text, re.MULTILINE)
        return found[1] if found else None

    cid = (value("parentCID") or NO_PARENT).lower()
    parent = value("parentFileNameHint") if cid != NO_PARENT else None
    extents = [
        Extent(access, int(sectors), kind, file or None, int(offset or 0))
        for access, sectors, kind, file, offset in EXTENT.findall(text)
    ]
    return Descriptor(start, len(text), value("createType"), parent or None, extents)
