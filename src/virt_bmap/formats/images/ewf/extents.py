"""The tables of an image: in which segment each chunk of the disk lies, where, and how it is stored.

A table has no lengths. A chunk ends where the next one begins, or with the section that it lies in.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "Sectors section", "Table section", "Table
entries offset overflow".
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Bool, Int, ints
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import record, widen
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import ROW, afford
from virt_bmap.formats.images.ewf.header import sealed
from virt_bmap.formats.images.ewf.ondisk import CHECKSUM, ENTRY, PACKED, PLACE, TABLE_HEADER
from virt_bmap.formats.images.ewf.sections import FileSection, SegmentFile
from virt_bmap.formats.images.layer import Draft

TABLES = {"table": "table", "table2": "backup table"}
"""Kinds of sections, and what they are called."""


class Chunks(NamedTuple):
    """Chunks, as columns: their `number` on the disk, the `file` they lie in, from byte `host` on; `stored`:
    bytes up to what comes next; `packed`: whether they are compressed."""

    number: Int
    file: Int
    host: Int
    stored: Int
    packed: Bool

    def take(self, keep: Bool | Int) -> "Chunks":
        return take(self, keep)


NO_CHUNKS = Chunks(EMPTY, EMPTY, EMPTY, EMPTY, np.zeros(0, bool))


class _Table(NamedTuple):
    """The entries of a table, and the byte in the file that they count from."""

    entries: np.ndarray
    base: int


def read_chunks(draft: Draft, segments: Sequence[SegmentFile]) -> tuple[Chunks, int]:
    """All chunks that lie in their files, and how many the tables list: numbers go on from table to table."""
    parts, first = [NO_CHUNKS], 0
    for file, segment in enumerate(segments):
        found, listed = _of_segment(draft, file, segment, first)
        parts.append(found)
        first += listed
    return stack(Chunks, parts), first


def _of_segment(draft: Draft, file: int, segment: SegmentFile, first: int) -> tuple[Chunks, int]:
    image = draft.files[file]
    host, packed, place = [EMPTY], [np.zeros(0, bool)], [EMPTY]
    total = 0
    for section, backup in _pairs(segment):
        table = _read(draft, file, section, backup)
        total += len(table.entries)
        afford(image, total * ROW, f"the rows of {plural(total, 'chunk')}")
        offset, is_packed = _places(table.entries)
        host.append(offset + table.base)
        packed.append(is_packed)
        place.append(section.start + TABLE_HEADER.itemsize + ENTRY * np.arange(len(offset), dtype=np.int64))
    at = np.concatenate(host)
    end = _ends(segment, at)
    number = first + np.arange(len(at), dtype=np.int64)
    good = draft.damage.check(
        end > at,
        "outside",
        f"[entry of a table leads|entries of tables lead] to where no chunk can be{_of(image, file)}",
        np.concatenate(place),
    )
    chunks = Chunks(number, np.full(len(at), file), at, end - at, np.concatenate(packed))
    return chunks.take(good), len(at)


def _pairs(segment: SegmentFile) -> list[tuple[FileSection, FileSection | None]]:
    """The tables, each with the backup behind it; a backup without its table stands for it."""
    found: list[tuple[FileSection, FileSection | None]] = []
    for section in segment.of(*TABLES):
        if section.kind == "table2" and found and found[-1][1] is None and found[-1][0].kind == "table":
            found[-1] = found[-1][0], section
        else:
            found.append((section, None))
    return found


def _read(draft: Draft, file: int, section: FileSection, backup: FileSection | None) -> _Table:
    """A table, or its backup where only that is whole."""
    image = draft.files[file]
    found, whole = _entries(draft, file, section)
    if backup is None:
        again, also = None, False
    else:
        again, also = _entries(draft, file, backup)
    if not whole and again is not None and also:
        draft.damage.add(
            "copy-used",
            f"[table is damaged, and its backup is|tables are damaged, and their backups are] read"
            f"{_of(image, file)}",
            section.start,
        )
        return again
    if not whole:
        draft.damage.add(
            "checksum",
            f"[table is|tables are] damaged, and so [is its backup|are their backups], or there is none"
            f"{_of(image, file)}",
            section.start,
        )
    elif again is not None and not (
        also and found.base == again.base and np.array_equal(found.entries, again.entries)
    ):
        draft.damage.add(
            "copy-differs",
            f"[backup table says|backup tables say] something else{_of(image, file)}",
            section.start,
        )
    return found


def _entries(draft: Draft, file: int, section: FileSection) -> tuple[_Table, bool]:
    """The entries of one table as far as they lie in its section, and whether its checksums are right.

    What of the section is the table gets its owner."""
    image, word = draft.files[file], TABLES[section.kind]
    raw = image.read_clipped(section.start, TABLE_HEADER.itemsize)
    head = record(raw, TABLE_HEADER)
    start = section.start + TABLE_HEADER.itemsize
    count, room = int(head["entry_count"]), max(0, (section.end - start) // ENTRY)
    base = min(int(head["base_offset"]), image.size + 1)  # an offset may be 2^64, which no arithmetic bears
    whole = sealed(raw) and count <= room and base <= image.size
    count = min(count, room)
    entries = np.frombuffer(image.read(start, count * ENTRY), "<u4") if count else np.zeros(0, "<u4")
    length = count * ENTRY
    if _has_footer(section, entries, start + length, base):
        footer = image.read(start + length, CHECKSUM)
        whole = whole and zlib.adler32(entries.tobytes()) == int.from_bytes(footer, "little")
        draft.own(f"{word} checksum", start + length, CHECKSUM, file=file)
    draft.own(f"{word} header", section.start, start - section.start, file=file)
    draft.own(word, start, length, file=file)
    return _Table(entries, base), whole


def _has_footer(section: FileSection, entries: np.ndarray, end: int, base: int) -> bool:
    """SMART, and the specification, have the first chunk where others have the checksum of the entries."""
    left = section.end - end
    if left <= CHECKSUM or not len(entries):
        return left >= CHECKSUM
    first = (entries & np.uint32(PLACE)).astype(np.int64) + base
    inside = first[(first >= end) & (first < section.end)]
    return not len(inside) or int(inside.min()) >= end + CHECKSUM


def _places(entries: np.ndarray) -> tuple[Int, Bool]:
    """(offset, is compressed) of entries. EnCase 6.7 wrote on beyond 2 GiB and used the bit for it: chunks
    behind that are stored as they are."""
    packed = (entries & np.uint32(PACKED)) != 0
    offset = (entries & np.uint32(PLACE)).astype(np.int64)
    wrapped = np.flatnonzero((offset[1:] < offset[:-1]) & packed[1:] & ~packed[:-1])
    if len(wrapped):
        packed[wrapped[0] + 1 :] = False
        offset[wrapped[0] + 1 :] = widen(entries[wrapped[0] + 1 :], "table entry")
    return offset, packed


def _ends(segment: SegmentFile, host: Int) -> Int:
    """The byte after each chunk: where the next one begins, or the section ends; 0 for those that lie in no
    section that holds chunks."""
    holders = segment.of("sectors", "table")
    if not len(host) or not holders:
        return np.zeros(len(host), np.int64)
    low, high = ints([one.start for one in holders]), ints([one.end for one in holders])
    inside = np.searchsorted(low, host, "right") - 1
    there = (inside >= 0) & (host < high[inside])
    begins = np.unique(host)
    behind = np.append(begins[1:], np.iinfo(np.int64).max)[np.searchsorted(begins, host)]
    return np.where(there, np.minimum(behind, high[inside]), 0)


def _of(image: Reader, file: int) -> str:
    return f" in {image.name}" if file else ""


def last_length(files: Sequence[Reader], chunks: Chunks, chunk: int) -> int:
    """Bytes of the disk in the last of these chunks, which may be shorter than the others."""
    at = int(np.argmax(chunks.number))
    image, host, stored = files[chunks.file[at]], int(chunks.host[at]), int(chunks.stored[at])
    if not chunks.packed[at]:
        return min(max(stored - CHECKSUM, 0), chunk)
    try:
        return len(inflate(image.read(host, min(stored, 2 * chunk)), chunk))
    except ValueError:  # who reads it is told
        return chunk


def inflate(data: bytes, size: int) -> bytes:
    """A compressed chunk, of at most `size` bytes; its Adler-32 behind it must be right (RFC 1950)."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) > size:
        raise ValueError("it holds more than a chunk")
    if not stream.eof:
        raise ValueError("it ends early")
    return found
