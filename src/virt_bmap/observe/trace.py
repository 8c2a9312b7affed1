"""Which of the bytes that were read are the content of a file, and at which offset of it?

A read belongs to a file when the bytes on the disk are the bytes that the file gave: readahead, inodes and
trees that are read on the way are told apart by what they hold, not by when they were read. Files are read
forwards, page by page, so what was read comes in the order of the file.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, ints, runs, union

UNIT = 512
"""Bytes: the smallest piece that a kernel reads, and that filesystems place files in."""
PROOF = 16
"""Bytes that must agree where content is looked for at
any offset of what was read: fewer are found by chance."""
LONGEST_SEARCH = 64 << 10
"""Bytes of content looked for at any offset: what is packed with other things (tails, inline data) is shorter
than a block."""


class Placed(NamedTuple):
    """Where content lies: file bytes [offset, offset + length) at `place` in the volume; `packed`: inside a
    block that holds other things, too.

    `left` are ranges (starts, ends) of the file whose bytes were not found, though they are not zero;
    `unsure` those that are zero, some of them read from the ranges `zeroes` of the volume, and which ones
    can't be told; `other` ranges of the volume that were read and hold nothing of it.
    """

    offset: Int
    place: Int
    length: Int
    packed: Bool
    left: tuple[Int, Int]
    unsure: tuple[Int, Int]
    zeroes: tuple[Int, Int]
    other: tuple[Int, Int]


def find(content: bytes, starts: Int, ends: Int, data: Bytes) -> Placed:
    """Find `content` in what was read: ranges [starts, ends) of the volume, in the order of their reading,
    `data` their bytes one after the other.

    Offsets in the result count from the content's start. Ranges are whole units, and content lies in whole
    units, but for its end.
    """
    lengths = ends - starts
    size = len(content)
    covered = int(lengths.sum()) >= size > int(lengths[:-1].sum())
    if covered and data[:size].tobytes() == content:  # the common case: nothing but the content was read
        offset = np.cumsum(lengths) - lengths
        return _result(
            content, offset, starts, np.minimum(lengths, size - offset), starts[:0], ends[:0], data
        )
    return _search(content, starts, ends, data)


def _search(content: bytes, starts: Int, ends: Int, data: Bytes) -> Placed:
    """One read after the other, each at the next place of the content that holds its bytes."""
    at = 0
    rows: list[tuple[int, int, int]] = []
    other: list[tuple[int, int]] = []
    base = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        piece = data[base : base + end - start].tobytes()
        base += end - start
        done = 0
        while done < len(piece):
            found, length = _next(content, at, piece[done:])
            if length:
                rows.append((found, start + done, length))
                at = -(-(found + length) // UNIT) * UNIT
            else:
                length = UNIT
                other.append((start + done, min(end, start + done + UNIT)))
            done += -(-length // UNIT) * UNIT
    columns = np.array(rows, np.int64).reshape(-1, 3)
    away = np.array(other, np.int64).reshape(-1, 2)
    return _result(
        content, columns[:, 0], columns[:, 1], columns[:, 2], away[:, 0], away[:, 1], data, (starts, ends)
    )


def _next(content: bytes, at: int, piece: bytes) -> tuple[int, int]:
    """(offset, length) of the longest start of `piece` in the content from `at` on, in whole units; length 0
    where it isn't there.

    What is skipped must be a hole, so zeroes are looked for at `at` alone.
    """
    if at >= len(content):
        return at, 0
    length = _common(content, at, piece)
    if length == min(len(piece), len(content) - at):
        return at, length
    for wanted in (piece, piece[:UNIT]):  # the whole of it first: zeroes at its start are then no hole
        if any(wanted) and (found := _find(content, at, wanted)) >= 0:
            return found, _common(content, found, piece)
    return at, length


def _find(content: bytes, at: int, piece: bytes) -> int:
    """The first unit of the content from `at` on where it goes on as `piece`, or ends while it does; -1 where
    there is none."""
    found = content.find(piece, at)
    while found >= 0 and found % UNIT:
        found = content.find(piece, found + 1)
    if found >= 0:
        return found
    first = max(at, (len(content) - len(piece) + UNIT - 1) // UNIT * UNIT)
    for start in range(first, len(content), UNIT):
        tail = content[start:]
        if len(tail) >= PROOF and any(tail) and piece.startswith(tail):
            return start
    return -1


def _common(content: bytes, at: int, piece: bytes) -> int:
    """How many bytes of the content from `at` on are the start of `piece`: whole units, or up to the
    content's end."""
    size = min(len(piece), len(content) - at)
    if content[at : at + size] == piece[:size]:
        return size
    same = np.frombuffer(content, np.uint8, size, at) != np.frombuffer(piece, np.uint8, size)
    return int(np.argmax(same)) // UNIT * UNIT


