"""The inode tables as columns: only records that a bitmap calls used are looked at, only their blocks read.

Sources: kernel Documentation/filesystems/ext4/{inodes,special_inodes}.rst; fs/ext4/inode.c (ext4_iget),
fs/ext4/ext4.h.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int
from virt_bmap.core.columns import take
from virt_bmap.core.layout import Field, records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext.allocator import BlockGroups, record_offsets
from virt_bmap.formats.filesystems.ext.superblock import HURD, Superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

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
    (0x28, "i_block", "V60"),
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
    (0x84, "i_ctime_extra", "<u4"), (0x8C, "i_atime_extra", "<u4"), (0x90, "i_crtime", "<i4"),
    (0x9C, "i_projid", "<u4"),
])  # fmt: skip
"""All fields, for people; what is read takes the size that the superblock gives."""
I_BLOCK = 0x28
I_BLOCK_SIZE = 60

IMMUTABLE_FL, ENCRYPT_FL, VERITY_FL = 0x10, 0x800, 0x100000
EXTENTS_FL, EA_INODE_FL, INLINE_DATA_FL = 0x80000, 0x200000, 0x10000000

BAD_BLOCKS, ROOT, BOOT_LOADER, UNDELETE, RESIZE, JOURNAL, EXCLUDE, REPLICA = 1, 2, 5, 6, 7, 8, 9, 10
RESERVED = {
    BAD_BLOCKS: "bad blocks", 3: "user quota", 4: "group quota", BOOT_LOADER: "boot loader",
    UNDELETE: "undelete directory", RESIZE: "resize inode", JOURNAL: "journal", EXCLUDE: "exclude bitmap",
    REPLICA: "replica",
}  # fmt: skip

PLAIN = {
    "mode": "i_mode", "uid": "i_uid", "gid": "i_gid", "size": "i_size_lo", "nlink": "i_links_count",
    "flags": "i_flags", "mtime_ns": "i_mtime", "sectors": "i_blocks_lo", "acl": "i_file_acl_lo",
}  # fmt: skip
"""Columns and the fields that they begin with."""
COLUMNS = {
    "mode": "u2", "uid": "i8", "gid": "i8", "size": "i8", "nlink": "i8", "flags": "u4", "mtime_ns": "i8",
    "sectors": "u4", "acl": "i8", "translator": "u4", "block": f"{I_BLOCK_SIZE}u1",
}  # fmt: skip
"""The columns that come from records: as wide as the tables have them, or else as the disk."""
BATCH = 8 << 20
"""Bytes of inode tables read at a time: 32,768 records of the usual size, and few waits for a slow disk."""
COPIED = 2 << 20
"""The same where reading is only a copy: few enough to stay in the processor's own cache while field after
field is read."""
MAX_SIZE = 1 << 62
LATEST = (1 << 63) // 1_000_000_000 - 2
"""Seconds in the year 2262: the last that a count of nanoseconds since 1970 holds. ext4 goes on until
2446."""


class Inodes(NamedTuple):
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

    def take(self, keep: np.ndarray) -> "Inodes":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


class Bodies(NamedTuple):
    """Whole records, (n, inode_size) bytes, of the inodes with inline data."""

    number: Int
    data: Bytes


def read_inodes(
    reader: Reader, superblock: Superblock, groups: BlockGroups, numbers: Int, damage: Damage
) -> tuple[Inodes, Bodies]:
    """The records of these inodes, sorted by number."""
    size = superblock.block_size
    offset = record_offsets(superblock, groups, numbers)
    if (offset < 0).any():
        numbers, offset = numbers[offset >= 0], offset[offset >= 0]
    blocks = offset // size
    new = np.append(True, blocks[1:] != blocks[:-1])[: len(blocks)]
    wanted, rank = blocks[new], np.cumsum(new) - 1
    columns = _room(len(numbers)) | {"number": numbers, "offset": offset}
    inline, bodies = [EMPTY], [np.zeros((0, superblock.inode_size), np.uint8)]
    for part, batch in reader.batches(wanted * size, size, BATCH, COPIED):
        low, high = np.searchsorted(rank, [part.start, part.stop]).tolist()
        data = batch.reshape(-1, superblock.inode_size)
        if high - low < len(data):  # not every record of these blocks is in use
            place = (rank[low:high] - part.start) * size + offset[low:high] % size
            data = data[place // superblock.inode_size]
        _take_apart(superblock, data, {name: columns[name][low:high] for name in COLUMNS})
        if superblock.has("inline_data"):
            found = np.flatnonzero(columns["flags"][low:high] & INLINE_DATA_FL)
            inline.append(numbers[low:high][found])
            bodies.append(data[found])
    columns = _without_empty(superblock, columns)
    huge = (columns["size"] < 0) | (columns["size"] > MAX_SIZE)
    damage.add(
        "inode",
        "[inode says that it is|inodes say that they are] larger than any file can be",
        columns["offset"][huge],
    )
    columns["size"][huge] = 0
    return Inodes(**columns), Bodies(np.concatenate(inline), np.concatenate(bodies))


def columns_of(superblock: Superblock, data: Bytes) -> dict[str, np.ndarray]:
    """The columns of Inodes that come from (n, inode_size) bytes of records, by their names."""
    columns = _room(len(data))
    _take_apart(superblock, data, columns)
    return columns


def _room(count: int) -> dict[str, np.ndarray]:
    return {name: np.empty(count, dtype) for name, dtype in COLUMNS.items()}


@cache
def _record(size: int) -> np.dtype[np.void]:
    return struct(size, INODE_FIELDS + (INODE_EXTRA_FIELDS if size >= 0x8C else []))


def _take_apart(superblock: Superblock, data: Bytes, columns: dict[str, np.ndarray]) -> None:
    """Fill the columns in place, each field read once: high halves that are all zero, as nearly always, cost
    a look."""
    extra = superblock.inode_size >= 0x8C
    raw = records(data, _record(superblock.inode_size))
    hurd = superblock.number("s_creator_os") == HURD
    for name, field in PLAIN.items():
        columns[name][...] = raw[field]
    for name, high, shift in (
        ("uid", "l_i_uid_high", 16),
        ("gid", "l_i_gid_high", 16),
        ("acl", "l_i_file_acl_high", 32),
    ):
        if not (hurd and name == "acl") and raw[high].any():
            columns[name] |= raw[high].astype(np.int64) << shift
    if raw["i_size_high"].any():
        form = columns["mode"] >> 12
        large = (form == 0o10) | ((form == 0o4) & superblock.has("large_dir"))
        columns["size"] |= np.where(large, raw["i_size_high"], 0).astype(np.int64) << 32
    columns["block"].view(f"V{I_BLOCK_SIZE}")[:, 0] = raw["i_block"]
    columns["translator"][...] = raw["h_i_translator"] if hurd else 0
    mtime = columns["mtime_ns"]
    more = (
        np.where(raw["i_extra_isize"] >= 0x8C - 0x80, raw["i_mtime_extra"], 0)
        if extra
        else np.zeros(1, np.uint32)
    )
    if (more & 3).any():
        mtime += (more & 3).astype(np.int64) << 32
        np.minimum(mtime, LATEST, out=mtime)
    mtime *= 1_000_000_000
    mtime += more >> 2


def _without_empty(superblock: Superblock, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the reserved numbers whose records nobody uses; they come first, so nothing else needs to be
    moved."""
    count = int(np.searchsorted(columns["number"], superblock.first_inode))
    head = {name: values[:count] for name, values in columns.items()}
    used = (
        (head["mode"] != 0) | (head["size"] != 0) | (head["sectors"] != 0) | (head["block"] != 0).any(axis=1)
    )
    keep = np.flatnonzero(used | (head["number"] == ROOT))
    gone = count - len(keep)
    for name, values in head.items():
        values[gone:] = values[keep]
        columns[name] = columns[name][gone:]
    return columns


def metadata_names(superblock: Superblock) -> dict[int, str]:
    """Inode number to name of the files that serve the filesystem itself."""
    names = {
        number: name
        for number, name in RESERVED.items()
        if number < superblock.first_inode and number not in (3, 4)
    }
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
    at, special = at[at < len(inodes.number)], special[at < len(inodes.number)]
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
    flags = np.where((inodes.nlink == 0) & own, np.int32(tables.I_DELETED), np.int32(0))
    for bit, meaning in (
        (ENCRYPT_FL, tables.I_ENCRYPTED),
        (IMMUTABLE_FL, tables.I_IMMUTABLE),
        (VERITY_FL, tables.I_VERITY),
    ):
        flags[inodes.flags & bit != 0] |= meaning
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=types, mode=inodes.mode, uid=inodes.uid, gid=inodes.gid,
        size=inodes.size, nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=flags,
        record_offset=inodes.offset,
    )  # fmt: skip
