"""XFS on disk: records with the names and offsets of the kernel's own headers. All numbers are big endian.

Sources: fs/xfs/libxfs/xfs_format.h and xfs_da_format.h (Linux 6.12); "XFS Algorithms & Data Structures", 3rd
edition.
"""

from virt_bmap.core.layout import struct

SUPERBLOCK = struct(0x108, [
    (0x00, "sb_magicnum", "S4"),
    (0x04, "sb_blocksize", ">u4"),
    (0x08, "sb_dblocks", ">u8"),
    (0x10, "sb_rblocks", ">u8"),
    (0x20, "sb_uuid", "u1", (16,)),
    (0x30, "sb_logstart", ">u8"),
    (0x38, "sb_rootino", ">u8"),
    (0x40, "sb_rbmino", ">u8"),
    (0x48, "sb_rsumino", ">u8"),
    (0x54, "sb_agblocks", ">u4"),
    (0x58, "sb_agcount", ">u4"),
    (0x60, "sb_logblocks", ">u4"),
    (0x64, "sb_versionnum", ">u2"),
    (0x66, "sb_sectsize", ">u2"),
    (0x68, "sb_inodesize", ">u2"),
    (0x6A, "sb_inopblock", ">u2"),
    (0x6C, "sb_fname", "S12"),
    (0x78, "sb_blocklog", "u1"),
    (0x7B, "sb_inopblog", "u1"),
    (0x7C, "sb_agblklog", "u1"),
    (0x7E, "sb_inprogress", "u1"),
    (0xA0, "sb_uquotino", ">u8"),
    (0xA8, "sb_gquotino", ">u8"),
    (0xB0, "sb_qflags", ">u2"),
    (0xC0, "sb_dirblklog", "u1"),
    (0xC4, "sb_logsunit", ">u4"),
    (0xC8, "sb_features2", ">u4"),
    (0xD4, "sb_features_ro_compat", ">u4"),
    (0xD8, "sb_features_incompat", ">u4"),
    (0xDC, "sb_features_log_incompat", ">u4"),
    (0xE8, "sb_pquotino", ">u8"),
    (0xF8, "sb_meta_uuid", "u1", (16,)),
])  # fmt: skip

# sb_versionnum
VERSION_NUMBITS, VERSION_DIRV2BIT, VERSION_BORGBIT, VERSION_MOREBITSBIT = 0x000F, 0x2000, 0x4000, 0x8000
VERSION_QUOTABIT = 0x0040
# sb_features2
VERSION2_FEATURES = {0x0002: "lazy-count", 0x0008: "attr2", 0x0080: "projid32bit", 0x0200: "ftype"}
# version 5 masks, in mkfs.xfs' words
RO_COMPAT = {0x1: "finobt", 0x2: "rmapbt", 0x4: "reflink", 0x8: "inobtcount"}
INCOMPAT = {
    0x001: "ftype", 0x002: "sparse", 0x004: "metauuid", 0x008: "bigtime", 0x010: "needsrepair",
    0x020: "nrext64", 0x040: "exchange", 0x080: "parent", 0x100: "metadir", 0x200: "zoned",
    0x400: "zone_gaps",
}  # fmt: skip

AGF = struct(0xE0, [
    (0x00, "agf_magicnum", "S4"),
    (0x08, "agf_seqno", ">u4"),
    (0x0C, "agf_length", ">u4"),
    (0x10, "agf_bno_root", ">u4"),
    (0x14, "agf_cnt_root", ">u4"),
    (0x18, "agf_rmap_root", ">u4"),
    (0x1C, "agf_bno_level", ">u4"),
    (0x20, "agf_cnt_level", ">u4"),
    (0x24, "agf_rmap_level", ">u4"),
    (0x28, "agf_flfirst", ">u4"),
    (0x2C, "agf_fllast", ">u4"),
    (0x30, "agf_flcount", ">u4"),
    (0x58, "agf_refcount_root", ">u4"),
    (0x5C, "agf_refcount_level", ">u4"),
])  # fmt: skip

