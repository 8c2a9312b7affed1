"""Checksums put right again.

A damaged structure whose checksum is wrong is refused at the door; these let the damage in.

Each format's module finds its sealed structures in an undamaged image: a range of bytes, and a function that
computes the checksum of what now lies there and writes it where it belongs. A unit is believed only where
sealing the undamaged image changes nothing, so none of this has to trust the readers under test, or its own
idea of where structures lie. After damage, what it touched is sealed, and what the sealing touched, until
nothing changes: a table first, then the header with the table's checksum, then the header's own.
"""

from collections.abc import Iterator
from importlib import import_module

import numpy as np

from ..disk import Disk
from .unit import Unit, Volume

MODULES = {
    "ext": "ext", "xfs": "xfs", "btrfs": "btrfs", "ntfs": "records", "exfat": "exfat", "udf": "udf",
    "iso9660": "udf", "erofs": "small", "f2fs": "f2fs", "gpt": "gpt", "LVM2_member": "lvm",
    "linux_raid_member": "md", "crypto_LUKS": "small", "BitLocker": "small", "sgi": "small", "sun": "small",
    "vpc": "images", "vhdx": "images", "ewf": "ewf",
}  # fmt: skip
"""By what a map says that a volume is; ext2, ext3 and ext4 are ext."""
ROUNDS = 6


def find(disks: list[Disk], volumes: list[Volume]) -> list[Unit]:
    """The units of undamaged disks, in which these volumes lie."""
    found = []
    for volume in volumes:
        name = MODULES.get(volume.type, MODULES.get(volume.type.rstrip("234"), ""))
        if name:
            found += [
                unit
                for unit in import_module(f".{name}", __name__).units(disks, volume)
                if _is_right(disks, unit)
            ]
    return found


def _is_right(disks: list[Disk], unit: Unit) -> bool:
    if not 0 <= unit.start < unit.end <= disks[unit.disk].size:
        return False
    unit.seal(disks[unit.disk])
    changed = any(disk.touched for disk in disks)
    for disk in disks:
        disk.restore()
    return not changed


class Sealer:
    """All units of some disks, found by the bytes that were touched."""

    def __init__(self, disks: list[Disk], units: list[Unit]) -> None:
        self.units = sorted(units, key=lambda unit: unit.end - unit.start)
        self._disks = disks
        self._on, self._start, self._end = (
            np.array([getattr(unit, name) for unit in self.units], np.int64)
            for name in ("disk", "start", "end")
        )

    def seal(self) -> None:
        """Whatever was touched, the small before the large."""
        done = [0] * len(self._disks)
        for _ in range(ROUNDS):
            news = [(n, *span) for n, disk in enumerate(self._disks) for span in disk.touched[done[n] :]]
            done = [len(disk.touched) for disk in self._disks]
            if not news:
                return
            for number in self._touched(news):
                self.units[number].seal(self._disks[self.units[number].disk])

    def _touched(self, news: list[tuple[int, int, int]]) -> Iterator[int]:
        hit = np.zeros(len(self.units), bool)
        for disk, start, end in news:
            hit |= (self._on == disk) & (self._start < end) & (self._end > start)
        yield from np.flatnonzero(hit).tolist()
