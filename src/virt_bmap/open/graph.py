"""What QEMU is to open, as a graph of block nodes: every node with its driver, every file open already and
named by the descriptor that QEMU inherits.

QEMU follows no name, and guesses no format. What an image refers to was found here first (`references.py`)
and opened here; of every image that has no backing file it is said that it has none. A VMDK's text, whose
lines QEMU reads in its own way, is written anew (`formats/images/descriptor.py`).

Sources: QEMU qapi/block-core.json (BlockdevOptions), block/vmdk.c (vmdk_parse_extents, vmdk_open_vmdk4;
v7.2), block/qcow2.c (qcow2_do_open).
"""

import contextlib
import fcntl
import os
import re
import stat
import struct
from typing import Any

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.formats.images import descriptor
from virt_bmap.host.looked_at import open_looked_at
from virt_bmap.open.magic import FORMATS
from virt_bmap.open.raw import RawReader
from virt_bmap.open.references import allowed_references

FIRST_FREE = 4
"""The lowest descriptor that a file may be handed over as: those below are taken."""
VMDK_TYPES = (
    "monolithicFlat",
    "vmfs",
    "vmfsSparse",
    "seSparse",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
)
"""createType of the descriptors that QEMU opens: those of files that are text."""
VMDK_FLAT, VMDK_SPARSE = ("FLAT", "VMFS"), ("SPARSE", "VMFSSPARSE", "SESPARSE")

Node = dict[str, Any]


class Graph:
    """What QEMU is to open: the nodes of one image and of all that it refers to, and their files, which are
    held open until `close`."""

    def __init__(
        self, image: RawReader, format: str, references: bool, write: bool = False, force_share: bool = False
    ) -> None:
        """`force_share`: read what somebody else has open for writing."""
        self.name, self.format = image.name, format
        self.read: list[int] = []
        self.write: list[int] = []
        self._names: dict[str, str] = {}
        try:
            self.node = self._image(image, format, references, write, 0)
            if force_share:
                self.node["force-share"] = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files: whoever was to inherit them has done so."""
        for fd in (*self.read, *self.write):
            os.close(fd)
        self.read, self.write = [], []

    def stored(self) -> int:
        """Bytes that the files take on their host; a block device counts whole."""
        found = 0
        for fd in {*self.read, *self.write}:
            about = os.fstat(fd)
            found += os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(about.st_mode) else about.st_blocks * 512
        return found

    def give_back(self) -> None:
        """What the image frees is given back to the host."""
        self.node["discard"] = self.node["file"]["discard"] = "unmap"

    def in_words(self, said: str) -> str:
        """What QEMU says, with the files' names in the place of their descriptors."""
        return re.sub(r"/proc/self/fd/\d+", lambda found: self._names.get(found[0], found[0]), said)

    def _image(self, image: RawReader, format: str, references: bool, write: bool, depth: int) -> Node:
        if format not in ("raw", *FORMATS):
            raise UsageError(f"unknown image format {format!r}; there are: raw, {', '.join(FORMATS)}")
        found = allowed_references(image, format, references, depth)
        folder = os.path.dirname(os.path.abspath(image.name))
        node: Node = {"driver": format, "backing": None}
        text, whole = descriptor.find(image) if format == "vmdk" else (None, False)
        node["file"] = (
            self._described(image, text, folder, write)
            if text and whole
            else self._file(image.fileno(), image.name, write)
        )
        if found.data:
            node["data-file"] = self._beside(os.path.join(folder, found.data), write)
        if found.backing:
            assert found.backing_format  # or it would not be allowed
            with contextlib.closing(RawReader(os.path.join(folder, found.backing))) as backing:
                node["backing"] = self._image(backing, found.backing_format, references, False, depth + 1)
        return node

    def _file(self, fd: int, name: str, write: bool) -> Node:
        """A node for an open file."""
        handed = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
        (self.write if write else self.read).append(handed)
        place = f"/proc/self/fd/{handed}"
        self._names[place] = name
        return {"driver": "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file", "filename": place}

    def _beside(self, path: str, write: bool) -> Node:
        fd = open_looked_at(path)
        try:
            return self._file(fd, path, write)
        finally:
            os.close(fd)

    def _described(self, image: RawReader, found: descriptor.Descriptor, folder: str, write: bool) -> Node:
        """A VMDK that is text: our own text, in which extents are open files.

        QEMU leaves out ZERO: it gets an empty file for it.
        """
        if write and any(extent.access != "RW" or extent.type == "ZERO" for extent in found.extents):
            raise ImageError(f"{image.name}: can't be written: some of its extents are read-only")
        if found.create_type not in VMDK_TYPES:
            raise ImageError(
                f"{image.name}: is a VMDK of the type "
                f"{found.create_type!r}; there are: {', '.join(VMDK_TYPES)}"
            )
        nodes: dict[str, str] = {}
        places = []
        for extent in found.extents:
            key = extent.file or f"zeroes of {plural(extent.sectors, 'sector')}"
            if key not in nodes:
                nodes[key] = self._extent(image, extent, folder, write)
            places.append(nodes[key])
        return self._memory(descriptor.written(found, places), f"the descriptor of {image.name}", write)

    def _extent(self, image: RawReader, extent: descriptor.Extent, folder: str, write: bool) -> str:
        """The name by which QEMU is to open an extent's file."""
        if extent.type == "ZERO" and not extent.file:
            place: str = self._memory(extent.sectors * descriptor.SECTOR, "zeroes", False)["filename"]
            return place
        if extent.type not in (*VMDK_FLAT, *VMDK_SPARSE) or not extent.file or extent.access == "NOACCESS":
            raise ImageError(
                f"{image.name}: has an extent {extent.access} of "
                f"the type {extent.type}, which can't be opened"
            )
        with contextlib.closing(RawReader(os.path.join(folder, extent.file))) as file:
            if extent.type in VMDK_SPARSE:
                _require_sparse(file)
            found: str = self._file(file.fileno(), file.name, write)["filename"]
        return found

    def _memory(self, content: bytes | int, name: str, write: bool) -> Node:
        """A file in memory with this content, or so many zeroes."""
        fd = os.memfd_create("virt-bmap", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, content) if isinstance(content, int) else os.write(fd, content)
            return self._file(fd, name, write)
        finally:
            os.close(fd)


def _require_sparse(file: RawReader) -> None:
    """A sparse extent must not be a descriptor itself: QEMU would follow it."""
    head = file.read_clipped(0, descriptor.SECTOR)
    if (head[:4] == descriptor.MAGIC and struct.unpack_from("<Q", head, 12)[0] == 0) or head.startswith(
        descriptor.START
    ):
        raise ImageError(
            f"{file.name}: should be a sparse extent of a VMDK, but is a descriptor of more extents"
        )
