"""Disks on which two formats claim all: a partition table, and the superblock of a member or a filesystem
that the disk is, or was before it was partitioned.

Nobody wipes the other one for certain: an old superblock outlives a new table, an old table a new superblock.
A format says by its own geometry whether its superblock is a leftover (`contract.VolumeFormat`); what is not
believed is said all the same. Who makes a filesystem clears the first sector of the disk, or leaves a table
that he sees there and says so (mkswap): of these a table is the younger one.
"""

from typing import NamedTuple

from virt_bmap.core.errors import FormatError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import HEAD, Reader
from virt_bmap.formats import registry as formats
from virt_bmap.model.contract import Assembly, Beside, Member, Slice, VolumeFormat, outlived
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE, WARNING


class Rivalry(NamedTuple):
    """The format that is believed, and what is said of the other one, and how loudly: who believes a
    superblock though a table may be younger must not take what it calls free for free."""

    believed: VolumeFormat
    words: str
    severity: str = NOTE


def judge(reader: Reader, claims: VolumeFormat) -> Rivalry | None:
    """Which of the two a disk is, on which this format's superblock was found; None where no table with
    partitions lies beside it."""
    table = formats.table_on(reader)
    if table is None:
        return None
    try:
        assembly = table.assemble([Member(0, reader.name + ":", reader)])
    except FormatError:
        return None
    if table.name == claims.name:
        return _of_filesystem(reader, table, assembly)
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
    words = f"a partition table ({table.name}) lies at its start: left over"
    return Rivalry(claims, words, WARNING if claims.is_leftover is outlived else NOTE)


def _of_filesystem(reader: Reader, table: VolumeFormat, assembly: Assembly) -> Rivalry | None:
    """The superblock of a filesystem before the first partition; None where there is none, or where that
    begins with the disk and is what the filesystem lies in."""
    starts = [start for child in assembly.children for start in child.rows.parent_offset.tolist()]
    first = min(*starts, HEAD) if starts else 0
    front = MappedReader(first, reader.name, {0: reader}, Rows.make(0, 0, 0, first)) if first else None
    system = formats.filesystem_on(front) if front else None
    if system is None:
        return None
    return Rivalry(table, f"a superblock ({system.name}) lies beside its partition table: left over")
