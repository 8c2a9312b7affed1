"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "fixed, dynamic and differencing images, sectors of 512 and 4096 bytes",
    "blocks kept though they are zeroed or unmapped",
    "sector bitmaps",
    "changes that are in the log only, replayed in memory",
)
REFUSED = ("parents by volume name",)
ORACLES = (
    "qemu-img map",
    "content read through the map",
    "images made by Windows",
    "qemu-img check -r all, which replays a log",
)
CHECKS = Checks(
    checksums="CRC-32C of both headers, both region tables and entries of a log that is in use",
    rules=(
        "headers: sequence, log",
        "region and metadata tables: places, known entries",
        "block allocation table: states, places, each block once",
    ),
    unchecked=("the guest's bytes",),
)
