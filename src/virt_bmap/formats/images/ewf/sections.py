"""The sections of a segment file: a chain from the file header to `next` or `done`, each link checked.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "File header", "Section descriptor",
"Corruption scenarios".
"""

import zlib
from typing import NamedTuple

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.ondisk import (
    DONE,
    FILE_HEADER,
    MAX_SECTIONS,
    NEXT,
    SECTION,
    SIGNATURE,
)
from virt_bmap.model.problems import Problem


class FileSection(NamedTuple):
    """A section: its descriptor, and its data [start, end), as far as they lie in the file."""

    kind: str
    descriptor: int
    start: int
    end: int


class SegmentFile(NamedTuple):
    """One file of an image: its number, from 1, its sections in order, and what is wrong with the chain.

    `last` is NEXT, DONE, or "" where the chain breaks off.
    """

    number: int
    sections: list[FileSection]
    last: str
    problems: list[Problem]

    def of(self, *kinds: str) -> list[FileSection]:
        """Its sections of these kinds."""
        return [section for section in self.sections if section.kind in kinds]


def number_of(image: Reader) -> int:
    """The number in the file header. Raises Corrupt where there is no such header."""
    head = image.read_clipped(0, FILE_HEADER.itemsize)
    number = int(record(head, FILE_HEADER)["segment_number"])
    if not head.startswith(SIGNATURE) or number == 0:
        raise Corrupt(f"{image.name}: does not begin as a segment of an E01 or s01 does", 0)
    return number


def walk(image: Reader) -> SegmentFile:
    """The chain of sections, up to its end or to the first link that can't be believed.

    Each one lies behind the one before, so it ends.
    """
    found = SegmentFile(number_of(image), [], "", [])
    at, size = FILE_HEADER.itemsize, SECTION.itemsize

    def said(code: str, words: str) -> SegmentFile:
        found.problems.append(Problem(code, words, at))
        return found

    for _ in range(MAX_SECTIONS):
        if at + size > image.size:
            return said(
                "truncated",
                f"its sections go on at byte {at:#x}, but the file ends at {image.size:#x}: it was not "
                "finished, or cut off",
            )
        raw = image.read(at, size)
        head = record(raw, SECTION)
        if zlib.adler32(raw[: size - 4]) != int(head["checksum"]):
            return said(
                "checksum", f"the section at byte {at:#x} has a wrong checksum: no section behind it is known"
            )
        kind, follows = bytes(head["type"]).decode("latin-1"), int(head["next_offset"])
        if kind in (NEXT, DONE):
            found.sections.append(FileSection(kind, at, at + size, at + size))
            return found._replace(last=kind)
        if follows < at + size:
            return said(
                "mapping",
                f"the section at byte {at:#x} leads back to byte {follows:#x}: no section behind it is known",
            )
        if int(head["size"]) not in (0, follows - at):
            said(
                "mapping",
                f"the section at byte {at:#x} is {int(head['size']):#x} bytes long, but the next one lies "
                f"{follows - at:#x} bytes on: programs do not agree on what the image holds",
            )
        found.sections.append(FileSection(kind, at, at + size, min(follows, image.size)))
        at = follows
    return said("too-many", f"the file has more than {MAX_SECTIONS:,} sections")
