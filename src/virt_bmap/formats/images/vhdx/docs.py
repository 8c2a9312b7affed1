"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "fixed, dynamic and differencing images, sectors of 512 and 4096 bytes",
    "blocks kept though they are zeroed or unmapped",
    "sector bitmaps",
)
REFUSED = ("changes that are in the log only: reported, not replayed", "parents by volume name")
ORACLES = ("qemu-img map", "content read through the map", "images made by Windows")
CHECKS = Checks(
    checksums="CRC-32C of both headers and both region tables",
    rules=(
        "headers: sequence, log",
        "region and metadata tables: places, known entries",
        "block allocation table: states, places, each block once",
    ),
    unchecked=(
        "the guest's bytes",
        "the log, which is not replayed",
    ),
)
