"""The inode tables as columns: only records that a bitmap calls used are looked at, only their blocks read.

Sources: kernel Documentation/filesystems/ext4/{inodes,special_inodes}.rst; fs/ext4/inode.c (ext4_iget), fs/ext4/ext4.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap import tables
from virt_bmap.arrays import EMPTY, Bool, Bytes, Int
from virt_bmap.filesystems.ext.damage import Problems, complain_where
from virt_bmap.filesystems.ext.groups import Groups, record_offsets
from virt_bmap.filesystems.ext.superblock import HURD, Superblock
from virt_bmap.layout import Field, records, struct
from virt_bmap.reader import Reader

INODE_FIELDS: list[Field] = [
    (0x00, "i_mode", "<u2"),
    (0x02, "i_uid", "<u2"),
    (0x04, "i_size_lo", "<u4"),
    (0x08, "i_atime", "<i4"),
    (0x0C, "i_ctime", "<i4"),
    (0x10, "i_mtime", "<i4"),
    (0x14, "i_dtime", "<u4"),
    (0x18, "i_gid", "<u2"),
    (0x1A, "i_links_count", "<u2"),
    (0x1C, "i_blocks_lo", "<u4"),
    (0x20, "i_flags", "<u4"),
    (0x24, "h_i_translator", "<u4"),
    (0x64, "i_generation", "<u4"),
    (0x68, "i_file_acl_lo", "<u4"),
    (0x6C, "i_size_high", "<u4"),
    (0x76, "l_i_file_acl_high", "<u2"),
    (0x78, "l_i_uid_high", "<u2"),
    (0x7A, "l_i_gid_high", "<u2"),
]  # fmt: skip
INODE_EXTRA_FIELDS: list[Field] = [
    (0x80, "i_extra_isize", "<u2"),
    (0x88, "i_mtime_extra", "<u4"),
]  # fmt: skip
INODE = struct(0xA0, [
    *INODE_FIELDS, *INODE_EXTRA_FIELDS,
    (0x28, "i_block", "V60"), (0x84, "i_ctime_extra", "<u4"), (0x8C, "i_atime_extra", "<u4"), (0x90, "i_crtime", "<i4"), (0x9C, "i_projid", "<u4"),
])  # fmt: skip
"""All fields, for people; what is read takes the size that the superblock gives."""
I_BLOCK = 0x28
I_BLOCK_SIZE = 60

IMMUTABLE_FL, ENCRYPT_FL, VERITY_FL = 0x10, 0x800, 0x100000
EXTENTS_FL, EA_INODE_FL, INLINE_DATA_FL = 0x80000, 0x200000, 0x10000000

BAD_BLOCKS, ROOT, BOOT_LOADER, UNDELETE, RESIZE, JOURNAL, EXCLUDE, REPLICA = 1, 2, 5, 6, 7, 8, 9, 10
RESERVED = {
    BAD_BLOCKS: "bad blocks", 3: "user quota", 4: "group quota", BOOT_LOADER: "boot loader", UNDELETE: "undelete directory",
    RESIZE: "resize inode", JOURNAL: "journal", EXCLUDE: "exclude bitmap", REPLICA: "replica",
}  # fmt: skip

COLUMNS = ("mode", "uid", "gid", "size", "nlink", "flags", "mtime_ns", "sectors", "acl", "translator")
BATCH = 8 << 20
"""Bytes of inode tables read at a time: 32,768 records of the usual size, and few waits for a slow disk."""
AT_ONCE = 8192
"""Records that are taken apart at a time: few enough to stay in the processor's own cache while field after field is read."""
MAX_SIZE = 1 << 62
LATEST = (1 << 63) // 1_000_000_000 - 2
"""Seconds in the year 2262: the last that a count of nanoseconds since 1970 holds. ext4 goes on until 2446."""


