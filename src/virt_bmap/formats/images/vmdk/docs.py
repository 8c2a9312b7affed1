"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "monolithicSparse and twoGbMaxExtentSparse: both copies of grain directory and tables, grains of zeroes",
    "streamOptimized: compressed grains, markers, footer",
    "monolithicFlat, twoGbMaxExtentFlat and vmfs: extents in files of their own",
    "delta links (parents)",
)
REFUSED = ("COWD (vmfsSparse) and seSparse extents, raw device mappings: named",)
ORACLES = ("qemu-img map", "qemu-img info", "content read through the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "header and descriptor: version, sizes, extents",
        "grain tables: places, each grain once",
    ),
    unchecked=(
        "the guest's bytes",
        "the redundant grain tables",
    ),
)
