"""Striped layouts as mapping rows: one period of the pattern, repeated `count` times, never unrolled.

A layout is a `Pattern`: which chunk of the volume lies in which chunk of which member, for one period. RAID0
has a period of one row of chunks; a rotating RAID5 over n disks one of n rows.

Sources: kernel drivers/md/raid5.c (raid5_compute_sector, raid6_d0, raid6_idx_to_slot), raid10.c
(__raid10_find_phys, setup_geo).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Bool, Int, ints
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.mapping import COPY, DATA, PARITY, Row, Rows

MAX_MEMBERS = 384
"""Members of one array. md's superblock has room for 1920, raid6 stops at 253, and nobody was seen with more
than 60."""

LEFT_ASYMMETRIC, RIGHT_ASYMMETRIC, LEFT_SYMMETRIC, RIGHT_SYMMETRIC, PARITY_0, PARITY_N = range(6)
ROTATING_ZERO_RESTART, ROTATING_N_RESTART, ROTATING_N_CONTINUE = 8, 9, 10
"""Layouts of DDF: they differ from the others in where Q lies and in how the disks are numbered for it."""
Q_LAST = 16
"""Added to a RAID5 layout: the same over all disks but the last, which holds Q.

PARITY_N has no such form: it is the same.
"""


class Place(NamedTuple):
    """Where a member's data begins: the parent's number and the first byte there."""

    parent: int
    offset: int


class Pattern(NamedTuple):
    """One period: `volume_chunks` chunks of the volume take `member_chunks` chunks on each member.

    Columns, one row for each place of a chunk: chunk of the volume, member, chunk of that member; `parity`
    says that what lies there was computed from the chunk. Of several places without parity the first one that
    is present is the data, the others are copies.
    """

    volume_chunks: int
    member_chunks: int
    chunk: Int
    member: Int
    place: Int
    parity: Bool


class Parity(NamedTuple):
    """The rows of chunks of one period of RAID4, 5 or 6 over n members.

    `data[row, i]` is the member with the row's i-th data chunk, `p[row]` and `q[row]` are those with parity
    (q: -1 where there is none), `power[row, member]` is the power of the generator by which the member's
    chunk is multiplied in Q.
    """

    data: Int
    p: Int
    q: Int
    power: Int

    def pattern(self) -> Pattern:
        """Data chunks where they lie, and each parity chunk once for every data chunk of its row."""
        rows, width = self.data.shape
        row = np.repeat(np.arange(rows, dtype=np.int64), width)
        number = np.arange(rows * width, dtype=np.int64)
        members = [self.data.reshape(-1), self.p[row]] + ([self.q[row]] if self.q[0] >= 0 else [])
        times = len(members)
        parity = np.repeat(np.arange(times) > 0, len(row))
        return Pattern(
            rows * width, rows, np.tile(number, times), np.concatenate(members), np.tile(row, times), parity
        )


def rows(pattern: Pattern, chunk: int, size: int, members: Sequence[Place | None], start: int = 0) -> Rows:
    """The mapping rows of `size` bytes of a volume from its byte `start`, in chunks of `chunk` bytes; members
    that are None give none."""
    there = np.array([member is not None for member in members], bool)
    parent, first = (np.array([member[at] if member else 0 for member in members], np.int64) for at in (0, 1))
    keep = np.flatnonzero(there[pattern.member])
    number, member, place = pattern.chunk[keep], pattern.member[keep], pattern.place[keep]
    again = np.ones(len(keep), bool)
    again[np.unique(number, return_index=True)[1]] = False
    role = np.where(pattern.parity[keep], PARITY, np.where(again, COPY, DATA))
    whole, rest = divmod(size, chunk)
    count = -((number - whole) // pattern.volume_chunks)
    step, parent_step = pattern.volume_chunks * chunk, pattern.member_chunks * chunk
    whole_chunks = Rows.make(
        start + number * chunk, parent[member], first[member] + place * chunk, chunk, count,
        np.where(count > 1, step, 0), np.where(count > 1, parent_step, 0), role,
    )  # fmt: skip
    period, last = divmod(whole, pattern.volume_chunks)
    at = np.flatnonzero(number == last) if rest else EMPTY
    cut = whole_chunks.take(at)  # the last chunk is cut short
    last_chunk = Rows.make(
        cut.volume_offset + period * step, cut.parent, cut.parent_offset + period * parent_step, rest,
        role=cut.role,
    )  # fmt: skip
    some = np.flatnonzero(count > 0)
    return _in_turn((some, whole_chunks.take(some)), (at, last_chunk))


def _in_turn(*parts: tuple[Int, Rows]) -> Rows:
    """The rows of all parts by the numbers beside them."""
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]), kind="stable")
    return Rows.concat([rows for _, rows in parts]).take(order)


def mirrored(size: int, members: Sequence[Place | None], start: int = 0) -> Rows:
    """All bytes on every member; the first that is present is the data, the others are copies."""
    present = [member for member in members if member]
    return Rows.of([
        Row(start, place.parent, place.offset, size, role=COPY if at else DATA)
        for at, place in enumerate(present)
    ])  # fmt: skip


def striped(members: int, first: int = 0) -> Pattern:
    """RAID0: chunk after chunk over all members, from member `first` on."""
    each = np.arange(members, dtype=np.int64)
    return Pattern(
        members, 1, each, (each + first) % members, np.zeros(members, np.int64), np.zeros(members, bool)
    )


def parity(level: int, layout: int, members: int) -> Parity:
    """RAID4, 5 or 6 with one of the layouts above. Raises Unsupported for others."""
    if not (4 if level == 6 else 2) <= members <= MAX_MEMBERS and not (level == 6 and members == 3):
        raise Unsupported(f"RAID{level} over {plural(members, 'member')} is not supported")
    if level == 4:
        layout = PARITY_N
    if level == 6 and layout >= Q_LAST:
        return _q_last(layout - Q_LAST, members)
    period = members
    row = np.arange(period, dtype=np.int64)
    if level == 6:
        p, q, first = _raid6(layout, row, members)
    else:
        p = _raid5(layout, row, members)
        q = np.full(period, -1, np.int64)
        first = np.where(np.isin(layout, (LEFT_SYMMETRIC, RIGHT_SYMMETRIC)), p + 1, 0)
    data = _data(first, p, q, members)
    return Parity(
        data,
        p,
        q,
        _power(p, q, members, layout in (ROTATING_ZERO_RESTART, ROTATING_N_RESTART, ROTATING_N_CONTINUE)),
    )


def _raid5(layout: int, row: Int, members: int) -> Int:
    """The member with parity in each row."""
    if layout in (LEFT_ASYMMETRIC, LEFT_SYMMETRIC):
        return members - 1 - row % members
    if layout in (RIGHT_ASYMMETRIC, RIGHT_SYMMETRIC):
        return row % members
    if layout in (PARITY_0, PARITY_N):
        return np.full(len(row), 0 if layout == PARITY_0 else members - 1, np.int64)
    raise Unsupported(f"RAID5 layout {layout} is not supported")


def _raid6(layout: int, row: Int, members: int) -> tuple[Int, Int, Int]:
    """The members with P and Q in each row, and the one from which the data chunks are numbered."""
    zero = np.zeros(len(row), np.int64)
    if layout in (PARITY_0, PARITY_N):
        p = zero if layout == PARITY_0 else zero + members - 2
        return p, p + 1, zero
    if layout == ROTATING_N_CONTINUE:
        p = members - 1 - row % members
        return p, (p - 1) % members, p + 1
    if layout == ROTATING_N_RESTART:
        p = members - 1 - (row + 1) % members
        return p, (p + 1) % members, zero
    p = _raid5(RIGHT_ASYMMETRIC if layout == ROTATING_ZERO_RESTART else layout, row, members)
    symmetric = layout in (LEFT_SYMMETRIC, RIGHT_SYMMETRIC)
    return p, (p + 1) % members, p + 2 if symmetric else zero


def _q_last(layout: int, members: int) -> Parity:
    inner = parity(5, layout, members - 1)
    q = np.full(len(inner.p), members - 1, np.int64)
    return Parity(inner.data, inner.p, q, _power(inner.p, q, members, False))


def _data(first: Int, p: Int, q: Int, members: int) -> Int:
    """(rows, data members): all members from `first` on, wrapping around, without those that hold parity."""
    order = (first[:, None] + np.arange(members)) % members
    keep = (order != p[:, None]) & (order != q[:, None])
    found: Int = order[keep].reshape(len(p), -1)
    return found


def _power(p: Int, q: Int, members: int, ddf: bool) -> Int:
    """(rows, members): data chunks count from the member after Q;
    DDF counts from member 0, and counts P and Q as well.

    RAID6 over five members, left-symmetric; what P and Q have means nothing:

        row    0 1 2 3 4 members    from the one after Q    powers
         0     Q D D D P            1 2 3 4 0               . 0 1 2 .
         1     D D D P Q            0 1 2 3 4               0 1 2 . .
         2     D D P Q D            4 0 1 2 3               1 2 . . 0

    >>> p, q, _ = _raid6(LEFT_SYMMETRIC, np.arange(3), 5)
    >>> p.tolist(), q.tolist()
    ([4, 3, 2], [0, 4, 3])
    >>> power = _power(p, q, 5, ddf=False)
    >>> power[0, [1, 2, 3]].tolist(), power[1, [0, 1, 2]].tolist(), power[2, [4, 0, 1]].tolist()
    ([0, 1, 2], [0, 1, 2], [0, 1, 2])
    """
    each = np.arange(members, dtype=np.int64)
    if ddf:
        return np.tile(each, (len(p), 1))
    order = (q[:, None] + 1 + each) % members
    is_data = (order != p[:, None]) & (order != q[:, None])
    power = np.zeros((len(p), members), np.int64)
    np.put_along_axis(power, order, np.cumsum(is_data, axis=1) - 1, axis=1)
    return np.maximum(power, 0)


class Raid10(NamedTuple):
    """md's layout word for RAID10, taken apart."""

    near: int
    far: int
    offset: bool
    far_set: int

    @staticmethod
    def of(layout: int, members: int) -> "Raid10":
        """Raises Unsupported where the kernel does not take the word."""
        near, far, offset = layout & 255, (layout >> 8) & 255, bool(layout & (1 << 16))
        sets = {0: members, 1: members // max(far, 1), 2: far * near}
        if near < 1 or far < 1 or near * far > members or layout >> 17 not in sets or members > MAX_MEMBERS:
            raise Unsupported(f"RAID10 layout {layout:#x} over {plural(members, 'member')} is not supported")
        return Raid10(near, far, offset, max(1, sets[layout >> 17]))

    def chunks(self, each: int, members: int) -> tuple[int, int]:
        """(chunks of the array, chunks from one far copy to the next), given the chunks of each member."""
        total = each // self.far * members // self.near
        used = -(-total * self.near * self.far // members)
        return total, 1 if self.offset else used // self.far

    def pattern(self, each: int, members: int) -> Pattern:
        """One period: as many chunks as fill whole rows of all members."""
        period = math.lcm(members, self.near) // self.near
        stride = self.chunks(each, members)[1]
        chunk = np.repeat(np.arange(period, dtype=np.int64), self.near)
        slot = np.arange(period * self.near, dtype=np.int64)
        first = (
            chunk * self.near // members
        )  # near copies that wrap around lie one chunk lower, also where rows are `far` chunks high
        member, row = slot % members, first * (self.far if self.offset else 1) + slot // members - first
        columns = [(chunk, member, row)]
        for _ in range(1, self.far):
            member, row = self._next(member, members), row + stride
            columns.append((chunk, member, row))
        height = period * self.near // members * (self.far if self.offset else 1)
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
        return Pattern(period, height, joined[0], joined[1], joined[2], np.zeros(len(joined[0]), bool))

    def _next(self, member: Int, members: int) -> Int:
        """The member with the next far copy: `near` members on, within its set; the last set takes in what is
        left over."""
        last = (members // self.far_set - 1) * self.far_set
        last_size = self.far_set + members % self.far_set
        moved = member + self.near
        in_last = (members % self.far_set != 0) & (moved > last)
        own = moved % self.far_set + member // self.far_set * self.far_set
        return np.where(in_last, (moved - last) % last_size + last, own)


def bounded(found: Rows, sizes: Mapping[int, int]) -> tuple[Rows, int]:
    """The rows cut at the end of their parents, whose sizes are given, and how many bytes of data were cut
    off."""
    parents = np.unique(found.parent)
    size = ints([sizes[parent] for parent in parents.tolist()])[np.searchsorted(parents, found.parent)]
    step = np.maximum(np.maximum(found.parent_step, found.run), 1)
    fit = np.clip((size - found.parent_offset - found.run) // step + 1, 0, found.count)
    if (fit == found.count).all():
        return found, 0
    several, some = fit > 1, np.flatnonzero(fit)
    whole = replace(
        found, count=fit, volume_step=np.where(several, found.volume_step, 0),
        parent_step=np.where(several, found.parent_step, 0),
    )  # fmt: skip
    left = size - (found.parent_offset + fit * found.parent_step)
    at = np.flatnonzero((fit < found.count) & (left > 0) & (left < found.run))
    tail = Rows.make(
        (found.volume_offset + fit * found.volume_step)[at], found.parent[at], (size - left)[at], left[at],
        role=found.role[at],
    )  # fmt: skip
    gone = (found.count - fit) * found.run
    gone[at] -= left[at]
    return _in_turn((some, whole.take(some)), (at, tail)), int(gone[found.role == DATA].sum())
