"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "fixed, dynamic and differencing images",
    "sector bitmaps of differencing images",
    "sizes by geometry or in bytes, as the program that made the image counts them",
)
REFUSED = ("parents by anything but a relative or absolute path",)
ORACLES = ("qemu-img map", "content read through the map", "sectors of a parent and child laid out by hand")
CHECKS = Checks(
    checksums="footer and dynamic disk header",
    rules=(
        "footer and header: both copies, sizes",
        "block allocation table: places, each block once",
    ),
    unchecked=("the guest's bytes",),
)
