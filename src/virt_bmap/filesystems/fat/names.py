"""Names and times of FAT and exFAT directory entries: UTF-16 and code page 437 to UTF-8, long names put together."""

import numpy as np
import pyarrow as pa

from virt_bmap.arrays import Bool, Bytes, Int, expand

LFN_UNITS = np.r_[1:11, 14:26, 28:32]
"""Where an entry of a long name keeps its 13 UTF-16 units."""
UNITS = 13
MAX_SLOTS = 20
"""255 units take 20 entries: fs/fat/namei_vfat.c (MSDOS_SLOTS)."""
LAST_SLOT = 0x40
NO_TIME = np.iinfo(np.int64).min

CP437 = np.array([ord(bytes([byte]).decode("cp437")) for byte in range(256)], "<u2")
"""Short names to UTF-16. The disk does not name its code page; 437 is the kernel's default."""
CP437_LOWER = np.array([ord(lower) if len(lower := chr(unit).lower()) == 1 else unit for unit in CP437.tolist()], "<u2")


def utf8(units: np.ndarray, starts: Int, lengths: Int) -> pa.Array:
    """Names units[starts[i]:starts[i]+lengths[i]] in UTF-16 as a binary array in UTF-8.

    Unpaired surrogates stay as three bytes each, as Python's surrogatepass does; a unit 0 inside a name becomes U+FFFD.
    """
    row, step = expand(lengths)
    joined = np.zeros(len(row) + len(lengths), "<u2")
    unit = units[starts[row] + step]
    joined[np.arange(len(row)) + row] = np.where(unit == 0, 0xFFFD, unit)
    text = joined.tobytes().decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == 0) - np.arange(len(lengths))
    offsets = np.append(0, ends).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data[data != 0])]
    return pa.Array.from_buffers(pa.binary(), len(lengths), buffers)


def entry_names(raw: Bytes, owner: Int, slots: Int, files: Int) -> tuple[pa.Array, int]:
    """Names of the entries `files`; these and `slots` (entries of long names) are sorted positions in raw (n, 32).

    `owner` is the directory of each entry. A long name counts when all its slots stand right before the entry and carry its checksum, as in fs/fat/dir.c; otherwise
    the short name does. Also returns how many slots belong to no entry.
    """
    slot_count, orphans = _slot_counts(raw, owner, files, slots)
    long = slot_count > 0
    long_units, long_lengths = _long_names(raw, files[long], slot_count[long])
    long[long] = long_lengths > 0
    long_starts = (np.cumsum(slot_count) - slot_count)[long] * UNITS
    short_units, short_lengths = _short_names(raw[files[~long]])
    starts, lengths = np.zeros(len(files), np.int64), np.zeros(len(files), np.int64)
    starts[long], lengths[long] = long_starts, long_lengths[long_lengths > 0]
    starts[~long], lengths[~long] = len(long_units) + np.cumsum(short_lengths) - short_lengths, short_lengths
    return utf8(np.concatenate([long_units, short_units]), starts, lengths), orphans


def _slot_counts(raw: Bytes, owner: Int, files: Int, slots: Int) -> tuple[Int, int]:
    """For each file how many slots its long name has, 0 where it has no valid one; and how many slots are nobody's."""
    sequence = (raw[slots, 0] & 0x3F).astype(np.int64)
    target = slots + sequence
    file_at = np.full(len(raw) + 1, -1, np.int64)
    file_at[files] = np.arange(len(files))
    file = file_at[np.minimum(target, len(raw))]
    checksum = _checksum(raw[files, :11])
    good = (sequence > 0) & (sequence <= MAX_SLOTS) & (file >= 0)
    good[good] &= (owner[target[good]] == owner[slots[good]]) & (checksum[file[good]] == raw[slots[good], 13])
    slots, sequence, file = slots[good], sequence[good], file[good]
    count = np.zeros(len(files), np.int64)
    last = raw[slots, 0] & LAST_SLOT != 0
    count[file[last]] = sequence[last]  # where there are several, the last written is the nearest, which counts
    used = sequence <= count[file]
    found = np.bincount(file[used], minlength=len(files))
    complete = (found == count) & (count > 0)
    return np.where(complete, count, 0), len(good) - int(count[complete].sum())


def _checksum(short: Bytes) -> Bytes:
    """The checksum of short names (n, 11) that their long name's slots carry."""
    total = np.zeros(len(short), np.uint8)
    for column in short.T:
        total = (total << 7 | total >> 1) + column
    return total


def _long_names(raw: Bytes, files: Int, count: Int) -> tuple[np.ndarray, Int]:
    """(units, lengths) of long names that have `count` slots right before `files`, 13 units a slot; they end before a unit 0."""
    row, step = expand(count)
    units = np.ascontiguousarray(raw[files[row] - 1 - step][:, LFN_UNITS]).view("<u2").reshape(-1)
    lengths = count * UNITS
    begin = np.cumsum(lengths) - lengths
    zero = np.flatnonzero(units == 0)[::-1]
    name = row[zero // UNITS]
    lengths[name] = zero - begin[name]  # in descending order: the first zero is written last
    return units, lengths


def _short_names(raw: Bytes) -> tuple[np.ndarray, Int]:
    """(units, lengths) of 8.3 names; byte 12 says (since Windows NT) that base or extension is to be shown in lower case."""
    name = raw[:, :11].copy()
    name[name[:, 0] == 0x05, 0] = 0xE5
    lower = np.repeat((raw[:, 12:13] & (0x08, 0x10)) != 0, (8, 3), axis=1)
    unit = np.where(lower, CP437_LOWER[name], CP437[name])
    base, extension = _trimmed(name[:, :8]), _trimmed(name[:, 8:])
    dot = np.full((len(name), 1), ord("."), "<u2")
    all_units = np.concatenate([unit[:, :8], dot, unit[:, 8:]], axis=1)
    keep = np.concatenate([base, extension[:, :1], extension], axis=1)
    return all_units[keep], keep.sum(1, dtype=np.int64)


def _trimmed(part: Bytes) -> Bool:
    """Which bytes of space-padded names belong to them: all up to the last that is no space."""
    return np.logical_or.accumulate((part != 0x20)[:, ::-1], axis=1)[:, ::-1]


def timestamps(date: np.ndarray, time: np.ndarray) -> Int:
    """FAT date and time (uint16 each) as nanoseconds since 1970; a local time of unknown zone, taken as UTC. NO_TIME for date 0."""
    date, time = date.astype(np.int64), time.astype(np.int64)
    month = (1980 - 1970 + (date >> 9)) * 12 + np.clip(date >> 5 & 15, 1, 12) - 1
    days = month.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + np.maximum(date & 31, 1) - 1
    seconds = days * 86400 + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2
    return np.where(date == 0, NO_TIME, seconds * 10**9)
