"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "versions 2 and 3, clusters of 512 bytes to 2 MiB, refcounts of 1 to 64 bits",
    "backing chains",
    "internal snapshots: data that only they hold, with the number of the snapshot; VM state",
    "compressed clusters",
    "subclusters (extended L2 entries)",
    "clusters kept for zeroes",
    "external data files",
    "persistent bitmaps",
    "refcounts compared with what refers to each cluster: free, leaked, damaged",
)
REFUSED = ("content of encrypted images (AES, LUKS): it is known where the clusters lie, not what they say",)
ORACLES = ("qemu-img map", "qemu-img check", "qemu-img info", "content read through the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "header: version, features known, places of tables",
        "L1 and L2 tables: places, alignment, reserved bits, each cluster once",
        "refcounts: against what refers to a cluster",
        "snapshots and bitmaps: sizes, places",
    ),
    unchecked=("the guest's bytes",),
)
