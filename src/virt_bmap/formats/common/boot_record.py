"""Boot records with four partitions each, and the chain of extended ones, as the kernel follows it.

In an extended record the entries that are no link are partitions, and of the last two only those that lie
where they may: they are often garbage. The first link, wherever it stands, leads on. It counts from the
extended partition; partitions count from their record.

Sources: Linux block/partitions/msdos.c (parse_extended); libblkid/src/partitions/dos.c.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from virt_bmap.core.layout import records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

SECTOR = 512
ENTRIES, SIGNATURE = 446, 510
EXTENDED = (0x05, 0x0F, 0x85)
MAX_EMPTY = 100
"""Links without a partition that are followed, one after the other, as the kernel."""

ENTRY = struct(16, [
    (0, "boot_indicator", "u1"),
    (4, "os_type", "u1"),
    (8, "starting_lba", "<u4"),
    (12, "size_in_lba", "<u4"),
])  # fmt: skip


class Entry(NamedTuple):
    """One entry of a boot record; in sectors."""

    kind: int
    start: int
    length: int

    @property
    def is_link(self) -> bool:
        return self.kind in EXTENDED


class Record(NamedTuple):
    """An extended boot record: its first byte, and the partitions that it lists, in bytes of the disk."""

    at: int
    partitions: list[Entry]


def raw_entries(sector: bytes) -> np.ndarray:
    """The four entries of a boot record, as ENTRY records."""
    return records(sector[ENTRIES : ENTRIES + 64], ENTRY)


def entries(sector: bytes) -> list[Entry]:
    """The four entries of a boot record."""
    return [
        Entry(*(int(entry[name]) for name in ("os_type", "starting_lba", "size_in_lba")))
        for entry in raw_entries(sector)
    ]


def has_partitions(sector: bytes) -> bool:
    """Does a first sector hold a table that can be used, whatever else it holds?

    Who makes a filesystem there writes or clears all of the sector, so that the table is younger; and the
    kernel reads it (block/partitions/msdos.c). `mkfs.fat --mbr` writes one whose partition is the volume.
    """
    table = raw_entries(sector)
    used = table[table["size_in_lba"] > 0]
    return bool(
        sector[SIGNATURE:] == b"\x55\xaa"
        and np.isin(table["boot_indicator"], (0, 0x80)).all()
        and len(used)
        and (used["starting_lba"] > 0).all()
    )


def chain(disk: Reader, extended: Entry, sector: int, damage: Damage) -> Iterator[Record]:
    """The records of one extended partition, `sector` the bytes that the table counts in."""
    first, last = extended.start * sector, (extended.start + extended.length) * sector
    at, room, empty, seen = first, extended.length, 0, set[int]()
    while at not in seen and empty < MAX_EMPTY:
        seen.add(at)
        data = disk.read_clipped(at, SECTOR)
        if data[SIGNATURE:] != b"\x55\xaa":
            damage.say(
                "mapping",
                f"there is no extended boot record at byte {at:#x}, where the chain of logical "
                "partitions leads",
                at,
            )
            return
        found = entries(data)
        inside = [
            Entry(entry.kind, at + entry.start * sector, entry.length * sector)
            for slot, entry in enumerate(found)
            if entry.length and not entry.is_link
            and (slot < 2 or (entry.start + entry.length <= room
                and at + (entry.start + entry.length) * sector <= last))
        ]  # fmt: skip
        for entry in inside:
            if entry.start + entry.length > last:
                damage.say(
                    "outside",
                    f"the logical partition at byte {entry.start:#x} reaches beyond its extended partition, "
                    f"which ends at {last:#x}",
                    at,
                    severity=WARNING,
                )
        yield Record(at, inside)
        empty = 0 if inside else empty + 1
        link = next((entry for entry in found if entry.is_link and entry.length), None)
        if link is None:
            return
        at, room = first + link.start * sector, link.length
    if at in seen:
        damage.say("twice", f"the chain of extended boot records comes back to byte {at:#x}", at)
    else:
        damage.say("too-many", f"{MAX_EMPTY} extended boot records without a partition follow each other", at)
