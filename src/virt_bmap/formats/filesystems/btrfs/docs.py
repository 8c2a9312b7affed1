"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "all subvolumes and snapshots", "skinny and full extent items", "mixed block groups", "block group tree",
    "free space tree (checked)", "free space cache v1", "inline extents",
    "zlib, LZO and zstd extents, with their content", "preallocated extents", "reflinks", "bookend extents",
    "log tree, replayed as a mount does: inodes, names, links, extents",
    "deletion and relocation that were interrupted",
    "files deleted while open, shown as deleted until a mount frees them", "nodes of 4 to 64 KiB",
    "changed fsid (metadata_uuid)",
)  # fmt: skip


REFUSED = (
    "btrfs-image dumps",
    "a balance that was interrupted: files are where the disk has them; a mount goes on to move them",
)


ORACLES = (
    "kernel FIEMAP through a loop mount", "btrfs inspect-internal dump-tree",
    "btrfs inspect-internal logical-resolve", "content through the map, compressed content too",
    "the extent tree against all owners", "the free space tree against the extent tree",
    "the kernel's own recovery of copies taken while it was written",
)  # fmt: skip


CHECKS = Checks(
    checksums="crc32c, xxhash64, sha256 or blake2b of superblocks and of tree blocks that are read",
    rules=(
        "superblock: geometry, features and flags known",
        "tree blocks: address, owner, generation, level, order of keys, each block once",
        "chunks and block groups: lengths, profiles, overlaps, each the other",
        "extent items: place, overlaps, used bytes of block groups, the free space tree's account",
        "file extents: numbers, an extent item each",
    ),
    unchecked=(
        "content of files and its checksums",
        "quotas, back references of extent items, the checksums of what is not read of log trees",
    ),
)
