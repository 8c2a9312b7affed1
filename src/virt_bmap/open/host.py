"""Disks seen from their host: where the guest's bytes lie in the files of its image, through the whole
backing chain, and who owns the rest of these files.

A file is opened once however many disks use it: overlays of one base share it. What of a backing file no disk
shows is named, too.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import ROLES, ZERO
from virt_bmap.core.stored import stored_bytes
from virt_bmap.formats.images.inflate import InflatingReader
from virt_bmap.model import tables
from virt_bmap.model.contract import RAW, Assembly, Member, References
from virt_bmap.open import PACKED, magic, open_image
from virt_bmap.open.chains import Chains
from virt_bmap.open.disks import SAFELY, Opening
from virt_bmap.open.raw import RawReader
from virt_bmap.open.references import allowed_references


@dataclass
class Host(Chains):
    """All files of some images, those that were given first, and the disks in them."""

    opening: Opening = SAFELY
    paths: list[str] = field(default_factory=list)
    name, allocator, checks = "image", "that of each image's own format", None
    _known: dict[object, int] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # ---- opening -------------------------------------------------------------------------------------------

    def file(self, path: str) -> int:
        """The number of a file, which is opened if it was not yet."""
        key: object = path
        if not magic.is_uri(path):
            with contextlib.suppress(OSError):  # what is wrong is said when it is opened
                about = os.stat(path)
                key = about.st_dev, about.st_ino
        if key not in self._known:
            reader = open_image(path) if magic.is_uri(path) else RawReader(path)
            self._stack.callback(reader.close)
            self.opening.tell(reader)
            self._known[key] = len(self.files)
            self.files.append(reader)
            self.paths.append(path if magic.is_uri(path) else os.path.abspath(path))
        return self._known[key]

    def references(self, number: int, format: str, depth: int) -> References:
        return allowed_references(self.files[number], format, self.opening, depth)

    def beside(self, number: int, name: str) -> int:
        return self.file(os.path.join(os.path.dirname(os.path.abspath(self.files[number].name)), name))

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def place(self, disk: int, offset: int) -> dict[str, Any]:
        """Where byte `offset` of a disk (from 0) lies: file, level in the chain, first byte and the byte
        after it there; `file` is None where it lies nowhere."""
        found = self.disks[disk]
        cluster = found.chain[0].layer.cluster
        result = {
            "format": found.format,
            "cluster_size": cluster,
            "cluster": offset // cluster,
            "cluster_offset": offset % cluster,
        }
        pieces = found.rows.down(ints(offset), ints(offset + 1))
        if len(pieces.row) == 0:
            return result | {"file": None, "level": None, "offset": None, "end": None, "role": None}
        row, at = int(pieces.row[0]), int(pieces.target[0])
        file = int(found.rows.parent[row])
        level = next(level for level, link in enumerate(found.chain) if file in link.files)
        return result | {
            "file": self.paths[file],
            "level": level,
            "offset": at,
            "end": at + int(pieces.target_length[0]),
            "role": ROLES[found.rows.role[row]],
        }

    # ---- as a layer of the survey --------------------------------------------------------------------------

    def assemble(self, members: Sequence[Member]) -> Assembly:
        """The disks as volumes that lie in the files; `members` are the files."""
        result = Assembly(members)
        files = list(result.volumes)
        self.own_files(files)
        for nth, disk in enumerate(self.disks, 1):
            result.add(self.child(disk, "disk", tables.disk_name(nth), files, self.opener(disk, self.files)))
        return result


class LayeredReader(InflatingReader):
    """A disk that QEMU does not open, read through its image's own layers.

    Raises as `open_host` does, and Unsupported where that takes more than to follow the rows.
    """

    def __init__(self, image: str, opening: Opening) -> None:
        with contextlib.ExitStack() as stack:
            host = stack.enter_context(open_host([image], opening))
            (disk,) = host.disks
            if disk.unreadable:
                raise Unsupported(f"{image}: can't be read here: {disk.unreadable}")
            files = dict(enumerate(host.files))
            plain = MappedReader(disk.size, image, files, disk.rows, [(0, disk.size)])
            super().__init__(plain, disk.packed, host.files, disk.layers, disk.lost)
            self.disk, self.marks = disk, disk.marks
            self.stored_most = min(disk.size, PACKED * sum(map(stored_bytes, host.files)))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


def describe(host: Host, disk: int = 0) -> dict[str, Any]:
    """What the image itself says of a disk (from 0), for JSON: format, sizes in bytes, the chain below it,
    snapshots, bitmaps, state."""
    top = host.disks[disk].chain[0]
    low, high = top.layer.allocated
    stored = top.layer.rows.role != ZERO
    return {
        "file": host.paths[int(top.files[0])], "format": host.disks[disk].format,
        "file_size": host.files[int(top.files[0])].size, "virtual_size": top.layer.size,
        "cluster_size": top.layer.cluster, "allocated": int((high - low).sum()),
        "stored": int(top.layer.rows.parent_run[stored].sum()), "backing": _backing(host, disk),
        "data_files": [host.paths[at] for at in top.files[1:].tolist()], **top.layer.facts,
        "problems": [{"severity": p.severity, "code": p.code, "offset": p.offset,
                "detail": p.detail} for p in top.layer.damage.problems()],
    }  # fmt: skip


def _backing(host: Host, disk: int) -> list[dict[str, str]]:
    """The backing files, nearest first."""
    return [
        {"file": host.paths[int(link.files[0])], "format": link.layer.format}
        for link in host.disks[disk].chain[1:]
    ]


@contextlib.contextmanager
def open_host(images: Sequence[str], opening: Opening = SAFELY) -> Iterator[Host]:
    """The files of these images, and of all that they may refer to; closed at the end of the block.

    Raises ImageError, and FormatError where an image's own tables can't be read.
    """
    host = Host(opening=opening)
    try:
        numbers = [host.file(image) for image in images]
        for image, number in zip(images, numbers, strict=True):
            found = RAW if magic.is_uri(image) else opening.format or magic.recognise(host.files[number])
            host.disks.append(host.disk(image, number, found))
        yield host
    finally:
        host.close()
