"""The sections of a segment file: a chain from the file header to `next` or `done`, each link checked.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "File header", "Section descriptor",
"Corruption scenarios".
"""

import struct
import zlib
from typing import NamedTuple

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.ondisk import (
    CHECKSUM,
    DONE,
    FILE_HEADER,
    MAX_SECTIONS,
    NEXT,
    SECTION,
    SIGNATURE,
)
from virt_bmap.model.problems import Problem

DESCRIPTOR = struct.Struct("<16sQQ40xI")
"""As `ondisk.SECTION`, for those that are read one by one: each one says where the next one lies."""

WINDOW = 4096
"""Bytes that are read for a descriptor: small sections lie side by side."""


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
    begin, data = 0, b""

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
        if not begin <= at <= begin + len(data) - size:
            begin, data = at, image.read(at, min(WINDOW, image.size - at))
        raw = data[at - begin : at - begin + size]
        name, follows, length, checksum = DESCRIPTOR.unpack(raw)
        if zlib.adler32(raw[:-CHECKSUM]) != checksum:
            return said(
                "checksum", f"the section at byte {at:#x} has a wrong checksum: no section behind it is known"
            )
        kind = name.rstrip(b"\0").decode("latin-1")
        if kind in (NEXT, DONE):
            found.sections.append(FileSection(kind, at, at + size, at + size))
            return found._replace(last=kind)
        if follows < at + size:
            return said(
                "mapping",
                f"the section at byte {at:#x} leads back to byte {follows:#x}: no section behind it is known",
            )
        if length not in (0, follows - at):
            said(
                "mapping",
                f"the section at byte {at:#x} is {length:#x} bytes long, but the next one lies "
                f"{follows - at:#x} bytes on: programs do not agree on what the image holds",
            )
        found.sections.append(FileSection(kind, at, at + size, min(follows, image.size)))
        at = follows
    return said("too-many", f"the file has more than {MAX_SECTIONS:,} sections")
