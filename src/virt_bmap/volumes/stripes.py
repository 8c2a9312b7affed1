"""Striped layouts as mapping rows: one period of the pattern, repeated `count` times, never unrolled.

A layout is a `Pattern`: which chunk of the volume lies in which chunk of which member, for one period. RAID0 has a period
of one row; a rotating RAID5 over n disks one of n rows.

Sources: kernel drivers/md/raid0.c, raid5.c (raid5_compute_sector), raid10.c (__raid10_find_phys).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virt_bmap.arrays import Int
from virt_bmap.mapping import COPY, DATA, PARITY, ROLES, Row

DATA_ROLE, COPY_ROLE, PARITY_ROLE = ROLES.index(DATA), ROLES.index(COPY), ROLES.index(PARITY)


@dataclass(frozen=True)
class Place:
    """Where a member's data begins: the parent's number and the first byte there."""

    parent: int
    offset: int


@dataclass(frozen=True)
class Pattern:
    """One period: `volume_chunks` chunks of the volume take `member_chunks` chunks on each member.

    Columns, one row for each copy or parity of a chunk: chunk of the volume, member, chunk of that member, role (code of ROLES).
    """

    volume_chunks: int
    member_chunks: int
    chunk: Int
    member: Int
    place: Int
    role: Int


def rows(pattern: Pattern, chunk: int, size: int, members: Sequence[Place | None], start: int = 0) -> list[Row]:
    """The mapping rows of `size` bytes of a volume from its byte `start`, in chunks of `chunk` bytes; members that are None give none."""
    present = np.array([member is not None for member in members], bool)
    keep = np.flatnonzero(present[pattern.member])
    whole, rest = divmod(size, chunk)
    result = []
    columns = (pattern.chunk[keep], pattern.member[keep], pattern.place[keep], pattern.role[keep])
    for number, member, place, role in zip(*(column.tolist() for column in columns), strict=True):
        where = members[member]
        assert where is not None
        count = -((number - whole) // pattern.volume_chunks)
        volume, parent = start + number * chunk, where.offset + place * chunk
        step, parent_step = pattern.volume_chunks * chunk, pattern.member_chunks * chunk
        if count > 1:
            result.append(Row(volume, where.parent, parent, chunk, count, step, parent_step, ROLES[role]))
        elif count == 1:
            result.append(Row(volume, where.parent, parent, chunk, role=ROLES[role]))
        if rest and whole % pattern.volume_chunks == number:  # the last chunk is cut short
            period = whole // pattern.volume_chunks
            result.append(Row(volume + period * step, where.parent, parent + period * parent_step, rest, role=ROLES[role]))
    return result


def striped(members: int) -> Pattern:
    """RAID0: chunk after chunk over all members."""
    each = np.arange(members, dtype=np.int64)
    none = np.zeros(members, np.int64)
    return Pattern(members, 1, each, each, none, none)


def bounded(found: list[Row], sizes: dict[int, int]) -> tuple[list[Row], int]:
    """The rows cut at the end of their parents, whose sizes are given, and how many bytes were cut off."""
    result, lost = [], 0
    for row in found:
        size = sizes[row.parent]
        step = max(row.parent_step, row.run)
        fit = max(0, min(row.count, (size - row.parent_offset - row.run) // step + 1))
        if fit == row.count:
            result.append(row)
            continue
        lost += (row.count - fit) * row.run
        if fit:
            result.append(Row(row.volume_offset, row.parent, row.parent_offset, row.run, fit,
                              row.volume_step if fit > 1 else 0, row.parent_step if fit > 1 else 0, row.role))  # fmt: skip
        tail = size - (row.parent_offset + fit * row.parent_step)
        if 0 < tail < row.run:
            lost -= tail
            result.append(Row(row.volume_offset + fit * row.volume_step, row.parent, size - tail, tail, role=row.role))
    return result, lost
