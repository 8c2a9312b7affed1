"""File entries as columns, and the extents that their allocation descriptors make.

Sources: ECMA-167 4/14.6 (ICB tags), 4/14.9 and 4/14.17 (file entries, extended ones), 4/14.5 (continuation of
allocation descriptors), 4/14.14 (the descriptors), 1/7.3 (timestamps); OSTA UDF 2.60, 2.3.6; Linux
fs/udf/inode.c (v6.12).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, ints, joined
from virt_bmap.core.columns import stack
from virt_bmap.core.layout import records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.udf.superblock import ALLOCATION, LogicalVolume, tagged
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR

INDIRECT, FILE, UNALLOCATED, EXTENDED = 259, 261, 263, 266
SHORT, LONG, WIDE, EMBEDDED = range(4)
AD_SIZE = np.array([8, 16, 20, 1])
WRITTEN, ALLOCATED, HOLE, CONTINUED = range(4)
STRATEGY, WRITTEN_ONCE = 4, 4096
MAX_REPLACED = 1024
"""ICBs that one after the other took another's place: UDF_MAX_ICB_NESTING of fs/udf/inode.c."""
VAT_150, DIRECTORY, SYMLINK, STREAMS, VAT = 0, 4, 12, 13, 248
MODES = {4: 0o4, 5: 0o10, 6: 0o6, 7: 0o2, 9: 0o1, 10: 0o14, 12: 0o12, 249: 0o10}
"""File types of the ICB tag, as the upper bits of st_mode."""
BATCH = 16 << 20
MAX_CONTINUED = 65536
NO_TIME = np.iinfo(np.int64).min

COMMON = struct(56, [
    (0, "TagIdentifier", "<u2"), (20, "StrategyType", "<u2"), (27, "FileType", "u1"), (34, "Flags", "<u2"),
    (36, "Uid", "<u4"), (40, "Gid", "<u4"), (44, "Permissions", "<u4"), (48, "FileLinkCount", "<u2"),
])  # fmt: skip
FILE_ENTRY = struct(
    176,
    [
        (56, "InformationLength", "<u8"),
        (84, "ModificationTime", "V12"),
        (112, "AttributeICB", "<u4"),
        (116, "AttributeBlock", "<u4"),
        (120, "AttributePartition", "<u2"),
        (168, "EALength", "<u4"),
        (172, "ADLength", "<u4"),
    ],
)
EXTENDED_ENTRY = struct(216, [
    (56, "InformationLength", "<u8"), (92, "ModificationTime", "V12"), (136, "AttributeICB", "<u4"),
    (140, "AttributeBlock", "<u4"), (144, "AttributePartition", "<u2"), (152, "StreamICB", "<u4"),
    (156, "StreamBlock", "<u4"), (160, "StreamPartition", "<u2"), (208, "EALength", "<u4"),
    (212, "ADLength", "<u4"),
])  # fmt: skip
CONTINUATION = struct(24, [(0, "TagIdentifier", "<u2"), (20, "ADLength", "<u4")])
INDIRECT_ENTRY = struct(52, [
    (0, "TagIdentifier", "<u2"), (36, "Length", "<u4"), (40, "Block", "<u4"), (44, "Partition", "<u2"),
])  # fmt: skip
UNALLOCATED_ENTRY = struct(40, [(0, "TagIdentifier", "<u2"), (34, "Flags", "<u2"), (36, "ADLength", "<u4")])
TIMESTAMP = struct(12, [
    (0, "TypeAndTimezone", "<u2"), (2, "Year", "<i2"), (4, "Month", "u1"), (5, "Day", "u1"),
    (6, "Hour", "u1"), (7, "Minute", "u1"), (8, "Second", "u1"), (9, "Centiseconds", "u1"),
    (10, "HundredsOfMicroseconds", "u1"), (11, "Microseconds", "u1"),
])  # fmt: skip


@dataclass
class FileEntries:
    """One row for each file entry that is whole.

    `inode` is the byte of the volume at which its ICB lies, `record` that of its newest entry, `partition`
    the reference that it was reached by.
    """

    inode: Int
    record: Int
    partition: Int
    file_type: Int
    size: Int
    mode: Int
    uid: Int
    gid: Int
    nlink: Int
    mtime_ns: Int


@dataclass
class Extents:
    """What the entries are made of, by entry and offset.

    `owner` is a position in the entries. `start` is a byte of the volume; embedded content lies in the ICB.
    """

    owner: Int
    file_offset: Int
    start: Int
    length: Int
    unwritten: Int
    embedded: Int


