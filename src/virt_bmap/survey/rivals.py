"""Disks on which two formats claim all: a partition table, and the superblock of a member that the disk is,
or was before it was partitioned.

Nobody wipes the other one for certain: an old superblock outlives a new table, an old table a new superblock.
A format says by its own geometry whether its superblock is a leftover (`contract.VolumeFormat`); what is not
believed is said all the same.
"""

from typing import NamedTuple

from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.model.contract import Beside, Member, Slice, VolumeFormat
from virt_bmap.model.damage import Damage


class Rivalry(NamedTuple):
    """The format that is believed, and what is said of the other one."""

    believed: VolumeFormat
    words: str


def judge(reader: Reader, claims: VolumeFormat) -> Rivalry | None:
    """Which of the two a disk is, on which this format's superblock was found; None where no table with
    partitions lies beside it."""
    table = formats.table_on(reader)
    if table is None or table.name == claims.name:
        return None
    try:
        assembly = table.assemble([Member(0, reader.name + ":", reader)])
    except FormatError:
        return None
    damage: Damage = assembly.volumes[0].damage
    partitions = [
        Slice(start, start + child.size, start > 0 and formats.is_known(reader, start, child.size))
        for child in assembly.children
        if child.contents
        for start in child.rows.parent_offset.tolist()
    ]
    if not partitions:
        return None
    beside = Beside(partitions, damage.has("truncated") or damage.has("outside"))
    is_leftover = claims.is_leftover(reader, beside)
    if is_leftover is None:
        return None
    if is_leftover:
        return Rivalry(table, f"a superblock ({claims.name}) lies beside its partition table: left over")
    return Rivalry(claims, f"a partition table ({table.name}) lies at its start: left over")
