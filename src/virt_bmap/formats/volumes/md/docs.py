"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "superblocks 0.90 (both byte orders), 1.0, 1.1, 1.2",
    "linear, RAID0 (both layouts of unequal members), RAID1, RAID4",
    "RAID5 and RAID6 with all layouts of md and DDF, RAID10 near, far, offset",
    "missing members: copies, or bytes computed from parity",
    "out-of-date, faulty, spare and doubled members named",
    "bitmap, bad block log, partial parity log, journal device",
)
REFUSED = (
    "arrays in the middle of a reshape",
    "multipath and containers",
    "IMSM and DDF metadata (named only)",
)
ORACLES = (
    "arrays that the kernel made and filled in the appliance of libguestfs",
    "a byte by byte reference of the kernel's formulas",
)
CHECKS = Checks(
    checksums="superblocks",
    rules=("superblock: geometry, roles, event counts",),
    unchecked=("whether copies and parity agree; the write-intent bitmap",),
)