@dataclass
class EntryBatch:
    """A batch of ICBs: entries, extents, the blocks with further allocation descriptors and those of ICBs
    beside the newest entry, both as (start, inode), and the ICBs of stream directories and of extended
    attributes as (inode, partition, block)."""

    entries: FileEntries
    extents: Extents
    continued: tuple[Int, Int]
    linked: tuple[Int, Int]
    beside: tuple[Int, Int, Int]


def read_entries(
    reader: Reader, volume: LogicalVolume, partition: Int, block: Int, damage: Damage
) -> Iterator[EntryBatch]:
    """The entries at these blocks of partitions, each block once, in bounded batches."""
    place = volume.places(partition, block)
    damage.add(
        "outside",
        "[ICB lies outside its|ICBs lie outside their] partition",
        (block * volume.block_size)[place < 0],
    )
    there = np.flatnonzero(place >= 0)
    place, first = np.unique(place[there], return_index=True)
    partition, block = partition[there[first]], block[there[first]]
    step = max(1, BATCH // volume.block_size)
    for at in range(0, len(place), step):
        mine = slice(at, at + step)
        yield _batch(reader, volume, partition[mine], block[mine], place[mine], damage)


def _batch(
    reader: Reader, volume: LogicalVolume, partition: Int, block: Int, place: Int, damage: Damage
) -> EntryBatch:
    """What the blocks at `place` hold. All rows are read as both kinds of entry, which agree on the first 56
    bytes; `field` takes each row's own. Of five blocks of 2048 bytes:

        block        tag  strategy  kept  attributes at  descriptors at  end
        a file       261      4     yes        176            176        184   one short descriptor
        a directory  266      4     yes        216            216        300   84 bytes of names, embedded
        a file       266      4     yes        216            316        324   100 bytes of attributes
        any          261      1      no                                        "unsupported"
        zeroes         0             no                                        damage "inode"
    """
    data, newest, linked = _newest(reader, volume, partition, block, place, damage)
    common = records(data, COMMON)
    extended = common["TagIdentifier"] == EXTENDED
    good = tagged(data) & (extended | (common["TagIdentifier"] == FILE))
    damage.add(
        "inode",
        "[block that should hold a file entry does|blocks that should hold file entries do] not",
        place[~good],
    )
    other = good & ~np.isin(common["StrategyType"], (STRATEGY, WRITTEN_ONCE))
    damage.add(
        "unsupported",
        "[ICB has|ICBs have] a strategy other than 4 and 4096, which is not supported",
        place[other],
        severity=ERROR,
    )
    rows = np.flatnonzero(good & ~other)
    data = data[rows]
    common = common[rows]
    extended = extended[rows]
    partition = partition[rows]
    place, newest = place[rows], newest[rows]
    plain, wide = records(data, FILE_ENTRY), records(data, EXTENDED_ENTRY)

    def field(name: str) -> np.ndarray:
        return np.where(extended, wide[name], plain[name])

    other = [
        (field("AttributeICB"), field("AttributePartition"), field("AttributeBlock")),
        (wide["StreamICB"] * extended, wide["StreamPartition"], wide["StreamBlock"]),
    ]
    there = [np.flatnonzero(length & 0x3FFFFFFF) for length, _, _ in other]
    beside = tuple(
        np.concatenate(column)
        for column in (
            [place[rows] for rows in there],
            [one[1][rows].astype(np.int64) for one, rows in zip(other, there, strict=True)],
            [one[2][rows].astype(np.int64) for one, rows in zip(other, there, strict=True)],
        )
    )
    head, attributes, length = (
        np.where(extended, 216, 176),
        field("EALength").astype(np.int64),
        field("ADLength").astype(np.int64),
    )
    fits = head + attributes + length <= volume.block_size
    damage.add("inode", "file [entry is longer than its|entries are longer than their] block", place[~fits])
    length = np.where(fits, length, 0)
    size = field("InformationLength")
    huge = size > np.uint64(1 << 62)
    damage.add(
        "inode", "[file says that it is|files say that they are] larger than any file can be", place[huge]
    )
    kind, permissions, flags = (
        common["FileType"].astype(np.int64),
        common["Permissions"].astype(np.int64),
        common["Flags"].astype(np.int64),
    )
    mode = (
        (permissions & 7)
        | (permissions >> 5 & 7) << 3
        | (permissions >> 10 & 7) << 6
        | (flags >> 6 & 1) << 11
        | (flags >> 7 & 1) << 10
        | (flags >> 8 & 1) << 9
    )
    upper = np.zeros(256, np.int64)
    upper[list(MODES)] = list(MODES.values())
    stamps = (
        np.where(extended, wide["ModificationTime"], plain["ModificationTime"]).view(np.uint8).reshape(-1, 12)
    )
    entries = FileEntries(
        place, newest, partition, kind, np.where(huge, 0, size).astype(np.int64), mode | upper[kind] << 12,
        _identity(common["Uid"]), _identity(common["Gid"]), common["FileLinkCount"].astype(np.int64),
        times(stamps),
    )  # fmt: skip
    start = np.arange(len(rows)) * volume.block_size + head + attributes
    lists = _Lists(np.arange(len(rows)), flags & 7, partition, data.reshape(-1), start, length)
    extents, continued = _extents(reader, volume, lists, place, damage)
    embedded = np.flatnonzero((flags & 7 == EMBEDDED) & (length > 0))
    inside = Extents(
        embedded,
        embedded * 0,
        newest[embedded] + (head + attributes)[embedded],
        length[embedded],
        embedded * 0,
        embedded * 0 + 1,
    )
    return EntryBatch(
        entries, stack(Extents, [extents, inside]), continued, linked, (beside[0], beside[1], beside[2])
    )


def _newest(
    reader: Reader, volume: LogicalVolume, partition: Int, block: Int, place: Int, damage: Damage
) -> tuple[Bytes, Int, tuple[Int, Int]]:
    """The blocks of the newest entries of ICBs, where each lies, and the other blocks of the ICBs as (start,
    inode).

    On media that are written once (strategy 4096) an ICB has a second block, which leads to the ICB that took
    its place, if any:

        block    7                 8                     20             21
        holds    entry, replaced   indirect entry: 20    entry, newest  nothing, or a terminal entry
    """
    data, newest = reader.read_blocks(place, volume.block_size), place.copy()
    partition, block, seen = partition.copy(), block.copy(), place
    starts, owners = [EMPTY], [EMPTY]
    rows = np.arange(len(place))
    for _ in range(MAX_REPLACED):
        rows = rows[tagged(data[rows]) & (records(data[rows], COMMON)["StrategyType"] == WRITTEN_ONCE)]
        second = volume.places(partition[rows], block[rows] + 1)
        rows, second = rows[second >= 0], second[second >= 0]
        if not len(rows):
            break
        starts.append(second)
        owners.append(place[rows])
        found = reader.read_blocks(second, volume.block_size)
        head = records(found, INDIRECT_ENTRY)
        leads = tagged(found) & (head["TagIdentifier"] == INDIRECT) & (head["Length"] & 0x3FFFFFFF > 0)
        rows, head = rows[leads], head[leads]
        to, next_block = head["Partition"].astype(np.int64), head["Block"].astype(np.int64)
        at = volume.places(to, next_block)
        fresh = (at >= 0) & ~np.isin(at, seen)
        fresh[np.setdiff1d(np.arange(len(at)), np.unique(at, return_index=True)[1])] = False
        what = "[ICB leads|ICBs lead] out of the partition, or to one that was read before"
        damage.add("inode", what, newest[rows[~fresh]])
        rows, at = rows[fresh], at[fresh]
        partition[rows], block[rows] = to[fresh], next_block[fresh]
        starts.append(newest[rows])
        owners.append(place[rows])
        seen, newest[rows] = np.append(seen, at), at
        data[rows] = reader.read_blocks(at, volume.block_size)
    return data, newest, (np.concatenate(starts), np.concatenate(owners))


def _identity(values: np.ndarray) -> Int:
    """User and group ids; all ones mean none."""
    return np.where(values == 0xFFFFFFFF, -1, values.astype(np.int64))


def times(stamps: Bytes) -> Int:
    """Timestamps, shape (n, 12), as nanoseconds since 1970 UTC; what is not a time gives NO_TIME."""
    one = records(stamps, TIMESTAMP)
    year, month, day = (one[name].astype(np.int64) for name in ("Year", "Month", "Day"))
    good = (
        (year >= 1678)
        & (year < 2262)
        & (month >= 1)
        & (month <= 12)
        & (day >= 1)
        & (day <= 31)
        & (one["Hour"] < 24)
        & (one["Minute"] < 60)
        & (one["Second"] < 61)
    )
    months = np.where(good, (year - 1970) * 12 + month - 1, 0)
    days = months.astype("M8[M]").astype("M8[D]").astype(np.int64) + day - 1
    zone = one["TypeAndTimezone"].astype(np.int64) & 0xFFF
    zone = np.where(zone >= 0x800, zone - 0x1000, zone)
    zone = np.where((zone == -2047) | (np.abs(zone) > 1440), 0, zone)
    seconds = (
        days * 86400
        + one["Hour"].astype(np.int64) * 3600
        + (one["Minute"].astype(np.int64) - zone) * 60
        + one["Second"]
    )
    micro = (
        one["Centiseconds"].astype(np.int64) * 10000
        + one["HundredsOfMicroseconds"].astype(np.int64) * 100
        + one["Microseconds"]
    )
    return np.where(good, seconds * 1_000_000_000 + micro * 1000, NO_TIME)


# ---- allocation descriptors --------------------------------------------------------------------------------


@dataclass
class _Lists:
    """Lists of allocation descriptors, each `length` bytes from `start` of `data` on.

    `kind` is SHORT, LONG or WIDE; short ones mean their own `partition`.
    """

    owner: Int
    kind: Int
    partition: Int
    data: Bytes
    start: Int
    length: Int


def _extents(
    reader: Reader, volume: LogicalVolume, lists: _Lists, place: Int, damage: Damage
) -> tuple[Extents, tuple[Int, Int]]:
    """All extents of the lists and of the blocks in which they go on; and these blocks, as (start, inode)."""
    owner, partition, block, length, what = [EMPTY], [EMPTY], [EMPTY], [EMPTY], [EMPTY]
    seen, holders = EMPTY, [EMPTY]
    kinds, own = lists.kind, lists.partition
    for _ in range(MAX_CONTINUED):
        found = _descriptors(lists)
        goes_on = found[4] == CONTINUED
        for column, values in zip((owner, partition, block, length, what), found, strict=True):
            column.append(values[~goes_on])
        at = volume.places(found[1][goes_on], found[2][goes_on])
        mine = found[0][goes_on]
        fresh = (at >= 0) & ~np.isin(at, seen)
        fresh[np.setdiff1d(np.arange(len(at)), np.unique(at, return_index=True)[1])] = False
        damage.add(
            "extents",
            "[list|lists] of allocation descriptors [goes|go] on "
            "outside the partition, or in a block that was read before",
            (place[mine])[~fresh],
        )
        at, mine = at[fresh], mine[fresh]
        if not len(at):
            break
        seen = np.append(seen, at)
        data = reader.read_blocks(at, volume.block_size)
        head = records(data, CONTINUATION)
        good = (
            tagged(data)
            & (head["TagIdentifier"] == ALLOCATION)
            & (head["ADLength"] <= volume.block_size - CONTINUATION.itemsize)
        )
        damage.add("extents", "[block|blocks] with more allocation descriptors [is|are] damaged", at[~good])
        holders.append(mine)
        lists = _Lists(
            mine,
            kinds[mine],
            own[mine],
            data.reshape(-1),
            np.arange(len(at)) * volume.block_size + CONTINUATION.itemsize,
            np.where(good, head["ADLength"].astype(np.int64), 0),
        )
    columns = [np.concatenate(column) for column in (owner, partition, block, length, what)]
    order = np.argsort(columns[0], kind="stable")
    owners, parts, blocks, lengths, kinds_of = (column[order] for column in columns)
    ends = np.cumsum(lengths)
    base = np.append(0, ends)[np.searchsorted(owners, owners, "left")]
    offset = ends - lengths - base
    real = np.flatnonzero(kinds_of != HOLE)
    row, inside, start, size = pieces(volume, parts[real], blocks[real], lengths[real])
    short = np.zeros(len(real), np.int64)
    np.add.at(short, row, size)
    damage.add(
        "outside",
        "[extent of a file reaches out of its|extents of files reach out of their] partition",
        (place[owners[real]])[short < whole(lengths[real], volume.block_size)],
    )
    rows = real[row]
    extents = Extents(
        owners[rows],
        offset[rows] + inside,
        start,
        size,
        (kinds_of[rows] == ALLOCATED).astype(np.int64),
        rows * 0,
    )
    return extents, (seen, place[np.concatenate(holders)])


def _descriptors(lists: _Lists) -> tuple[Int, Int, Int, Int, Int]:
    """(owner, partition, block, bytes, what it is) of each descriptor, up to
    the first one without length, or one that says where the list goes on.

    A list of four short descriptors; those after the first `last` one do not count:

        bytes      2048   2048      0    512
        block         7      9      0      3
        last          .      .      x      .
        before        0      0      0      1     how many `last` ones came earlier
        kept          x      x      .      .

    >>> data = np.array([2048, 7, 2048, 9, 0, 0, 512, 3], "<u4").view(np.uint8)
    >>> one = np.zeros(1, np.int64)
    >>> _, partition, block, size, _ = _descriptors(_Lists(one, one + SHORT, one, data, one, one + 32))
    >>> block.tolist(), size.tolist()
    ([7, 9], [2048, 2048])
    """
    size = AD_SIZE[np.minimum(lists.kind, EMBEDDED)]
    count = np.where(lists.kind < EMBEDDED, lists.length // size, 0)
    row, step = expand(count)
    at = lists.start[row] + step * size[row]
    words = lists.data[at[:, None] + np.arange(8)].view("<u4") if len(at) else np.zeros((0, 2), "<u4")
    length, what = (words[:, 0] & 0x3FFFFFFF).astype(np.int64), (words[:, 0] >> 30).astype(np.int64)
    kind = lists.kind[row]
    block, partition = words[:, 1].astype(np.int64), lists.partition[row]
    far = np.flatnonzero(kind != SHORT)
    place = at[far] + np.where(kind[far] == WIDE, 12, 4)
    block[far] = lists.data[place[:, None] + np.arange(4)].view("<u4")[:, 0] if len(far) else EMPTY
    partition[far] = lists.data[place[:, None] + np.arange(4, 6)].view("<u2")[:, 0] if len(far) else EMPTY
    last = (length == 0) | (what == CONTINUED)
    before = np.cumsum(last) - last
    keep = (before == np.append(before, 0)[np.searchsorted(row, row, "left")]) & (length > 0)
    return lists.owner[row[keep]], partition[keep], block[keep], length[keep], what[keep]


def unallocated(reader: Reader, volume: LogicalVolume, partition: int, place: int) -> tuple[Int, Int]:
    """(starts, bytes) of what an unallocated space entry (ECMA-167 4/14.11) calls free."""
    data = reader.read_blocks(ints(place), volume.block_size)
    head = records(data, UNALLOCATED_ENTRY)
    length = np.minimum(head["ADLength"].astype(np.int64), volume.block_size - UNALLOCATED_ENTRY.itemsize)
    length = np.where(tagged(data) & (head["TagIdentifier"] == UNALLOCATED), length, 0)
    lists = _Lists(
        ints(0),
        head["Flags"].astype(np.int64) & 7,
        ints(partition),
        data.reshape(-1),
        ints(UNALLOCATED_ENTRY.itemsize),
        length,
    )
    _, partitions, block, size, _ = _descriptors(lists)
    _, _, start, count = pieces(volume, partitions, block, size)
    return start, count


def pieces(volume: LogicalVolume, partition: Int, block: Int, length: Int) -> tuple[Int, Int, Int, Int]:
    """(row, offset in the extent, byte of the volume, bytes) of the extents of partitions, in whole blocks,
    by row; what lies nowhere is left out."""
    size = volume.block_size
    parts: list[tuple[Int, Int, Int, Int]] = [(EMPTY, EMPTY, EMPTY, EMPTY)]
    for number, found in enumerate(volume.partitions):
        mine = np.flatnonzero(partition == number)
        low, high = block[mine], block[mine] + -(-length[mine] // size)
        first, start, count = (
            found.runs
            if found.runs
            else (np.zeros(1, np.int64), np.array([found.start]), np.array([found.length]))
        )
        begin = np.searchsorted(first + count, low, "right")
        row, step = expand(np.maximum(np.searchsorted(first, high, "left") - begin, 0))
        run = begin[row] + step
        left, right = np.maximum(low[row], first[run]), np.minimum(high[row], (first + count)[run])
        keep = right > left
        row, run, left, right = row[keep], run[keep], left[keep], right[keep]
        parts.append(
            (
                mine[row],
                (left - low[row]) * size,
                start[run] + (left - first[run]) * size,
                (right - left) * size,
            )
        )
    row, inside, place, total = joined(parts, 4)
    order = np.lexsort((inside, row))
    return row[order], inside[order], place[order], total[order]


def whole(length: Int, size: int) -> Int:
    """Lengths rounded up to blocks."""
    return -(-length // size) * size
