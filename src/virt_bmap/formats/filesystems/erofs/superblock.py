"""The superblock, and what lies at places that it names."""

import numpy as np

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader

SUPER_OFFSET = 1024


MAGIC = 0xE0F5E1E2


SUPERBLOCK = struct(128, [
    (0, "magic", "<u4"), (8, "feature_compat", "<u4"), (12, "blkszbits", "u1"), (13, "sb_extslots", "u1"),
    (14, "root_nid", "<u2"), (16, "inos", "<u8"), (24, "build_time", "<u8"), (32, "build_time_nsec", "<u4"),
    (36, "blocks", "<u4"), (40, "meta_blkaddr", "<u4"), (44, "xattr_blkaddr", "<u4"), (48, "uuid", "V16"),
    (64, "volume_name", "V16"), (80, "feature_incompat", "<u4"), (84, "available_compr_algs", "<u2"),
    (86, "extra_devices", "<u2"), (88, "devt_slotoff", "<u2"), (90, "dirblkbits", "u1"),
    (91, "xattr_prefix_count", "u1"), (92, "xattr_prefix_start", "<u4"), (96, "packed_nid", "<u8"),
])  # fmt: skip


COMPR_CFGS, DEVICE_TABLE, FRAGMENTS, XATTR_PREFIXES = 2, 8, 0x20, 0x40


KNOWN_INCOMPAT = 0x7F


INCOMPAT = {1: "zero_padding", 2: "compr_cfgs/big_pcluster", 4: "chunked_file", 8: "device_table/compr_head2",
    16: "ztailpacking",
            32: "fragments/dedupe", 64: "xattr_prefixes", 128: "48bit", 256: "metabox"}  # fmt: skip


COMPAT = {1: "sb_chksum", 2: "mtime", 4: "xattr_filter"}


DEVICE_SLOT = 128


MAX_CONFIGS = 16


def read_superblock(reader: Reader) -> np.void:
    """The superblock, where its features are all known."""
    found = record(reader.read_clipped(SUPER_OFFSET, SUPERBLOCK.itemsize), SUPERBLOCK)
    unknown = int(found["feature_incompat"]) & ~KNOWN_INCOMPAT
    if unknown:
        words = " ".join(INCOMPAT.get(1 << bit, f"{1 << bit:#x}") for bit in range(32) if unknown >> bit & 1)
        raise Unsupported(
            f"{reader.name}: EROFS with features that are not supported: {words}", SUPER_OFFSET + 80
        )
    if not 9 <= int(found["blkszbits"]) <= 16 or found["dirblkbits"]:
        raise Corrupt(
            f"{reader.name}: blkszbits at byte {SUPER_OFFSET + 12} is {int(found['blkszbits'])} and "
            f"dirblkbits {int(found['dirblkbits'])}, not 9 to 16 and 0",
            SUPER_OFFSET + 12,
        )
    return found


def fixed_areas(reader: Reader, superblock: np.void, packed: bool) -> list[tuple[str, int, int]]:
    """(part, start, end) of what lies at places that the superblock names."""
    incompat = int(superblock["feature_incompat"])
    end = SUPER_OFFSET + SUPERBLOCK.itemsize + 16 * int(superblock["sb_extslots"])
    found = [("superblock", SUPER_OFFSET, end)]
    if incompat & COMPR_CFGS and int(superblock["available_compr_algs"]):
        at = end
        for bit in range(MAX_CONFIGS):
            if int(superblock["available_compr_algs"]) >> bit & 1:
                at += 2 + int.from_bytes(reader.read_clipped(at, 2), "little")
        found.append(("compression configurations", end, at))
    if incompat & DEVICE_TABLE and int(superblock["extra_devices"]):
        at = int(superblock["devt_slotoff"]) * DEVICE_SLOT
        found.append(("device table", at, at + DEVICE_SLOT * int(superblock["extra_devices"])))
    if incompat & XATTR_PREFIXES and int(superblock["xattr_prefix_count"]) and not packed:
        start = at = int(superblock["xattr_prefix_start"]) * 4
        for _ in range(int(superblock["xattr_prefix_count"])):
            at += 2 + int.from_bytes(reader.read_clipped(at, 2), "little")
            at = -(-at // 4) * 4
        found.append(("xattr prefixes", start, at))
    return [(part, start, min(stop, reader.size)) for part, start, stop in found]
