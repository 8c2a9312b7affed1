"""MFT records, a batch at a time: update sequences undone, attributes found, and what they say put into
columns.

Sources: ntfs-3g libntfs-3g/mst.c (update sequences), attrib.c ntfs_external_attr_find(), mft.c
ntfs_mft_record_check().
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int
from virt_bmap.core.columns import take
from virt_bmap.core.layout import records, struct
from virt_bmap.formats.common.ragged import Ragged, items, pieces
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.extents import MAX_BYTES
from virt_bmap.formats.filesystems.ntfs.text import utf8

FILETIME_OF_1970, FILETIME_MAX = 116444736000000000, 116444736000000000 + (2**63 - 1) // 100
NO_TIME = np.iinfo(np.int64).min
KEPT_RESIDENT = (ntfs.DATA, ntfs.INDEX_ROOT, ntfs.REPARSE_POINT, ntfs.EA, ntfs.LOGGED_UTILITY_STREAM)
"""Attributes whose value is told apart from the record it lies in; the others are part of what the record
itself is."""
IS_KEPT = np.isin(np.arange(max(KEPT_RESIDENT) + 2), KEPT_RESIDENT)


@dataclass
class Records:
    """One row for each record of the $MFT, by number.

    `usable`: a whole record, in use or not; `torn`: its update sequence does not fit; `damaged`: an attribute
    breaks the rules, and what follows it in the record is lost. `base` is the raw reference to the base
    record."""

    usable: Bool
    torn: Bool
    damaged: Bool
    in_use: Bool
    directory: Bool
    sequence: NDArray[np.uint16]
    base: Int
    mtime_ns: Int
    file_attributes: NDArray[np.uint32]
    usa_ofs: NDArray[np.uint16]


@dataclass
class Attributes:
    """One row for each attribute that owns bytes.

    `data_size` and `initialized_size` are 0 where another piece of it has them.

    `value`: where a resident value begins in its record, -1 for others. `start` is the number in the first
    eight bytes of a resident value, 0 where it has fewer. `pairs` are the run lists, which resident
    attributes don't have.
    """

    record: Int
    type: NDArray[np.uint32]
    flags: NDArray[np.uint16]
    lowest_vcn: Int
    highest_vcn: Int
    compression_unit: NDArray[np.uint8]
    data_size: Int
    initialized_size: Int
    value: NDArray[np.int16]
    start: Int
    name: Ragged
    pairs: Ragged

    def __len__(self) -> int:
        return len(self.record)

    def take(self, rows: Int) -> "Attributes":
        """Some of the attributes, with their run lists."""
        return take(self, rows)


@dataclass
class FileNames:
    """One row for each $FILE_NAME but those for DOS only; `parent` is the raw reference to the directory."""

    record: Int
    parent: Int
    name: Ragged


@dataclass
class Batch:
    """What a stretch of the $MFT says, from record `first` on."""

    first: int
    records: Records
    attributes: Attributes
    names: FileNames


Columns = TypeVar("Columns", Records, Attributes, FileNames)


def concat(parts: Sequence[Columns]) -> Columns:
    """Columns of batches, one after the other."""
    first = parts[0]

    def join(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return Ragged.concat(columns) if isinstance(columns[0], Ragged) else np.concatenate(columns)

    return type(first)(**{field.name: join(field.name) for field in fields(first)})


class Buffer:
    """A copy of records that may be changed, with room after them so that a header can be looked at
    anywhere."""

    def __init__(self, data: Bytes, size: int, held: Bytes | None = None) -> None:
        room = len(data) + 128
        self.bytes = held[:room] if held is not None and len(held) >= room else np.empty(room, np.uint8)
        self.bytes[: len(data)] = data
        self.bytes[len(data) :] = 0
        self.size = size
        self.count = len(data) // size

    @property
    def records(self) -> Bytes:
        """The records, shape (count, size)."""
        return self.bytes[: self.count * self.size].reshape(self.count, self.size)

    def window(self, at: Int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """One structure at each place, which may be anywhere.

        As opaque items they are copied whole: twice as fast as byte by byte.
        """
        found: NDArray[np.void] = items(self.bytes, dtype.itemsize)[at].view(dtype)
        return found

    def text(self, at: Int, units: NDArray[np.uint8]) -> Ragged:
        """The names at these places, of so many UTF-16 units."""
        return utf8(pieces(self.bytes, at, 2 * units.astype(np.uint16)).view("<u2"), units)


def parse(data: Bytes, first: int, size: int, held: Bytes | None = None) -> Batch:
    """Records of `size` bytes, numbered from `first`. `held` is memory to work in."""
    buffer = Buffer(data, size, held)
    heads = records(buffer.records, ntfs.MFT_RECORD)
    whole, torn = undo_update_sequence(buffer, heads)
    row, at, broken = attributes(buffer, heads, np.flatnonzero(whole))
    header = buffer.window(at, ntfs.ATTR_HEADER)
    kind, resident, value_length = header["type"], header["non_resident"] == 0, header["value_length"]
    value = at + header["value_offset"]
    right = resident & (header["value_offset"].astype(np.int64) + value_length <= header["length"])
    broken[row[resident & ~right]] = True

    mtime, file_attributes = np.full(buffer.count, NO_TIME, np.int64), np.zeros(buffer.count, np.uint32)
    mine = np.flatnonzero((kind == ntfs.STANDARD_INFORMATION) & right & (value_length >= 48))
    standard = buffer.window(value[mine], ntfs.STANDARD_INFORMATION_VALUE)
    mtime[row[mine]] = _times(standard["last_data_change_time"])
    file_attributes[row[mine]] = standard["file_attributes"]
    mine = np.flatnonzero((kind == ntfs.FILE_NAME) & right)
    names = _names(buffer, row[mine], value[mine], value_length[mine], broken)
    mine = np.flatnonzero(~resident | (IS_KEPT[np.minimum(kind, len(IS_KEPT) - 1)] & right))
    found = _attributes(buffer, row[mine], at[mine], broken)
    found.record += first
    names.record += first
    flags = heads["flags"]
    return Batch(
        first,
        Records(
            usable=whole, torn=torn, damaged=broken, in_use=whole & (flags & ntfs.IN_USE != 0),
            directory=whole & (flags & ntfs.IS_DIRECTORY != 0), sequence=heads["sequence_number"].copy(),
            base=heads["base_mft_record"].astype(np.int64), mtime_ns=mtime, file_attributes=file_attributes,
            usa_ofs=heads["usa_ofs"].copy(),
        ),
        found, names,
    )  # fmt: skip


def undo_update_sequence(buffer: Buffer, heads: NDArray[np.void]) -> tuple[Bool, Bool]:
    """Put back the last two bytes of every 512.

    Returns (whole, torn): records that are good, and those whose sequence does not fit.

    A record without the word FILE is neither: it was never used, or its place was overwritten.
    """
    strides = buffer.size // ntfs.STRIDE
    is_file = heads["magic"] == ntfs.MAGIC_FILE
    start, count = heads["usa_ofs"].astype(np.int64), heads["usa_count"]
    whole = (
        is_file
        & (count == strides + 1)
        & (start % 2 == 0)
        & (start >= 0x28)
        & (start + 2 * (strides + 1) <= ntfs.STRIDE - 2)
    )
    row = np.flatnonzero(whole)
    whole[row] = put_back(buffer.bytes.view("<u2"), row * buffer.size, start[row], strides)
    return whole, is_file & ~whole


def put_back(words: NDArray[np.uint16], base: Int, start: Int, strides: int) -> Bool:
    """Undo the update sequences of structures of so many strides, at bytes `base` of a buffer of words, whose
    arrays lie `start` bytes behind; which of them fit."""
    base = base // 2
    first = base + start // 2
    number, whole = words[first], np.ones(len(base), bool)
    for stride in range(1, strides + 1):
        last = base + (stride * (ntfs.STRIDE // 2) - 1)
        found = words[last]
        fits = found == number
        words[last] = np.where(fits, words[first + stride], found)
        whole &= fits
    return whole


def attributes(buffer: Buffer, heads: NDArray[np.void], row: Int) -> tuple[Int, Int, Bool]:
    """(record, place in the buffer) of every attribute of the records `row`, and which records break off.

    One cursor a record; as many steps as the fullest record has attributes.
    """
    words = buffer.bytes.view("<u8")  # type and length of an attribute, which begins at a multiple of 8
    broken = np.zeros(buffer.count, bool)
    used = np.minimum(heads["bytes_in_use"][row].astype(np.int64), buffer.size)
    at, end = row * buffer.size + heads["attrs_offset"][row], row * buffer.size + used
    start_is_good = heads["attrs_offset"][row] % 8 == 0
    broken[row[~start_is_good]] = True
    row, at, end = row[start_is_good], at[start_is_good], end[start_is_good]
    rows, places = [EMPTY], [EMPTY]
    while len(row):
        word = words[np.minimum(at, end) >> 3]
        kind, length = word.astype(np.uint32), (word >> 32).astype(np.int64)
        room = end - at
        good = (length >= ntfs.RESIDENT_HEADER) & (length % 8 == 0) & (length <= room)
        last = (kind == ntfs.ATTR_END) & (room >= 4)
        broken[row[~good & ~last]] = True
        go = good & ~last
        if not go.all():
            row, at, end, length = row[go], at[go], end[go], length[go]
        rows.append(row)
        places.append(at)
        at = at + length
    return np.concatenate(rows), np.concatenate(places), broken


def _times(time: NDArray[np.uint64]) -> Int:
    """FILETIME, 100 ns since 1601, to nanoseconds since 1970; what int64 can't hold becomes NO_TIME."""
    fits = (time > 0) & (time <= FILETIME_MAX)
    return np.where(fits, (np.where(fits, time, 0).astype(np.int64) - FILETIME_OF_1970) * 100, NO_TIME)