AGI = struct(0x158, [
    (0x00, "agi_magicnum", "S4"),
    (0x08, "agi_seqno", ">u4"),
    (0x0C, "agi_length", ">u4"),
    (0x14, "agi_root", ">u4"),
    (0x18, "agi_level", ">u4"),
    (0x28, "agi_unlinked", ">u4", (64,)),
    (0x148, "agi_free_root", ">u4"),
    (0x14C, "agi_free_level", ">u4"),
])  # fmt: skip

AGFL_MAGIC = b"XAFL"
AGFL_HEADER = 36
"""sizeof(struct xfs_agfl), version 5; the free list of version 4 starts at byte 0 of its sector."""

BTREE_BLOCK = struct(8, [
    (0x0, "bb_magic", "S4"),
    (0x4, "bb_level", ">u2"),
    (0x6, "bb_numrecs", ">u2"),
])  # fmt: skip
SHORT_HEADER, SHORT_CRC_HEADER = 16, 56
LONG_HEADER, LONG_CRC_HEADER = 24, 72

ALLOC_REC = struct(8, [(0, "ar_startblock", ">u4"), (4, "ar_blockcount", ">u4")])
INOBT_REC = struct(16, [(0, "ir_startino", ">u4"), (4, "ir_holemask", ">u2"), (8, "ir_free", ">u8")])
REFCOUNT_REC = struct(
    12, [(0, "rc_startblock", ">u4"), (4, "rc_blockcount", ">u4"), (8, "rc_refcount", ">u4")]
)
REFC_COWFLAG = 1 << 31
"""Set in rc_startblock of records that describe copy-on-write staging extents."""

INODES_PER_CHUNK = 64
INODES_PER_HOLEMASK_BIT = 4

DINODE_FIELDS = (
    (0x00, "di_magic", "S2"),
    (0x02, "di_mode", ">u2"),
    (0x04, "di_version", "u1"),
    (0x05, "di_format", "u1"),
    (0x06, "di_onlink", ">u2"),
    (0x08, "di_uid", ">u4"),
    (0x0C, "di_gid", ">u4"),
    (0x10, "di_nlink", ">u4"),
    (0x18, "di_big_nextents", ">u8"),
    (0x28, "di_mtime", ">u8"),
    (0x38, "di_size", ">u8"),
    (0x4C, "di_nextents", ">u4"),
    (0x50, "di_anextents", ">u2"),
    (0x52, "di_forkoff", "u1"),
    (0x53, "di_aformat", "u1"),
    (0x5A, "di_flags", ">u2"),
    (0x60, "di_next_unlinked", ">u4"),
)
DINODE = struct(100, DINODE_FIELDS)
"""Inode versions 1 and 2: the literal area (the two forks) follows at once."""
DINODE3 = struct(176, (*DINODE_FIELDS, (0x78, "di_flags2", ">u8"), (0x98, "di_ino", ">u8")))

DINODE_MAGIC = b"IN"
FMT_DEV, FMT_LOCAL, FMT_EXTENTS, FMT_BTREE = range(4)
DIFLAG_REALTIME, DIFLAG_IMMUTABLE = 0x1, 0x8
DIFLAG2_BIGTIME, DIFLAG2_NREXT64 = 0x8, 0x10
BIGTIME_EPOCH_NS = (1 << 31) * 1_000_000_000
"""di_mtime with bigtime counts nanoseconds from December 1901."""
NULLAGINO = 0xFFFFFFFF

BMBT_REC_SIZE = 16
"""struct xfs_bmbt_rec: 1 bit unwritten, 54 bits startoff, 52 bits startblock, 21 bits blockcount."""
MAX_BMBT_BLOCKS = (1 << 21) - 1

DIR2_LEAF_OFFSET = 1 << 35
DIR2_FREE_OFFSET = 1 << 36
"""Bytes in the directory's own address space: names below the first, the hash index up to the second, the
free-space index after that."""
DIR2_MAGICS = {b"XD2B": (16, True), b"XD2D": (16, False), b"XDB3": (64, True), b"XDD3": (64, False)}
"""Magic: (header size, with a block tail: the whole directory in one block)."""
DIR2_FREE_TAG = 0xFFFF

SYMLINK_HEADER = 56
"""sizeof(struct xfs_dsymlink_hdr), version 5."""
