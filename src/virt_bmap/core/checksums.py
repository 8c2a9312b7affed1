"""CRC-32C, CRC-32 and CRC-16 of many records at once, as ext4, jbd2 and F2FS use them: without the final
inversion; and XXH64.

A CRC is linear, so a record is folded like a tournament: neighbours are
joined by moving the left one past the zero bytes that the right one takes
the place of. A record of 4 KiB takes ten rounds, not four thousand steps.

Sources: kernel lib/crc (reflected polynomials: crc32c 0x82F63B78, crc32 0xEDB88320, crc16 0xA001);
fs/ext4/super.c ext4_group_desc_csum.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bytes, Int

U32 = NDArray[np.uint32]
ALL_ONES = 0xFFFFFFFF
CRC32C, CRC32 = 0x82F63B78, 0xEDB88320
BATCH = 1 << 20
"""Words that `crc32c_each` folds at a time, which bounds its memory to some 30 MiB beside the longest run."""


LONG = 512
"""Bytes of a row from which on it is quicker to hand over
each row by itself than to fold all rows together."""


@cache
def _compiled() -> "Callable[[int, Bytes], int] | None":
    """What computes crc32c with the processor's own instruction, at some gigabytes a second; None where its
    package is missing: folding takes 25 times as long."""
    try:
        import google_crc32c
    except ImportError:
        return None
    extend: Callable[[int, Bytes], int] = google_crc32c.extend
    return extend


def _table(polynomial: int, dtype: type) -> NDArray[np.generic]:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(polynomial), values >> 1).astype(np.uint32)
    return values.astype(dtype)


def _move(tables: U32, values: U32) -> U32:
    """Each value moved past as many zero bytes as `tables`, of shape (4, 256), stand for."""
    moved: U32 = tables[0][values & 0xFF]
    for byte in (1, 2, 3):
        moved ^= tables[byte][(values >> np.uint32(8 * byte)) & 0xFF]
    return moved


@cache
def _moves(level: int, polynomial: int) -> U32:
    """Tables that move a value past 4 << level zero bytes."""
    if level:
        half = _moves(level - 1, polynomial)
        return _move(half, half)
    one = _table(polynomial, np.uint32)
    values = np.arange(256, dtype=np.uint32)[None, :] << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(4):
        values = one[values & 0xFF] ^ (values >> np.uint32(8))
    return values.astype(np.uint32)


def crc32c(data: Bytes, seed: int | U32 = ALL_ONES) -> U32:
    """The CRC of each row of an (n, size) array; `seed` is a number or one for each row."""
    if data.shape[1] < 4:
        table, state = _table(CRC32C, np.uint32), np.broadcast_to(np.asarray(seed, np.uint32), len(data))
        for column in data.T:
            state = table[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
        return np.array(state, np.uint32)
    if data.shape[1] >= LONG and (extend := _compiled()):
        seeds = np.broadcast_to(np.asarray(seed, np.uint32) ^ np.uint32(ALL_ONES), len(data))
        rows = zip(seeds.tolist(), data, strict=True)
        return ~np.fromiter((extend(start, row) for start, row in rows), np.uint32, len(data))
    return _folded(_seeded(data, seed), CRC32C)


def crc32(data: Bytes, seed: int | U32 = ALL_ONES) -> U32:
    """Like `crc32c`, with the polynomial of Ethernet, and
    faster where most words are zero: these add nothing."""
    words = _seeded(data, seed)
    row, column = np.nonzero(words)
    if 4 * len(row) > words.size:
        return _folded(words, CRC32)
    value, table = words[row, column], _columns(words.shape[1], CRC32)
    parts = table[column, 0, value & 0xFF]
    for byte in (1, 2, 3):
        parts ^= table[column, byte, (value >> np.uint32(8 * byte)) & 0xFF]
    result = np.zeros(len(words), np.uint32)
    first = np.flatnonzero(np.diff(row, prepend=-1))
    result[row[first]] = np.bitwise_xor.reduceat(parts, first) if len(first) else 0
    return result


@cache
def _columns(count: int, polynomial: int) -> U32:
    """Tables, of shape (count, 4, 256), that move the word of
    each column past the rest of a row of `count` words."""
    tables = np.empty((count, 4, 256), np.uint32)
    tables[-1] = _moves(0, polynomial)
    for column in range(count - 2, -1, -1):
        tables[column] = _move(tables[-1], tables[column + 1])
    return tables


def crc32c_without(data: Bytes, at: int, size: int = 4, seed: int | U32 = ALL_ONES) -> U32:
    """Like `crc32c`, with the `size` bytes at `at` of each row as zeroes: a checksum's own place."""
    blank = data.copy()
    blank[:, at : at + size] = 0
    return crc32c(blank, seed)


