"""Partitions beside a CD image: a hybrid image on a stick is an ISO 9660 or UDF volume, and has a partition
table as well.

The disk is the filesystem, as blkid and libguestfs have it, and the kernel shows partitions all the same.
Those that share bytes with what the filesystem holds show it again: its tree, its boot images. The others
were added (persistent storage), and are volumes like any other.

Sources: as in `mbr` and `gpt`; man page xorrisofs(1) (-append_partition, -partition_offset).
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import Int, intersect, ints
from virt_bmap.core.errors import FormatError
from virt_bmap.formats.common.boot_record import raw_entries
from virt_bmap.formats.common.partitions import SECTOR, check_overlaps
from virt_bmap.formats.volumes import gpt, mbr
from virt_bmap.model import tables
from virt_bmap.model.contract import Assembly, Member


class Hybrid:
    """The table of a disk of which a filesystem owns the ranges `owned`, as the survey sees a volume
    module."""

    name, allocator, checks = "partition table", None, None

    def __init__(self, owned: tuple[Int, Int]) -> None:
        self._owned = owned

    def assemble(self, members: Sequence[Member]) -> Assembly:
        """The partitions that the filesystem has nothing in, and what of the table lies outside of it."""
        (disk,) = members
        found, kept = _table(disk), Assembly(members)
        for child in found.children:
            if self._is_apart(int(child.rows.parent_offset[0]), child.size):
                kept.add(child)
        about = kept.about(disk)
        check_overlaps(kept.children, about.damage)
        for row in found.about(disk).extents.table(0).to_pylist():
            if self._is_apart(row["volume_offset"], row["length"]):
                about.extents.add(
                    tables.KINDS.index(row["kind"]), row["volume_offset"], row["length"], part=row["part"]
                )
        return kept

    def _is_apart(self, start: int, length: int) -> bool:
        return not len(intersect(ints(start), ints(start + length), *self._owned)[0])


def _table(disk: Member) -> Assembly:
    """The disk's partitions, by the GPT where the MBR says that there is one; none where the table can't be
    used."""
    protective = mbr.PROTECTIVE in raw_entries(disk.reader.read(0, SECTOR))["os_type"]
    try:
        return gpt.assemble([disk]) if protective else mbr.assemble([disk])
    except FormatError:
        return Assembly([disk])
