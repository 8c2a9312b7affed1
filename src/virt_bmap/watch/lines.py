"""The live log: `read f /dev/sda1 /Boot/BCD`, one line for consecutive accesses to one object, as the
original printed.

Behind a tab, which no escaped name contains, follow the ranges of the file that were touched (of the disk,
after an `@`, for what has no file offsets). A line is written when another object is touched, or when the
guest pauses. Behind another tab stands what is special about it: a name from a map that is older than the
metadata, or a line that comes late.
"""

from collections.abc import Callable

import numpy as np

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import DOUBTFUL, HELD, TOLD, Resolver, Touched
from virt_bmap.core.arrays import Int, union_by
from virt_bmap.core.columns import stack
from virt_bmap.model import tables

MOST_RANGES = 4
"""Ranges shown on one line. A line for a person; the trace has them all."""
SILENT = ("flush", "cache")
"""Operations that touch no object's bytes, or only might."""
_SILENT = [tables.OPS.index(name) for name in SILENT]
OLDER_MAP, LATE = "older map", "late"
"""older map: metadata was written between the reading of the map that gave this name and the access; late:
the access was earlier, and only a newer map knew whose bytes these were."""


class LineLog:
    """Puts accesses of one disk into lines for `write`.

    `inline` names also what lies inside the blocks of another object.
    """

    def __init__(self, resolver: Resolver, write: Callable[[list[str]], None], inline: bool = False) -> None:
        self.resolver = resolver
        self.write = write
        self.inline = inline
        self._key = -1
        self._open: list[Touched] = []

    def add(self, accesses: Accesses, touched: Touched) -> None:
        """Write the lines that these accesses complete. What is held comes later."""
        touched = touched.take(touched.state != HELD)
        op = accesses.op[touched.access]
        keep = ~np.isin(op, _SILENT)
        if not self.inline:
            keep &= ~touched.inline
        touched, op = touched.take(keep), op[keep]
        if not len(touched):
            return
        key = touched.object * len(tables.OPS) + op
        first = np.flatnonzero(np.append(key[0] != self._key, key[1:] != key[:-1]))
        if len(first) == 0:
            self._open.append(touched)
            return
        last = np.append(first[1:], len(key))
        if first[0] > 0:
            self._open.append(touched.take(np.arange(first[0])))
        self.flush()
        self._write_runs(touched, key, first[:-1], last[:-1])
        self._key = int(key[-1])
        self._open = [touched.take(np.arange(first[-1], len(key)))]

    def late(self, accesses: Accesses, touched: Touched) -> None:
        """Write the lines of pieces that come again, but not of
        those that the log has had already under this name."""
        self.flush()
        shown = ~np.isin(touched.state, TOLD) & ~np.isin(accesses.op[touched.access], _SILENT)
        touched = touched.take(shown if self.inline else shown & ~touched.inline)
        if len(touched):
            key = touched.object * len(tables.OPS) + accesses.op[touched.access]
            first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
            self._write_runs(touched, key, first, np.append(first[1:], len(key)), LATE)

    def renew(self, resolver: Resolver) -> None:
        """Names come from a newer map from now on."""
        self.flush()
        self.resolver = resolver

    def flush(self) -> None:
        """Write the line that is still open, at a pause or at the end."""
        if self._open:
            joined = stack(Touched, self._open)
            self._write_runs(
                joined, np.full(len(joined), self._key), np.zeros(1, np.int64), np.full(1, len(joined))
            )
        self._key, self._open = -1, []

    def _write_runs(self, touched: Touched, key: Int, first: Int, last: Int, mark: str = "") -> None:
        """One line for the pieces [first[i], last[i]) each; every run begins where the one before ends."""
        if not len(first):
            return
        shown = touched.take(np.arange(first[0], last[-1]))
        objects = key[first] // len(tables.OPS)
        labels = self.resolver.labels(objects)
        has_file = shown.file_offset >= 0
        low = np.where(has_file, shown.file_offset, shown.start)
        origins = np.where(has_file[first - first[0]], "", "@").tolist()
        older = np.add.reduceat(np.isin(shown.state, DOUBTFUL), first - first[0], dtype=np.int64) > 0
        marks = np.where(older, f"\t{OLDER_MAP}", f"\t{mark}" if mark else "").tolist()
        line, low, high = union_by(
            np.repeat(np.arange(len(first)), last - first), low, low + shown.end - shown.start
        )
        bounds = np.searchsorted(line, np.arange(len(first) + 1)).tolist()
        starts, ends = low.tolist(), high.tolist()
        heads = zip((key[first] % len(tables.OPS)).tolist(), objects.tolist(), origins, marks, strict=True)
        lines = []
        for (op, number, origin, special), begin, end in zip(heads, bounds[:-1], bounds[1:], strict=True):
            letter, device, name = labels[number]
            where = (
                f"{starts[begin]:#x}-{ends[begin]:#x}"
                if end - begin == 1
                else _ranges(starts[begin:end], ends[begin:end])
            )
            lines.append(
                f"{tables.OPS[op]} {letter} {device}{' ' if name else ''}{name}\t{origin}{where}{special}\n"
            )
        self.write(lines)


def _ranges(low: list[int], high: list[int]) -> str:
    text = ",".join(f"{a:#x}-{b:#x}" for a, b in zip(low[:MOST_RANGES], high, strict=False))
    more = len(low) - MOST_RANGES
    return f"{text},... ({more} more, {sum(high) - sum(low)} bytes in all)" if more > 0 else text
