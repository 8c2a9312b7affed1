"""Run lists (mapping pairs): where the clusters of an attribute lie.

A run list is a string of pairs (length, distance from the run before); a first byte says how many bytes each
takes, 0 ends the list, and a distance of no bytes is a hole. Sources: ntfs-3g libntfs-3g/runlist.c
ntfs_mapping_pairs_decompress(); kernel fs/ntfs3/run.c run_unpack().
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, expand, ints
from virt_bmap.core.columns import take

HOLE = -1
MAX_BYTES = 1 << 62
"""Offsets in a file beyond it are damage: the largest file that NTFS is specified for has 2**60 bytes."""


@dataclass(frozen=True)
class RunLists:
    """Runs in the order of their lists: `count` clusters of list `row` from `vcn` on lie at cluster `lcn` of
    the volume, or are a HOLE."""

    row: Int
    vcn: Int
    lcn: Int
    count: Int

    def take(self, keep: np.ndarray) -> "RunLists":
        """The runs that a boolean or index array asks for."""
        return take(self, keep)


class Decoded(NamedTuple):
    """What run lists say. For each list: `reach` is the VCN after its last run; `bad` where it breaks off or
    makes no sense, `outside` where a run leaves the volume. A list is read up to its first fault."""

    runs: RunLists
    reach: Int
    bad: Bool
    outside: Bool


def decode(
    data: Bytes, lengths: NDArray[np.integer], lowest_vcn: Int, clusters: int, cluster_size: int
) -> Decoded:
    """Decode lists that lie one after the other in `data`, list i in `lengths[i]` bytes and starting at
    `lowest_vcn[i]`.

    One cursor for each list, all stepped together: as many steps as the longest list has runs.
    """
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    padded = np.append(data, np.zeros(16, np.uint8))
    words = np.lib.stride_tricks.sliding_window_view(padded, 8)
    reach, bad, outside = lowest_vcn.copy(), np.zeros(n, bool), np.zeros(n, bool)
    row, at, vcn, lcn = np.arange(n, dtype=np.int64), ends - lengths, lowest_vcn, np.zeros(n, np.int64)
    parts: list[RunLists] = []
    while len(row):
        head = padded[at]
        more = (at < ends[row]) & (head != 0)
        bad[row[at >= ends[row]]] = True
        row, at, vcn, lcn, head = row[more], at[more], vcn[more], lcn[more], head[more]
        n_count, n_lcn = (head & 15).astype(np.int64), (head >> 4).astype(np.int64)
        after = at + 1 + n_count + n_lcn
        good = (n_count >= 1) & (n_count <= 8) & (n_lcn <= 8) & (after <= ends[row])
        count = _number(words, at + 1, n_count)
        lcn = lcn + _number(words, np.where(good, at + 1 + n_count, 0), n_lcn)
        good &= (count > 0) & (count <= MAX_BYTES // cluster_size - vcn)
        hole = (n_lcn == 0) | (lcn == HOLE)
        inside = hole | ((lcn >= 0) & (lcn <= clusters - count))
        bad[row[~good]] = True
        outside[row[good & ~inside]] = True
        good &= inside
        row, vcn, lcn, count, hole = row[good], vcn[good], lcn[good], count[good], hole[good]
        parts.append(RunLists(row, vcn, np.where(hole, HOLE, lcn), count))
        at, vcn = after[good], vcn + count
        reach[row] = vcn
    return Decoded(_join(parts), reach, bad, outside)


def _number(words: np.ndarray, at: Int, size: Int) -> Int:
    """Signed little-endian numbers of 0 to 8 bytes."""
    value = words[at].view("<i8")[:, 0]
    shift = np.clip(64 - 8 * size, 0, 63)
    return np.where(size == 0, 0, (value << shift) >> shift)


def _join(parts: list[RunLists]) -> RunLists:
    """The runs of all steps, by list and VCN."""
    if not parts:
        return RunLists(EMPTY, EMPTY, EMPTY, EMPTY)
    joined = RunLists(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "vcn", "lcn", "count"))
    )
    return joined if len(parts) == 1 else joined.take(np.argsort(joined.row, kind="stable"))


class AttributeStream(NamedTuple):
    """Where the bytes of one attribute lie: its real runs, sorted by their place in it. All in bytes."""

    start: Int
    volume: Int
    length: Int

    @staticmethod
    def of(runs: RunLists, cluster_size: int, size: int) -> "AttributeStream":
        """The stream that runs of one attribute make on a volume of `size` bytes: holes, repeated VCNs and
        what lies beyond the volume's end left out. It is never longer than the volume, whatever the runs
        say."""
        runs = runs.take(runs.lcn != HOLE)
        runs = runs.take(np.argsort(runs.vcn, kind="stable"))
        reach = np.maximum.accumulate(runs.vcn + runs.count)
        runs = runs.take(np.append(True, runs.vcn[1:] >= reach[:-1])[: len(runs.vcn)])
        start, volume = runs.vcn * cluster_size, runs.lcn * cluster_size
        length = np.clip(size - volume, 0, runs.count * cluster_size)
        keep = (length > 0) & (np.cumsum(length.astype(np.float64)) <= size)
        return AttributeStream(start[keep], volume[keep], length[keep])

    def contiguous(self, start: int) -> int:
        """Up to which byte the stream is known without a gap from `start` on; `start` itself where it lies in
        none."""
        ends = self.start + self.length
        first = int(np.searchsorted(ends, start, "right"))
        if first == len(ends) or self.start[first] > start:
            return start
        gaps = np.flatnonzero(self.start[first + 1 :] != ends[first:-1])
        return int(ends[first + gaps[0]] if len(gaps) else ends[-1])

    def ascends(self, start: int, length: int) -> bool:
        """Do these bytes of the stream lie in the volume in the order of the stream?"""
        _, _, places, _ = self.place(ints(start), ints(length))
        return bool((np.diff(places) > 0).all())

    def place(self, starts: Int, lengths: Int) -> tuple[Int, Int, Int, Int]:
        """(query, stream offset, volume offset, length) of the pieces in which ranges of the stream lie; what
        lies in holes is left out."""
        ends = self.start + self.length
        first = np.searchsorted(ends, starts, "right")
        piece = np.minimum(first, len(ends) - 1)
        # none is cut
        if len(ends) and bool(((self.start[piece] <= starts) & (starts + lengths <= ends[piece])).all()):
            return np.arange(len(starts)), starts, self.volume[piece] + starts - self.start[piece], lengths
        last = np.searchsorted(self.start, starts + lengths, "left")
        query, step = expand(np.maximum(0, last - first))
        piece = first[query] + step
        low = np.maximum(starts[query], self.start[piece])
        high = np.minimum((starts + lengths)[query], ends[piece])
        keep = high > low
        query, piece, low, high = query[keep], piece[keep], low[keep], high[keep]
        return query, low, self.volume[piece] + low - self.start[piece], high - low
