"""What is wrong on a volume, added up: one row of `problems` for each kind, however often it occurs.

The survey makes one for each volume and format, and gives it to the reader; what becomes of it, whether the
filesystem counts as damaged for one thing, is the survey's business alone.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.errors import FormatError
from virt_bmap.core.layout import INT64_MAX
from virt_bmap.model import tables
from virt_bmap.model.problems import CODES, ERROR, Problem


class _Found(NamedTuple):
    times: int | None
    """None: said once, as a sentence."""
    offset: int
    severity: str


class Damage:
    """Collects what one format finds on one volume. `code` is one of `problems.CODES`, `offset` in bytes of
    the volume, -1 where there is no one place; `severity` only where the code's own does not hold."""

    def __init__(self, source: str = "") -> None:
        self.source = source
        self._found: dict[tuple[str, str], _Found] = {}

    def add(
        self,
        code: str,
        text: str,
        offsets: Int | int = -1,
        count: int | None = None,
        severity: str | None = None,
    ) -> None:
        """`text`, a phrase that can follow a number ("[name leads|names lead] nowhere"), is true at each of
        these places, or `count` times; nothing where there are none."""
        if isinstance(offsets, np.ndarray):
            count, offset = len(offsets), int(offsets.min(initial=INT64_MAX))
        else:
            count, offset = 1 if count is None else count, offsets
        if count:
            usual = CODES[code].severity
            before = self._found.get((code, text), _Found(0, offset, severity or usual))
            self._found[code, text] = before._replace(
                times=(before.times or 0) + count, offset=min(before.offset, offset)
            )

    def check(self, good: Bool, code: str, text: str, offsets: Int, severity: str | None = None) -> Bool:
        """Where `good` is False something is wrong at `offsets`. Returns `good`, to filter with."""
        if not good.all():
            self.add(code, text, offsets[~good], severity=severity)
        return good

    def say(self, code: str, sentence: str, offset: int | None = None, severity: str | None = None) -> None:
        """What is wrong once."""
        place = -1 if offset is None or offset > INT64_MAX else offset
        usual = CODES[code].severity
        self._found[code, sentence] = _Found(None, place, severity or usual)

    def ends_early(self, wanted: int, size: int, severity: str | None = None) -> None:
        """What takes `wanted` bytes lies on a volume of `size`."""
        if wanted > size:
            sentence = f"it takes {wanted:,} bytes, but the volume has only {size:,}"
            self.say("truncated", sentence, size, severity)

    def refuse(self, error: FormatError, words: str = "", severity: str | None = None) -> None:
        """What can't be read, and why; `words` say what became of it."""
        self.say(error.code, f"{words}: {error}" if words else str(error), error.offset, severity)

    def take(self, other: "Damage") -> None:
        """All that another one has."""
        self._found |= other._found

    def has(self, code: str) -> bool:
        """Was this said?"""
        return any(said == code for said, _ in self._found)

    @property
    def is_damaged(self) -> bool:
        """Are bytes or names lost or wrong?"""
        return any(found.severity == ERROR for found in self._found.values())

    def problems(self) -> list[Problem]:
        """One for each kind, in the order in which they were found."""
        return [
            Problem(code, _words(text, found), found.offset, found.severity)
            for (code, text), found in self._found.items()
        ]


def table(found: Iterable[tuple[int, Damage]]) -> pa.Table:
    """The table `problems` of what was found on volumes with these numbers."""
    rows = [(volume, damage.source, *problem) for volume, damage in found for problem in damage.problems()]
    volume, source, code, detail, offset, severity = zip(*rows, strict=True) if rows else [()] * 6
    return tables.make(
        "problems", severity=list(severity), format=list(source), volume=list(volume),
        volume_offset=[None if at < 0 else at for at in offset], code=list(code), detail=list(detail),
    )  # fmt: skip


def _words(text: str, found: _Found) -> str:
    if found.times is None:
        return text
    where = f", the first at byte {found.offset:#x}" if found.offset >= 0 else ""
    return counted(found.times, text) + where
