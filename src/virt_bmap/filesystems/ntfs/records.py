"""MFT records, a batch at a time: update sequences undone, attributes found, and what they say put into columns.

Sources: ntfs-3g libntfs-3g/mst.c (update sequences), attrib.c ntfs_external_attr_find(), mft.c ntfs_mft_record_check().
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from virt_bmap.arrays import EMPTY, Bool, Bytes, Int, gather
from virt_bmap.filesystems.ntfs import structures as ntfs
from virt_bmap.filesystems.ntfs.runs import MAX_BYTES
from virt_bmap.filesystems.ntfs.text import Units, utf8
from virt_bmap.layout import records, struct

FILETIME_OF_1970, FILETIME_MAX = 116444736000000000, 116444736000000000 + (2**63 - 1) // 100
NO_TIME = np.iinfo(np.int64).min
KEPT_RESIDENT = (ntfs.DATA, ntfs.INDEX_ROOT, ntfs.REPARSE_POINT, ntfs.EA, ntfs.LOGGED_UTILITY_STREAM)
"""Attributes whose value is told apart from the record it lies in; the others are part of what the record itself is."""


@dataclass
class Records:
    """One row for each record of the $MFT, by number. `usable`: a whole record, in use or not; `torn`: its update sequence does not fit;
    `damaged`: an attribute breaks the rules, and what follows it in the record is lost. `base` is the raw reference to the base record."""

    usable: Bool
    torn: Bool
    damaged: Bool
    in_use: Bool
    directory: Bool
    sequence: Int
    base: Int
    mtime_ns: Int
    file_attributes: Int
    usa_ofs: Int


@dataclass
class Attributes:
    """One row for each attribute that owns bytes. `data_size` and `initialized_size` are 0 where another piece of it has them.

    `value`: where a resident value begins in its record, -1 for others. `pairs` are all run lists, one after the other, each
    of `pairs_length` bytes. `start` is the number in the first eight bytes of a resident value, 0 where it has fewer.
    """

    record: Int
    type: Int
    flags: Int
    lowest_vcn: Int
    highest_vcn: Int
    compression_unit: Int
    data_size: Int
    initialized_size: Int
    value: Int
    start: Int
    pairs_length: Int
    name: pa.Array
    pairs: Bytes

    def __len__(self) -> int:
        return len(self.record)

    def take(self, rows: Int) -> "Attributes":
        """Some of the attributes, with their run lists."""
        starts = np.cumsum(self.pairs_length) - self.pairs_length
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("name", "pairs")}
        return Attributes(
            **{name: column[rows] for name, column in columns.items()}, name=self.name.take(pa.array(rows)),
            pairs=gather(self.pairs, starts[rows], self.pairs_length[rows]),
        )  # fmt: skip

    def named(self, rows: Int) -> Bool:
        """Which of these attributes have a name."""
        lengths: Bool = pc.binary_length(self.name.take(pa.array(rows))).to_numpy() > 0
        return lengths


@dataclass
class Names:
    """One row for each $FILE_NAME but those for DOS only; `parent` is the raw reference to the directory."""

    record: Int
    parent: Int
    name: pa.Array


@dataclass
class Batch:
    """What a stretch of the $MFT says, from record `first` on."""

    first: int
    records: Records
    attributes: Attributes
    names: Names


Columns = TypeVar("Columns", Records, Attributes, Names)


def concat(parts: Sequence[Columns]) -> Columns:
    """Columns of batches, one after the other."""
    first = parts[0]

    def join(name: str) -> Any:
        pieces = [getattr(part, name) for part in parts]
        return pa.chunked_array(pieces) if isinstance(pieces[0], pa.Array) else np.concatenate(pieces)

    return type(first)(**{field.name: join(field.name) for field in fields(first)})


class Buffer:
    """A copy of records that may be changed, with room behind them so that a header can be looked at anywhere."""

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
        """One structure at each place, which may be anywhere. As opaque items they are copied whole: twice as fast as byte by byte."""
        whole = np.dtype((np.void, dtype.itemsize))
        view = np.lib.stride_tricks.as_strided(
            self.bytes[: dtype.itemsize].view(whole), (len(self.bytes) - dtype.itemsize + 1,), (1,), writeable=False
        )
        found: NDArray[np.void] = view[at].view(dtype)
        return found

    def text(self, at: Int, units: Int) -> Units:
        """UTF-16 units, those of all places (even) one after the other. Half the work of gathering bytes, a quarter with int32."""
        ends = np.cumsum(units)
        shift = ((at >> 1) - (ends - units)).astype(np.int32)
        index = np.repeat(shift, units)
        index += np.arange(len(index), dtype=np.int32)
        found: Units = self.bytes.view("<u2")[index]
        return found


def parse(data: Bytes, first: int, size: int, held: Bytes | None = None) -> Batch:
    """Records of `size` bytes, numbered from `first`. `held` is memory to work in."""
    buffer = Buffer(data, size, held)
    heads = records(buffer.records, ntfs.MFT_RECORD)
    whole, torn = undo_update_sequence(buffer, heads)
    row, at, broken = attributes(buffer, heads, np.flatnonzero(whole))
    header = buffer.window(at, ntfs.ATTR_RECORD)
    kind, resident = header["type"], header["non_resident"] == 0
    value_end = header["value_offset"].astype(np.int64) + header["value_length"]
    wrong = resident & (value_end > header["length"])
    broken[row[wrong]] = True

    mtime = np.full(buffer.count, NO_TIME, np.int64)
    mine = np.flatnonzero((kind == ntfs.STANDARD_INFORMATION) & resident & ~wrong & (header["value_length"] >= 48))
    standard = buffer.window(at[mine] + header["value_offset"][mine], ntfs.STANDARD_INFORMATION_VALUE)
    mtime[row[mine]] = _times(standard["last_data_change_time"])
    file_attributes = np.zeros(buffer.count, np.int64)
    file_attributes[row[mine]] = standard["file_attributes"]
    mine = np.flatnonzero((kind == ntfs.FILE_NAME) & resident & ~wrong)
    names = _names(buffer, row[mine], at[mine] + header["value_offset"][mine], header["value_length"][mine], broken)
    mine = np.flatnonzero(~resident | (np.isin(kind, KEPT_RESIDENT) & ~wrong))
    found = _attributes(buffer, row[mine], at[mine], header[mine], broken)
    found.record += first
    names.record += first
    flags = heads["flags"]
    return Batch(
        first,
        Records(
            usable=whole, torn=torn, damaged=broken, in_use=whole & (flags & ntfs.IN_USE != 0),
            directory=whole & (flags & ntfs.IS_DIRECTORY != 0), sequence=heads["sequence_number"].astype(np.int64),
            base=heads["base_mft_record"].astype(np.int64), mtime_ns=mtime, file_attributes=file_attributes, usa_ofs=heads["usa_ofs"].astype(np.int64),
        ),
        found, names,
    )  # fmt: skip


def undo_update_sequence(buffer: Buffer, heads: NDArray[np.void]) -> tuple[Bool, Bool]:
    """Put back the last two bytes of every 512. Returns (whole, torn): records that are good, and those whose sequence does not fit.

    A record without the word FILE is neither: it was never used, or its place was overwritten.
    """
    strides = buffer.size // ntfs.STRIDE
    is_file = heads["magic"] == ntfs.MAGIC_FILE
    start, count = heads["usa_ofs"].astype(np.int64), heads["usa_count"]
    whole = is_file & (count == strides + 1) & (start % 2 == 0) & (start >= 0x28) & (start + 2 * (strides + 1) <= ntfs.STRIDE - 2)
    words = buffer.records.view("<u2")
    row = np.flatnonzero(whole)
    first = start[row] // 2
    number = words[row, first]
    for stride in range(1, strides + 1):
        last = stride * (ntfs.STRIDE // 2) - 1
        fits = words[row, last] == number
        words[row, last] = np.where(fits, words[row, first + stride], words[row, last])
        whole[row[~fits]] = False
    return whole, is_file & ~whole


def attributes(buffer: Buffer, heads: NDArray[np.void], row: Int) -> tuple[Int, Int, Bool]:
    """(record, place in the buffer) of every attribute of the records `row`, and which records break off.

    One cursor a record; as many steps as the fullest record has attributes.
    """
    words = buffer.bytes.view("<u4")
    broken = np.zeros(buffer.count, bool)
    used = np.minimum(heads["bytes_in_use"][row].astype(np.int64), buffer.size)
    at, end = row * buffer.size + heads["attrs_offset"][row], row * buffer.size + used
    start_is_good = heads["attrs_offset"][row] % 8 == 0
    broken[row[~start_is_good]] = True
    row, at, end = row[start_is_good], at[start_is_good], end[start_is_good]
    rows, places = [EMPTY], [EMPTY]
    while len(row):
        index = np.minimum(at, end) >> 2
        kind, length = words[index], words[index + 1].astype(np.int64)
        room = end - at
        good = (length >= ntfs.RESIDENT_HEADER) & (length % 8 == 0) & (length <= room)
        last = (kind == ntfs.ATTR_END) & (room >= 4)
        broken[row[~good & ~last]] = True
        go = good & ~last
        row, at, end = row[go], at[go], end[go]
        rows.append(row)
        places.append(at)
        at = at + length[go]
    return np.concatenate(rows), np.concatenate(places), broken


def _times(time: NDArray[np.uint64]) -> Int:
    """FILETIME, 100 ns since 1601, to nanoseconds since 1970; what int64 can't hold is no time."""
    fits = (time > 0) & (time <= FILETIME_MAX)
    return np.where(fits, (np.where(fits, time, 0).astype(np.int64) - FILETIME_OF_1970) * 100, NO_TIME)


