"""Linux software RAID (md): members to arrays.

Read: superblocks 0.90 (both byte orders), 1.0, 1.1 and 1.2; of several members the one with the most events
is believed. Arrays are called /dev/md127, /dev/md126, ... in the order in which their members are found. The
appliance of libguestfs gives the same numbers, but which of several arrays gets which depends there on the
order of probing: the name that an array gives itself is its label, and tells for sure.

Sources: kernel drivers/md/, include/uapi/linux/raid/md_p.h; mdadm's super0.c, super1.c and man page md(4).
"""

import re
from collections.abc import Sequence
from functools import partial

from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.rebuild import RebuiltReader
from virt_bmap.formats.common.stripes import bounded
from virt_bmap.formats.volumes.md.about import NAME, REDUNDANCY, describe, refuse, volume_state
from virt_bmap.formats.volumes.md.arrays import Array, gather, lost, place
from virt_bmap.formats.volumes.md.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.volumes.md.leftover import identify, is_leftover
from virt_bmap.formats.volumes.md.superblock import JOURNAL, Superblock, find, read
from virt_bmap.model.contract import Assembly, Child, Docs, Member, Structure, Structures, VolumeFormat
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE
from virt_bmap.model.tables import JOURNALED

FIRST_MINOR = 127


def probe(reader: Reader) -> bool:
    """A superblock at one of its four places."""
    return find(reader) is not None


def assemble(members: Sequence[Member]) -> Assembly:
    """All arrays of these members."""
    assembly = Assembly(members)
    groups: dict[tuple[str, str], list[Superblock]] = {}
    for member in members:
        try:
            found = read(member)
        except FormatError as error:
            refuse(assembly, member, error)
            continue
        groups.setdefault((found.version, found.uuid), []).append(found)
        about = assembly.about(member)
        about.uuid, about.detail = found.uuid, f"superblock {found.version}"
    first = _first_minor(members)
    for minor, group in enumerate(groups.values()):
        strangers = [other.member.name for found in groups.values() if found is not group for other in found]
        _add_array(
            assembly, group, f"/dev/md{first - minor if minor <= first else FIRST_MINOR + minor}", strangers
        )
    return assembly


def _first_minor(members: Sequence[Member]) -> int:
    """127, or one less than the arrays that these members lie on."""
    below = [int(found[1]) for member in members if (found := re.search(r"/dev/md(\d+)", member.name))]
    return max(0, min(below, default=FIRST_MINOR + 1) - 1)


def _add_array(assembly: Assembly, members: list[Superblock], name: str, strangers: list[str]) -> None:
    """One array, and the rows of its members' own metadata.

    `strangers` are members of other arrays, for messages.
    """
    try:
        array = gather(members)
        size, rows, parity = place(array)
    except FormatError as error:
        for one in members:
            refuse(assembly, one.member, error)
        return
    head = array.head
    degraded = parity is not None and not all(array.slots)
    rows, cut = bounded(rows, {one.member.number: one.member.reader.size for one in array.present})
    child = assembly.add(Child(
        "md", name, size, rows, uuid=head.uuid, label=head.name.rpartition(":")[2] or None,
        detail=volume_state(array),
        open=partial(RebuiltReader, stripes=parity) if parity and degraded else None,
        traits=JOURNALED if JOURNAL in head.roles else 0,
    ))  # fmt: skip
    describe(assembly, array)
    _check(array, cut, strangers, child.damage)


def _check(array: Array, cut: int, strangers: list[str], damage: Damage) -> None:
    """What is wrong with the array as a whole."""
    if missing := [slot for slot, one in enumerate(array.slots) if one is None]:
        beyond = lost(array)
        words = "its bytes are lost" if beyond else REDUNDANCY.get(array.head.level, "there are copies")
        head = array.head
        detail = (
            f"members in slots {', '.join(map(str, missing))} are missing, says the superblock at byte "
            f"{head.offset:#x} of {head.member.name}: {words}"
        )
        detail += f"; {', '.join(strangers)} belong to other arrays" if strangers else ""
        damage.say("missing-member", detail, severity=ERROR if beyond else NOTE)
    damage.add("truncated", "of its bytes [lies|lie] beyond the end of [its disk|their disks]", count=cut)


def _structures() -> Structures:
    from virt_bmap.formats.volumes.md.superblock import BITMAP, SUPERBLOCK_1

    return {
        "md superblock": Structure(SUPERBLOCK_1),
        "md bitmap": Structure(BITMAP),
    }


FORMAT = VolumeFormat(
    NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, spans=True, structures=_structures,
    is_leftover=is_leftover, identify=identify,
)  # fmt: skip
