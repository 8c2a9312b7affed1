"""Images and what they refer to: a disk's chain of backing files as one table of rows over all of its files.

Who finds the files, and what an image may refer to, is the business of two subclasses: `open/host.py` for
files of the host, `survey/nested/inner.py` for files of a guest's filesystem.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, complement, ints, subtract, union
from virt_bmap.core.errors import Corrupt, ImageError, Unsupported
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.mapping import PACKED, Rows
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats import registry as formats
from virt_bmap.formats.images.inflate import InflatingReader
from virt_bmap.model import tables
from virt_bmap.model.contract import About, Child, ImageFormat, ImageLayer, References
from virt_bmap.open import magic

HIDDEN = "hidden by an overlay"


class Link(NamedTuple):
    """One image of a chain; `files` are the numbers (from 0) of its own files, the image file first."""

    layer: ImageLayer
    files: Int
    names: References

    @property
    def marks(self) -> list[Mark]:
        """What it says of itself, and what else is wrong with it."""
        names = tuple(file.name for file in self.layer.files)
        return [
            Mark(code, words if words.startswith(names) else f"{names[0]}: {words}", severity)
            for code, words, _, severity in self.layer.damage.problems()
        ]


@dataclass
class ChainedDisk:
    """One disk: `image` is what it is called, its chain goes from the top down, and its rows' `parent` is the
    number of a file."""

    image: str
    format: str
    chain: list[Link]
    rows: Rows

    @property
    def size(self) -> int:
        return self.chain[0].layer.size

    @property
    def marks(self) -> list[Mark]:
        """What is wrong with its images, and what they say of themselves, from the top down."""
        return [mark for link in self.chain for mark in link.marks]

    @property
    def unreadable(self) -> str | None:
        """Why the guest's bytes can't be read; None where they can."""
        return next((link.layer.unreadable for link in self.chain if link.layer.unreadable), None)

    @property
    def packed(self) -> Rows:
        """The rows of what is compressed."""
        return self.rows.take(self.rows.role == PACKED)

    @property
    def layers(self) -> dict[int, ImageLayer]:
        """By the number of each file the layer that it belongs to."""
        return {file: link.layer for link in self.chain for file in link.files.tolist()}

    @property
    def lost(self) -> Lost:
        """What its images should hold and do not, as far as none above them has it."""
        parts, above = [NOTHING], (EMPTY, EMPTY)
        for link in self.chain:
            parts.append(link.layer.lost.without(*above))
            mine = link.layer.allocated
            above = union(np.append(above[0], mine[0]), np.append(above[1], mine[1]))
        return Lost.join(parts)


@dataclass
class Chains:
    """Files with images in them, each opened and read once
    however many disks use it, and the disks in them."""

    files: list[Reader] = field(default_factory=list)
    disks: list[ChainedDisk] = field(default_factory=list)
    _links: dict[int, tuple[str, Link]] = field(default_factory=dict)

    # ---- for subclasses ------------------------------------------------------------------------------------

    def references(self, number: int, format: str, depth: int) -> References:
        """What the image in a file refers to, which is number `depth` of its chain.

        Raises where it may not do so, and where the chain does not end.
        """
        raise NotImplementedError

    def beside(self, number: int, name: str) -> int:
        """The number of the file that the image in file `number` calls `name`."""
        raise NotImplementedError

    def format_of(self, number: int) -> str:
        """The format of a backing file for which none is stated."""
        raise NotImplementedError

    # ---- chains --------------------------------------------------------------------------------------------

    def disk(self, image: str, number: int, format: str) -> ChainedDisk:
        """The disk whose topmost image is in this file.

        Raises ImageError and FormatError where it can't be followed.
        """
        chain = self.chain(number, format)
        return ChainedDisk(image, format, chain, visible(chain))

    def chain(self, number: int, format: str) -> list[Link]:
        """An image and its backing files, top first."""
        found = [self.link(number, format, 0)]
        while backing := found[-1].names.backing:
            stated = found[-1].names.backing_format
            number = self.beside(int(found[-1].files[0]), backing)
            found.append(self.link(number, stated or self.format_of(number), len(found)))
        return found

    def link(self, number: int, format: str, depth: int) -> Link:
        """The layer of the image in a file."""
        reader = self.files[number]
        names = self.references(number, format, depth)  # first of all: it ends loops
        if number in self._links:
            other, link = self._links[number]
            if other != format:
                raise ImageError(f"{reader.name}: is used as {other} by one image and as {format} by another")
            return link
        known = magic.known(format)
        if known.read is None:
            raise Unsupported(
                f"{reader.name}: where the bytes of a {format} image lie in its file is not known here; it "
                f"is for {', '.join(each.name for each in formats.images() if each.read)}"
            )
        others = [
            self.beside(number, name) for name in (*([names.data] if names.data else []), *names.extents)
        ]
        others += self.parts(number, known, names.continued)
        try:
            self.files[number] = known.recovered(reader)
            layer = known.read(self.files[number], [self.files[other] for other in others])
        except Corrupt as error:
            raise (
                error
                if reader.name in str(error)
                else Corrupt(f"{reader.name}: {error}", error.offset, error.code)
            ) from error
        if mark := known.marked(reader):
            layer.damage.say(mark.code, mark.words, severity=mark.severity)
        link = Link(layer, ints([self.files.index(file) for file in layer.files]), names)
        self._links[number] = format, link
        return link

    def parts(self, number: int, known: ImageFormat, name: str | None) -> list[int]:
        """The numbers of the files in which the image in a file goes on, the first of which has this name."""
        found = [number]
        while name is not None:
            try:
                found.append(self.beside(number, name))
            except (ImageError, Unsupported) as error:
                words = f"{error}; {self.files[number].name} goes on in it"
                raise Unsupported(words) if isinstance(error, Unsupported) else ImageError(words) from error
            if found[-1] in found[:-1]:
                raise Corrupt(
                    f"{self.files[number].name}: {name!r}, in which it goes on, is a part that it has"
                )
            name = known.continued(self.files[number], self.files[found[-1]], len(found))
        return found[1:]

    # ---- as a layer of the survey --------------------------------------------------------------------------

    def opener(self, disk: ChainedDisk, files: Sequence[Reader]) -> Callable[[Reader], Reader] | None:
        """What makes a reader of the disk of one that follows its plain rows in these files; None where that
        is all that there is to it."""
        packed, lost = disk.packed, disk.lost
        if not len(packed) and not len(lost.starts):
            return None
        return partial(InflatingReader, rows=packed, files=files, layers=disk.layers, lost=lost)

    def own_files(self, volumes: Sequence[About]) -> None:
        """Who owns the files of the disks: the formats' metadata, and data of backing files that no disk
        shows. `volumes` are the files."""
        links = {int(link.files[0]): link for disk in self.disks for link in disk.chain}
        shown = [disk.rows for disk in self.disks]
        for number, link in links.items():
            image = volumes[number]
            image.type, image.detail = link.layer.format, summary(link)
            image.damage.take(link.layer.damage)
            for at, file in enumerate(link.files.tolist()):
                about = volumes[file]
                about.type = about.type or f"{link.layer.format} data"
                about.checks = magic.known(link.layer.format).checks
                about.extents = link.layer.extents[at]
                low, high = subtract(*parent_ranges([link.layer.rows], at), *parent_ranges(shown, file))
                about.extents.add(tables.CONTENT, low, high - low, part=HIDDEN)

    def child(
        self,
        disk: ChainedDisk,
        kind: str,
        name: str,
        volumes: Sequence[About],
        open: Callable[[Reader], Reader] | None = None,
    ) -> Child:
        """The disk as a volume in its files, which are `volumes`."""
        rows = disk.rows.placed(0, ints([about.number for about in volumes]))
        return Child(kind, name, disk.size, rows, open=open, contents=disk.unreadable is None,
                     unread=f"encrypted {disk.format} image" if disk.unreadable else None,
                     holes=[(0, disk.size)])  # fmt: skip


def parent_ranges(rows: Sequence[Rows], parent: int) -> tuple[Int, Int]:
    """What the rows take of one parent, sorted and merged."""
    mine = [part.take(part.parent == parent) for part in rows]
    none = [np.zeros(0, np.int64)]
    return union(
        np.concatenate([part.parent_offset for part in mine] or none),
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
        file, role = link.files[rows.parent[pieces.row]], rows.role[pieces.row]
        parts.append(
            Rows.make(
                pieces.source, file, pieces.target, pieces.length, role=role, parent_run=pieces.target_length
            )
        )
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
