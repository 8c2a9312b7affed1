"""The superblock, checked, and the arithmetic of addresses that follows from it.

XFS counts blocks in three ways: agbno, from the start of an allocation group; fsblock, with the group's
number in the bits above `agblklog`; and plainly, from the start of the volume. Everything here leaves as
bytes from the start of the volume.
"""

import uuid
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs import ondisk

MIN_BLOCK, MAX_BLOCK = 512, 65536
MIN_INODE, MAX_INODE = 256, 2048
MIN_SECTOR, MAX_SECTOR = 512, 32768
MIN_AG_BYTES = 1 << 24
"""XFS_MIN_AG_BYTES: no mkfs ever made smaller groups; a tiny number here would make millions of them."""
MAX_DIRBLOCK = 65536
UNREAD = {"metadir", "zoned", "zone_gaps"}
"""Incompatible features that change where metadata lies, and are not read yet."""


class Geometry(NamedTuple):
    """Sizes in bytes unless the name says blocks; `limit` is the end of what can be read: of the filesystem
    or of a cut off volume."""

    version: int
    block_size: int
    sector_size: int
    inode_size: int
    dirblock_size: int
    agblocks: int
    agblklog: int
    inopblog: int
    dblocks: int
    groups: int
    limit: int
    rootino: int
    features: tuple[str, ...]
    uuid: bytes
    meta_uuid: bytes
    label: str
    hidden: dict[int, str]
    logstart: int
    logblocks: int

    @property
    def size(self) -> int:
        """What the filesystem claims."""
        return self.dblocks * self.block_size

    @property
    def crc(self) -> bool:
        """Version 5: self-describing metadata with longer headers."""
        return self.version == 5

    @property
    def agi_bits(self) -> int:
        """Bits of an inode number below the group's number."""
        return self.agblklog + self.inopblog

    def has(self, feature: str) -> bool:
        """Is this feature on, in mkfs.xfs' words?"""
        return feature in self.features

    def group_offset(self, agno: Int) -> Int:
        """First byte of each group."""
        return agno * (self.agblocks * self.block_size)

    def group_blocks(self, agno: Int) -> Int:
        """Blocks in each group: the last one may be shorter, one beyond the end has none."""
        return np.clip(self.dblocks - agno * self.agblocks, 0, self.agblocks)

    def block_offset(self, fsblock: Int) -> Int:
        """First byte of each block given as fsblock."""
        agno, agbno = fsblock >> self.agblklog, fsblock & ((1 << self.agblklog) - 1)
        return (agno * self.agblocks + agbno) * self.block_size

    def holds(self, fsblock: Int, count: Int) -> Bool:
        """Do `count` blocks from `fsblock` lie in one group, and where they can be read?"""
        agno, agbno = fsblock >> self.agblklog, fsblock & ((1 << self.agblklog) - 1)
        known = (fsblock >= 0) & (agno < self.groups) & (count > 0)
        agno = np.where(known, agno, 0)
        inside = agbno + count <= self.group_blocks(agno)
        result: Bool = (
            known & inside & (self.group_offset(agno) + (agbno + count) * self.block_size <= self.limit)
        )
        return result

    def inode_offset(self, inode: Int) -> Int:
        """First byte of each inode's record."""
        agino = inode & ((1 << self.agi_bits) - 1)
        return self.group_offset(inode >> self.agi_bits) + agino * self.inode_size


