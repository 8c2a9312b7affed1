"""The text descriptor of a VMDK, in a file of its own or embedded: read, and written anew.

QEMU's parser takes more for a line of it than VMware's specification does, and every line can name a file of
the host. So QEMU is never shown a descriptor that somebody else wrote: it gets `written`, what was read here,
and what is no plain line of an extent is refused.

Sources: VMware "Virtual Disk Format 5.0", section "The Descriptor File"; QEMU block/vmdk.c
(vmdk_parse_extents, vmdk_open_vmdk4, vmdk_parent_open; v7.2).
"""

import re
import struct
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.vmdk.ondisk import MAX_CAPACITY, SECTOR
from virt_bmap.model.contract import Rewritten, ShownFile

MAGIC, COWD, START = b"KDMV", b"COWD", b"# Disk DescriptorFile"
MAX_DESCRIPTOR = 1 << 20
"""Bytes; QEMU's limit for a descriptor of its own. Real ones have some hundreds."""
TYPES = (
    "monolithicFlat",
    "vmfs",
    "vmfsSparse",
    "seSparse",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
)
"""createType of the descriptors that QEMU opens: those of files that are text."""
FLAT, SPARSE = ("FLAT", "VMFS"), ("SPARSE", "VMFSSPARSE", "SESPARSE")
NO_PARENT = "ffffffff"
NUMBER = re.compile("[0-9a-f]{1,8}")
HINT = "parentFileNameHint"
WINDOW = (SECTOR, 20 * SECTOR)
"""Where QEMU looks for the hint in a sparse extent, (first byte, length), whatever its header says."""
EXTENT = re.compile(
    r'(RW|RDONLY|NOACCESS)[ \t]+(\d{1,18})[ \t]+(\w+)(?:[ \t]+"([^"\n]*)"(?:[ \t]+(\d{1,18}))?)?[ \t]*\r?'
)
LIKE_EXTENT = re.compile(r"[^\w#]*(RW|RDONLY|NOACCESS)\b", re.IGNORECASE)
"""A line that some program might take for an extent's."""


class Extent(NamedTuple):
    """One line: `sectors` of 512 bytes of the disk, in a file from sector `offset` on (type FLAT and VMFS),
    or none (ZERO)."""

    access: str
    sectors: int
    type: str
    file: str | None
    offset: int


class Descriptor(NamedTuple):
    """What the descriptor says; `start` and `length` are its bytes in the file, as far as they are text.

    `parent` is None where there is none.
    """

    start: int
    length: int
    create_type: str | None
    cid: str
    parent_cid: str
    parent: str | None
    extents: list[Extent]


def find(image: Reader) -> tuple[Descriptor | None, bool]:
    """(descriptor, is it what describes the whole disk): an embedded one only repeats what the sparse header
    says, unless that has a capacity of 0.

    Raises Corrupt where it can't be followed, or where programs would not agree on what it refers to.
    """
    head = image.read_clipped(0, SECTOR)
    if head.startswith(START):
        return parse(image, image.read_clipped(0, min(image.size, MAX_DESCRIPTOR)), 0, True), True
    if head[:4] not in (MAGIC, COWD):  # QEMU would take whatever it is for a descriptor
        raise Corrupt(
            f"{image.name}: is not a VMDK: it does not begin as a sparse extent or as a descriptor", 0
        )
    found, whole = None, False
    if head[:4] == MAGIC:
        capacity, at, sectors = struct.unpack_from("<Q8xQQ", head, 12)
        whole = capacity == 0
        if 0 < at * SECTOR < image.size:
            found = parse(
                image,
                image.read_clipped(at * SECTOR, min(sectors * SECTOR, MAX_DESCRIPTOR)),
                at * SECTOR,
                whole,
            )
    if whole and found is None:
        raise Corrupt(
            f"{image.name}: its VMDK header has a capacity of 0, and no descriptor gives another", 12
        )
    seen = image.read_clipped(*WINDOW).split(b"\0", 1)[0].find(HINT.encode())
    if seen >= 0 and (found is None or found.parent is None):
        raise Corrupt(
            f"{image.name}: something at byte {WINDOW[0] + seen:#x} names a parent, but no descriptor does: "
            "programs do not agree on whether there is one",
            WINDOW[0] + seen,
        )
    return found, whole


