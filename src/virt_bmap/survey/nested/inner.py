"""The disks in the image files of one guest filesystem, as an assembly: the files' volumes in the
filesystem's, the disks in the files.

What an image refers to (backing file, external data file, extents) is looked for among the files of the same
filesystem and nowhere else. So a header can name what it likes: what a map reads are bytes of the disk that
it was given, and a header without a stated format may be believed by its magic.
"""

import os
from collections.abc import Sequence

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.errors import Corrupt, FormatError, ImageError, Unsupported
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.reader import Reader
from virt_bmap.formats import foreign
from virt_bmap.model.contract import RAW, About, Assembly, Child, Filesystem, Member, References
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE
from virt_bmap.open import magic
from virt_bmap.open.chains import Chains
from virt_bmap.open.disks import Nested
from virt_bmap.open.references import MAX_CHAIN, references_of
from virt_bmap.survey.nested import MAX_IMAGES, ImageBudget
from virt_bmap.survey.nested.files import Image, ImageFiles

MAX_READ, FREE_READ = 4, 16 << 20
"""Bytes of an image's tables that are read: so many times what the file really holds, and some more.

Tables that claim more lie in holes, or over each other.
"""

MAX_ROWS = 1 << 22
"""Pieces of all disks of one filesystem's images: 256 GiB in single clusters of 64 KiB. Many overlays show
one base again and again."""


class Metered(Reader):
    """A file that is read for its tables alone.

    Raises Corrupt where that goes on for longer than the file has bytes.
    """

    def __init__(self, file: Reader, limit: int) -> None:
        super().__init__(file.size, file.name)
        self._file, self._limit = file, limit
        self.below = [file]

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        if self.requested > self._limit:
            raise Corrupt(
                f"{self.name}: its tables claim more than {self._limit:,} bytes, but the file does not hold "
                "as many: they lie in holes, or overlap"
            )
        return self._file.read_ranges(offsets, lengths)


