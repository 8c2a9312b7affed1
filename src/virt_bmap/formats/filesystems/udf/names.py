"""Directories: file identifier descriptors of any length, one after the other over the borders of blocks.

Each says how long it is, so that nobody can tell where the thousandth begins without having looked at those
before. All places at which one could begin are looked at together instead; the ones that are reached from a
directory's first byte are found by pointers that double their reach in each step.

Sources: ECMA-167 4/14.4 (file identifier descriptors); OSTA UDF 2.60, 2.3.4 and 2.1.1 (names).
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand
from virt_bmap.core.layout import records, struct
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.model.damage import Damage

IDENTIFIER = 257
DELETED, PARENT = 4, 8
ALIGN = 4
FID = struct(38, [
    (0, "TagIdentifier", "<u2"), (18, "FileCharacteristics", "u1"), (19, "IdentifierLength", "u1"),
    (20, "ICBLength", "<u4"), (24, "ICBBlock", "<u4"), (28, "ICBPartition", "<u2"),
    (36, "ImplementationUseLength", "<u2"),
])  # fmt: skip


@dataclass
class Names:
    """One row for each name: the directory's inode, where the ICB is that it leads to, and the name in
    UTF-8."""

    parent: Int
    partition: Int
    block: Int
    name: Ragged


def parse(data: Bytes, parent: Int, base: Int, size: Int, damage: Damage) -> Names:
    """The names in directories whose content is data[base[i]:base[i] + size[i]]; `base` are multiples of
    four. Deleted ones, and the parent's, are left out."""
    directory, nth = expand(np.maximum(size - FID.itemsize, -1) // ALIGN + 1)
    at = base[directory] + nth * ALIGN
    begins = (
        np.flatnonzero((data[at] == IDENTIFIER & 0xFF) & (data[at + 1] == IDENTIFIER >> 8))
        if len(at)
        else EMPTY
    )
    at, directory = at[begins], directory[begins]
    head = data[at[:, None] + np.arange(FID.itemsize)] if len(at) else np.zeros((0, FID.itemsize), np.uint8)
    sums = head[:, :16].astype(np.int64)
    found = records(head, FID)
    length = FID.itemsize + found["IdentifierLength"].astype(np.int64) + found["ImplementationUseLength"]
    after = at + -(-length // ALIGN) * ALIGN
    end = (base + size)[directory]
    good = ((sums.sum(axis=1) - sums[:, 4]) & 0xFF == sums[:, 4]) & (at + length <= end)
    at, directory, found, after, end = at[good], directory[good], found[good], after[good], end[good]
    reached = _reached(at, after, end, base)
    lost = reached & (after + FID.itemsize <= end) & ~np.isin(after, at)
    first = ~np.isin(base, at) & (size >= FID.itemsize)
    places = np.append(parent[directory[lost]], parent[first])
    what = "[directory breaks|directories break] off: what follows is not a file identifier"
    damage.add("directory", what, places)
    keep = np.flatnonzero(
        reached & (found["FileCharacteristics"] & (DELETED | PARENT) == 0) & (found["IdentifierLength"] > 0)
    )
    at, found = at[keep], found[keep]
    start = at + FID.itemsize + found["ImplementationUseLength"]
    return Names(
        parent[directory[keep]], found["ICBPartition"].astype(np.int64), found["ICBBlock"].astype(np.int64),
        _utf8(Ragged.cut(data, start, found["IdentifierLength"])),
    )  # fmt: skip


def _reached(at: Int, after: Int, end: Int, base: Int) -> np.ndarray:
    """Which of the places are met when one goes from each of `base` to what comes after, and on.

    Candidates at 0 8 20 24 44; what lies at 8 only looks like a descriptor, inside the one at 0.
    Each round, what is reached hands on to what it follows; then all follow twice as far:

        place     0     8    20    24    44
        after    20    24    44    44    64       the end is at 64
        round 0   x                               follow: 20 24 44 44 end
        round 1   x           x                   follow: 44 44 end end end
        round 2   x           x           x

    >>> at, after = np.array([0, 8, 20, 24, 44]), np.array([20, 24, 44, 44, 64])
    >>> _reached(at, after, np.full(5, 64), np.array([0])).tolist()
    [True, False, True, False, True]
    """
    count = len(at)
    where = np.minimum(np.searchsorted(at, after), max(count - 1, 0))
    follow = np.append(
        np.where((at[where] == after) & (after < end), where, count) if count else EMPTY, count
    )
    reached = np.append(np.isin(at, base), False)
    while (follow[:count] < count).any():
        reached[follow[np.flatnonzero(reached)]] = True
        reached[count] = False
        follow = follow[follow]
    return reached[:count]


def _utf8(names: Ragged) -> Ragged:
    """Compressed Unicode, whose first byte says how many bits a character has, as UTF-8; what is not a
    character becomes U+FFFD, `/` and NUL too."""
    starts, lengths = names.starts, names.lengths.astype(np.int64)
    wide = names.data[starts] == 16 if len(names) else np.zeros(0, bool)
    units = np.where(wide, (lengths - 1) // 2, lengths - 1)
    row, step = expand(units)
    at = starts[row] + 1 + step * np.where(wide[row], 2, 1)
    text = (
        np.where(
            wide[row],
            names.data[at].astype(np.uint16) << 8 | names.data[np.minimum(at + 1, len(names.data) - 1)],
            names.data[at].astype(np.uint16),
        )
        if len(at)
        else np.zeros(0, np.uint16)
    )
    text[(text == 0) | (text == 0x2F)] = 0xFFFD
    separated = np.insert(text.astype(">u2"), np.cumsum(units)[:-1], 0) if len(units) else text.astype(">u2")
    strings = pa.array(
        separated.tobytes().decode("utf-16-be", "replace").split("\0") if len(units) else [], pa.string()
    )
    offsets = (
        np.frombuffer(strings.buffers()[1], np.int32)[: len(strings) + 1].astype(np.int64)
        if len(strings)
        else np.zeros(1, np.int64)
    )
    body = (
        np.frombuffer(strings.buffers()[2], np.uint8)
        if len(strings) and strings.buffers()[2]
        else np.zeros(0, np.uint8)
    )
    return Ragged(body[: offsets[-1]], np.diff(offsets).astype(np.uint16))
