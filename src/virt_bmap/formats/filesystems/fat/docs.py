"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "FAT12, FAT16, FAT32, also FAT32 with few clusters", ("sectors of 512 to 4096 bytes, clusters of any "
        "power of two"),
    "long names, checked by their checksum", ("short names in code page 437, with Windows NT's lower-case "
        "flags"),
    "one or more FATs, mirrored or with one active", "FSInfo, backup boot sector", "bad clusters",
    "Atari's boot sectors", "volume labels in the root directory", "dirty and error marks",
)  # fmt: skip


REFUSED: tuple[str, ...] = ()


ORACLES = (
    "istat and fls of The Sleuth Kit",
    "mshowfat and mcopy of mtools",
    "fsck.fat of dosfstools",
    "the FAT itself",
)


CHECKS = Checks(
    checksums=None,
    rules=(
        "boot sector: geometry",
        "FAT: chains, loops, clusters with two owners, lost clusters",
        "copies of the FAT: equal to the active one, where they are to be",
        "directories: entries, sizes against chains, long names' checksums, free count",
    ),
    unchecked=(
        "content of files",
        "the backup of the boot sector",
    ),
)
