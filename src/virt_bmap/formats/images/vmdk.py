"""VMDK: sparse extents with grain directories and tables, streams of compressed grains, flat extents.

Sources: VMware "Virtual Disk Format 5.0"; QEMU block/vmdk.c.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.mapping import PACKED
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images import descriptor
from virt_bmap.formats.images.descriptor import SECTOR, Descriptor
from virt_bmap.formats.images.inflate import deflated
from virt_bmap.formats.images.layer import IN_DATA, Draft, used_entries
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    ImageFormat,
    ImageLayer,
    References,
    Structure,
    Structures,
    Writing,
)

NAME = "vmdk"
FEATURES = (
    "monolithicSparse and twoGbMaxExtentSparse: both copies of grain directory and tables, grains of zeroes",
    "streamOptimized: compressed grains, markers, footer",
    "monolithicFlat, twoGbMaxExtentFlat and vmfs: extents in files of their own",
    "delta links (parents)",
)
REFUSED = ("COWD (vmfsSparse) and seSparse extents, raw device mappings: named",)
ORACLES = ("qemu-img map", "qemu-img info", "content read through the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "header and descriptor: version, sizes, extents",
        "grain tables: places, each grain once",
    ),
    unchecked=(
        "the guest's bytes",
        "the redundant grain tables",
    ),
)

HEADER = struct(512, [
    (0, "magicNumber", "S4"), (4, "version", "<u4"), (8, "flags", "<u4"), (12, "capacity", "<u8"),
    (20, "grainSize", "<u8"), (28, "descriptorOffset", "<u8"), (36, "descriptorSize", "<u8"),
    (44, "numGTEsPerGT", "<u4"), (48, "rgdOffset", "<u8"), (56, "gdOffset", "<u8"), (64, "overHead", "<u8"),
    (72, "uncleanShutdown", "u1"), (77, "compressAlgorithm", "<u2"),
])  # fmt: skip
REDUNDANT, ZERO_GRAINS, COMPRESSED, MARKERS = 1 << 1, 1 << 2, 1 << 16, 1 << 17
AT_END = (1 << 64) - 1
"""gdOffset of a stream: the directory's place is only known in the footer."""
MARKER = struct(512, [(0, "numSectors", "<u8"), (8, "size", "<u4"), (12, "type", "<u4")])
GRAIN_MARKER = struct(12, [(0, "lba", "<u8"), (8, "size", "<u4")])
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)
"""Types of markers of metadata."""
MAX_TABLE_ENTRIES, MAX_GRAIN, MAX_CAPACITY = 512, 2 << 20, 1 << 53
"""QEMU's limits for a grain table and a grain (in bytes); sectors of a disk."""
BATCH = 8192
"""Grain tables that are looked into at a time: 16 MiB."""


