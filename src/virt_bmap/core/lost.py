"""Bytes that can't be had: which, why, and how that is said.

A member is missing, every copy has a wrong checksum, a sector can't be read: such bytes read as zeroes, so
that what can be mapped is mapped, and `Reader.lost` tells which they are. Whoever moves bytes asks, names
what is missing, and fails unless --partial says that one knows.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import human, plural
from virt_bmap.core.arrays import EMPTY, Int, Intervals, subtract
from virt_bmap.core.columns import stack, take

REASONS = (
    "none of the members present holds them", "they lie beyond the end of the disk or volume",
    "no copy has the right checksum", "their checksums can't be read", "reading fails",
    "deleted: they belong to something else now", "deleted: where they lay is not kept",
    "what they are compressed to is damaged",
)  # fmt: skip
MISSING, BEHIND, CHECKSUM, NO_CHECKSUM, UNREADABLE, REUSED, NOWHERE, DAMAGED = range(len(REASONS))
NAMED = 8
"""Ranges of one file that are named; all are counted."""


class Lost(NamedTuple):
    """Ranges of bytes, as columns: `why` is a number of REASONS. They may overlap where two things are wrong
    with the same bytes."""

    starts: Int
    ends: Int
    why: Int

    @staticmethod
    def of(ranges: tuple[Int, Int], why: int) -> "Lost":
        """All of these for one reason."""
        return Lost(*ranges, np.full(len(ranges[0]), why, np.int64))

    @staticmethod
    def join(parts: "list[Lost]") -> "Lost":
        """One after the other."""
        return stack(Lost, parts)

    def within(self, starts: Int, ends: Int) -> "tuple[Int, Lost]":
        """(which range, what of this lies in it), for ranges that may touch and overlap."""
        if not len(self.starts):
            return EMPTY, self
        query, row = Intervals(self.starts, self.ends).overlaps(starts, ends)
        found = take(self, row)
        return query, found._replace(
            starts=np.maximum(found.starts, starts[query]), ends=np.minimum(found.ends, ends[query])
        )

    def without(self, starts: Int, ends: Int) -> "Lost":
        """What of this the ranges do not cover."""
        if not len(self.starts):
            return self
        parts = [
            Lost.of(subtract(self.starts[mine], self.ends[mine], starts, ends), why)
            for why, mine in self._by_reason()
        ]
        return Lost.join(parts)

    def _by_reason(self) -> list[tuple[int, Int]]:
        return [(why, np.flatnonzero(self.why == why)) for why in np.unique(self.why).tolist()]


NOTHING = Lost(EMPTY, EMPTY, EMPTY)


@dataclass
class Missing:
    """What of one thing (a file, a volume) could not be read:
    the first ranges, and how many bytes in how many."""

    first: list[tuple[int, int, int]] = field(default_factory=list)
    ranges: int = 0
    size: int = 0
    _end: tuple[int, int] = (-1, -1)

    def __bool__(self) -> bool:
        return self.ranges > 0

    def add(self, lost: Lost, shift: int = 0) -> None:
        """More ranges, which lie after those before; `shift` is added to their offsets."""
        if not len(lost.starts):
            return
        lost = take(lost, np.argsort(lost.starts, kind="stable"))
        new = np.append(True, (lost.starts[1:] != lost.ends[:-1]) | (lost.why[1:] != lost.why[:-1]))
        at = np.flatnonzero(new)
        starts = lost.starts[at] + shift
        ends = lost.ends[np.append(at[1:], len(new)) - 1] + shift
        why = lost.why[at]
        rows = list(
            zip(
                starts[: NAMED + 1].tolist(),
                ends[: NAMED + 1].tolist(),
                why[: NAMED + 1].tolist(),
                strict=True,
            )
        )
        goes_on = self._end == (rows[0][0], rows[0][2])
        if goes_on and len(self.first) == self.ranges:
            self.first[-1] = (self.first[-1][0], *rows[0][1:])
        self.first += rows[goes_on:][: NAMED - len(self.first)]
        self.ranges += len(starts) - goes_on
        self.size += int((ends - starts).sum())
        self._end = int(ends[-1]), int(why[-1])

    def __str__(self) -> str:
        words = [f"{start:#x}-{end:#x} ({REASONS[why]})" for start, end, why in self.first]
        more = self.ranges - len(self.first)
        return f"bytes {', '.join(words)}" + (
            f" and {plural(more, 'more range')}, {human(self.size)} in all" if more else ""
        )
