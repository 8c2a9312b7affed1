"""SUSP and Rock Ridge: the system use fields of directory records, continued or not, as columns.

Sources: SUSP 1.12 and RRIP 1.12 (entry layouts by their field names); Linux fs/isofs/rock.c for what is taken
in practice (a continuation inside one block, the length of a symbolic link); the zisofs ZF entry from
fs/isofs/rock.h.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, gather, ints
from virt_bmap.core.reader import Reader

MAX_ROUNDS = 32
"""Continuation areas that are followed from one record, each a further read.

A name of 255 and a link of 4095 bytes need three.
"""
MAX_CONTINUED = 64 << 20
"""Bytes of continuation areas kept for one batch of records: honest ones have some hundred bytes for each
record."""
SECTOR = 2048

_FLAG_CONTINUE, _FLAG_CURRENT, _FLAG_PARENT, _FLAG_ROOT = 1, 2, 4, 8


def signature(text: bytes) -> int:
    """The two letters of an entry as they read as a little-endian number."""
    return int.from_bytes(text, "little")


class SystemUse(NamedTuple):
    """System use entries in the order in which a reader meets them, grouped by record: entry i is
    `flat[at[i]:at[i] + length[i]]`."""

    record: Int
    sig: Int
    at: Int
    length: Int
    offset: Int
    flat: Bytes

    def of(self, sig: bytes, minimum: int) -> Int:
        """Which entries have this signature and at least `minimum` bytes."""
        return np.flatnonzero((self.sig == signature(sig)) & (self.length >= minimum))

    def byte(self, rows: Int, at: int) -> Int:
        """One byte of each of the entries."""
        return self.flat[self.at[rows] + at].astype(np.int64)

    def u32(self, rows: Int, at: int) -> Int:
        """The little-endian half of a 7.3.3 number (or a plain 7.3.1 one) of each of the entries."""
        four = self.flat[(self.at[rows] + at)[:, None] + np.arange(4)].astype(np.int64)
        number: Int = four @ (np.int64(1) << (8 * np.arange(4, dtype=np.int64)))
        return number


class Collected(NamedTuple):
    """The entries of a batch of records, where their continuation areas lie, and how many entries and areas
    were damaged."""

    entries: SystemUse
    areas: tuple[Int, Int]
    damaged: int


def collect(reader: Reader, block_size: int, data: Bytes, offset: Int, starts: Int, ends: Int) -> Collected:
    """All entries of records whose system use fields are data[starts:ends] and lie at `offset` of the volume,
    continuations included."""
    record = np.arange(len(starts), dtype=np.int64)
    parts: list[SystemUse] = []
    areas: list[tuple[Int, Int]] = []
    damaged = 0
    for _ in range(MAX_ROUNDS):
        found, bad = _step(data, record, offset, starts, ends)
        parts.append(found)
        damaged += bad
        more = found.of(b"CE", 28)
        if not len(more):
            break
        place = found.u32(more, 4) * block_size + found.u32(more, 12)
        size = found.u32(more, 20)
        good = (size <= SECTOR) & (place <= reader.size - size) & (np.cumsum(size) <= MAX_CONTINUED)
        damaged += int((~good).sum())
        record, offset, size = found.record[more][good], place[good], size[good]
        areas.append((offset, offset + size))
        data = reader.read_ranges(offset, size)
        ends = np.cumsum(size)
        starts = ends - size
    where = tuple(np.concatenate([EMPTY, *(area[side] for area in areas)]) for side in (0, 1))
    return Collected(_join(parts), (where[0], where[1]), damaged)


def _step(data: Bytes, record: Int, offset: Int, starts: Int, ends: Int) -> tuple[SystemUse, int]:
    """The entries in data[starts:ends], with one cursor for each field, all stepped at once."""
    cursor, owner = starts.copy(), np.arange(len(starts), dtype=np.int64)
    found: list[tuple[Int, Int]] = []
    damaged = 0
    while len(owner):
        keep = cursor + 4 <= ends[owner]
        cursor, owner = cursor[keep], owner[keep]
        length = data[cursor + 2].astype(np.int64) if len(cursor) else EMPTY
        stop = (
            (data[cursor] == 0) | ((data[cursor] == ord("S")) & (data[cursor + 1] == ord("T")))
            if len(cursor)
            else EMPTY
        )
        wrong = (length < 4) | (cursor + length > ends[owner])
        damaged += int((wrong & ~stop.astype(bool)).sum())
        keep = ~wrong & ~stop.astype(bool)
        cursor, owner = cursor[keep], owner[keep]
        found.append((cursor, owner))
        cursor = cursor + length[keep]
    at = np.concatenate([EMPTY, *(pair[0] for pair in found)])
    mine = np.concatenate([EMPTY, *(pair[1] for pair in found)])
    order = np.lexsort((at, mine))
    at, mine = at[order], mine[order]
    length = data[at + 2].astype(np.int64) if len(at) else EMPTY
    sig = data[at].astype(np.int64) | data[at + 1].astype(np.int64) << 8 if len(at) else EMPTY
    flat = gather(data, at, length) if len(at) else np.zeros(0, np.uint8)
    return SystemUse(
        record[mine], sig, np.cumsum(length) - length, length, offset[mine] + at - starts[mine], flat
    ), damaged


def _join(parts: list[SystemUse]) -> SystemUse:
    base = np.cumsum([0, *(len(part.flat) for part in parts)])
    record = np.concatenate([part.record for part in parts])
    order = np.argsort(record, kind="stable")
    at = np.concatenate([part.at + base[i] for i, part in enumerate(parts)])
    column = {
        name: np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("sig", "length", "offset")
    }
    return SystemUse(
        record[order], at=at[order], flat=np.concatenate([part.flat for part in parts]), **column
    )


class RockRidge(NamedTuple):
    """What Rock Ridge says of each of n records; -1 (mtime_ns: INT64_MIN) where it says nothing.

    `name` is all names one after the other, `name_length` 0 where there is none. `child` is the block of a
    relocated directory, `moved` marks the entry under which it really lies. `real_size` is the size of a file
    that zisofs compressed. Links: see `links`.
    """

    mode: Int
    nlink: Int
    uid: Int
    gid: Int
    mtime_ns: Int
    name: Bytes
    name_length: Int
    child: Int
    moved: np.ndarray
    real_size: Int
    link_size: Int


def rock_ridge(entries: SystemUse, records: int) -> RockRidge:
    """The entries of `records` records as columns."""

    def column(sig: bytes, minimum: int, at: int) -> Int:
        rows = entries.of(sig, minimum)
        result = np.full(records, -1, np.int64)
        result[entries.record[rows]] = entries.u32(rows, at)
        return result

    name, name_length = _names(entries, records)
    moved = np.zeros(records, bool)
    moved[entries.record[entries.of(b"RE", 4)]] = True
    return RockRidge(
        column(b"PX", 36, 4), column(b"PX", 36, 12), column(b"PX", 36, 20), column(b"PX", 36, 28),
        _modified(entries, records), name, name_length, column(b"CL", 12, 4), moved, column(b"ZF", 16, 8),
        _link_sizes(entries, records),
    )  # fmt: skip


def _names(entries: SystemUse, records: int) -> tuple[Bytes, Int]:
    """Alternate names, their NM pieces joined."""
    rows = entries.of(b"NM", 5)
    rows = rows[(entries.byte(rows, 4) & (_FLAG_CURRENT | _FLAG_PARENT)) == 0]
    length = np.zeros(records, np.int64)
    np.add.at(length, entries.record[rows], entries.length[rows] - 5)
    return gather(entries.flat, entries.at[rows] + 5, entries.length[rows] - 5), length


def _modified(entries: SystemUse, records: int) -> Int:
    """TF: the second of the stamps that its flags announce, 7 bytes each or 17 in the long form."""
    result = np.full(records, np.iinfo(np.int64).min)
    rows = entries.of(b"TF", 5)
    flags = entries.byte(rows, 4)
    size = np.where(flags & 0x80, 17, 7)
    start = 5 + (flags & 1) * size
    keep = ((flags & 2) != 0) & (start + size <= entries.length[rows])
    for long in (False, True):
        mine = keep & ((flags & 0x80) != 0) if long else keep & ((flags & 0x80) == 0)
        at = (entries.at[rows] + start)[mine]
        stamps = entries.flat[at[:, None] + np.arange(17 if long else 7)]
        result[entries.record[rows[mine]]] = long_stamps(stamps) if long else short_stamps(stamps)
    return result


def _link_sizes(entries: SystemUse, records: int) -> Int:
    """Length in bytes of the target of a symbolic link, -1 where there is none: components and the slashes
    between them."""
    result = np.full(records, -1, np.int64)
    rows = entries.of(b"SL", 5)
    result[entries.record[rows]] = 0
    cursor, end, owner = entries.at[rows] + 5, (entries.at + entries.length)[rows], rows
    found: list[tuple[Int, Int, Int]] = []
    while True:
        keep = cursor + 2 <= end
        cursor, end, owner = cursor[keep], end[keep], owner[keep]
        if not len(cursor):
            break
        flags, length = entries.flat[cursor].astype(np.int64), entries.flat[cursor + 1].astype(np.int64)
        text = np.select([(flags & _FLAG_CURRENT) != 0, (flags & _FLAG_PARENT) != 0,
                (flags & _FLAG_ROOT) != 0], [1, 2, 1],
                         np.minimum(length, end - cursor - 2))  # fmt: skip
        found.append((cursor, entries.record[owner], text + ((flags & (_FLAG_CONTINUE | _FLAG_ROOT)) == 0)))
        cursor = cursor + 2 + length
    if found:
        at, record, size = (np.concatenate([part[i] for part in found]) for i in range(3))
        np.add.at(result, record, size)
        order = np.lexsort((at, record))
        at, record = at[order], record[order]
        last = np.append(record[1:] != record[:-1], True)  # no slash after the last component
        slash = (entries.flat[at[last]] & (_FLAG_CONTINUE | _FLAG_ROOT)) == 0
        result[record[last]] -= slash
    return result


def links(entries: SystemUse) -> tuple[Int, Int, Int]:
    """(record, volume offset, length) of the entries that hold the targets of symbolic links."""
    rows = entries.of(b"SL", 5)
    return entries.record[rows], entries.offset[rows], entries.length[rows]


def short_stamps(stamps: Bytes) -> Int:
    """ECMA-119 9.1.5: (n, 7) bytes to nanoseconds since 1970 UTC, INT64_MIN where they are not a date."""
    year, month, day, hour, minute, second = (stamps[:, i].astype(np.int64) for i in range(6))
    return _nanoseconds(
        year + 1900, month, day, hour, minute, second, stamps[:, 6].astype(np.int8).astype(np.int64)
    )


def long_stamps(stamps: Bytes) -> Int:
    """ECMA-119 8.4.26.1: (n, 17) bytes, digits and an offset, to nanoseconds since 1970 UTC, INT64_MIN where
    they are not a date."""
    digits = stamps[:, :16].astype(np.int64) - ord("0")
    fine = ((digits >= 0) & (digits <= 9)).all(axis=1)
    pair = digits[:, 0::2] * 10 + digits[:, 1::2]
    zone = stamps[:, 16].astype(np.int8).astype(np.int64)
    result = _nanoseconds(
        pair[:, 0] * 100 + pair[:, 1], pair[:, 2], pair[:, 3], pair[:, 4], pair[:, 5], pair[:, 6], zone
    )
    result = np.where(
        result == np.iinfo(np.int64).min, result, result + np.clip(pair[:, 7], 0, 99) * 10_000_000
    )
    return np.where(fine, result, np.iinfo(np.int64).min)


def _nanoseconds(year: Int, month: Int, day: Int, hour: Int, minute: Int, second: Int, zone: Int) -> Int:
    """Fields of a local date whose zone is in quarters of an hour east of Greenwich."""
    fine = (year >= 1900) & (year < 2200) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    fine &= (hour < 24) & (minute < 60) & (second < 61) & (abs(zone) <= 56)
    months = ints(np.where(fine, (year - 1970) * 12 + month - 1, 0))
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + day - 1
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second - zone * 900
    return np.where(fine, seconds * 1_000_000_000, np.iinfo(np.int64).min)
