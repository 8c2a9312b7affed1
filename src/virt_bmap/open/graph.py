"""What QEMU is to open, as a graph of block nodes: every node with its driver, every file open already and
named by the descriptor that QEMU inherits.

QEMU follows no name, and guesses no format. What an image refers to was found here first (`references.py`)
and opened here; of every image that has no backing file it is said that it has none. What QEMU reads in its
own way (a VMDK's text) is written anew by its format.

Sources: QEMU qapi/block-core.json (BlockdevOptions), block/qcow2.c (qcow2_do_open; v7.2).
"""

import contextlib
import fcntl
import os
import re
import stat
from typing import Any

from virt_bmap.core.errors import ImageError
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.host.looked_at import open_looked_at
from virt_bmap.model.contract import ImageFormat, Rewritten, ShownFile
from virt_bmap.open import magic
from virt_bmap.open.disks import Opening
from virt_bmap.open.raw import RawReader
from virt_bmap.open.references import allowed_references

FIRST_FREE = 4
"""The lowest descriptor that a file may be handed over as: those below are taken."""

Node = dict[str, Any]


class NotForQemu(ImageError):
    """QEMU does not read such an image, or not without writing to it."""


class Graph:
    """What QEMU is to open: the nodes of one image and of all that it refers to, and their files, which are
    held open until `close`."""

    def __init__(self, image: RawReader, format: str, opening: Opening, write: bool = False) -> None:
        self.name, self.format = image.name, format
        self.marks: list[Mark] = []
        self.read: list[int] = []
        self.write: list[int] = []
        self._names: dict[str, str] = {}
        try:
            self.node = self._image(image, format, opening, write, 0)
            if opening.force_share:
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

    def _image(self, image: RawReader, format: str, opening: Opening, write: bool, depth: int) -> Node:
        known = magic.known(format)
        if not known.in_qemu:
            raise NotForQemu(
                f"{image.name}: QEMU does not read images in {format}; make a raw copy first: "
                f"virt-bmap dump {image.name} /dev/sda OUT"
            )
        found = allowed_references(image, format, opening, depth)
        if found.backing and not known.follows:
            raise NotForQemu(f"{image.name}: QEMU does not read the parent of an image in {format}")
        if not write and known.recovered(image) is not image:
            raise NotForQemu(
                f"{image.name}: its log has changes that are not in place yet, and QEMU carries them out "
                "only where it may write: qemu-img check -r all does it"
            )
        self._note(known, image)
        folder = os.path.dirname(os.path.abspath(image.name))
        node: Node = {"driver": known.name, "backing": None, **known.options(image)}
        rewritten = known.rewritten(image, write) if known.rewritten else None
        node["file"] = (
            self._rewritten(image, known, rewritten, folder, write)
            if rewritten
            else self._file(image.fileno(), image.name, write)
        )
        if found.data:
            node["data-file"] = self._beside(os.path.join(folder, found.data), write)
        if found.backing:
            assert found.backing_format  # or it would not be allowed
            with contextlib.closing(RawReader(os.path.join(folder, found.backing))) as backing:
                node["backing"] = self._image(backing, found.backing_format, opening, False, depth + 1)
        return node

    def _note(self, format: ImageFormat, image: Reader) -> None:
        if mark := format.marked(image):
            self.marks.append(mark)

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

    def _rewritten(
        self, image: RawReader, format: ImageFormat, found: Rewritten, folder: str, write: bool
    ) -> Node:
        """A file in memory instead of the image, whose parts are open files."""
        places = {part: self._part(format, part, folder, write) for part in dict.fromkeys(found.parts)}
        content = found.content([places[part] for part in found.parts])
        return self._memory(content, f"the descriptor of {image.name}", write)

    def _part(self, format: ImageFormat, part: ShownFile, folder: str, write: bool) -> str:
        """The name by which QEMU is to open a part."""
        place: str
        if part.file is None:
            place = self._memory(part.zeroes, "zeroes", False)["filename"]
            return place
        with contextlib.closing(RawReader(os.path.join(folder, part.file))) as file:
            if part.check:
                part.check(file)
                self._note(format, file)
            place = self._file(file.fileno(), file.name, write)["filename"]
        return place

    def _memory(self, content: bytes | int, name: str, write: bool) -> Node:
        """A file in memory with this content, or so many zeroes."""
        fd = os.memfd_create("virt-bmap", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, content) if isinstance(content, int) else os.write(fd, content)
            return self._file(fd, name, write)
        finally:
            os.close(fd)
