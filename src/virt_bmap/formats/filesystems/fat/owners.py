"""Rows for what belongs to no file: boot sectors, FATs, free and bad clusters."""

from virt_bmap.core.arrays import complement, ints
from virt_bmap.formats.filesystems.fat.allocator import ClusterRuns
from virt_bmap.formats.filesystems.fat.extents import Heap
from virt_bmap.formats.filesystems.fat.superblock import Geometry
from virt_bmap.model import tables


def add_system(rows: tables.ExtentRows, geometry: Geometry) -> None:
    """Boot sectors, FATs, and what lies after the last cluster."""
    sector = geometry.sector_size
    named = {"backup FSInfo": geometry.backup + sector if geometry.backup and geometry.fsinfo else 0,
             "backup boot sector": geometry.backup, "FSInfo": geometry.fsinfo}  # fmt: skip
    at = {offset: part for part, offset in named.items() if 0 < offset < geometry.reserved} | {
        0: "boot sector"
    }
    for offset, part in at.items():
        rows.add(tables.METADATA, offset, sector, part=part)
    starts = ints(list(at))
    left = complement(starts, starts + sector, 0, geometry.reserved)
    rows.add(tables.METADATA, left[0], left[1] - left[0], part="reserved sectors")
    for number in range(geometry.fats):
        rows.add(
            tables.METADATA,
            geometry.reserved + number * geometry.fat_size,
            geometry.fat_size,
            part=f"FAT {number + 1}",
        )
    if geometry.bits == 32:  # has none, but the kernel leaves room for it where the boot sector says so
        rows.add(
            tables.METADATA,
            geometry.root_start,
            geometry.data_start - geometry.root_start,
            part="root directory",
        )
    rows.add(tables.GAP, geometry.data_end, geometry.size - geometry.data_end, part="slack")


def add_clusters(rows: tables.ExtentRows, heap: Heap, runs: ClusterRuns) -> None:
    """What the FAT calls free or bad."""
    for kind, part, (start, end) in (
        (tables.FREE, None, runs.free),
        (tables.METADATA, "bad clusters", runs.bad),
    ):
        rows.add(kind, heap.offset(start), (end - start) * heap.cluster_size, part=part)