class Sparse(NamedTuple):
    """One sparse extent: its header's fields as numbers; `file` is a position in the draft, `base` its first
    byte on the disk, `size` its bytes there."""

    file: int
    base: int
    size: int
    flags: int
    grain: int
    entries: int
    directory: int
    redundant: int
    text: tuple[int, int]


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of a VMDK: a file that holds everything, or a descriptor with its extents (`others`, in the
    order in which they are named)."""
    found, separate = descriptor.find(image)
    if found is None and image.read_clipped(0, 4) == b"COWD":
        raise Unsupported(f"{image.name}: is a COWD (vmfsSparse) extent, which is not read", 0)
    if found is not None and separate:
        return _several(image, others, found)
    head = read_header(image)
    draft = Draft([image], head["capacity"] * SECTOR)
    grain = own_sparse(draft, image, 0, 0, draft.size)
    return draft.finish(NAME, grain, _facts(found, head), inflate=inflate)


def _facts(found: Descriptor | None, head: dict[str, int] | None) -> dict[str, object]:
    return {
        "subformat": found.create_type if found else None,
        "dirty": bool(head and head["uncleanShutdown"]),
    }


def _several(image: Reader, others: Sequence[Reader], found: Descriptor) -> ImageLayer:
    """Extents one after the other on the disk; several may lie in one file."""
    files = list(dict.fromkeys([image, *others]))
    size = sum(extent.sectors for extent in found.extents) * SECTOR
    if not found.extents or size > MAX_CAPACITY * SECTOR:
        raise Corrupt(
            f"{image.name}: its descriptor at byte {found.start:#x} gives {len(found.extents)} "
            f"extents with {size:,} bytes",
            found.start,
        )
    draft = Draft(files, size)
    draft.own("descriptor", found.start, found.length)
    base, grain, readers = 0, 1, iter(others)
    for extent in found.extents:  # lines of text: as many as the disk has files
        length = extent.sectors * SECTOR
        reader = next(readers, None) if extent.file else None
        if extent.type == "ZERO":
            draft.zero(ints(base), ints(length))
        elif reader is None or extent.type not in (*descriptor.FLAT, "SPARSE"):
            raise Unsupported(
                f"{image.name}: has an extent of type {extent.type}, which is not read; FLAT, VMFS, "
                "SPARSE and ZERO are",
                found.start,
            )
        elif extent.type == "SPARSE":
            grain = own_sparse(draft, reader, files.index(reader), base, length)
        else:
            draft.place(ints(base), ints(extent.offset * SECTOR), ints(length), file=files.index(reader))
        base += length
    return draft.finish(NAME, grain, _facts(found, None), inflate=inflate)


def read_header(image: Reader, at: int = 0) -> dict[str, int]:
    """The sparse extent header, or the footer that stands for it in a stream; checked.

    Raises Corrupt or Unsupported.
    """
    raw = record(image.read_clipped(at, HEADER.itemsize), HEADER)
    if bytes(raw["magicNumber"]) != b"KDMV":
        what = (
            "is a COWD (vmfsSparse) extent, which is not read"
            if bytes(raw["magicNumber"]) == b"COWD"
            else "has no VMDK sparse header"
        )
        raise (Unsupported if "COWD" in what else Corrupt)(f"{image.name}: {what} at byte {at:#x}", at)
    head = {name: int(raw[name]) for name in (HEADER.names or ())[1:]}
    if head["version"] not in (1, 2, 3):
        raise Unsupported(f"{image.name}: is a VMDK of version {head['version']}; 1 to 3 are known", at + 4)
    grain, entries = head["grainSize"], head["numGTEsPerGT"]
    if (
        not 0 < grain * SECTOR <= MAX_GRAIN
        or grain & (grain - 1)
        or not 0 < entries <= MAX_TABLE_ENTRIES
        or head["capacity"] > MAX_CAPACITY
    ):
        raise Corrupt(
            f"{image.name}: its VMDK header at byte {at:#x} says {head['capacity']:,} sectors, "
            f"{grain:,} a grain and {entries:,} grains a table",
            at + 12,
        )
    if head["gdOffset"] == AT_END and at == 0:
        return read_header(image, image.size - 2 * SECTOR)
    return head


def own_sparse(draft: Draft, image: Reader, file: int, base: int, size: int) -> int:
    """One sparse extent: who owns its file, and where the disk's bytes [base, +size) lie in it.

    The bytes of a grain.
    """
    head = read_header(image)
    stream = bool(head["flags"] & MARKERS)
    sparse = Sparse(
        file, base, min(size, head["capacity"] * SECTOR), head["flags"], head["grainSize"] * SECTOR,
        head["numGTEsPerGT"], head["gdOffset"] * SECTOR,
        head["rgdOffset"] * SECTOR if head["flags"] & REDUNDANT else 0,
        (head["descriptorOffset"] * SECTOR, head["descriptorSize"] * SECTOR),
    )  # fmt: skip
    draft.own("header", 0, SECTOR, file=file)
    own_descriptor(draft, image, sparse)
    if stream:
        own_footer(draft, image, file)
    for directory, word in ((sparse.redundant, "redundant "), (sparse.directory, "")):
        if directory:
            place, table = own_tables(draft, image, sparse, directory, word)
            if not word:
                place_grains(draft, image, sparse, place, table)
    return sparse.grain


def own_descriptor(draft: Draft, image: Reader, sparse: Sparse) -> None:
    """The embedded text, and the room that is kept for it."""
    at, room = sparse.text
    if 0 < at < image.size:
        text = len(image.read_clipped(at, min(room, descriptor.MAX_DESCRIPTOR)).split(b"\0", 1)[0])
        draft.own("descriptor", at, text, file=sparse.file)
        draft.own("slack", at + text, room - text, tables.GAP, sparse.file)


def own_footer(draft: Draft, image: Reader, file: int) -> None:
    """The last sectors of a stream: the footer's marker, the footer, the end-of-stream marker."""
    end = image.size // SECTOR * SECTOR
    if end >= 4 * SECTOR and image.read(end - 2 * SECTOR, 4) == b"KDMV":
        own_markers(draft, image, file, ints(end - 3 * SECTOR), FOOTER)
        draft.own("footer", end - 2 * SECTOR, SECTOR, file=file)
        own_markers(draft, image, file, ints(end - SECTOR), END_OF_STREAM)


def own_markers(draft: Draft, image: Reader, file: int, at: Int, kind: int) -> None:
    """Those of the sectors that are markers of this type: not all programs write them."""
    at = np.unique(at[(at > 0) & (at + SECTOR <= image.size)])
    found = records(image.read_blocks(at, SECTOR), MARKER) if len(at) else np.zeros(0, MARKER)
    draft.own("marker", at[(found["size"] == 0) & (found["type"] == kind)], SECTOR, file=file)


