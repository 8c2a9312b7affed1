"""Partitions beside a CD image: a hybrid image on a stick is an ISO 9660 or UDF volume, and has one partition
table or several as well.

The disk is the filesystem, as blkid and libguestfs have it, and the kernel shows partitions all the same.
Those that share bytes with what the filesystem holds show it again: its tree, its boot images. The others
were added (persistent storage), and are volumes like any other. What of a partition only another filesystem
holds, whose files are those of the CD image (Apple's), is named.

Sources: as in `mbr`, `gpt`, `apm`, `sun` and `sgi`; Linux block/partitions/core.c for which of several tables
counts; man page xorrisofs(1) (-append_partition, -partition_offset, -hfsplus).
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from virt_bmap.core.arrays import Int, intersect, ints, subtract, union
from virt_bmap.core.errors import FormatError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats import foreign
from virt_bmap.formats.common.boot_record import raw_entries
from virt_bmap.formats.common.partitions import SECTOR, check_overlaps
from virt_bmap.formats.volumes import apm, gpt, mbr, sgi, sun
from virt_bmap.model import tables
from virt_bmap.model.contract import About, Assembly, Child, Member
from virt_bmap.model.problems import NOTE


class Hybrid:
    """The table of a disk of which a filesystem owns the ranges `owned`, as the survey sees a volume
    module."""

    name, allocator, checks = "partition table", None, None

    def __init__(self, owned: tuple[Int, Int]) -> None:
        self._owned = owned

    def assemble(self, members: Sequence[Member]) -> Assembly:
        """The partitions that the filesystem has nothing in, of the first table that has them there, and what
        of the tables lies outside of it."""
        (disk,) = members
        kept = Assembly(members)
        about = kept.about(disk)
        for found in _tables(disk):
            for child in found.children:
                start = int(child.rows.parent_offset[0])
                if self._is_apart(start, child.size):
                    kept.add(child)
                    self._take(start, child.size)
                else:
                    self._name_other(disk.reader, start, child, about)
            for row in found.about(disk).extents.table(0).to_pylist():
                if self._is_apart(row["volume_offset"], row["length"]):
                    kind = tables.KINDS.index(row["kind"])
                    about.extents.add(kind, row["volume_offset"], row["length"], part=row["part"])
                    self._take(row["volume_offset"], row["length"])
        check_overlaps(kept.children, about.damage)
        return kept

    def _is_apart(self, start: int, length: int) -> bool:
        return not len(intersect(ints(start), ints(start + length), *self._owned)[0])

    def _take(self, start: int, length: int) -> None:
        """From now on these bytes have an owner."""
        low, high = self._owned
        self._owned = union(np.append(low, start), np.append(high, start + length))

    def _name_other(self, disk: Reader, start: int, child: Child, about: About) -> None:
        """What nobody else owns of a partition on which lies a filesystem that is known by name alone."""
        if start == 0 or not child.contents:
            return  # it is the CD image once more, or nothing of anybody's
        reader = MappedReader(child.size, child.name, {0: disk}, Rows.make(0, 0, start, child.size))
        name = foreign.recognise(reader)
        if name is None:
            return
        low, high = subtract(ints(start), ints(start + child.size), *self._owned)
        about.extents.add(tables.CONTENT, low, high - low, part=f"{name} volume beside it")
        about.damage.say("beside", f"a volume of {name} shares its files, and is not read", start, NOTE)
        self._owned = union(np.append(self._owned[0], low), np.append(self._owned[1], high))


def _tables(disk: Member) -> Iterator[Assembly]:
    """What all tables of the disk say, in the order in which the kernel looks for them; a GPT stands for the
    MBR that announces it."""
    for table in (gpt, sgi, mbr, sun, apm):
        protective = mbr.PROTECTIVE in raw_entries(disk.reader.read(0, SECTOR))["os_type"]
        if table.labelled(disk.reader) and not (table is mbr and protective):
            with contextlib.suppress(FormatError):
                yield table.assemble([disk])
