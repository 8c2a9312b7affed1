"""What image formats collect a `contract.ImageLayer` in: where the guest's bytes lie in the files of an
image, and who owns the rest of these files.

Only metadata is read, as arrays; content never is. Raises Corrupt or Unsupported where nothing can be said;
what is wrong but leaves the rest readable is damage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Bool, Int, covered_twice, expand, ints, joined, runs, union
from virt_bmap.core.layout import widen
from virt_bmap.core.mapping import DATA, PACKED, ZERO, Rows
from virt_bmap.core.packed import Codec
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import ROW, afford, held, whole
from virt_bmap.model import tables
from virt_bmap.model.contract import ImageLayer
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

Ranges = tuple[Int, Int]
BitOrder = Literal["big", "little"]
"""Of a byte: which bit comes first."""
IN_DATA, IN_ZERO = DATA, ZERO


@dataclass
class Draft:
    """Collects an ImageLayer. All offsets and lengths are bytes; arrays of one length, or numbers."""

    files: Sequence[Reader]
    size: int
    may_end_early: bool = False
    """The file's last bytes are left out where they are zero (QEMU writes qcow2 so)."""
    extents: list[ExtentRows] = field(default_factory=list)
    damage: Damage = field(default_factory=Damage)
    _pieces: list[tuple[Int, ...]] = field(default_factory=list)
    _zeros: list[Ranges] = field(default_factory=list)
    _owned: list[tuple[Int, Int, Int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.extents = [ExtentRows() for _ in self.files]

    def place(
        self,
        guest: Int,
        host: Int,
        length: Int,
        role: Any = IN_DATA,
        file: Any = 0,
        stored: Int | None = None,
    ) -> None:
        """The guest's bytes [guest, +length) lie at `host` of a file; `stored` bytes there where role is
        compressed."""
        n = len(guest)
        self._pieces.append(
            (guest, host, length, length if stored is None else stored, _column(role, n), _column(file, n))
        )

    def zero(self, guest: Int, length: Int) -> None:
        """The guest's bytes read as zeroes and lie nowhere."""
        self._zeros.append((guest, guest + length))

    def own(
        self,
        part: str | None,
        start: Any,
        length: Any,
        kind: int = tables.METADATA,
        file: int = 0,
        flags: int = 0,
    ) -> None:
        """Bytes of a file that hold something else than the guest's current data; what leaves the file is cut
        off."""
        start, length = ints(start), ints(length)
        end = np.minimum(start + length, self.files[file].size)
        keep = (start >= 0) & (end > start)
        if keep.any():
            self._owned.append((start[keep], end[keep], np.full(int(keep.sum()), file)))
            self.extents[file].add(kind, start[keep], (end - start)[keep], part=part, flags=flags)

    def finish(
        self,
        format: str,
        cluster: int,
        facts: dict[str, Any],
        unreadable: str | None = None,
        inflate: Codec | None = None,
    ) -> ImageLayer:
        """The layer: rows cut at the ends of disk and files, sorted, and neighbours joined."""
        columns = joined(self._pieces, 6)
        columns = self._inside_files(self._inside_disk(columns))
        self._check_overlaps(columns)
        order = np.argsort(columns[0], kind="stable")
        guest, host, run, stored, role, file = _joined([column[order] for column in columns])
        rows = Rows.make(guest, file, host, run, role=role, parent_run=stored)
        low, high = (np.concatenate([EMPTY, *(pair[side] for pair in self._zeros)]) for side in (0, 1))
        zeros = union(low, high)
        zeros = np.minimum(zeros[0], self.size), np.minimum(zeros[1], self.size)
        return ImageLayer(
            format,
            self.files,
            self.size,
            cluster,
            rows,
            zeros,
            self.extents,
            self.damage,
            facts,
            unreadable,
            inflate,
        )

    def _inside_disk(self, columns: list[Int]) -> list[Int]:
        """Rows cut at the end of the disk; the rest of the last cluster is slack."""
        guest, host, length, stored, role, file = columns
        kept = np.clip(self.size - guest, 0, length)
        plain = role != PACKED
        cut = plain & (kept < length)
        for number in range(len(self.files)):
            mine = cut & (file == number)
            self.own("slack", (host + kept)[mine], (length - kept)[mine], tables.GAP, number)
        keep = kept > 0
        return [column[keep] for column in (guest, host, kept, np.where(plain, kept, stored), role, file)]

    def _inside_files(self, columns: list[Int]) -> list[Int]:
        """Rows cut at the ends of their files, beyond which zeroes are read."""
        guest, host, length, stored, role, file = columns
        ends = np.array([reader.size for reader in self.files], np.int64)[file]
        left = np.clip(ends - host, 0, stored)
        plain = role != PACKED
        kept = np.where(plain, left, np.where(left > 0, length, 0))
        self.damage.add(
            "outside",
            "[run|runs] of data [lies|lie] beyond the end of the file",
            host[(left == 0) & (role != IN_ZERO)],
        )
        cut = (left > 0) & (left < stored) & (role == IN_DATA) & (not self.may_end_early)
        self.damage.add(
            "truncated", "[run|runs] of data [goes|go] on beyond the end of the file", (host + left)[cut]
        )
        self.zero(guest + kept, length - kept)
        keep = kept > 0
        return [column[keep] for column in (guest, host, kept, np.where(plain, kept, left), role, file)]

    def _check_overlaps(self, columns: list[Int]) -> None:
        """What metadata and data, or two pieces of data, claim together."""
        _, host, _, stored, _, file = columns
        for number, reader in enumerate(self.files):
            mine = file == number
            owned = [(start[at == number], end[at == number]) for start, end, at in self._owned]
            starts = np.concatenate([host[mine], *(start for start, _ in owned)])
            ends = np.concatenate([(host + stored)[mine], *(end for _, end in owned)])
            twice = covered_twice(starts, ends)
            of = f" of {reader.name}" if number else ""
            self.damage.add("two-owners", f"[range|ranges]{of} [has|have] two owners", twice[0])


BATCH = 16 << 20
"""Bytes of a table that are looked into at a time."""
SECTORS = 1 << 23
"""Sectors whose bits are looked into at a time."""


def used_entries(
    image: Reader, offset: Any, length: Any, kind: str, unused: int, mask: int | None = None
) -> tuple[Int, Int]:
    """(number, value) of the entries of a table that are not `unused`; `kind` is their NumPy type, `mask`
    the bits of them that count.

    The table may lie in several ranges of so many bytes, one after the other. It can be large and empty:
    memory follows what is used.
    """
    offset, length = ints(offset), ints(length)
    size, total = np.dtype(kind).itemsize, 0
    numbers, values = [EMPTY], [EMPTY]
    if unused:  # holes are entries, too
        afford(image, int(length.sum()), "a table")
    for at, raw in (held if unused == 0 else whole)(image, offset, length, BATCH):
        entry = raw.view(kind)
        if mask is not None:
            entry = entry & entry.dtype.type(mask)
        used = np.flatnonzero(entry != unused)
        numbers.append(used + at // size)
        values.append(widen(entry[used], "table entry"))
        total += _runs_of(values[-1])
        afford(image, total * ROW, f"the rows of {plural(total, 'run')} of table entries")
    return np.concatenate(numbers), np.concatenate(values)


def _runs_of(entry: Int) -> int:
    """How many runs entries of a table make: those that go up by one step are in one. Entries in a hole are
    equal, and each leads to the same place."""
    step = np.diff(entry)
    goes_on = (step[1:] == step[:-1]) & (step[1:] != 0)
    return len(entry) - int(np.count_nonzero(goes_on))


def place_sectors(
    draft: Draft, guest: Int, host: Int, bitmap: Int, sectors: int, sector: int, bitorder: BitOrder
) -> None:
    """Blocks of a differencing image, each of so many `sectors`: those that it has itself, by the bitmaps
    that lie at `bitmap`; the others are the parent's, and stay unused in the block."""
    image, step, total = draft.files[0], max(1, SECTORS // sectors), 0
    for at in range(0, len(guest), step):
        part = slice(at, at + step)
        data = image.read_blocks(bitmap[part], -(-sectors // 8))
        flags = np.unpackbits(data, axis=1, bitorder=bitorder)[:, :sectors].astype(bool)
        for mine, used in ((flags, True), (~flags, False)):
            start, end = split(*runs(mine.reshape(-1)), sectors)
            total += len(start)
            afford(image, total * ROW, f"{total:,} runs of sectors")
            row, inside = start // sectors, start % sectors * sector
            low, length = host[part][row] + inside, (end - start) * sector
            if used:
                draft.place(guest[part][row] + inside, low, length)
            else:
                draft.own("sectors not in use", low, length, tables.UNWRITTEN)


def split(start: Int, end: Int, unit: int) -> tuple[Int, Int]:
    """Ranges cut at the multiples of `unit`."""
    row, nth = expand((end - 1) // unit - start // unit + 1)
    bound = (start[row] // unit + nth) * unit
    return np.maximum(start[row], bound), np.minimum(end[row], bound + unit)


def _column(value: Any, n: int) -> Int:
    return value if isinstance(value, np.ndarray) else np.full(n, value, np.int64)


def _joined(columns: list[Int]) -> list[Int]:
    """Neighbours that continue each other on both sides made one; compressed runs stay what they are."""
    guest, host, length, stored, role, file = columns
    if len(guest) == 0:
        return columns
    first = np.flatnonzero(np.append(True, ~continues(guest, host, length, role, file)))
    last = np.append(first[1:], len(guest)) - 1
    run = guest[last] + length[last] - guest[first]
    return [
        guest[first],
        host[first],
        run,
        np.where(role[first] == PACKED, stored[first], run),
        role[first],
        file[first],
    ]


def continues(guest: Int, host: Int, length: Int, role: Int, *same: Int) -> Bool:
    """For each row but the first: does it continue the one before on both sides? `same` are columns that must
    be equal."""
    found: Bool = (
        (guest[1:] == (guest + length)[:-1])
        & (host[1:] == (host + length)[:-1])
        & (role[1:] == role[:-1])
        & (role[1:] != PACKED)
    )
    for column in same:
        found &= column[1:] == column[:-1]
    return found