def _result(
    content: bytes, offset: Int, place: Int, length: Int, low: Int, high: Int, data: Bytes,
    read: tuple[Int, Int] | None = None,
) -> Placed:  # fmt: skip
    """What was found, what was not, and whether that is a hole."""
    size = len(content)
    units = -(-size // UNIT)
    known = np.zeros(units, bool)
    for start, n in zip((offset // UNIT).tolist(), (-(-length // UNIT)).tolist(), strict=True):
        known[start : start + n] = True
    padded = np.frombuffer(content.ljust(units * UNIT, b"\0"), np.uint8).reshape(units, UNIT)
    zero: Bool = np.logical_not(padded.any(axis=1))
    left = _ranges(~known & ~zero, size)
    is_packed = np.zeros(len(offset), bool)
    if len(left[0]) and read is not None:
        more, left = _packed(content, left, read, data)
        is_packed = np.append(is_packed, (more[1] % UNIT != 0) | (more[0] % UNIT != 0))
        offset, place, length = (
            np.append(mine, new) for mine, new in zip((offset, place, length), more, strict=True)
        )
    doubtful = np.array(
        [
            zero[start // UNIT : -(-(start + n) // UNIT)].all()
            for start, n in zip(offset.tolist(), length.tolist(), strict=True)
        ],
        bool,
    )
    unsure, zeroes = (EMPTY, EMPTY), (EMPTY, EMPTY)
    if doubtful.any() and (~known & zero).any():  # which of the zeroes are those that were read?
        for start, n in zip(
            (offset[doubtful] // UNIT).tolist(), (-(-length[doubtful] // UNIT)).tolist(), strict=True
        ):
            known[start : start + n] = False
        unsure, zeroes = _ranges(~known & zero, size), union(place[doubtful], (place + length)[doubtful])
        offset, place, length, is_packed = (
            column[~doubtful] for column in (offset, place, length, is_packed)
        )
    return Placed(offset, place, length, is_packed, left, unsure, zeroes, union(low, high))


def _packed(
    content: bytes, left: tuple[Int, Int], read: tuple[Int, Int], data: Bytes
) -> tuple[tuple[Int, Int, Int], tuple[Int, Int]]:
    """What is left, looked for at any offset of what was read: ((offset, place, length), still left)."""
    whole, base = data.tobytes(), np.cumsum(read[1] - read[0]) - (read[1] - read[0])
    rows: list[tuple[int, int, int]] = []
    still: list[tuple[int, int]] = []
    for start, end in zip(left[0].tolist(), left[1].tolist(), strict=True):
        wanted = content[start:end]
        found = whole.find(wanted) if PROOF <= len(wanted) <= LONGEST_SEARCH else -1
        row = int(np.searchsorted(base, found, "right")) - 1
        if found < 0 or found - base[row] + len(wanted) > read[1][row] - read[0][row]:
            still.append((start, end))
        else:
            rows.append((start, int(read[0][row] + found - base[row]), len(wanted)))
    columns, rest = np.array(rows, np.int64).reshape(-1, 3), np.array(still, np.int64).reshape(-1, 2)
    return (columns[:, 0], columns[:, 1], columns[:, 2]), (rest[:, 0], rest[:, 1])


def _ranges(units: Bool, size: int) -> tuple[Int, Int]:
    """Flags of units as ranges of bytes, none beyond `size`."""
    starts, ends = runs(units)
    return starts * UNIT, np.minimum(ends * UNIT, size)


def pages(starts: Int, ends: Int, step: int, size: int) -> list[tuple[int, int]]:
    """Ranges cut at multiples of `step` bytes, and rounded out to them, none beyond `size`."""
    low, high = union(ints(starts) // step * step, np.minimum(-(-ints(ends) // step) * step, size))
    return [
        (at, min(at + step, end))
        for start, end in zip(low.tolist(), high.tolist(), strict=True)
        for at in range(start, end, step)
    ]
