"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "linear and striped volumes, mirrors, unfinished pvmove",
    "RAID0, 1, 4, 5, 6 and 10 with all layouts, failed and missing images computed from parity",
    "thin pools, thin volumes, their snapshots and external origins",
    "snapshots of the old kind",
    "dm-cache (pool or single volume) and dm-writecache: blocks that are newer than the origin",
    "integrity",
    "several physical volumes, also with some missing; several metadata areas, the newest valid text",
)
REFUSED = (
    "VDO",
    "volumes in the middle of a RAID reshape",
    "fresh data in the journal of dm-integrity that was not shut down",
    "LVM1",
)
ORACLES = (
    "lvs and pvs on the same loop devices",
    "every volume as a kernel reads it in the appliance of libguestfs",
    "thin_dump",
    "the pool's own space maps",
)
CHECKS = Checks(
    checksums="label, metadata headers and text; superblocks and blocks of thin and cache metadata",
    rules=(
        "label and metadata areas: places, the newest text",
        "metadata text: segments, sizes, overlaps",
        "thin metadata: B-tree nodes' flags, counts, order of keys, each block once",
    ),
    unchecked=("integrity checksums of volumes, space maps of thin metadata",),
)
