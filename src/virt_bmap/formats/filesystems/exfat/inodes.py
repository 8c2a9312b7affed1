"""Entry sets: what directories say of a file, its name included."""

from dataclasses import dataclass, field

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, expand, ints
from virt_bmap.core.layout import records, struct, widen
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.fat.inodes import before_end
from virt_bmap.formats.filesystems.fat.names import timestamps, utf8
from virt_bmap.formats.filesystems.fat.tree import DirEntries
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

ENTRY = 32


ALLOCATION_BITMAP, UP_CASE_TABLE, VOLUME_LABEL, FILE, STREAM, FILE_NAME = 0x81, 0x82, 0x83, 0x85, 0xC0, 0xC1


FILE_ENTRY = struct(ENTRY, [
    (1, "SecondaryCount", "u1"),
    (2, "SetChecksum", "<u2"),
    (4, "FileAttributes", "<u2"),
    (12, "LastModifiedTime", "<u2"),
    (14, "LastModifiedDate", "<u2"),
    (21, "LastModified10msIncrement", "u1"),
    (23, "LastModifiedUtcOffset", "u1"),
])  # fmt: skip


STREAM_ENTRY = struct(ENTRY, [
    (1, "GeneralSecondaryFlags", "u1"),
    (3, "NameLength", "u1"),
    (8, "ValidDataLength", "<u8"),
    (20, "FirstCluster", "<u4"),
    (24, "DataLength", "<u8"),
])  # fmt: skip


ATTRIBUTE_DIRECTORY, NO_FAT_CHAIN, UTC_OFFSET_VALID = 0x10, 2, 0x80


NAME_UNITS = 15


QUARTER = 15 * 60 * 10**9
"""Nanoseconds of one step of a UTC offset."""


MAX_DIRECTORY = 256 << 20
"""Specification, section 7.4: no directory is larger."""


@dataclass
class Parser:
    """Makes entries of raw ones; `wrong` are the inodes whose entry sets have a wrong checksum."""

    damage: Damage
    wrong: list[Int] = field(default_factory=lambda: [ints([])])

    def __call__(self, raw: Bytes, owner: Int, number: Int) -> DirEntries:
        kind = np.where(before_end(raw, owner), raw[:, 0], 0)
        first = np.flatnonzero(kind == FILE)
        good = _is_whole(raw, kind, owner, first)
        say = self.damage.add
        say(
            "directory",
            "entry [set of a file is|sets of files are] incomplete: not read",
            number[first[~good]] * ENTRY,
        )
        first = first[good]
        entry, stream = records(raw[first], FILE_ENTRY), records(raw[first + 1], STREAM_ENTRY)
        wrong = _checksums(raw, first, entry["SecondaryCount"]) != entry["SetChecksum"]
        self.wrong.append(number[first[wrong]])
        say(
            "checksum",
            "entry [set of a file has|sets of files have] a wrong checksum",
            self.wrong[-1] * ENTRY,
            severity=WARNING,
        )
        long = first[stream["ValidDataLength"] > stream["DataLength"]]
        say(
            "directory",
            "[file has|files have] more valid data than data",
            number[long] * ENTRY,
            severity=WARNING,
        )
        zone = ((entry["LastModifiedUtcOffset"] << 1).view(np.int8) >> 1).astype(np.int64) * QUARTER
        local = timestamps(entry["LastModifiedDate"], entry["LastModifiedTime"])
        mtime = local + entry["LastModified10msIncrement"].astype(np.int64) * 10**7
        size = _lengths(stream["DataLength"])
        return DirEntries(
            inode=number[first], parent=owner[first],
            directory=entry["FileAttributes"] & ATTRIBUTE_DIRECTORY != 0,
            cluster=stream["FirstCluster"].astype(np.int64), size=size,
            valid=np.minimum(size, _lengths(stream["ValidDataLength"])),
            contiguous=stream["GeneralSecondaryFlags"] & NO_FAT_CHAIN != 0,
            mtime_ns=mtime - np.where(entry["LastModifiedUtcOffset"] & UTC_OFFSET_VALID, zone, 0),
            name=_names(raw, first),
        )  # fmt: skip


def _lengths(values: np.ndarray) -> Int:
    """Sizes in bytes; what is more than any volume holds becomes the largest that one can hold."""
    return widen(np.minimum(values, np.uint64(1 << 62)), "size")


def _is_whole(raw: Bytes, kind: Bytes, owner: Int, first: Int) -> np.ndarray:
    """Which entry sets, by their file entries `first`, have all members: a stream, the names it counts, in
    one directory."""
    last = first + raw[first, 1]
    at = np.minimum(first + 1, len(raw) - 1)
    slots = -(-raw[at, 3].astype(np.int64) // NAME_UNITS)
    names = np.append(0, np.cumsum(kind == FILE_NAME))
    end = np.minimum(first + 2 + slots, len(raw))
    whole: np.ndarray = (
        (last < len(raw)) & (owner[np.minimum(last, len(raw) - 1)] == owner[first]) & (kind[at] == STREAM)
        & (slots > 0) & (raw[first,
                1] >= 1 + slots) & (names[end] - names[np.minimum(first + 2, len(raw))] == slots)
    )  # fmt: skip
    return whole


def _names(raw: Bytes, first: Int) -> Ragged:
    length = raw[first + 1, 3].astype(np.int64)
    row, step = expand(-(-length // NAME_UNITS))
    text = np.ascontiguousarray(raw[first[row] + 2 + step, 2:]).view("<u2")
    keep = np.arange(NAME_UNITS) < (length[row] - step * NAME_UNITS)[:, None]
    return utf8(text[keep], length)


def _checksums(raw: Bytes, first: Int, count: np.ndarray) -> np.ndarray:
    """The checksum of each entry set, all sets a byte at a time: 96 steps for short names, 608 for the
    longest."""
    order = np.argsort(-count.astype(np.int64), kind="stable")
    length = (count[order].astype(np.int64) + 1) * ENTRY
    flat, start = raw.reshape(-1), first[order] * ENTRY
    total = np.zeros(len(first), np.uint16)
    for at in range(int(length.max(initial=0))):
        if at not in (2, 3):  # SetChecksum itself
            n = len(length) if at < 3 * ENTRY else int(np.searchsorted(-length, -at, "left"))
            total[:n] = (total[:n] << 15 | total[:n] >> 1) + flat[start[:n] + at]
    result = np.empty(len(first), np.uint16)
    result[order] = total
    return result