def own_tables(draft: Draft, image: Reader, sparse: Sparse, directory: int, word: str) -> tuple[Int, Int]:
    """A grain directory and its tables: (number, offset) of the distinct tables that lie in the file."""
    count = -(-sparse.size // (sparse.grain * sparse.entries))
    if directory + count * 4 > image.size:
        raise Corrupt(
            f"{image.name}: its {word}grain directory of {count * 4:,} bytes at byte {directory:#x} "
            "does not fit into the file",
            56,
        )
    draft.own(f"{word}grain directory", directory, count * 4, file=sparse.file)
    number, sector = used_entries(image, directory, count, "<u4", 0)
    at, size = sector * SECTOR, sparse.entries * 4
    wrong = at + size > image.size
    draft.damage.add(
        "outside",
        f"entries of the {word}grain directory lead behind the end of the file",
        directory + number[wrong] * 4,
    )
    number, at = number[~wrong], at[~wrong]
    _, first = np.unique(at, return_index=True)
    again = np.ones(len(at), bool)
    again[first] = False
    draft.damage.add(
        "outside",
        f"entries of the {word}grain directory lead to a table that another has",
        directory + number[again] * 4,
    )
    number, at = number[~again], at[~again]
    draft.own(f"{word}grain table", at, size, file=sparse.file)
    if sparse.flags & MARKERS:
        own_markers(draft, image, sparse.file, at - SECTOR, GRAIN_TABLE)
        own_markers(draft, image, sparse.file, ints(directory - SECTOR), GRAIN_DIRECTORY)
    return number, at


def place_grains(draft: Draft, image: Reader, sparse: Sparse, number: Int, table: Int) -> None:
    """Where each grain lies; 0 is nowhere, and 1 a grain of zeroes where the header says so."""
    for guest, sector, place in _grains(image, sparse, number, table):
        zero = (sector == 1) & bool(sparse.flags & ZERO_GRAINS)
        draft.zero(sparse.base + guest[zero], np.full(int(zero.sum()), sparse.grain))
        host = sector * SECTOR
        wrong = ~zero & (host >= image.size)
        draft.damage.add("outside", "entries of grain tables lead behind the end of the file", place[wrong])
        keep = ~zero & ~wrong & (guest < sparse.size)
        guest, host = guest[keep], host[keep]
        length = np.minimum(sparse.grain, sparse.size - guest)
        packed = bool(sparse.flags & COMPRESSED)
        stored = _stored(image, sparse, host) if packed else length
        draft.place(sparse.base + guest, host, length, PACKED if packed else IN_DATA, sparse.file, stored)


def _grains(image: Reader, sparse: Sparse, number: Int, table: Int) -> Iterator[tuple[Int, Int, Int]]:
    """(first byte in the extent, sector, offset of the entry) of the grains that have a place, in batches of
    tables."""
    for at in range(0, len(table), BATCH):
        raw = image.read_blocks(table[at : at + BATCH], sparse.entries * 4)
        entry = widen(np.frombuffer(raw.tobytes(), "<u4"), "grain table entry")
        used = np.flatnonzero(entry)
        row, nth = used // sparse.entries + at, used % sparse.entries
        yield (number[row] * sparse.entries + nth) * sparse.grain, entry[used], table[row] + nth * 4


def _stored(image: Reader, sparse: Sparse, host: Int) -> Int:
    """Bytes that compressed grains take, up to the next sector: their markers say it; without markers it is a
    grain."""
    if not sparse.flags & MARKERS or len(host) == 0:
        return np.full(len(host), sparse.grain, np.int64)
    inside = np.minimum(host, image.size - GRAIN_MARKER.itemsize)
    size = widen(
        records(image.read_blocks(inside, GRAIN_MARKER.itemsize), GRAIN_MARKER)["size"], "size of a grain"
    )
    stored: Int = -(-(GRAIN_MARKER.itemsize + size) // SECTOR) * SECTOR
    return np.minimum(stored, 2 * sparse.grain)


def inflate(data: bytes, size: int) -> bytes:
    """A grain, behind its marker."""
    return deflated(data[GRAIN_MARKER.itemsize :], size, zlib.MAX_WBITS)


def references(image: Reader) -> References:
    """The text descriptor's extent lines and its parent's name.

    A parent is always a VMDK: the specification leaves nothing to guess.
    """
    found, _ = descriptor.find(image)
    if found is None:
        return References()
    extents = tuple(extent.file for extent in found.extents if extent.file)
    return References(found.parent, NAME if found.parent else None, extents=extents)


def _structures() -> Structures:
    return {"header": Structure(HEADER), "footer": Structure(HEADER), "marker": Structure(MARKER)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    rewritten=descriptor.rewritten,
    writing=Writing.ANYWHERE,
    suffix=".vmdk",
)
