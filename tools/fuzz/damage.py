"""What is done to bytes, and to which.

Damage goes where a map says that metadata lies: one class (volume, kind, part) first, so that a superblock is
hit as often as a table a thousand times its size."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .disk import Disk

INTERESTING = [
    0, 1, 2, 3, 7, 8, 0x10, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000,
    0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, 1 << 40, 1 << 48, (1 << 52) - 1, 1 << 56, 1 << 62,
    (1 << 63) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1,
]  # fmt: skip
"""Numbers at the edges of types, signs and multiplications."""
HOW_MANY = (1, 1, 1, 2, 2, 3, 4, 6)
Place = tuple[int, int]
"""(disk, offset)"""
Class = Sequence[tuple[int, int, int]]
"""(disk, start, end) of all that is of one class."""


class Damage(NamedTuple):
    """The chooser of a mutation, the disks, and the classes of their metadata."""

    rng: random.Random
    disks: Sequence[Disk]
    classes: Sequence[Class]

    def place(self) -> Place:
        """Somewhere in metadata, mostly where there is something, often near the start of a structure."""
        disk = at = 0
        for _ in range(12):
            disk, low, high = self.rng.choice(self.rng.choice(self.classes))
            at = low + self.rng.randrange(min(high - low, 256) if self.rng.random() < 0.35 else high - low)
            if self.disks[disk].read(at & ~31, 64).strip(b"\0") or self.rng.random() < 0.08:
                break
        return disk, at

    def hurt(self) -> str:
        """One operation at one place; its name and place, for people."""
        disk, at = self.place()
        operation = self.rng.choice(OPERATIONS)
        operation(self, self.disks[disk], at)
        return f"{operation.__name__.strip('_')} {disk}:{at:#x}"


def _bit(damage: Damage, disk: Disk, at: int) -> None:
    if byte := disk.read(at, 1):
        disk.write(at, bytes([byte[0] ^ 1 << damage.rng.randrange(8)]))


def _byte(damage: Damage, disk: Disk, at: int) -> None:
    disk.write(at, bytes([damage.rng.choice((0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, damage.rng.randrange(256)))]))


def _number(damage: Damage, disk: Disk, at: int) -> None:
    """A number of 2, 4 or 8 bytes becomes an interesting one, a near one, one of the disk's own sizes, or
    any."""
    rng = damage.rng
    size = rng.choice((2, 4, 4, 4, 8, 8))
    at -= at % rng.choice((1, 2, size, size))
    old = disk.read(at, size)
    if len(old) < size:
        return
    order = "big" if rng.random() < 0.33 else "little"
    value, chance = int.from_bytes(old, "big" if order == "big" else "little"), rng.random()
    if chance < 0.5:
        value = rng.choice(INTERESTING)
    elif chance < 0.75:
        value += rng.choice((-1, 1, -2, 2, 8, -8, 0x1000, -0x1000, 1 << 31, value, -value // 2))
    elif chance < 0.85:
        sizes = (
            disk.size,
            disk.size // 512,
            disk.size // 1024,
            disk.size // 4096,
            value << 1,
            value << 8,
            value << 16,
            ~value,
        )
        value = rng.choice(sizes) + rng.choice((-1, 0, 1))
    else:
        value = rng.getrandbits(8 * size)
    disk.write(at, (value & (1 << 8 * size) - 1).to_bytes(size, "big" if order == "big" else "little"))


def _zeroes(damage: Damage, disk: Disk, at: int) -> None:
    size = damage.rng.choice((4, 8, 16, 64, 512, 1024, 4096, 16384))
    disk.write(at & -size, bytes(size))


def _ones(damage: Damage, disk: Disk, at: int) -> None:
    size = damage.rng.choice((4, 8, 16, 64, 512))
    disk.write(at & -size, b"\xff" * size)


def _noise(damage: Damage, disk: Disk, at: int) -> None:
    disk.write(at, damage.rng.randbytes(damage.rng.choice((4, 8, 16, 32, 64))))


def _copy(damage: Damage, disk: Disk, at: int) -> None:
    """One structure over another: both are right by themselves, and their checksums may be."""
    source, where = damage.place()
    size = damage.rng.choice((4, 8, 16, 32, 128, 256, 512, 1024, 4096, 16384))
    if size >= 16:
        at, where = at & -size, where & -size
    disk.write(at, damage.disks[source].read(where, size))


def _shift(damage: Damage, disk: Disk, at: int) -> None:
    size, by = damage.rng.choice((64, 256, 512)), damage.rng.choice((1, 2, 4, 8))
    data = disk.read(at & -size, size)
    disk.write(at & -size, data[by:] + data[:by])


def _text(damage: Damage, disk: Disk, at: int) -> None:
    """A number in text (LVM's metadata, LUKS2's JSON, VMDK's descriptor) becomes another; where there is no
    text, a binary one does."""
    start = max(0, at - 512)
    data = disk.read(start, 2048)
    found = list(re.finditer(rb"[0-9]{1,20}", data))
    if len(found) < 3 or sum(32 <= byte < 127 or byte in (9, 10) for byte in data) < len(data) // 2:
        return _number(damage, disk, at)
    rng, old = damage.rng, damage.rng.choice(found)
    choices = (
        str(rng.choice(INTERESTING)),
        str(int(old[0]) + rng.choice((-1, 1))),
        "-1",
        "1e9",
        "0",
        rng.choice(found)[0].decode(),
    )
    new = rng.choice(choices).encode()
    grown = len(new) - len(old[0])
    if grown <= 0:
        disk.write(start + old.start(), new + b" " * -grown)
    else:  # what follows moves, and the text loses its end
        disk.write(start + old.start(), (new + data[old.end() :])[: len(data) - old.start()])
    return None


OPERATIONS: list[Callable[[Damage, Disk, int], None]] = [
    _bit, _byte, _byte, *[_number] * 6, _zeroes, _ones, _noise, *[_copy] * 3, _shift, _text,
]  # fmt: skip
