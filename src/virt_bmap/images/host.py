"""Disks seen from their host: where the guest's bytes lie in the files of its image, through the whole backing chain, and who owns the rest of these files.

A file is opened once however many disks use it: overlays of one base share it. What of a backing file no disk shows is named, too.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Int, complement, ints, subtract, union
from virt_bmap.contract import Assembly, Child, Member
from virt_bmap.errors import ImageError, Unsupported
from virt_bmap.images import layers, magic, open_image
from virt_bmap.images.layer import PACKED, Layer
from virt_bmap.images.raw import RawReader
from virt_bmap.images.references import References, allowed_references
from virt_bmap.mapping import ROLES, ZERO, Rows, Side
from virt_bmap.reader import MappedReader, Reader

HIDDEN = "hidden by an overlay"


@dataclass(frozen=True)
class Link:
    """One image of a chain; `files` are the numbers (from 0) of its own files, the image file first."""

    layer: Layer
    files: Int
    names: References


@dataclass
class HostDisk:
    """One disk of the machine: `image` as it was given, its chain from the top down, and its rows, whose `parent` is the number of a file."""

    image: str
    format: str
    chain: list[Link]
    rows: Rows

    @property
    def size(self) -> int:
        return self.chain[0].layer.size

    @property
    def unreadable(self) -> str | None:
        """Why the guest's bytes can't be read; None where they can."""
        return next((link.layer.unreadable for link in self.chain if link.layer.unreadable), None)


@dataclass
class Host:
    """All files of some images, those that were given first, and the disks in them."""

    references: bool
    files: list[Reader] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    disks: list[HostDisk] = field(default_factory=list)
    NAME = "image"
    _links: dict[int, tuple[str, Link]] = field(default_factory=dict)
    _known: dict[object, int] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # ---- opening ----------------------------------------------------------------------------------------------------

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
            self._known[key] = len(self.files)
            self.files.append(reader)
            self.paths.append(path if magic.is_uri(path) else os.path.abspath(path))
        return self._known[key]

    def link(self, number: int, format: str, depth: int) -> Link:
        """The layer of the image in a file. Raises ImageError for what it may not refer to, FormatError for what can't be read."""
        reader = self.files[number]
        if number in self._links:
            other, link = self._links[number]
            if other != format:
                raise ImageError(f"{reader.name}: is used as {other} by one image and as {format} by another")
            return link
        names = allowed_references(reader, format, self.references, depth)
        module = layers.load(format)
        if module is None:
            raise Unsupported(
                f"{reader.name}: where the bytes of a {format} image lie in its file is not read; it is of {', '.join(layers.LAYERS)}"
            )
        folder = os.path.dirname(os.path.abspath(reader.name))
        others = [self.file(os.path.join(folder, name)) for name in (*([names.data] if names.data else []), *names.extents)]
        layer = module.read(reader, [self.files[other] for other in others])
        link = Link(layer, ints([self.files.index(file) for file in layer.files]), names)
        self._links[number] = format, link
        return link

    def chain(self, number: int, format: str) -> list[Link]:
        """An image and its backing files, top first."""
        found = [self.link(number, format, 0)]
        while names := found[-1].names:
            if not names.backing or not names.backing_format:
                break
            folder = os.path.dirname(os.path.abspath(self.files[int(found[-1].files[0])].name))
            number = self.file(os.path.join(folder, names.backing))
            allowed_references(self.files[number], names.backing_format, self.references, len(found))  # also ends loops
            found.append(self.link(number, names.backing_format, len(found)))
        return found

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def place(self, disk: int, offset: int) -> dict[str, Any]:
        """Where byte `offset` of a disk (from 0) lies: file, level in the chain, first byte and the byte behind it there; `file` is None where it lies nowhere."""
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

    # ---- as a layer of the survey -----------------------------------------------------------------------------------

    def assemble(self, members: Sequence[Member]) -> Assembly:
        """The disks as volumes that lie in the files; `members` are the files."""
        result = Assembly()
        for number, (format, link) in self._links.items():
            result.types[number], result.details[number] = format, summary(link)
            for at, file in enumerate(link.files.tolist()):
                result.types.setdefault(file, f"{format} data")
                result.extents[file] = link.layer.extents[at]
            result.problems[number] = list(link.layer.problems)
        self._own_hidden(result)
        for nth, disk in enumerate(self.disks, 1):
            result.children.append(self._child(disk, nth))
        return result

    def _child(self, disk: HostDisk, nth: int) -> Child:
        from virt_bmap.survey import disk_name

        opener: Callable[[Reader], Reader] | None = None
        if (disk.rows.role == PACKED).any():  # content is QEMU's to inflate
            opener = lambda _: self._stack.enter_context(contextlib.closing(open_image(disk.image, disk.format, self.references)))  # noqa: E731
        return Child("disk", disk_name(nth), disk.size, [], many=disk.rows, open=opener, contents=disk.unreadable is None,
                     unread=f"encrypted {disk.format} image" if disk.unreadable else None)  # fmt: skip

    def _own_hidden(self, result: Assembly) -> None:
        """Data of backing files that no disk shows."""
        shown = [disk.rows for disk in self.disks]
        for _, link in self._links.values():
            for at, file in enumerate(link.files.tolist()):
                low, high = parent_ranges([link.layer.rows], at)
                low, high = subtract(low, high, *parent_ranges(shown, file))
                result.extents[file].add(tables.CONTENT, low, high - low, part=HIDDEN)


