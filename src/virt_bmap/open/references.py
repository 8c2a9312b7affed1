"""What else an image would make us open: backing files, external data files, extents.

Headers are read here before anything else looks at them.

Whoever wrote an image chose these names, and that can be a guest: nothing of it is opened unless the caller
allows it, and never in a format that was guessed.

Sources: QEMU docs/interop/qcow2.rst, block/qcow.c, block/qed.h, block/vmdk.c.
"""

import contextlib
import os
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images import descriptor
from virt_bmap.host import protection
from virt_bmap.open.magic import FORMATS, recognise
from virt_bmap.open.raw import RawReader

MAX_CHAIN = 64
"""Backing files below each other.

QEMU itself sets no limit; chains beyond a few dozen are unusable, and a loop must end.
"""
AS_RAW = "--format raw for a raw disk that only looks like this"
QCOW2_DATA_FILE = 1 << 2
QCOW2_EXT_BACKING_FORMAT, QCOW2_EXT_DATA_FILE = 0xE2792ACA, 0x44415441
MAX_EXTENSIONS = 64 << 10
"""Bytes of header extensions that are looked at.

Real ones have some hundreds, and what is not found is refused.
"""
QED_BACKING_FILE, QED_BACKING_RAW = 1, 4


class ChainImage(NamedTuple):
    """One image of a backing chain: its file, its format, and the bytes of its clusters."""

    path: str
    format: str
    cluster: int


@dataclass
class References:
    """Other files that an image's header names, and the backing format that it states."""

    backing: str | None = None
    backing_format: str | None = None
    data: str | None = None
    extents: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return [name for name in (self.backing, self.data, *self.extents) if name]


def allowed_references(image: Reader, format: str, references: bool, depth: int) -> References:
    """What the image refers to.

    ImageError where it does so though `references` are not allowed, where the backing file has no stated
    format, and where the chain, of which this is number `depth`, does not end."""
    try:
        found = references_of(image, format)
    except Corrupt as error:
        raise ImageError(f"{error} ({AS_RAW})") from error
    if found.names() and not references:
        raise ImageError(
            f"{image.name}: its {format} header refers to {', '.join(map(repr, found.names()))}, which is "
            "not opened unless asked for, since whoever wrote the image chose that name; if you trust it, "
            f"use --references (or {AS_RAW})"
        )
    for name in found.names():
        protection.reads(os.path.join(os.path.dirname(os.path.abspath(image.name)), name))
    if depth >= MAX_CHAIN:
        raise ImageError(f"{image.name}: its backing chain is longer than {MAX_CHAIN} files, or loops")
    if found.backing and not found.backing_format:
        raise ImageError(
            f"{image.name}: its header names the backing file {found.backing!r} "
            "without its format, and guessing that is unsafe; state it with: "
            f"qemu-img rebase -u -b {found.backing} -F FORMAT {image.name}"
        )
    return found


def references_of(image: Reader, format: str) -> References:
    """What else an image of this format would make QEMU open."""
    if format in ("qcow2", "qcow"):
        return _qcow_references(image, format)
    if format == "qed":
        header = image.read_clipped(0, 72)
        features, at, length = struct.unpack_from("<Q", header, 16)[0], *struct.unpack_from("<II", header, 56)
        name = _name(image, at, length) if features & QED_BACKING_FILE else None
        return References(backing=name, backing_format="raw" if features & QED_BACKING_RAW else None)
    if format == "vmdk":
        return _vmdk_references(image)
    if format in ("vpc", "vhdx"):
        return _parent_of_vhd(image, format)
    return References()


def _name(image: Reader, offset: int, length: int) -> str | None:
    if length == 0:
        return None
    if length > 1023 or offset + length > image.size:
        raise ImageError(
            f"{image.name}: the backing file name at byte {offset:#x}, "
            f"{length} bytes long, does not fit into the image"
        )
    return os.fsdecode(image.read(offset, length))


def _qcow_references(image: Reader, format: str) -> References:
    """qcow2.rst, "Header" and "Header extensions"."""
    header = image.read_clipped(0, 104)
    version, at, length = struct.unpack_from(">IQI", header, 4)
    found = References(backing=_name(image, at, length) if at else None)
    if format == "qcow2":
        start = 72 if version < 3 else struct.unpack_from(">I", header, 100)[0]
        found.backing_format, found.data = _extensions(image.read_clipped(start, MAX_EXTENSIONS))
        incompatible = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
        if not incompatible & QCOW2_DATA_FILE:
            found.data = None
        elif found.data is None:
            raise ImageError(
                f"{image.name}: its qcow2 header says that an "
                "external data file holds the data, but names none"
            )
    if found.backing_format and found.backing_format not in ("raw", *FORMATS):
        raise ImageError(
            f"{image.name}: its header states the backing format "
            f"{found.backing_format!r}; there are: raw, {', '.join(FORMATS)}"
        )
    return found


def _extensions(area: bytes) -> tuple[str | None, str | None]:
    """(backing format, data file) that the header extensions state."""
    found: dict[int, bytes] = {}
    place = 0
    while place + 8 <= len(area):
        kind, size = struct.unpack_from(">II", area, place)
        body = area[place + 8 : place + 8 + size]
        if kind == 0 or len(body) < size:
            break
        found[kind] = body
        place += 8 + (size + 7) // 8 * 8
    format, data = found.get(QCOW2_EXT_BACKING_FORMAT), found.get(QCOW2_EXT_DATA_FILE)
    return format.decode("ascii", "replace") if format else None, os.fsdecode(data) if data else None


def _parent_of_vhd(image: Reader, format: str) -> References:
    """A differencing VHD's or VHDX' parent, which is of the same format.

    What is damaged is said by whoever reads the image.
    """
    from virt_bmap.formats import images as layers

    try:
        parent = layers.load(format).parent(image)  # type: ignore[union-attr]
    except Corrupt as error:
        if error.code == "holes":  # who reads it would have much to do
            raise
        parent = None
    return References(backing=parent, backing_format=format if parent else None)


def _vmdk_references(image: Reader) -> References:
    """The text descriptor's extent lines and its parent's name.

    A parent is always a VMDK: the specification leaves nothing to guess.
    """
    found, _ = descriptor.find(image)
    if found is None:
        return References()
    extents = [extent.file for extent in found.extents if extent.file]
    return References(backing=found.parent, backing_format="vmdk" if found.parent else None, extents=extents)


def backing_chain(path: str, format: str | None, references: bool) -> list[ChainImage]:
    """An image and those below it, uppermost first, as their headers name them; of each only the header is
    read. Raises as `allowed_references` does."""
    chain: list[ChainImage] = []
    while True:
        with contextlib.closing(RawReader(path)) as image:
            format = format or recognise(image) or "raw"
            found = allowed_references(image, format, references, len(chain))
            chain.append(ChainImage(path, format, _cluster(image, format)))
        if not found.backing:
            return chain
        path = os.path.join(os.path.dirname(os.path.abspath(path)), found.backing)
        format = found.backing_format


def _cluster(image: Reader, format: str) -> int:
    """qcow2.rst, "Header": cluster_bits; 64 KiB, which is the default, for all others."""
    bits = struct.unpack_from(">I", image.read_clipped(20, 4))[0] if format == "qcow2" else 16
    return 1 << min(max(bits, 9), 21)
