"""What is said of an array and of its members."""

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import FormatError
from virt_bmap.formats.volumes.md.arrays import NAMES, RAID4, RAID5, RAID6, Array
from virt_bmap.model.contract import (
    Assembly,
    Member,
)
from virt_bmap.model.tables import CONTENT, METADATA

NAME = "linux_raid_member"


REDUNDANCY = dict.fromkeys((RAID4, RAID5, RAID6), "they are computed from parity")


def volume_state(array: Array) -> str:
    """Level, members and state in a few words."""
    head = array.head
    words = [NAMES[head.level], f"{len(array.present)} of {plural(len(array.slots), 'member')}"]
    words += [] if head.clean else ["not in sync"]
    return ", ".join(words)


def describe(assembly: Assembly, array: Array) -> None:
    """Rows and problems of the members."""
    for one in array.members:
        about, size = assembly.about(one.member), one.member.reader.size
        for part, start, length in one.metadata:
            about.extents.add(METADATA, start, max(0, min(length, size - start)), part=part)
        if one not in array.present and one.metadata[-1][0] != "md journal":
            start = one.data_offset
            about.extents.add(CONTENT, start, max(0, min(one.data_size or one.size, size - start)), part=NAME)
        about.damage.take(one.damage)


def refuse(assembly: Assembly, member: Member, error: FormatError) -> None:
    about = assembly.about(member)
    about.damage.refuse(error)
    about.extents.add(CONTENT, 0, member.reader.size, part=NAME)
