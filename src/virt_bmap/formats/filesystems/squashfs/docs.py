"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "version 4.0 with gzip, lzma, lzo, xz, lz4 and zstd", "basic and extended inodes",
    "fragments, shared by the files they pack", "sparse blocks", "duplicate files (as shared)",
    "directory indexes", "fragment, export, id and xattr tables", "compressor options",
)  # fmt: skip


REFUSED = ("versions 1 to 3", "big-endian images")


ORACLES = ("unsquashfs", "content through a loop mount", "content read back by the map")


CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: geometry, places of tables",
        "metadata blocks: lengths, decompression",
        "inodes and directories: references, counts",
    ),
    unchecked=("content of files",),
)
