"""The allocator of a qcow2 image: what it says of each cluster, and what really refers to it.

Both are kept as runs over the file, not as one number for each cluster: a sparse file can claim any number of
clusters.

Sources: QEMU docs/interop/qcow2.rst (v8.2) section "Host cluster management"; block/qcow2-refcount.c
(get_refcount_ro0 to ro6, check_refcounts_l1).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, ints, joined, union, weigh
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import PIECE, ROW, afford, held
from virt_bmap.formats.images.layer import Draft, Ranges
from virt_bmap.formats.images.qcow2.header import Header
from virt_bmap.formats.images.qcow2.ondisk import DIRTY, REFCOUNT_MASK
from virt_bmap.model import tables
from virt_bmap.model.problems import ERROR, NOTE, WARNING

BATCH = 16 << 20
"""Bytes that refcounts take while they are looked into."""
LOW = (
    "[range of clusters has a refcount below the number of references to it|ranges of clusters have a "
    "refcount below the number of references to them]"
)
HIGH = (
    "[range of clusters has a refcount above the number of references to it|ranges of clusters have a "
    "refcount above the number of references to them]"
)
LEAKED = (
    "[range of clusters is counted as used, but nothing refers to it|ranges of clusters are counted as "
    "used, but nothing refers to them] (qemu-img check -r leaks frees [it|them])"
)


@dataclass
class Uses:
    """What refers to clusters: ranges of the file in bytes, rounded out to clusters, with how often."""

    cluster: int
    _parts: list[tuple[Int, Int, Int]] = field(default_factory=list)

    def add(self, start: Int, length: Int, times: Int | int = 1) -> None:
        """Each cluster that [start, +length) touches, `times` more."""
        low = start // self.cluster * self.cluster
        high = -(-(start + length) // self.cluster) * self.cluster
        self._parts.append((low, high, np.broadcast_to(np.asarray(times, np.int64), low.shape)))

    def own_table(self, draft: Draft, part: str, offset: Any, length: Any) -> None:
        """Tables that begin at clusters: what is left of the last cluster is slack."""
        offset, length = ints(offset), ints(length)
        some = length > 0
        offset, length = offset[some], length[some]
        draft.own(part, offset, length)
        end = offset + length
        draft.own("slack", end, -end % self.cluster, tables.GAP)
        self.add(offset, length)

    def all(self) -> tuple[Int, Int, Int]:
        """(start, end, times) of all."""
        start, end, times = joined(self._parts, 3)
        return start, end, times


class Balance(NamedTuple):
    """Ranges of the file: free (count 0, no reference), leaked (counted, no reference), too low and too high
    a count."""

    free: Ranges
    leaked: Ranges
    low: Ranges
    high: Ranges


def read_blocks(image: Reader, header: Header, draft: Draft) -> tuple[Int, Int]:
    """(position in the refcount table, offset) of each refcount block that can be read and that speaks of
    bytes in the file."""
    start, length = header.refcount_table
    raw = image.read(start, length)
    offset = (np.frombuffer(raw, ">u8") & np.uint64(REFCOUNT_MASK)).astype(np.int64)
    at = np.flatnonzero(offset)
    offset = offset[at]
    place = start + at * 8
    wrong = (offset % header.cluster != 0) | (offset < 0) | (offset > image.size - header.cluster)
    draft.damage.add(
        "outside",
        "[entry|entries] of the refcount table [leads|lead] outside the file or between clusters",
        place[wrong],
    )
    at, offset, place = at[~wrong], offset[~wrong], place[~wrong]
    _, first = np.unique(offset, return_index=True)
    again = np.ones(len(at), bool)
    again[first] = False
    draft.damage.add(
        "outside",
        "[entry|entries] of the refcount table [leads|lead] to a block that another has",
        place[again],
    )
    return at[~again], offset[~again]


def read_counts(image: Reader, header: Header, at: Int, offset: Int) -> tuple[Int, Int, Int]:
    """(start, end, count) of the runs of clusters with one refcount above 0; bytes of the file."""
    entries = header.cluster * 8 // header.refcount_bits
    inside = at * entries * header.cluster < image.size
    at, offset = at[inside], offset[inside]
    starts, ends, counts = [EMPTY], [EMPTY], [EMPTY]
    total, most = 0, max(PIECE, BATCH // max(1, 64 // header.refcount_bits))
    for place, raw in held(image, offset, np.full(len(offset), header.cluster), most):
        value = decode(raw, header.refcount_bits)
        nth = place * 8 // header.refcount_bits + np.arange(len(value))
        number = at[nth // entries] * entries + nth % entries
        first = np.flatnonzero(np.append(True, (value[1:] != value[:-1]) | (number[1:] != number[:-1] + 1)))
        last = np.append(first[1:], len(value)) - 1
        some = value[first] != 0
        starts.append(number[first][some] * header.cluster)
        ends.append((number[last][some] + 1) * header.cluster)
        counts.append(value[first][some])
        total += len(counts[-1])
        afford(image, total * ROW, f"{total:,} runs of refcounts")
    start, end, count = (np.concatenate(column) for column in (starts, ends, counts))
    order = np.argsort(start, kind="stable")
    return start[order], end[order], count[order]


def decode(blocks: np.ndarray, bits: int) -> Int:
    """The refcounts of whole blocks in order: big-endian, or less than a byte each from the lowest bits
    up."""
    raw = np.ascontiguousarray(blocks).reshape(-1)
    if bits < 8:
        split = np.unpackbits(raw, bitorder="little").reshape(-1, bits).astype(np.int64)
        narrow: Int = (split << np.arange(bits)).sum(axis=1)
        return narrow
    wide = raw.view(f">u{bits // 8}").astype(np.uint64)
    return np.minimum(wide, np.uint64(1 << 62)).astype(np.int64)


def compare(uses: Uses, counted: tuple[Int, Int, Int], size: int) -> Balance:
    """What the allocator says against what there is, over the `size` bytes of the file.

    Both are cut at each other's ends, and summed up piece by piece; clusters of 1:

        refers      0=====3     2===4            (a snapshot refers to 2 and 3 as well)
        counted     0==2 count 1, 2==3 count 2, 4==6 count 1
        pieces      0-2    2-3    3-4    4-6
        need         1      2      1      0
        have         1      2      0      1
                                 low   leaked
    """
    start, end, times = uses.all()
    low, high, count = counted
    points = np.unique(np.concatenate([start, end, low, high, [0, -(-size // uses.cluster) * uses.cluster]]))
    need = weigh(points, start, end, times)
    have = weigh(points, low, high, count)
    left, right = np.minimum(points[:-1], size), np.minimum(points[1:], size)

    def where(flags: np.ndarray) -> Ranges:
        return union(left[flags], right[flags])

    return Balance(
        where((need == 0) & (have == 0)),
        where((need == 0) & (have > 0)),
        where(need > have),
        where((need > 0) & (have > need)),
    )


def own_free_clusters(image: Reader, draft: Draft, head: Header, uses: Uses) -> None:
    """Refcount structures, and what they say against what refers to the clusters.

    Of a dirty image they say nothing.
    """
    at, block = read_blocks(image, head, draft)
    uses.own_table(draft, "refcount table", *head.refcount_table)
    draft.own("refcount block", block, head.cluster)
    uses.add(block, np.full(len(block), head.cluster))
    found = compare(uses, read_counts(image, head, at, block), image.size)
    draft.own("free cluster", found.free[0], found.free[1] - found.free[0], tables.FREE)
    if head.incompatible & DIRTY:
        draft.damage.say(
            "unclean",
            "the image was not closed: its refcounts are out of date until qemu-img check -r all is run",
            72,
            severity=NOTE,
        )
        draft.own("leaked cluster", found.leaked[0], found.leaked[1] - found.leaked[0], tables.GAP)
        return
    draft.own("leaked cluster", found.leaked[0], found.leaked[1] - found.leaked[0], tables.UNKNOWN)
    for code, ranges, what, severity in (
        ("unowned", found.leaked, LEAKED, WARNING),
        (
            "count",
            found.low,
            LOW,
            ERROR,
        ),
        (
            "count",
            found.high,
            HIGH,
            WARNING,
        ),
    ):
        draft.damage.add(code, what, ranges[0], severity=severity)