def _names(buffer: Buffer, row: Int, at: Int, length: NDArray[np.uint32], broken: Bool) -> FileNames:
    """$FILE_NAME values of the records `row`, at `at` of the buffer and `length` bytes long."""
    value = buffer.window(at, ntfs.FILE_NAME_VALUE)
    units = value["file_name_length"]
    good = (
        (length >= ntfs.FILE_NAME_VALUE.itemsize + 2 * units.astype(np.uint32)) & (units > 0) & (at % 2 == 0)
    )
    broken[row[~good]] = True
    keep = np.flatnonzero(good & (value["file_name_type"] != ntfs.NAME_DOS))
    return FileNames(
        row[keep],
        value["parent_directory"][keep].astype(np.int64),
        buffer.text(at[keep] + ntfs.FILE_NAME_VALUE.itemsize, units[keep]),
    )


START = struct(8, [(0, "start", "<i8")])


def _attributes(buffer: Buffer, row: Int, at: Int, broken: Bool) -> Attributes:
    """Attributes of the records `row`, at `at` of the buffer; those that make no sense are left out and their
    record is `broken`."""
    header = buffer.window(at, ntfs.ATTR_HEADER)
    units, name_at, length = header["name_length"], header["name_offset"], header["length"].astype(np.int64)
    good = (units == 0) | (
        (name_at.astype(np.int64) + 2 * units.astype(np.int64) <= length) & (name_at % 2 == 0)
    )
    listed = np.flatnonzero(header["non_resident"])
    wide = buffer.window(at[listed], ntfs.ATTR_RECORD)
    sized = (wide["lowest_vcn"] == 0) & (length[listed] >= ntfs.NON_RESIDENT_HEADER)
    sizes = {name: np.where(sized, wide[name], 0) for name in ("data_size", "initialized_size")}
    pairs_at = wide["mapping_pairs_offset"].astype(np.int64)
    good[listed] &= (pairs_at >= ntfs.PAIRS_AT_LEAST) & (pairs_at <= length[listed])
    for number in (wide["lowest_vcn"], *sizes.values()):
        good[listed] &= (number >= 0) & (number <= MAX_BYTES)
    if not good.all():
        broken[row[~good]] = True
        return _attributes(buffer, row[good], at[good], broken)

    def joined(of_resident: Any, of_listed: Any, dtype: Any = np.int64) -> np.ndarray:
        column = np.empty(len(row), dtype)
        column[:] = of_resident
        column[listed] = of_listed
        return column

    value, value_length = at + header["value_offset"], header["value_length"]
    has_start = (header["non_resident"] == 0) & (value_length >= START.itemsize)
    pairs_length = (length[listed] - pairs_at).astype(np.uint16)
    return Attributes(
        record=row, type=header["type"].copy(), flags=header["flags"].copy(),
        lowest_vcn=joined(0, wide["lowest_vcn"]), highest_vcn=joined(-1, wide["highest_vcn"]),
        compression_unit=joined(0, wide["compression_unit"], np.uint8),
        data_size=joined(value_length, sizes["data_size"]),
        initialized_size=joined(value_length, sizes["initialized_size"]),
        value=joined(value % buffer.size, -1, np.int16),
        start=np.where(has_start, buffer.window(np.where(has_start, value, 0), START)["start"], 0),
        name=buffer.text(at + name_at, units),
        pairs=Ragged(pieces(buffer.bytes, at[listed] + pairs_at, pairs_length),
            joined(0, pairs_length, np.uint16)),
    )  # fmt: skip
