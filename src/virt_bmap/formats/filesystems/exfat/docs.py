"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "main and backup boot region, with checksum", "files in one piece (NoFatChain) and chained in the FAT",
    "allocation bitmap", "TexFAT's second FAT and bitmap", "up-case table", "valid data length",
    "entry sets with checksum", "vendor extensions, skipped", "volume label, serial number", "bad clusters",
    "dirty and failure marks",
)  # fmt: skip


REFUSED = ("revisions other than 1.x",)


ORACLES = (
    "istat and fls of The Sleuth Kit",
    "fsck.exfat and dump.exfat of exfatprogs",
    "the allocation bitmap",
    "exfat-fuse",
)


CHECKS = Checks(
    checksums="main boot region; entry sets",
    rules=(
        "boot region: geometry, order of regions",
        "FAT: chains, bad clusters",
        "allocation bitmap: against what is owned",
        "entry sets: members, sizes, first clusters",
    ),
    unchecked=(
        "content of files",
        "backup boot region, name hashes, the up-case table's checksum",
    ),
)