@dataclass(frozen=True)
class Inodes:
    """Used inodes as columns, by number."""

    number: Int
    offset: Int
    """Where the record lies, in bytes."""
    mode: Int
    uid: Int
    gid: Int
    size: Int
    nlink: Int
    flags: Int
    """i_flags, as on disk."""
    mtime_ns: Int
    sectors: Int
    """i_blocks_lo: of use only to tell the two kinds of symbolic links apart."""
    acl: Int
    """Block of extended attributes, 0 for none."""
    translator: Int
    block: Bytes
    """i_block, (n, 60) bytes."""

    def __len__(self) -> int:
        return len(self.number)

    def take(self, keep: np.ndarray) -> "Inodes":
        """The rows that a boolean or index array asks for."""
        return Inodes(*(getattr(self, field.name)[keep] for field in fields(self)))


class Bodies(NamedTuple):
    """Whole records, (n, inode_size) bytes, of the inodes with inline data."""

    number: Int
    data: Bytes


def read_inodes(
    reader: Reader, superblock: Superblock, groups: Groups, numbers: Int, problems: Problems
) -> tuple[Inodes, Bodies]:
    """The records of these inodes, sorted by number."""
    size = superblock.block_size
    offset = record_offsets(superblock, groups, numbers)
    if (offset < 0).any():
        numbers, offset = numbers[offset >= 0], offset[offset >= 0]
    blocks = offset // size
    new = np.append(True, blocks[1:] != blocks[:-1])[: len(blocks)]
    wanted, rank = blocks[new], np.cumsum(new) - 1
    # one array for all columns, from the start: pieces to be joined would take twice the memory, and small arrays small pages
    table = np.empty((len(COLUMNS), len(numbers)), np.int64)
    columns: dict[str, np.ndarray] = dict(zip(COLUMNS, table, strict=True))
    columns |= {"number": numbers, "offset": offset, "block": np.empty((len(numbers), I_BLOCK_SIZE), np.uint8)}
    inline, bodies = [EMPTY], [np.zeros((0, superblock.inode_size), np.uint8)]
    for part, batch in reader.batches(wanted * size, size, BATCH):
        low, high = np.searchsorted(rank, [part.start, part.stop]).tolist()
        data = batch.reshape(-1, superblock.inode_size)
        if high - low < len(data):  # not every record of these blocks is in use
            place = (rank[low:high] - part.start) * size + offset[low:high] % size
            data = data[place // superblock.inode_size]
        for first in range(0, len(data), AT_ONCE):
            some = data[first : first + AT_ONCE]
            for name, values in _fields(superblock, some):
                columns[name][low + first : low + first + len(some)] = values
        if superblock.has("inline_data"):
            found = np.flatnonzero(columns["flags"][low:high] & INLINE_DATA_FL)
            inline.append(numbers[low:high][found])
            bodies.append(data[found])
    columns = _without_empty(superblock, columns)
    huge = (columns["size"] < 0) | (columns["size"] > MAX_SIZE)
    complain_where(problems, "inode-size", "inodes say that they are larger than any file can be", huge, columns["offset"])
    columns["size"][huge] = 0
    return Inodes(**columns), Bodies(np.concatenate(inline), np.concatenate(bodies))


def _fields(superblock: Superblock, data: Bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of Inodes that come from (n, inode_size) bytes of records."""
    extra = superblock.inode_size >= 0x8C
    raw = records(data, struct(superblock.inode_size, INODE_FIELDS + (INODE_EXTRA_FIELDS if extra else [])))
    hurd = superblock.number("s_creator_os") == HURD

    def wide(low: str, high: str = "", shift: int = 16) -> Int:
        value = raw[low].astype(np.int64)
        return value | raw[high].astype(np.int64) << shift if high else value

    mode = wide("i_mode")
    yield "mode", mode
    yield "uid", wide("i_uid", "l_i_uid_high")
    yield "gid", wide("i_gid", "l_i_gid_high")
    large = (mode >> 12 == 0o10) | ((mode >> 12 == 0o4) & superblock.has("large_dir"))
    size = wide("i_size_lo", "i_size_high", 32)
    yield "size", size if large.all() else np.where(large, size, wide("i_size_lo"))
    yield "nlink", wide("i_links_count")
    yield "flags", wide("i_flags")
    mtime = wide("i_mtime")
    if extra:
        more = np.where(raw["i_extra_isize"] >= 0x8C - 0x80, raw["i_mtime_extra"], 0).astype(np.int64)
        mtime += (more & 3) << 32
        np.minimum(mtime, LATEST, out=mtime)
        mtime *= 1_000_000_000
        mtime += more >> 2
    else:
        mtime *= 1_000_000_000
    yield "mtime_ns", mtime
    yield "sectors", wide("i_blocks_lo")
    yield "acl", wide("i_file_acl_lo") if hurd else wide("i_file_acl_lo", "l_i_file_acl_high", 32)
    yield "translator", wide("h_i_translator") if hurd else np.zeros(1, np.int64)
    yield "block", data[:, I_BLOCK : I_BLOCK + I_BLOCK_SIZE]


def _without_empty(superblock: Superblock, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the reserved numbers whose records nobody uses; they come first, so nothing else needs to be moved."""
    count = int(np.searchsorted(columns["number"], superblock.first_inode))
    head = {name: values[:count] for name, values in columns.items()}
    used = (head["mode"] != 0) | (head["size"] != 0) | (head["sectors"] != 0) | (head["block"] != 0).any(axis=1)
    keep = np.flatnonzero(used | (head["number"] == ROOT))
    gone = count - len(keep)
    for name, values in head.items():
        values[gone:] = values[keep]
        columns[name] = columns[name][gone:]
    return columns


def metadata_names(superblock: Superblock) -> dict[int, str]:
    """Inode number to name of the files that serve the filesystem itself."""
    names = {number: name for number, name in RESERVED.items() if number < superblock.first_inode and number not in (3, 4)}
    if superblock.has("has_journal") and (journal := superblock.number("s_journal_inum")):
        names[journal] = "journal"
    for feature, field, name in (
        ("quota", "s_usr_quota_inum", "user quota"), ("quota", "s_grp_quota_inum", "group quota"),
        ("quota", "s_prj_quota_inum", "project quota"), ("orphan_file", "s_orphan_file_inum", "orphan file"),
    ):  # fmt: skip
        if superblock.has(feature) and superblock.number(field):
            names[superblock.number(field)] = name
    names.pop(ROOT, None)
    return names


def types_of(superblock: Superblock, inodes: Inodes) -> np.ndarray:
    """Codes of tables.TYPES."""
    types = tables.type_of_mode(inodes.mode).copy()
    special = np.array(sorted(metadata_names(superblock)), np.int64)
    at = np.searchsorted(inodes.number, special)
    at, special = at[at < len(inodes)], special[at < len(inodes)]
    types[at[inodes.number[at] == special]] = tables.T_METADATA
    types[(inodes.flags & EA_INODE_FL) != 0] = tables.T_METADATA
    return types


def with_types(types: np.ndarray, *wanted: int) -> Bool:
    """Which of `types` are among the wanted codes."""
    table = np.zeros(len(tables.TYPES), bool)
    table[list(wanted)] = True
    found: Bool = table[types]
    return found


def table(superblock: Superblock, inodes: Inodes, types: np.ndarray) -> pa.Table:
    """The table `inodes`."""
    own = types != tables.T_METADATA
    flags = np.where((inodes.nlink == 0) & own, tables.I_DELETED, 0)
    for bit, meaning in ((ENCRYPT_FL, tables.I_ENCRYPTED), (IMMUTABLE_FL, tables.I_IMMUTABLE), (VERITY_FL, tables.I_VERITY)):
        flags |= np.where((inodes.flags & bit) != 0, meaning, 0)
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=types, mode=inodes.mode, uid=inodes.uid, gid=inodes.gid, size=inodes.size,
        nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=flags, record_offset=inodes.offset,
    )  # fmt: skip
