"""Do two maps describe one disk at two times? Its volumes and filesystems have UUIDs, which survive
everything but being made anew."""

from virt_bmap.ask.space import inside
from virt_bmap.core.errors import MapError
from virt_bmap.model.blockmap import BlockMap


def uuids(bmap: BlockMap, disk: int) -> set[str]:
    """The UUIDs of all volumes and filesystems on a disk: partition tables, LVM, arrays, filesystems."""
    below = set(inside(bmap, bmap.disk(disk)))
    return {row["uuid"] for table in (bmap.volumes,
            bmap.filesystems) for row in table.select(["volume", "uuid"]).to_pylist()
            if row["volume"] in below and row["uuid"]}  # fmt: skip


def require_same(old: BlockMap, old_name: str, new: BlockMap, new_name: str, disk: int) -> None:
    """MapError where the maps can't be of one disk: no UUID of the one is on the other."""
    before, after = uuids(old, disk), uuids(new, disk)
    if before and after and not before & after:
        raise MapError(
            f"{old_name} and {new_name} are of different disks: no partition table, volume or filesystem is "
            f"on both (for example {min(before)}, {min(after)}); --force compares them anyway"
        )
