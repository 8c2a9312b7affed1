"""The inode tables as columns: only records that a bitmap calls used are looked at, only their blocks read.

Sources: kernel Documentation/filesystems/ext4/{inodes,special_inodes}.rst; fs/ext4/inode.c (ext4_iget), fs/ext4/ext4.h.
"""

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from virt_bmap import tables
from virt_bmap.arrays import Bytes, Int
from virt_bmap.filesystems.ext.damage import Problems, complain
from virt_bmap.filesystems.ext.groups import Groups, record_offsets
from virt_bmap.filesystems.ext.superblock import HURD, Superblock
from virt_bmap.layout import Field, records, struct
from virt_bmap.reader import Reader

INODE_FIELDS: list[Field] = [
    (0x00, "i_mode", "<u2"),
    (0x02, "i_uid", "<u2"),
    (0x04, "i_size_lo", "<u4"),
    (0x10, "i_mtime", "<i4"),
    (0x18, "i_gid", "<u2"),
    (0x1A, "i_links_count", "<u2"),
    (0x1C, "i_blocks_lo", "<u4"),
    (0x20, "i_flags", "<u4"),
    (0x24, "h_i_translator", "<u4"),
    (0x28, "i_block", "<u4", (15,)),
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
I_BLOCK = 0x28
I_BLOCK_SIZE = 60

IMMUTABLE_FL, ENCRYPT_FL, VERITY_FL = 0x10, 0x800, 0x100000
EXTENTS_FL, EA_INODE_FL, INLINE_DATA_FL = 0x80000, 0x200000, 0x10000000

BAD_BLOCKS, ROOT, BOOT_LOADER, UNDELETE, RESIZE, JOURNAL, EXCLUDE, REPLICA = 1, 2, 5, 6, 7, 8, 9, 10
RESERVED = {
    BAD_BLOCKS: "bad blocks", 3: "user quota", 4: "group quota", BOOT_LOADER: "boot loader", UNDELETE: "undelete directory",
    RESIZE: "resize inode", JOURNAL: "journal", EXCLUDE: "exclude bitmap", REPLICA: "replica",
}  # fmt: skip

BATCH = 8 << 20
"""Bytes of inode tables read at a time: they stay in the processor's cache while their fields are taken apart."""
MAX_SIZE = 1 << 62


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


@dataclass(frozen=True)
class Bodies:
    """Whole records, (n, inode_size) bytes, of the inodes with inline data."""

    number: Int
    data: Bytes


def read_inodes(
    reader: Reader, superblock: Superblock, groups: Groups, numbers: Int, problems: Problems
) -> tuple[Inodes, Bodies]:
    """The records of these inodes, sorted by number."""
    size = superblock.block_size
    offset = record_offsets(superblock, groups, numbers)
    numbers, offset = numbers[offset >= 0], offset[offset >= 0]
    blocks = offset // size
    new = np.append(True, blocks[1:] != blocks[:-1])[: len(blocks)]
    wanted, rank = blocks[new], np.cumsum(new) - 1
    step = max(1, BATCH // size)
    parts, bodies = [], [np.zeros((0, superblock.inode_size), np.uint8)]
    for at in range(0, len(wanted), step):
        part = wanted[at : at + step]
        low, high = np.searchsorted(rank, [at, at + len(part)])
        data = reader.read_blocks(part * size, size).reshape(-1, superblock.inode_size)
        row = (rank[low:high] - at) * (size // superblock.inode_size) + offset[low:high] % size // superblock.inode_size
        data = data if len(row) == len(data) else data[row]
        parts.append(_columns(superblock, data))
        if superblock.has("inline_data"):
            bodies.append(data[parts[-1]["flags"] & INLINE_DATA_FL != 0])
    if not parts:
        parts = [_columns(superblock, np.zeros((0, superblock.inode_size), np.uint8))]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    huge = (joined["size"] < 0) | (joined["size"] > MAX_SIZE)
    complain(problems, "inode-size", "inodes say that they are larger than any file can be", offset[huge])
    joined["size"] = np.where(huge, 0, joined["size"]) if huge.any() else joined["size"]
    inline = np.flatnonzero(joined["flags"] & INLINE_DATA_FL) if superblock.has("inline_data") else numbers[:0]
    found = _without_empty(superblock, Inodes(number=numbers, offset=offset, **joined))
    return found, Bodies(numbers[inline], np.concatenate(bodies))


def _columns(superblock: Superblock, data: Bytes) -> dict[str, np.ndarray]:
    """The fields of (n, inode_size) bytes of records, widened."""
    extra = superblock.inode_size >= 0x8C
    raw = records(data, struct(superblock.inode_size, INODE_FIELDS + (INODE_EXTRA_FIELDS if extra else [])))

    def wide(name: str) -> Int:
        return raw[name].astype(np.int64)

    hurd = superblock.number("s_creator_os") == HURD
    mode = wide("i_mode")
    size = wide("i_size_lo")
    large = (mode >> 12 == 0o10) | ((mode >> 12 == 0o4) & superblock.has("large_dir"))
    size += np.where(large, wide("i_size_high"), 0) << 32
    mtime = wide("i_mtime") * 1_000_000_000
    if extra:
        more = np.where(raw["i_extra_isize"] >= 0x8C - 0x80, wide("i_mtime_extra"), 0)
        mtime += ((more & 3) << 32) * 1_000_000_000 + (more >> 2)
    acl = wide("i_file_acl_lo")
    return {
        "mode": mode, "uid": wide("i_uid") | wide("l_i_uid_high") << 16, "gid": wide("i_gid") | wide("l_i_gid_high") << 16,
        "size": size, "nlink": wide("i_links_count"), "flags": wide("i_flags"), "mtime_ns": mtime,
        "sectors": wide("i_blocks_lo"), "acl": acl if hurd else acl | wide("l_i_file_acl_high") << 32,
        "translator": wide("h_i_translator") if hurd else np.zeros(len(raw), np.int64),
        "block": np.ascontiguousarray(raw["i_block"]).view(np.uint8).reshape(-1, I_BLOCK_SIZE),
    }  # fmt: skip


def _without_empty(superblock: Superblock, inodes: Inodes) -> Inodes:
    """Without the reserved numbers whose records nobody uses."""
    count = int(np.searchsorted(inodes.number, superblock.first_inode))
    head = inodes.take(np.arange(count))
    empty = (head.mode == 0) & (head.size == 0) & (head.sectors == 0) & (head.block == 0).all(axis=1) & (head.number != ROOT)
    return inodes.take(np.flatnonzero(np.append(~empty, np.ones(len(inodes) - count, bool)))) if empty.any() else inodes


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
    types[np.isin(inodes.number, list(metadata_names(superblock)))] = tables.T_METADATA
    types[(inodes.flags & EA_INODE_FL) != 0] = tables.T_METADATA
    return types


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