def parse(image: Reader, data: bytes, start: int, whole: bool) -> Descriptor:
    """The lines that matter; others are comments and geometry.

    Extents are read where they make up the `whole` disk: a monolithic file's own one names the file itself.
    """
    text = data.split(b"\0", 1)[0].decode("latin-1")

    def value(key: str) -> str | None:
        for found in re.finditer(rf"^{key}[ \t]*=([^\r\n]*)\r?$", text, re.MULTILINE):
            said = found[1].strip(" \t").removeprefix('"').removesuffix('"')
            if '"' not in said:
                return said
        return None

    cid, parent_cid = ((value(key) or NO_PARENT).lower() for key in ("CID", "parentCID"))
    parent = value(HINT) if parent_cid != NO_PARENT else None
    if not (NUMBER.fullmatch(cid) and NUMBER.fullmatch(parent_cid)):
        raise Corrupt(
            f"{image.name}: its descriptor at byte {start:#x} has no proper CID and parentCID", start
        )
    if bool(parent) != (parent_cid != NO_PARENT) or (HINT in text and not parent):
        raise Corrupt(
            f"{image.name}: its descriptor at byte {start:#x} has parentCID={parent_cid} and "
            f"{'a' if HINT in text else 'no'} {HINT}: programs do not agree on whether there is a parent",
            start,
        )
    extents = (
        [_extent(image, line, start) for line in text.split("\n") if LIKE_EXTENT.match(line)] if whole else []
    )
    if whole and not extents:
        raise Corrupt(f"{image.name}: its descriptor at byte {start:#x} has no extents", start)
    return Descriptor(start, len(text), value("createType"), cid, parent_cid, parent, extents)


def _extent(image: Reader, line: str, start: int) -> Extent:
    found = EXTENT.fullmatch(line)
    if not found:
        raise Corrupt(
            f"{image.name}: its descriptor at byte {start:#x} has the line "
            f"{line[:100]!r}, which is not a proper line for an extent",
            start,
        )
    access, sectors, kind, file, offset = found.groups()
    extent = Extent(access, int(sectors), kind, file or None, int(offset or 0))
    if extent.offset + extent.sectors > MAX_CAPACITY:
        raise Corrupt(
            f"{image.name}: its descriptor at byte {start:#x} has an extent "
            f"of {plural(extent.sectors, 'sector')} at sector {extent.offset:,}",
            start,
        )
    return extent


def written(found: Descriptor, places: Sequence[str]) -> bytes:
    """The same in the words that every program reads alike; `places` are the files of the extents, one for
    each."""
    lines = [
        START.decode(),
        "version=1",
        f"CID={int(found.cid, 16):08x}",
        f"parentCID={int(found.parent_cid, 16):08x}",
        f'createType="{found.create_type}"',
    ]
    for extent, place in zip(found.extents, places, strict=True):
        flat = extent.type not in SPARSE
        lines.append(
            f'RW {extent.sectors} {"FLAT" if flat else extent.type} "{place}"'
            + (f" {extent.offset}" if flat else "")
        )
    return ("\n".join(lines) + "\n").encode()


def rewritten(image: Reader, write: bool) -> Rewritten | None:
    """What QEMU is shown of a VMDK that is text: a text of ours, of files that it is given."""
    found, whole = find(image)
    if found is None or not whole:
        return None
    if write and any(extent.access != "RW" or extent.type == "ZERO" for extent in found.extents):
        raise ImageError(f"{image.name}: can't be written: some of its extents are read-only")
    if found.create_type not in TYPES:
        raise ImageError(
            f"{image.name}: is a VMDK of the type {found.create_type!r}; there are: {', '.join(TYPES)}"
        )
    return Rewritten(tuple(_part(image, extent) for extent in found.extents), partial(written, found))


def _part(image: Reader, extent: Extent) -> ShownFile:
    """QEMU leaves out ZERO: it gets an empty file for it."""
    if extent.type == "ZERO" and not extent.file:
        return ShownFile(None, extent.sectors * SECTOR)
    if extent.type not in (*FLAT, *SPARSE) or not extent.file or extent.access == "NOACCESS":
        raise ImageError(
            f"{image.name}: has an extent {extent.access} of the type {extent.type}, which can't be opened"
        )
    return ShownFile(extent.file, check=_require_sparse if extent.type in SPARSE else None)


def _require_sparse(file: Reader) -> None:
    """A sparse extent must not be a descriptor itself: QEMU would follow it."""
    head = file.read_clipped(0, SECTOR)
    if (head[:4] == MAGIC and struct.unpack_from("<Q", head, 12)[0] == 0) or head.startswith(START):
        raise ImageError(
            f"{file.name}: should be a sparse extent of a VMDK, but is a descriptor of more extents"
        )