def _seeded(data: Bytes, seed: int | U32) -> U32:
    # zeroes in front change nothing, as long as the seed is laid over what follows
    if odd := -data.shape[1] % 4:
        front = np.zeros((len(data), odd), np.uint8)
        first = np.ascontiguousarray(data[:, :4]).view("<u4")[:, 0] ^ np.asarray(seed, np.uint32)
        seeded = np.ascontiguousarray(first.astype("<u4")).view(np.uint8).reshape(-1, 4)
        return np.concatenate([front, seeded, data[:, 4:]], axis=1).view("<u4").astype(np.uint32)
    words = np.ascontiguousarray(data).view("<u4").astype(np.uint32)
    words[:, 0] ^= np.asarray(seed, np.uint32)
    return words


def crc32c_each(words: U32, starts: Int, counts: Int, seeds: U32) -> U32:
    """The CRC of each run words[starts[i]:starts[i] + counts[i]], of little-endian words and any length, with
    a seed for each; an empty run keeps its seed.

    Runs are taken together with others of about their length, BATCH words at a time.
    """
    result = seeds.copy()
    level = np.frexp(np.maximum(counts - 1, 0).astype(np.float64))[1]
    for power in np.unique(level[counts > 0]).tolist():
        width = 1 << power
        mine = np.flatnonzero((level == power) & (counts > 0))
        for rows in np.array_split(mine, -(-len(mine) * width // BATCH)):
            front = width - counts[rows]  # zeroes in front change nothing
            column = np.arange(width)
            block = words[np.maximum((starts[rows] - front)[:, None] + column, 0)]
            block[column < front[:, None]] = 0
            block[np.arange(len(rows)), front] ^= seeds[rows]
            result[rows] = _folded(block, CRC32C)
    return result


def _folded(words: U32, polynomial: int) -> U32:
    """The CRC of each row of words, a tournament: of each two neighbours, the
    left one is moved past the bytes of the right one, and the two are added.

        words       a b c d e          odd: a zero in front changes nothing
        round 1     . a | b c | d e    move by 4 bytes and add:    a  bc  de
        round 2     . a | bc de        move by 8 bytes and add:    a  bcde
        round 3     a bcde             move by 16 bytes and add:   abcde
    """
    level = 0
    while words.shape[1] > 1:
        if words.shape[1] % 2:  # zeroes in front change nothing
            words = np.concatenate([np.zeros((len(words), 1), np.uint32), words], axis=1)
        words = _move(_moves(level, polynomial), words[:, 0::2]) ^ words[:, 1::2]
        level += 1
    return _move(_moves(0, polynomial), words[:, 0])


def crc16(data: Bytes, seed: int = 0xFFFF) -> NDArray[np.uint16]:
    """The CRC of each row of an (n, size) array; for short records."""
    table = _table(0xA001, np.uint16)
    state = np.full(len(data), seed, np.uint16)
    for column in data.T:
        state = table[(state ^ column) & 0xFF] ^ (state >> np.uint16(8))
    return state


# ---- xxHash ------------------------------------------------------------------------------------------------

U64 = NDArray[np.uint64]
_PRIMES = np.array(
    [11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579], np.uint64
)


def _rotated(values: U64, bits: int) -> U64:
    rotated: U64 = values << np.uint64(bits) | values >> np.uint64(64 - bits)
    return rotated


def xxhash64(data: Bytes) -> U64:
    """XXH64 with seed 0 (the xxHash specification) of each row of an (n, size) array; size is a multiple of
    8, and 32 or more. All rows are stepped together."""
    p1, p2, p3, p4 = _PRIMES
    words = np.ascontiguousarray(data).view("<u8").astype(np.uint64)
    whole = words.shape[1] // 4 * 4
    with np.errstate(over="ignore"):
        state = np.broadcast_to(
            np.array([p1 + p2, p2, 0, np.uint64(0) - p1], np.uint64), (len(words), 4)
        ).copy()
        for at in range(0, whole, 4):
            state = _rotated(state + words[:, at : at + 4] * p2, 31) * p1
        value = np.zeros(len(words), np.uint64)
        for lane, bits in enumerate((1, 7, 12, 18)):
            value += _rotated(state[:, lane], bits)
        for lane in range(4):
            value = (value ^ _rotated(state[:, lane] * p2, 31) * p1) * p1 + p4
        value = value + np.uint64(data.shape[1])
        for at in range(whole, words.shape[1]):
            value = _rotated(value ^ _rotated(words[:, at] * p2, 31) * p1, 27) * p1 + p4
        value = (value ^ value >> np.uint64(33)) * p2
        value = (value ^ value >> np.uint64(29)) * p3
    result: U64 = value ^ value >> np.uint64(32)
    return result
