"""LVM2: physical volumes to logical volumes.

Read: the label in the first four sectors, all metadata areas (the newest text with a right checksum wins),
the text itself, and what device-mapper keeps inside volumes: thin pools, snapshot stores, caches, RAID
superblocks. Volumes are called /dev/VG/LV, as libguestfs calls them; inner ones keep their names
(/dev/VG/pool_tdata) and say that they are part of another.

Sources: lvm2 (sourceware.org/git/lvm2.git) lib/format_text, lib/metadata; man pages lvmraid, lvmthin,
lvmcache.
"""

from collections import Counter
from collections.abc import Sequence

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.volumes.lvm.group import new_group
from virt_bmap.formats.volumes.lvm.label import find_label, read_pv
from virt_bmap.formats.volumes.lvm.logical import read_group
from virt_bmap.formats.volumes.lvm.physical import (
    NAME,
    add_orphans,
    add_stale,
    add_unread,
    newest_texts,
    physical_volumes,
)
from virt_bmap.model.contract import (
    Assembly,
    Beside,
    Docs,
    Identity,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)


def probe(reader: Reader) -> bool:
    """A label in one of the first four sectors."""
    return find_label(reader) >= 0


def assemble(members: Sequence[Member]) -> Assembly:
    """All groups of these physical volumes, and their logical volumes."""
    assembly = Assembly(members)
    pvs = physical_volumes(members, assembly)
    free = {pv.uuid: pv for pv in pvs}
    newest = newest_texts(pvs)
    called = Counter(name for _, name in newest)
    for text, name in newest:
        listed = (
            section.text("id")
            for section in text.sections[name].section("physical_volumes").sections.values()
        )
        mine = [free.pop(uuid) for uuid in listed if uuid in free]
        mine.sort(key=lambda pv: pv.member.number)
        add_stale(mine, text, name, assembly)
        if called[name] > 1:
            for pv in mine[:1]:
                detail = (
                    f"{plural(called[name], 'volume group')} are called {name}, so their volumes have "
                    f"the same device names; this one, with the metadata at byte {pv.text_at:#x} of "
                    f"{pv.member.name}, has the id {text.sections[name].text('id')}"
                )
                assembly.about(pv.member).damage.say("duplicate", detail, pv.text_at)
        try:
            read_group(new_group(text, name, mine, assembly))
        except Corrupt as error:
            add_unread(mine, error.code, f"volume group {name}: {error}", assembly)
    add_orphans(list(free.values()), assembly)
    return assembly


def is_leftover(reader: Reader, table: Beside) -> bool:
    """LVM takes no disk that has partitions: lvm2 lib/filters/filter-partitioned.c."""
    return True


def identify(reader: Reader) -> Identity | None:
    """As `contract.VolumeFormat` asks it: a physical volume of the group that its newest text describes."""
    try:
        pv = read_pv(Member(0, reader.name, reader), {})
    except Corrupt:
        return None
    if pv.newest is None:
        return None
    return Identity(pv.newest.text("id"), pv.uuid, pv.seqno)


def _structures() -> Structures:
    from virt_bmap.formats.volumes.lvm.label import LABEL_HEADER, MDA_HEADER

    return {
        "LVM label": Structure(LABEL_HEADER),
        "LVM metadata area": Structure(MDA_HEADER),
    }


FORMAT = VolumeFormat(
    NAME,
    probe,
    assemble,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the group's metadata, the space maps of thin pools, "
    "the tables of snapshot stores and write caches",
    spans=True,
    structures=_structures,
    is_leftover=is_leftover,
    identify=identify,
)
