"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "compact and extended inodes", "flat, inline and chunk-based files",
    "compressed files with full and compact indexes", "big physical clusters", "inline tails (ztailpacking)",
    "fragments in the packed inode", ("deduplicated clusters and chunks (as "
        "shared)"), "inline and shared xattrs",
)  # fmt: skip


REFUSED = (
    "48-bit block addresses",
    "metadata compression (metabox)",
    "data on further devices (named, not mapped)",
)


ORACLES = ("kernel FIEMAP through a loop mount", "content through a loop mount", "dump.erofs")


CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: geometry, features known",
        "inodes and directories: layout, place, order of blocks",
        "clusters: indexes, place, overlaps",
    ),
    unchecked=(
        "content of files",
        "checksum of the superblock",
    ),
)