def read_geometry(reader: Reader) -> Geometry:
    """The superblock of the first group. Corrupt or Unsupported where it gives no way to read the rest."""
    sb = record(reader.read_clipped(0, ondisk.SUPERBLOCK.itemsize), ondisk.SUPERBLOCK)
    version = int(sb["sb_versionnum"]) & ondisk.VERSION_NUMBITS
    if not 1 <= version <= 5:
        raise Unsupported(f"XFS version {version} at byte 0x64: only versions 1 to 5 are supported", 0x64)
    if (version >= 4 and not int(sb["sb_versionnum"]) & ondisk.VERSION_DIRV2BIT) or version < 4:
        raise Unsupported(
            "XFS with directories of version 1 (IRIX before 6.5), which are not supported", 0x64
        )
    _check_sizes(sb)
    features = _features(sb, version)
    if unread := [name for name in features if name in UNREAD or name.startswith("incompat-")]:
        raise Unsupported(
            f"XFS with {', '.join(unread)} (sb_features_incompat at byte 0xd8) is not supported", 0xD8
        )
    block, agblocks, dblocks = int(sb["sb_blocksize"]), int(sb["sb_agblocks"]), int(sb["sb_dblocks"])
    limit = min(dblocks * block, reader.size)
    return Geometry(
        version=version, block_size=block, sector_size=int(sb["sb_sectsize"]),
        inode_size=int(sb["sb_inodesize"]), dirblock_size=block << int(sb["sb_dirblklog"]), agblocks=agblocks,
        agblklog=int(sb["sb_agblklog"]), inopblog=int(sb["sb_inopblog"]), dblocks=dblocks,
        groups=min(int(sb["sb_agcount"]), -(-limit // (agblocks * block))),
        limit=limit, rootino=_inode(sb["sb_rootino"]), features=features, uuid=sb["sb_uuid"].tobytes(),
        meta_uuid=sb["sb_meta_uuid" if "metauuid" in features else "sb_uuid"].tobytes(),
        label=bytes(sb["sb_fname"]).split(b"\0")[0].decode(errors="replace"), hidden=_hidden(sb, version),
        logstart=int(sb["sb_logstart"]), logblocks=int(sb["sb_logblocks"]),
    )  # fmt: skip


def uuid_text(raw: bytes) -> str:
    """As blkid prints it."""
    return str(uuid.UUID(bytes=raw))


def _check_sizes(sb: np.void) -> None:
    """The superblock's own rules (xfs_validate_sb_common), as far as addresses depend on them."""

    def need(name: str, offset: int, good: bool, rule: str) -> None:
        if not good:
            raise Corrupt(
                f"XFS superblock: {name} at byte {offset:#x} is {int(sb[name])}, but should be {rule}", offset
            )

    def power(value: int, low: int, high: int) -> bool:
        return low <= value <= high and value & (value - 1) == 0

    block, inode = int(sb["sb_blocksize"]), int(sb["sb_inodesize"])
    agblocks, dblocks = int(sb["sb_agblocks"]), int(sb["sb_dblocks"])
    need(
        "sb_blocksize",
        0x04,
        power(block, MIN_BLOCK, MAX_BLOCK),
        f"a power of two from {MIN_BLOCK} to {MAX_BLOCK}",
    )
    need("sb_blocklog", 0x78, 1 << int(sb["sb_blocklog"]) == block, f"log2 of the block size {block}")
    need(
        "sb_sectsize",
        0x66,
        power(int(sb["sb_sectsize"]), MIN_SECTOR, MAX_SECTOR),
        f"a power of two from {MIN_SECTOR} to {MAX_SECTOR}",
    )
    need(
        "sb_inodesize",
        0x68,
        power(inode, MIN_INODE, min(MAX_INODE, block)),
        f"a power of two from {MIN_INODE} to {MAX_INODE}",
    )
    need(
        "sb_inopblog",
        0x7B,
        inode << int(sb["sb_inopblog"]) == block,
        f"log2 of {block // inode}, the inodes a block",
    )
    need("sb_agblocks", 0x54, agblocks * block >= MIN_AG_BYTES, f"{MIN_AG_BYTES // block} or more")
    log = int(sb["sb_agblklog"])
    need(
        "sb_agblklog",
        0x7C,
        log < 32 and (1 << log) >= agblocks > (1 << log) // 2,
        f"log2 of {agblocks} rounded up",
    )
    groups = -(-dblocks // agblocks)
    need(
        "sb_agcount",
        0x58,
        int(sb["sb_agcount"]) == groups and groups > 0,
        f"{groups}: {plural(dblocks, 'block')} in groups of {agblocks}",
    )
    need("sb_dblocks", 0x08, dblocks * block < 1 << 62, "less than 2^62 bytes")
    need(
        "sb_dirblklog",
        0xC0,
        block << min(int(sb["sb_dirblklog"]), 16) <= MAX_DIRBLOCK,
        f"at most {MAX_DIRBLOCK} bytes a directory block",
    )
    need("sb_inprogress", 0x7E, int(sb["sb_inprogress"]) == 0, "0: mkfs.xfs was interrupted")


def _features(sb: np.void, version: int) -> tuple[str, ...]:
    """In mkfs.xfs' words; bits that are not known as mask-0x..."""
    if version < 5:
        number = int(sb["sb_versionnum"])
        bits = int(sb["sb_features2"]) if number & ondisk.VERSION_MOREBITSBIT else 0
        names = [name for bit, name in ondisk.VERSION2_FEATURES.items() if bits & bit]
        return (f"v{version}", *(["ascii-ci"] if number & ondisk.VERSION_BORGBIT else []), *names)
    found = ["v5", "crc"] + (["ascii-ci"] if int(sb["sb_versionnum"]) & ondisk.VERSION_BORGBIT else [])
    for mask, field, known in (
        ("ro_compat", "sb_features_ro_compat", ondisk.RO_COMPAT),
        ("incompat", "sb_features_incompat", ondisk.INCOMPAT),
        ("log_incompat", "sb_features_log_incompat", {}),
    ):
        bits = int(sb[field])
        found += [name for bit, name in known.items() if bits & bit]
        found += [f"{mask}-{1 << n:#x}" for n in range(32) if bits >> n & 1 and 1 << n not in known]
    return tuple(found)


def _hidden(sb: np.void, version: int) -> dict[int, str]:
    """Inodes that no directory names, and what they hold."""
    fields = {"sb_rbmino": "realtime bitmap", "sb_rsumino": "realtime summary"}
    if int(sb["sb_versionnum"]) & ondisk.VERSION_QUOTABIT:
        # before version 5 group and project quota shared one inode; sb_qflags says which is meant
        fields |= {"sb_uquotino": "user quota", "sb_gquotino": "group quota"}
        if version == 5:
            fields["sb_pquotino"] = "project quota"
    found = {_inode(sb[field]): name for field, name in fields.items()}
    return {inode: name for inode, name in found.items() if inode > 0}


def _inode(number: int) -> int:
    """An inode number of the superblock; NULLFSINO (all ones) and what else is out of range as -1."""
    return int(number) if int(number) < 1 << 62 else -1
