"""Disks made much larger by holes.

What a number on the disk sizes must not be built where nothing is stored, and only a large disk has room for
large numbers.

Which numbers say how large the disk is need not be known format by format: they are those that equal the size
of a disk, a volume or a filesystem, in bytes or in one of its units. The few that count something else
(groups, clusters, entries of a table) are listed.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.model.blockmap import BlockMap

from .damage import Class
from .disk import Disk
from .sealing.unit import Volume

UNITS = (1, 512, 1024, 2048, 4096, 65536, 1 << 20)
SMALLEST = 100
"""Units: smaller numbers equal a size by chance."""
ROUND = 1 << 17
"""And powers of two below this are the sizes of blocks and sectors more often than those of disks."""
LOOKED_AT = 8192
"""Bytes of each range of metadata: sizes stand at the head of structures."""
LARGEST = (1 << 60) + 12345
"""Of no sector size's multiple."""
COUNTS: dict[str, tuple[tuple[int, int, str], ...]] = {
    "ext": ((1024, 4, "<"), (1028, 4, "<")),
    "xfs": ((8, 8, ">"), (88, 4, ">"), (84, 4, ">")),
    "vfat": ((0x20, 4, "<"), (0x24, 4, "<"), (0x13, 2, "<"), (0x16, 2, "<")),
    "ntfs": ((0x28, 8, "<"),),
    "exfat": ((72, 8, "<"), (84, 4, "<"), (92, 4, "<")),
    "f2fs": ((1024 + 36, 8, "<"), (1024 + 44, 4, "<"), (1024 + 48, 4, "<"), (1024 + 52, 4, "<"),
        (1024 + 56, 4, "<"), (1024 + 60, 4, "<"), (1024 + 68, 4, "<")),
    "swap": ((1028, 4, "<"),),
    "erofs": ((1024 + 16, 8, "<"), (1024 + 36, 4, "<")),
    "squashfs": ((4, 4, "<"), (16, 4, "<"), (40, 8, "<")),
    "btrfs": ((0x10070, 8, "<"), (0x100D0, 8, "<")),
    "qcow2": ((24, 8, ">"), (36, 4, ">"), (56, 4, ">")),
    "vmdk": ((12, 8, "<"), (44, 4, "<")),
    "vpc": ((48, 8, ">"), (512 + 28, 4, ">")),
    "vdi": ((368, 8, "<"), (384, 4, "<"), (388, 4, "<")),
}  # fmt: skip
"""(offset in the volume, width, byte order) of sizes and of what grows with them: groups, allocation groups,
sectors of a FAT, entries of an L1 table."""


class Field(NamedTuple):
    """A number of the disk that grows with it."""

    disk: int
    at: int
    width: int
    order: str
    value: int


def fields(
    disks: Sequence[Disk], bmap: BlockMap, volumes: Sequence[Volume], classes: Sequence[Class]
) -> list[Field]:
    """All that is found on undamaged disks."""
    sizes = (
        {disk.size for disk in disks}
        | set(bmap.volumes.column("size").to_pylist())
        | set(bmap.filesystems.column("size").to_pylist())
    )
    numbers = {
        size // unit - less for size in sizes for unit in UNITS for less in (0, 1) if size // unit >= SMALLEST
    }
    wanted = np.array(
        sorted(number for number in numbers if number >= ROUND or number & (number - 1)), np.uint64
    )
    found = {(f.disk, f.at): f for f in _listed(disks, volumes)}
    for disk, start, end in [span for spans in classes for span in spans[:16]]:
        data = disks[disk].read(start, min(end - start, LOOKED_AT))
        for width in (4, 8):
            for order in "<>":
                words = np.frombuffer(data[: len(data) // width * width], f"{order}u{width}")
                for row in np.flatnonzero(np.isin(words, wanted)).tolist():
                    found.setdefault(
                        (disk, start + row * width),
                        Field(disk, start + row * width, width, order, int(words[row])),
                    )
    return list(found.values())


def _listed(disks: Sequence[Disk], volumes: Sequence[Volume]) -> list[Field]:
    found = []
    for volume in volumes:
        for at, width, order in COUNTS.get(
            volume.type.rstrip("234") if volume.type.startswith("ext") else volume.type, ()
        ):
            value = int.from_bytes(
                disks[volume.disk].read(volume.base + at, width), "little" if order == "<" else "big"
            )
            found.append(Field(volume.disk, volume.base + at, width, order, value))
    return found


def grow(rng: random.Random, disks: Sequence[Disk], found: Sequence[Field]) -> str:
    """All disks larger by one factor, and most of the numbers that say so."""
    power = rng.randrange(3, 34)
    grow_by(disks, power, [field for field in found if rng.random() < 0.9])
    return f"grown by 2^{power}"


def grow_by(
    disks: Sequence[Disk], power: int, found: Sequence[Field], power_of_fields: int | None = None
) -> None:
    """The disks larger by 2^power, and these numbers by the same factor, or by one of their own."""
    factor = power if power_of_fields is None else power_of_fields
    for disk in disks:
        disk.resize(min(disk.size << power, LARGEST))
    for field in found:
        odd = field.value & 1 and field.value > 1  # the last one, not how many
        value = ((field.value + 1) << factor) - 1 if odd else field.value << factor
        value = min(value, (1 << 8 * field.width) - 1)
        disks[field.disk].write(
            field.at, value.to_bytes(field.width, "little" if field.order == "<" else "big")
        )