def _names(buffer: Buffer, row: Int, at: Int, length: NDArray[np.uint32], broken: Bool) -> Names:
    """$FILE_NAME values of the records `row`, at `at` of the buffer and `length` bytes long."""
    value = buffer.window(at, ntfs.FILE_NAME_VALUE)
    units = value["file_name_length"].astype(np.int64)
    good = (length >= ntfs.FILE_NAME_VALUE.itemsize + 2 * units) & (units > 0) & (at % 2 == 0)
    broken[row[~good]] = True
    good &= value["file_name_type"] != ntfs.NAME_DOS
    value, units = value[good], units[good]
    text = buffer.text(at[good] + ntfs.FILE_NAME_VALUE.itemsize, units)
    return Names(row[good], value["parent_directory"].astype(np.int64), utf8(text, units))


START = struct(8, [(0, "start", "<i8")])


def _attributes(buffer: Buffer, row: Int, at: Int, header: NDArray[np.void], broken: Bool) -> Attributes:
    """Attributes of the records `row`, at `at` of the buffer; those that make no sense are left out and their record is `broken`."""
    resident = header["non_resident"] == 0
    length, pairs_at = header["length"].astype(np.int64), header["mapping_pairs_offset"].astype(np.int64)
    lowest, highest = header["lowest_vcn"], header["highest_vcn"]
    is_head = ~resident & (lowest == 0) & (length >= ntfs.NON_RESIDENT_HEADER)
    sizes = np.where(is_head, header["data_size"], 0), np.where(is_head, header["initialized_size"], 0)
    name_units, name_at = header["name_length"].astype(np.int64), header["name_offset"].astype(np.int64)
    good = (name_units == 0) | ((name_at + 2 * name_units <= length) & (name_at % 2 == 0))
    good &= resident | ((pairs_at >= ntfs.PAIRS_AT_LEAST) & (pairs_at <= length) & (lowest >= 0) & (lowest <= MAX_BYTES)
                        & (sizes[0] >= 0) & (sizes[0] <= MAX_BYTES) & (sizes[1] >= 0) & (sizes[1] <= MAX_BYTES))  # fmt: skip
    broken[row[~good]] = True
    keep = np.flatnonzero(good)
    row, at, header, resident, length, pairs_at = row[keep], at[keep], header[keep], resident[keep], length[keep], pairs_at[keep]
    lowest, highest, name_units = lowest[keep], highest[keep], name_units[keep]
    pairs_length = np.where(resident, 0, length - pairs_at)
    value = np.where(resident, header["value_offset"].astype(np.int64), -1)
    value_length = header["value_length"].astype(np.int64)
    has_start = resident & (value_length >= START.itemsize)
    start = np.where(has_start, buffer.window(np.where(has_start, at + value, 0), START)["start"], 0)
    text = buffer.text(at + np.where(name_units > 0, name_at[keep], 0), name_units)
    return Attributes(
        record=row, type=header["type"].astype(np.int64), flags=header["flags"].astype(np.int64),
        lowest_vcn=np.where(resident, 0, lowest), highest_vcn=np.where(resident, -1, highest),
        compression_unit=np.where(resident, 0, header["compression_unit"]).astype(np.int64),
        data_size=np.where(resident, value_length, sizes[0][keep]), initialized_size=np.where(resident, value_length, sizes[1][keep]),
        value=np.where(resident, at % buffer.size + value, -1), start=start, pairs_length=pairs_length,
        name=utf8(text, name_units), pairs=gather(buffer.bytes, at + pairs_at, pairs_length),
    )  # fmt: skip
