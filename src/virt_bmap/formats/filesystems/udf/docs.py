"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    (
        "UDF 1.02 to 2.60 with blocks of 512 bytes to 16 KiB; plain partitions, sparable ones with packets "
        "that were moved, virtual ones (VAT), metadata partitions (checked with one written by hand: no "
        "tool here makes them)"
    ),
    (
        "file entries and extended ones; short, long, extended and embedded allocation descriptors, and "
        "blocks in which they go on; ICBs of strategy 4 and, for media written once, 4096"
    ),
    "sparse and preallocated files, hard links, symbolic links, devices, names in 8 and 16 bits",
    "space bitmaps and tables of unallocated space; both descriptor sequences and all anchors",
    "any session of a disc that was written in several, and what any VAT shows (`--session`)",
    "bridge discs with ISO 9660: the tree with more content is mapped, the other one's structures are named",
)


REFUSED = (
    "ICBs with a strategy other than 4 and 4096", "names of streams: their bytes are owned by their file",
)  # fmt: skip


ORACLES = (
    "content put in by a kernel's driver and by mkisofs, read back by the map",
    "udfinfo and blkid for label, UUID and counts of free blocks",
)


CHECKS = Checks(
    checksums="CRC-16 of volume descriptors; the sums of all tags",
    rules=(
        "volume structure: descriptors, partitions, virtual and sparable maps",
        "file entries: allocation descriptors, place, overlaps",
        "directories: identifiers, each directory once",
    ),
    unchecked=("content of files",),
)
