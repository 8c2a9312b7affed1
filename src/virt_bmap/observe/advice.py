"""What of a direct map an observation could add. Light: every map asks."""

from collections.abc import Iterator

from virt_bmap.core.escape import escape
from virt_bmap.model.blockmap import BlockMap

INSTALL = "apt-get install python3-guestfs linux-image-amd64, or dnf install python3-libguestfs"
MOUNTABLE = (
    "adfs", "affs", "befs", "bfs", "efs", "exfs", "f2fs", "hfs", "hfsplus", "hpfs", "jfs", "minix", "nilfs2",
    "omfs", "qnx4", "qnx6", "reiserfs", "romfs", "sysv", "udf", "ufs", "zonefs",
)  # fmt: skip
"""Filesystems that are only named in a direct map, and that the kernels of most distributions mount."""


def advice(bmap: BlockMap) -> Iterator[str]:
    """A line for each volume whose filesystem no reader reads, but a kernel mounts."""
    read = set(bmap.filesystems.column("volume").to_pylist())
    for row in bmap.volumes.to_pylist():
        if row["type"] in MOUNTABLE and row["volume"] not in read:
            name = escape(row["name"].encode(errors="surrogateescape"))
            yield (
                f"{name}: {row['type']} is taken as one piece; --method observe "
                f"maps it by reading its files through a kernel ({INSTALL})"
            )
