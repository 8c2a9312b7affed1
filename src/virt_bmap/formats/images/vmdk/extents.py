"""The grain directory and grain tables of a sparse VMDK extent: where its grains lie.

Sources: VMware "Virtual Disk Format 5.0", "Grain Directory" and "Grain Table"; QEMU block/vmdk.c.
"""

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.codecs import zlibbed
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import records, widen
from virt_bmap.core.mapping import PACKED
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import IN_DATA, Draft, used_entries
from virt_bmap.formats.images.vmdk.header import marked, read_header
from virt_bmap.formats.images.vmdk.ondisk import (
    COMPRESSED,
    GRAIN_DIRECTORY,
    GRAIN_MARKER,
    GRAIN_TABLE,
    MARKERS,
    REDUNDANT,
    SECTOR,
    ZERO_GRAINS,
)
from virt_bmap.formats.images.vmdk.owners import Sparse, own_descriptor, own_footer, own_markers


def own_sparse(draft: Draft, image: Reader, file: int, base: int, size: int) -> int:
    """One sparse extent: who owns its file, and where the disk's bytes [base, +size) lie in it.

    The bytes of a grain.
    """
    head = read_header(image)
    if mark := marked(image):
        draft.damage.say(mark.code, mark.words)
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


def own_tables(draft: Draft, image: Reader, sparse: Sparse, directory: int, word: str) -> tuple[Int, Int]:
    """A grain directory and its tables: (number, offset) of the distinct tables that lie in the file."""
    count = -(-sparse.size // (sparse.grain * sparse.entries))
    if directory + count * 4 > image.size:
        raise Corrupt(
            f"{image.name}: its {word}grain directory of {count * 4:,} "
            f"bytes at byte {directory:#x} does not fit into the file",
            56,
        )
    draft.own(f"{word}grain directory", directory, count * 4, file=sparse.file)
    number, sector = used_entries(image, directory, count * 4, "<u4", 0)
    at, size = sector * SECTOR, sparse.entries * 4
    wrong = at + size > image.size
    draft.damage.add(
        "outside",
        f"[entry|entries] of the {word}grain directory [leads|lead] beyond the end of the file",
        directory + number[wrong] * 4,
    )
    number, at = number[~wrong], at[~wrong]
    _, first = np.unique(at, return_index=True)
    again = np.ones(len(at), bool)
    again[first] = False
    draft.damage.add(
        "outside",
        f"[entry|entries] of the {word}grain directory [leads|lead] to a table that another has",
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
    lengths = np.full(len(table), sparse.entries * 4)
    used, sector = used_entries(image, table, lengths, "<u4", 0)
    row, nth = np.divmod(used, sparse.entries)
    guest, place = (number[row] * sparse.entries + nth) * sparse.grain, table[row] + nth * 4
    zero = (sector == 1) & bool(sparse.flags & ZERO_GRAINS)
    draft.zero(sparse.base + guest[zero], np.full(int(zero.sum()), sparse.grain))
    host = sector * SECTOR
    wrong = ~zero & (host >= image.size)
    draft.damage.add(
        "outside",
        "[entry of a grain table leads|entries of grain tables lead] beyond the end of the file",
        place[wrong],
    )
    keep = ~zero & ~wrong & (guest < sparse.size)
    guest, host = guest[keep], host[keep]
    length = np.minimum(sparse.grain, sparse.size - guest)
    packed = bool(sparse.flags & COMPRESSED)
    stored = _stored(image, sparse, host) if packed else length
    draft.place(sparse.base + guest, host, length, PACKED if packed else IN_DATA, sparse.file, stored)


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
    """A grain, after its marker."""
    return zlibbed(data[GRAIN_MARKER.itemsize :], size)
