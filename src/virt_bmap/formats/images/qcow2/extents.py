"""L1 and L2 tables: which host cluster holds which guest cluster, in the current state and in the snapshots.

Sources: QEMU docs/interop/qcow2.rst (v8.2) section "Cluster mapping" with "Extended L2 Entries";
block/qcow2.h (qcow2_get_subcluster_type).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bool, Int, expand, ints
from virt_bmap.core.codecs import deflated, zstd
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import ROW, afford, held
from virt_bmap.formats.images.layer import Draft, used_entries
from virt_bmap.formats.images.qcow2.header import Header, Table
from virt_bmap.formats.images.qcow2.ondisk import (
    ALL_ZEROS,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SECTOR,
    SUBCLUSTERS,
)

BATCH = 16 << 20
"""Bytes of L2 tables that are looked into at a time: memory follows this and the runs found, not the size of
the image."""
INFLATE = {"zlib": deflated, "zstd": zstd}
"""By ondisk.COMPRESSION_TYPES."""

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


def read_l2_tables(image: Reader, header: Header, tables: Sequence[Table], draft: Draft) -> L2Tables:
    """The L2 tables that these L1 tables, of the current state and of the snapshots, lead to."""
    starts, lengths = (ints([table[side] for table in tables]) for side in (0, 1))
    number, offset = used_entries(image, starts, lengths, ">u8", 0, OFFSET_MASK)
    ends = np.cumsum(lengths) // 8
    who = np.searchsorted(ends, number, "right")
    nth = number - (ends - lengths // 8)[who]
    where = starts[who] + nth * 8
    wrong = (offset % header.cluster != 0) | (offset > image.size - header.cluster)
    draft.damage.add(
        "outside", "L1 [entry leads|entries lead] outside the file or between clusters", where[wrong]
    )
    who, nth, offset, where = who[~wrong], nth[~wrong], offset[~wrong], where[~wrong]
    distinct, start, inverse = np.unique(offset, return_index=True, return_inverse=True)
    first, last = np.full(len(distinct), len(tables)), np.full(len(distinct), -1)
    np.minimum.at(first, inverse, who)
    np.maximum.at(last, inverse, who)
    again = (who == who[start][inverse]) & (np.arange(len(who)) != start[inverse])
    draft.damage.add(
        "twice",
        "L1 [entry leads|entries lead] to an L2 table that the same L1 table already has",
        where[again],
    )
    guest = nth[start] * header.l2_entries * header.cluster
    uses = np.bincount(inverse, minlength=len(distinct)).astype(np.int64)
    return L2Tables(distinct, guest, uses, first, last)


def read_clusters(
    image: Reader, header: Header, l2: L2Tables, draft: Draft
) -> tuple[ClusterPieces, ClusterPieces]:
    """(what guest bytes are where, which host clusters are held), of all L2 tables."""
    batches, total = [], 0
    for batch in _pieces(image, header, l2, draft):
        batches.append(batch)
        total += len(batch[0].guest)
        afford(image, total * ROW, f"{total:,} runs of clusters")

    def join(side: int) -> ClusterPieces:
        return stack(ClusterPieces, [batch[side] for batch in batches])

    return _packed_cut(join(0)), join(1)


def _pieces(
    image: Reader, header: Header, tables: L2Tables, draft: Draft
) -> Iterator[tuple[ClusterPieces, ClusterPieces]]:
    """For each batch of L2 tables: (what guest bytes are where, which host clusters are held). They differ
    where subclusters are in use."""
    width, most = (16, BATCH // SUBCLUSTERS) if header.extended else (8, BATCH)
    lengths = np.full(len(tables.offset), header.cluster)
    for at, raw in held(image, tables.offset, lengths, max(most, header.cluster)):
        words = raw.view(">u8").astype(np.uint64)
        entry, bitmap = (words[0::2], words[1::2]) if header.extended else (words, None)
        used = np.flatnonzero(entry if bitmap is None else entry | bitmap)
        table, nth = np.divmod(used + at // width, header.l2_entries)
        guest = tables.guest[table] + nth * header.cluster
        place = tables.offset[table] + nth * width
        found = _entries(header, entry[used], guest, table)
        wrong = _wrong(image, header, found, place, draft)
        held_here = found.take(~wrong & (found.host >= 0))
        known = found.take(~wrong)
        if bitmap is not None:
            known = _subclusters(header, known, bitmap[used][~wrong])
        yield _runs(known), _runs(held_here)


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
    """Entries that lead nowhere, reported: between clusters, or beyond the end of the file."""
    plain = found.kind != PACKED
    between = plain & (found.host >= 0) & (found.host % header.cluster != 0)
    draft.damage.add("outside", "L2 [entry leads|entries lead] between clusters", place[between])
    if header.external:
        draft.damage.add(
            "outside",
            "L2 [entry is|entries are] compressed, which an external data file can't hold",
            place[~plain],
        )
        return _any(between, ~plain)
    behind = found.host >= image.size
    draft.damage.add("outside", "L2 [entry leads|entries lead] beyond the end of the file", place[behind])
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


def _packed_cut(found: ClusterPieces) -> ClusterPieces:
    """Compressed clusters cut where the next one begins: their length is stored in sectors only, and they are
    packed without gaps."""
    packed = np.flatnonzero(found.kind == PACKED)
    if len(packed) == 0:
        return found
    start = np.unique(found.host[packed])
    behind = np.append(start[1:], np.iinfo(np.int64).max)[np.searchsorted(start, found.host[packed])]
    stored = found.stored.copy()
    stored[packed] = np.minimum(stored[packed], behind - found.host[packed])
    return ClusterPieces(found.guest, found.host, found.length, stored, found.kind, found.table)
