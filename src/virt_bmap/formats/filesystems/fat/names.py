"""Names and times of FAT and exFAT directory entries: UTF-16 and code page 437 to UTF-8, long names put
together."""

import numpy as np

from virt_bmap.core.arrays import Bool, Bytes, Int, expand
from virt_bmap.core.layout import struct
from virt_bmap.formats.common.ragged import Ragged, items, pieces
from virt_bmap.formats.filesystems.fat.superblock import ENTRY

LFN_ENTRY = struct(ENTRY, [(1, "LDIR_Name1", "V10"), (14, "LDIR_Name2", "V12"), (28, "LDIR_Name3", "V4")])
"""Where an entry of a long name keeps its 13 UTF-16 units."""
TEXT = struct(26, [(0, "LDIR_Name1", "V10"), (10, "LDIR_Name2", "V12"), (22, "LDIR_Name3", "V4")])
UNITS = 13
MAX_SLOTS = 20
"""255 units take 20 entries: fs/fat/namei_vfat.c (MSDOS_SLOTS)."""
LAST_SLOT = 0x40
NO_TIME = np.iinfo(np.int64).min

CP437 = np.array([ord(bytes([byte]).decode("cp437")) for byte in range(256)], "<u2")
"""Short names to UTF-16. The disk does not name its code page; 437 is the kernel's default."""
CP437_LOWER = np.array(
    [ord(lower) if len(lower := chr(unit).lower()) == 1 else unit for unit in CP437.tolist()], "<u2"
)


def utf8(units: np.ndarray, lengths: Int) -> Ragged:
    """Names in UTF-16, one after the other, of `lengths` units, in UTF-8.

    Unpaired surrogates stay as three bytes each, as Python's surrogatepass does; a unit 0 inside a name
    becomes U+FFFD.
    """
    units = np.where(units == 0, np.uint16(0xFFFD), units) if not units.all() else units
    if len(units) == 0 or units.max() < 0x80:
        data = units.astype(np.uint8)
    else:
        text = units.astype("<u2").tobytes().decode("utf-16-le", "surrogatepass")
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        size = 1 + (units >= 0x80).view(np.uint8) + (units >= 0x800)
        pairs = np.flatnonzero((units[:-1] & 0xFC00 == 0xD800) & (units[1:] & 0xFC00 == 0xDC00))
        size[pairs] = size[pairs + 1] = 2  # four bytes for two units
        ends = np.append(0, np.cumsum(lengths))
        lengths = np.diff(np.append(0, np.cumsum(size, dtype=np.int64))[ends])
    return Ragged(data, lengths.astype(np.uint16))


def entry_names(raw: Bytes, owner: Int, slots: Int, files: Int) -> tuple[Ragged, int]:
    """Names of the entries `files`; these and `slots` (entries of long names) are sorted positions in raw (n,
    32).

    `owner` is the directory of each entry. A long name counts when all its slots stand right before the entry
    and carry its checksum, as in fs/fat/dir.c; otherwise the short name does. Also returns how many slots
    belong to no entry.
    """
    count, orphans = _slot_counts(raw, owner, files, slots)
    with_long = np.flatnonzero(count)
    names, lengths = long_names(raw, files[with_long], count[with_long])
    has_long = np.zeros(len(files), bool)
    has_long[with_long[lengths > 0]] = True
    if has_long.all():
        return names, orphans
    short = utf8(*short_names(raw[files[~has_long]]))
    order = np.argsort(np.concatenate([with_long[lengths > 0], np.flatnonzero(~has_long)]), kind="stable")
    return Ragged.concat([names.take(np.flatnonzero(lengths)), short]).take(order), orphans


def _slot_counts(raw: Bytes, owner: Int, files: Int, slots: Int) -> tuple[Int, int]:
    """For each file how many slots its long name has, 0 where it has no valid one; and how many slots are
    nobody's."""
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
    # where there are several, the last written is the nearest, which counts
    count[file[last]] = sequence[last]
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


def long_names(raw: Bytes, files: Int, count: Int) -> tuple[Ragged, Int]:
    """Long names that have `count` slots right before `files`, and their lengths in units; they end before a
    unit 0."""
    row, step = expand(count)
    slots = items(raw.reshape(-1), ENTRY)[(files[row] - 1 - step) * ENTRY].view(LFN_ENTRY)
    text = np.empty(len(slots), TEXT)
    for part in TEXT.names or ():
        text[part] = slots[part]
    units = text.view("<u2")
    lengths = count * UNITS
    zero = np.flatnonzero(units == 0)[::-1]
    at = zero // UNITS
    lengths[row[at]] = step[at] * UNITS + zero % UNITS  # descending: the first zero of a name is written last
    starts = (np.cumsum(count) - count) * TEXT.itemsize
    return utf8(
        pieces(text.view(np.uint8), starts, (2 * lengths).astype(np.uint16)).view("<u2"), lengths
    ), lengths


def short_names(raw: Bytes) -> tuple[np.ndarray, Int]:
    """(units, lengths) of 8.3 names; byte 12 says (since Windows NT) that base or extension is to be shown in
    lower case."""
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
    """Which bytes of space-padded names belong to them: all up to the last that is not a space."""
    return np.logical_or.accumulate((part != 0x20)[:, ::-1], axis=1)[:, ::-1]


def timestamps(date: np.ndarray, time: np.ndarray) -> Int:
    """FAT date and time (uint16 each) as nanoseconds since 1970; a local time of unknown zone, taken as UTC.

    NO_TIME for date 0.
    """
    date, time = date.astype(np.int64), time.astype(np.int64)
    month = (1980 - 1970 + (date >> 9)) * 12 + np.clip(date >> 5 & 15, 1, 12) - 1
    days = (
        month.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + np.maximum(date & 31, 1) - 1
    )
    seconds = days * 86400 + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2
    return np.where(date == 0, NO_TIME, seconds * 10**9)
