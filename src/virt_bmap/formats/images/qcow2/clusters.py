"""L1 and L2 tables: which host cluster holds which guest cluster, in the current state and in the snapshots.

Sources: QEMU docs/interop/qcow2.rst (v8.2) section "Cluster mapping" with "Extended L2 Entries";
block/qcow2.h (qcow2_get_subcluster_type).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bool, Int, expand
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.qcow2.header import Header

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED, COMPRESSED, ALL_ZEROS = 1 << 63, 1 << 62, 1
SUBCLUSTERS = 32
SECTOR = 512
BATCH = 16 << 20
"""Bytes of L2 tables that are looked into at a time: memory follows this and the runs found, not the size of
the image."""

IN_PLACE, ZERO_IN_PLACE, NOWHERE, PACKED, RESERVED = range(5)
"""Guest data at its cluster; a cluster kept for zeroes; zeroes without a cluster; compressed; a subcluster
that is kept but not in use."""


class L2Tables(NamedTuple):
    """The distinct L2 tables, by file offset.

    `guest` is the first byte that each describes; `uses` how many L1 entries lead to it.

    `first` and `last` are the lowest and highest number of who uses it: 0 the current state, from 1 on the
    snapshots.
    """

    offset: Int
    guest: Int
    uses: Int
    first: Int
    last: Int


class ClusterPieces(NamedTuple):
    """Runs of guest bytes [guest, +length) of one kind, at `host` (-1: nowhere) in `stored` bytes; `table` is
    a position in L2Tables."""

    guest: Int
    host: Int
    length: Int
    stored: Int
    kind: Int
    table: Int

    def take(self, keep: Bool | Int) -> "ClusterPieces":
        return take(self, keep)


def read_l2_tables(image: Reader, header: Header, draft: Draft) -> L2Tables:
    """All L1 tables in one batch, and the L2 tables that they lead to."""
    tables = [
        (header.l1_offset, header.l1_size),
        *((snapshot.l1_offset, snapshot.l1_size) for snapshot in header.snapshots),
    ]
    sizes = np.array([size for _, size in tables], np.int64)
    raw = image.read_ranges(np.array([offset for offset, _ in tables], np.int64), sizes * 8)
    who, nth = expand(sizes)
    entry = np.frombuffer(raw, ">u8").astype(np.uint64) & np.uint64(OFFSET_MASK)
    offset = entry.astype(np.int64)
    used = offset != 0
    where = np.array([start for start, _ in tables], np.int64)[who] + nth * 8
    wrong = used & ((offset % header.cluster != 0) | (offset + header.cluster > image.size))
    draft.damage.add("outside", "L1 entries lead outside the file or between clusters", where[wrong])
    used &= ~wrong
    who, nth, offset, where = who[used], nth[used], offset[used], where[used]
    distinct, start, inverse = np.unique(offset, return_index=True, return_inverse=True)
    first, last = np.full(len(distinct), len(tables)), np.full(len(distinct), -1)
    np.minimum.at(first, inverse, who)
    np.maximum.at(last, inverse, who)
    again = (who == who[start][inverse]) & (np.arange(len(who)) != start[inverse])
    draft.damage.add(
        "twice", "L1 entries lead to an L2 table that the same L1 table already has", where[again]
    )
    guest = nth[start] * header.l2_entries * header.cluster
    return L2Tables(
        distinct, guest, np.bincount(inverse, minlength=len(distinct)).astype(np.int64), first, last
    )


def pieces(
    image: Reader, header: Header, tables: L2Tables, draft: Draft
) -> Iterator[tuple[ClusterPieces, ClusterPieces]]:
    """For each batch of L2 tables: (what guest bytes are where, which host clusters are held). They differ
    where subclusters are in use."""
    step = max(1, BATCH // header.cluster)
    for at in range(0, len(tables.offset), step):
        batch = slice(at, at + step)
        raw = image.read_blocks(tables.offset[batch], header.cluster)
        words = np.frombuffer(raw.tobytes(), ">u8").astype(np.uint64)
        entry, bitmap = (words[0::2], words[1::2]) if header.extended else (words, None)
        used = np.flatnonzero(entry if bitmap is None else entry | bitmap)
        table = used // header.l2_entries + at
        guest = tables.guest[table] + used % header.l2_entries * header.cluster
        place = tables.offset[table] + used % header.l2_entries * (16 if header.extended else 8)
        found = _entries(header, entry[used], guest, table)
        wrong = _wrong(image, header, found, place, draft)
        held = found.take(~wrong & (found.host >= 0))
        known = found.take(~wrong)
        if bitmap is not None:
            known = _subclusters(header, known, bitmap[used][~wrong])
        yield _runs(known), _runs(held)


def _entries(header: Header, entry: np.ndarray, guest: Int, table: Int) -> ClusterPieces:
    """Standard L2 entries; with subclusters the bit "all zeros" has no meaning."""
    packed = (entry & np.uint64(COMPRESSED)) != 0
    bits = 62 - (header.cluster_bits - 8)
    at = (entry & np.uint64((1 << bits) - 1)).astype(np.int64)
    sectors = ((entry >> np.uint64(bits)) & np.uint64((1 << (header.cluster_bits - 8)) - 1)).astype(np.int64)
    offset = (entry & np.uint64(OFFSET_MASK)).astype(np.int64)
    # in an external data file the first cluster lies at 0: there COPIED tells that it is allocated
    nowhere = (offset == 0) & ~(header.external & ((entry & np.uint64(COPIED)) != 0))
    zero = ((entry & np.uint64(ALL_ZEROS)) != 0) & (header.version >= 3) & (not header.extended)
    kind = np.where(packed, PACKED, np.where(zero, np.where(nowhere, NOWHERE, ZERO_IN_PLACE), IN_PLACE))
    host = np.where(packed, at, np.where(nowhere, -1, offset))
    length = np.full(len(entry), header.cluster, np.int64)
    stored = np.where(packed, (sectors + 1) * SECTOR - at % SECTOR, length)
    return ClusterPieces(guest, host, length, stored, kind, table)


def _wrong(image: Reader, header: Header, found: ClusterPieces, place: Int, draft: Draft) -> Bool:
    """Entries that lead nowhere, reported: between clusters, or behind the end of the file."""
    plain = found.kind != PACKED
    between = plain & (found.host >= 0) & (found.host % header.cluster != 0)
    draft.damage.add("outside", "L2 entries lead between clusters", place[between])
    if header.external:
        draft.damage.add(
            "outside", "L2 entries are compressed, which an external data file can't hold", place[~plain]
        )
        return _any(between, ~plain)
    behind = found.host >= image.size
    draft.damage.add("outside", "L2 entries lead behind the end of the file", place[behind])
    empty = plain & (found.host < 0) & (found.kind == IN_PLACE) & (not header.extended)
    return _any(between, behind, empty)


def _any(*flags: Bool) -> Bool:
    found: Bool = np.any(flags, axis=0)
    return found


def _subclusters(header: Header, found: ClusterPieces, bitmap: np.ndarray) -> ClusterPieces:
    """Each cluster that is not compressed as its 32 subclusters; what falls through to the backing file is
    left out."""
    packed = found.kind == PACKED
    split = found.take(~packed)
    row, nth = expand(np.full(len(split.guest), SUBCLUSTERS, np.int64))
    word = bitmap[~packed][row]
    allocated = ((word >> nth.astype(np.uint64)) & np.uint64(1)) != 0
    zero = ((word >> (nth + SUBCLUSTERS).astype(np.uint64)) & np.uint64(1)) != 0
    size = header.cluster // SUBCLUSTERS
    there = split.host[row] >= 0
    kind = np.where(zero, np.where(there, ZERO_IN_PLACE, NOWHERE), np.where(allocated, IN_PLACE, RESERVED))
    host = np.where(there, split.host[row] + nth * size, -1)
    length = np.full(len(row), size, np.int64)
    keep = there | (kind == NOWHERE)
    cut = ClusterPieces(split.guest[row] + nth * size, host, length, length, kind, split.table[row]).take(
        keep
    )
    merged = stack(ClusterPieces, [cut, found.take(packed)])
    return merged.take(np.lexsort((merged.guest, merged.table)))


def _runs(found: ClusterPieces) -> ClusterPieces:
    """Neighbours of one table and kind that continue each other on both sides, made one; compressed clusters
    stay alone."""
    if len(found.guest) == 0:
        return ClusterPieces(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
    end = found.guest + found.length
    follows = (found.host[1:] == found.host[:-1] + found.length[:-1]) | (
        (found.host[1:] < 0) & (found.host[:-1] < 0)
    )
    same = (
        (found.kind[1:] == found.kind[:-1])
        & (found.table[1:] == found.table[:-1])
        & (found.kind[1:] != PACKED)
    )
    first = np.flatnonzero(np.append(True, ~((found.guest[1:] == end[:-1]) & follows & same)))
    last = np.append(first[1:], len(end)) - 1
    one = found.take(first)
    length = end[last] - one.guest
    return ClusterPieces(
        one.guest, one.host, length, np.where(one.kind == PACKED, one.stored, length), one.kind, one.table
    )