class Inner(Chains):
    """All images of a filesystem that were asked for, as the survey sees a volume module: `assemble` is given
    the filesystem's volume."""

    name, allocator, checks = "nested", "that of each image's own format", None

    def __init__(self, found: Filesystem, wanted: Nested, progress: ImageBudget) -> None:
        super().__init__()
        self._found, self._wanted, self._progress = found, wanted, progress
        self._images: list[Image] = []
        self._contents: list[Reader] = []
        self._numbers: dict[int, int] = {}
        """Files by inode; a file's number is its place in
        `_images`, `_contents`, and `files`, which are metered."""
        self._refused: dict[int, FormatError | ImageError] = {}

    def assemble(self, members: Sequence[Member]) -> Assembly:
        """Children of the filesystem's volume: a volume for each file of an image, then the disks.

        What can't be opened is one piece, with the reason.
        """
        (self._member,) = members
        result = Assembly(members)
        if self._found.root >= 0 and self._found.names.num_rows:
            self._names = ImageFiles(self._found)
            raw = self._open_wanted(result.about(self._member).damage)
            self._add_children(result, raw)
        return result

    # ---- opening -------------------------------------------------------------------------------------------

    def _open_wanted(self, damage: Damage) -> list[int]:
        """Follow every image that was asked for; the numbers of raw ones.

        Parts of other images count as disks only where they were named.
        """
        raw: list[int] = []
        for image in self._names.wanted(self._member.reader, self._wanted):
            self._progress.paths.add(image.path)
            if image.refused or self._progress.left <= 0:
                why = image.refused or f"is not opened: there are more than {MAX_IMAGES} images"
                damage.say("nested", f"{self._name(image)} {why}")
                continue
            self._progress.left -= 1
            number = self._number(image)
            if (format := self.format_of(number)) == RAW:
                raw.append(number)
            else:
                self._try(number, format)
        parts = {file for disk in self.disks for link in disk.chain for file in link.files[1:].tolist()}
        parts = {file for file in parts if self._images[file].path not in self._wanted.paths}
        self.disks = [disk for disk in self.disks if int(disk.chain[0].files[0]) not in parts]
        used = self._used()
        for number in raw:
            if number in used and number not in parts:  # the base of an overlay is a disk by itself, too
                self._try(number, RAW)
        return [number for number in raw if number not in used]

    def _try(self, number: int, format: str) -> None:
        try:
            disk = self.disk(self._name(self._images[number]), number, format)
            if sum(len(other.rows) for other in (*self.disks, disk)) > MAX_ROWS:
                raise Unsupported(
                    f"{disk.image}: the images of this filesystem have more than {MAX_ROWS:,} pieces; name "
                    "those that matter with --nested"
                )
            self.disks.append(disk)
        except (FormatError, ImageError) as error:
            self._refused[number] = error

    def _used(self) -> set[int]:
        """Numbers of the files in which disks lie."""
        return {file for disk in self.disks for link in disk.chain for file in link.files.tolist()}

    def _number(self, image: Image) -> int:
        """The number of a file, which is opened if it was not yet."""
        if image.inode not in self._numbers:
            self._numbers[image.inode] = len(self.files)
            content = MappedReader(
                image.size, self._name(image), {0: self._member.reader}, image.rows, [(0, image.size)]
            )
            self._images.append(image)
            self._contents.append(content)
            self.files.append(Metered(content, MAX_READ * int(image.rows.run.sum()) + FREE_READ))
        return self._numbers[image.inode]

    def _name(self, image: Image) -> str:
        return f"{self._member.name}:{image.path.decode(errors='backslashreplace')}"

    def references(self, number: int, format: str, depth: int) -> References:
        name = self.files[number].name
        if depth >= MAX_CHAIN:
            raise Unsupported(f"{name}: its backing chain is longer than {MAX_CHAIN} files, or loops")
        try:
            found = references_of(self.files[number], format)
        except ImageError as error:
            raise Corrupt(str(error), 0) from error
        if len(found.extents) > MAX_IMAGES:
            raise Unsupported(
                f"{name}: has {plural(len(found.extents), 'extent')}; at most "
                f"{MAX_IMAGES} are followed in an image inside a disk"
            )
        return found

    def beside(self, number: int, name: str) -> int:
        image = self._names.find(os.fsencode(name), self._images[number].path)
        if image is None:
            raise Unsupported(
                f"{self.files[number].name}: refers to {name!r}, which is not a file of the same filesystem; "
                "nothing is looked for elsewhere"
            )
        if image.refused:
            raise Unsupported(f"{self.files[number].name}: refers to {name!r}, which {image.refused}")
        return self._number(image)

    def format_of(self, number: int) -> str:
        """By magic: also of a backing file, where its overlay does not say."""
        try:
            return magic.recognise(self.files[number])
        except ImageError:  # nothing opens these as disks: they are named
            return RAW

    # ---- volumes -------------------------------------------------------------------------------------------

    def _add_children(self, result: Assembly, raw: list[int]) -> None:
        none = About()
        files = [none] * len(self.files)
        for number in sorted(self._used()):
            files[number] = result.add(self._file(number, f"{self._name(self._images[number])}:file", False))
        self.own_files(files)
        for number in raw:
            result.add(self._file(number, self._name(self._images[number])))
        for number, error in self._refused.items():
            if files[number] is none:
                what = foreign.recognise(self._contents[number]) or "disk image"
                child = self._file(number, self._name(self._images[number]), False)
                child.type = child.unread = what
                files[number] = result.add(child)
            if isinstance(error, FormatError):
                files[number].damage.refuse(error, severity=NOTE if isinstance(error, Unsupported) else None)
            else:
                files[number].damage.say("unreadable", str(error))
        for disk in self.disks:
            result.add(self.child(disk, "image", disk.image, files, self.opener(disk, self._contents)))

    def _file(self, number: int, name: str, contents: bool = True) -> Child:
        """A volume that is a file of the filesystem."""
        rows, file = self._images[number].rows.placed(0, ints(self._member.number)), self.files[number]
        replay = magic.known(self._links[number][0]).recovered if file.corrects else None
        return Child("image", name, file.size, rows, open=replay, contents=contents, holes=[(0, file.size)])
