"""What all partition tables have in common: names of partitions, their place on the disk, and what is wrong
between them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import Assembly, Child, Member
from virt_bmap.model.damage import Damage

SECTOR = 512


def partition_name(disk: str, number: int) -> str:
    """/dev/sda1; a p in between where the disk's own name ends in a digit."""
    return f"{disk}{'p' if disk[-1].isdigit() else ''}{number}"


def add_partition(
    assembly: Assembly, disk: Member, number: int, start: int, length: int, **about: Any
) -> None:
    """Add partition `number` at bytes [start, start + length) of the disk, `about` it as in Child; what lies
    beyond the disk's end is cut off and said."""
    name, damage = partition_name(disk.name, number), assembly.about(disk).damage
    end = start + length
    if start >= disk.reader.size:
        damage.say(
            "outside",
            f"{name} begins at byte {start:#x}, but the disk ends at {disk.reader.size:#x}: the "
            "image is truncated, or the table is wrong",
        )
        return
    if end > disk.reader.size:
        damage.say(
            "truncated",
            f"{name} ends at byte {end:#x}, but the disk ends at {disk.reader.size:#x}: the "
            "image is truncated, or the table is wrong",
        )
        length = disk.reader.size - start
    assembly.add(Child("partition", name, length, Rows.make(0, disk.number, start, length), **about))


def check_overlaps(partitions: Sequence[Child], damage: Damage) -> None:
    """Say which partitions begin inside another one that lies before them on the disk."""
    spans = sorted(
        (start, start + child.size, child.name)
        for child in partitions
        for start in child.rows.parent_offset.tolist()
    )
    reach, before = 0, ""
    for start, end, name in spans:
        if start < reach:
            words = f"{name} begins at byte {start:#x}, inside {before}, which ends at {reach:#x}"
            damage.say("two-owners", words, start)
        if end > reach:
            reach, before = end, name


DYNAMIC: dict[str, Any] = {"type": "ldm", "contents": False, "unread": "ldm"}
"""About a partition of a Windows dynamic disk: a volume may begin there, and go on somewhere else."""


def say_dynamic(partitions: Sequence[Child], damage: Damage) -> None:
    """Name a dynamic disk."""
    if any(child.type == DYNAMIC["type"] for child in partitions):
        damage.say(
            "unsupported",
            "a Windows dynamic disk: which volumes lie in its partitions, only its own database (LDM) knows, "
            "which is not read",
        )


DESCRIPTOR = 0x8000
"""Where ISO 9660 begins on CDs."""


def is_cd(reader: Reader) -> bool:
    """Does ISO 9660 begin where it does on CDs?"""
    return reader.read_clipped(DESCRIPTOR + 1, 5) == b"CD001"


def is_disc(reader: Reader, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Is this a CD image that is partitioned as well? Its descriptors lie inside a partition then, not in a
    gap where an older image left them."""
    return is_cd(reader) and holds_descriptors(starts, ends)


def holds_descriptors(starts: np.ndarray, ends: np.ndarray) -> bool:
    """Does one of these partitions hold what a CD begins with?"""
    return bool(((starts <= DESCRIPTOR) & (ends > DESCRIPTOR)).any())