class LayeredReader(MappedReader):
    """A disk read through its image's own layers. Raises Unsupported where that takes more than to follow the rows."""

    def __init__(self, image: str, format: str, references: bool) -> None:
        self._stack = contextlib.ExitStack()
        host = self._stack.enter_context(open_host([image], format, references))
        disk = host.disks[0]
        if disk.unreadable or (disk.rows.role == PACKED).any():
            self._stack.close()
            raise Unsupported(f"{image}: can't be read here: {disk.unreadable or 'it is compressed'}")
        super().__init__(disk.size, image, dict(enumerate(host.files)), disk.rows)

    def close(self) -> None:
        self._stack.close()


def open_by_layers(image: str, format: str, references: bool) -> Reader:
    """A disk that QEMU does not open. Raises as `open_host` does."""
    return LayeredReader(image, format, references)


def parent_ranges(rows: Sequence[Rows], parent: int) -> tuple[Int, Int]:
    """What the rows take of one parent, sorted and merged."""
    mine = [part.select(part.parent == parent) for part in rows]
    none = [np.zeros(0, np.int64)]
    return union(
        np.concatenate([part.on_parent.offset for part in mine] or none),
        np.concatenate([part.parent_end for part in mine] or none),
    )


def visible(chain: Sequence[Link]) -> Rows:
    """The rows of a disk in all files of its chain: each image shows what those above it do not have."""
    size = chain[0].layer.size
    covered = np.zeros(0, np.int64), np.zeros(0, np.int64)
    parts = []
    for link in chain:
        left = complement(*covered, 0, size)
        rows = link.layer.rows
        pieces = rows.down(*left)
        none, one = np.zeros(len(pieces.row), np.int64), np.ones(len(pieces.row), np.int64)
        parts.append(Rows(none, link.files[rows.parent[pieces.row]], rows.role[pieces.row], pieces.length, one,
                          Side(pieces.source, none), Side(pieces.target, none), pieces.target_length))  # fmt: skip
        mine = link.layer.allocated
        covered = union(np.concatenate([covered[0], mine[0]]), np.concatenate([covered[1], mine[1]]))
    return Rows.concat(parts)


def summary(link: Link) -> str:
    """One line on an image for people."""
    facts, layer = link.layer.facts, link.layer
    words = [f"version {facts['version']}"] if "version" in facts else []
    words += [facts["subformat"]] if facts.get("subformat") else []
    words += [f"{layer.cluster:,} bytes a cluster"] if layer.cluster > 1 else []
    words += [f"backing file {link.names.backing}"] if link.names.backing else []
    words += [word for word in ("dirty", "corrupt") if facts.get(word)]
    words += [f"encrypted ({facts['encryption']})"] if facts.get("encryption") else []
    return ", ".join(words)


def describe(host: Host, disk: int = 0) -> dict[str, Any]:
    """What the image itself says of a disk (from 0), for JSON: format, sizes in bytes, the chain below it, snapshots, bitmaps, state."""
    top = host.disks[disk].chain[0]
    low, high = top.layer.allocated
    stored = top.layer.rows.role != ROLES.index(ZERO)
    return {
        "file": host.paths[int(top.files[0])], "format": host.disks[disk].format, "file_size": host.files[int(top.files[0])].size,
        "virtual_size": top.layer.size, "cluster_size": top.layer.cluster, "allocated": int((high - low).sum()),
        "stored": int(top.layer.rows.in_parent[stored].sum()), "backing": _backing(host, disk), "data_files": [host.paths[at] for at in top.files[1:].tolist()],
        **top.layer.facts, "problems": [{"severity": p.severity, "code": p.code, "offset": p.offset, "detail": p.detail} for p in top.layer.problems],
    }  # fmt: skip


def _backing(host: Host, disk: int) -> list[dict[str, str]]:
    """The backing files, nearest first."""
    return [{"file": host.paths[int(link.files[0])], "format": link.layer.format} for link in host.disks[disk].chain[1:]]


@contextlib.contextmanager
def open_host(images: Sequence[str], format: str | None = None, references: bool = False) -> Iterator[Host]:
    """The files of these images, and of all that they refer to where `references` allow it; closed at the end of the block.

    Raises ImageError, and FormatError where an image's own tables can't be read.
    """
    host = Host(references)
    try:
        numbers = [host.file(image) for image in images]
        for image, number in zip(images, numbers, strict=True):
            found = "raw" if magic.is_uri(image) else format or magic.recognise(host.files[number]) or "raw"
            chain = host.chain(number, found)
            host.disks.append(HostDisk(image, found, chain, visible(chain)))
        yield host
    finally:
        host.close()
