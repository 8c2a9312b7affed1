"""LVM2: physical volumes to logical volumes.

Read: the label in the first four sectors, all metadata areas (the newest text with a right checksum wins),
the text itself, and what device-mapper keeps inside volumes: thin pools, snapshot stores, caches, RAID
superblocks. Volumes are called /dev/VG/LV, as libguestfs calls them; inner ones keep their names
(/dev/VG/pool_tdata) and say that they are part of another.

Sources: lvm2 (sourceware.org/git/lvm2.git) lib/format_text, lib/metadata; man pages lvmraid, lvmthin,
lvmcache.
"""

from collections.abc import Sequence

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.lvm.group import new_group
from virt_bmap.formats.volumes.lvm.label import SECTOR, Pv, find_label, read_pv
from virt_bmap.formats.volumes.lvm.logical import read_group
from virt_bmap.formats.volumes.lvm.text import Section
from virt_bmap.model.contract import (
    Assembly,
    Checks,
    Docs,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR
from virt_bmap.model.tables import BOOT, CONTENT, METADATA, UNREFERENCED

NAME = "LVM2_member"
FEATURES = (
    "linear and striped volumes, mirrors, unfinished pvmove",
    "RAID0, 1, 4, 5, 6 and 10 with all layouts, failed and missing images computed from parity",
    "thin pools, thin volumes, their snapshots and external origins",
    "snapshots of the old kind",
    "dm-cache (pool or single volume) and dm-writecache: blocks that are newer than the origin",
    "integrity",
    "several physical volumes, also with some missing; several metadata areas, the newest valid text",
)
REFUSED = (
    "VDO",
    "volumes in the middle of a RAID reshape",
    "fresh data in the journal of dm-integrity that was not shut down",
    "LVM1",
)
ORACLES = (
    "lvs and pvs on the same loop devices",
    "every volume as a kernel reads it in the appliance of libguestfs",
    "thin_dump",
    "the pool's own space maps",
)
CHECKS = Checks(
    checksums="label, metadata headers and text; superblocks and blocks of thin and cache metadata",
    rules=(
        "label and metadata areas: places, the newest text",
        "metadata text: segments, sizes, overlaps",
        "thin metadata: B-tree nodes' flags, counts, order of keys, each block once",
    ),
    unchecked=("integrity checksums of volumes, space maps of thin metadata",),
)


def probe(reader: Reader) -> bool:
    """A label in one of the first four sectors."""
    return find_label(reader) >= 0


def assemble(members: Sequence[Member]) -> Assembly:
    """All groups of these physical volumes, and their logical volumes."""
    assembly = Assembly(members)
    pvs = _physical(members, assembly)
    newest = _newest(pvs)
    claimed: set[str] = set()
    names = [name for _, name in newest]
    for text, name in newest:
        listed = {
            section.text("id")
            for section in text.sections[name].section("physical_volumes").sections.values()
        }
        mine = [pv for pv in pvs if pv.uuid in listed - claimed]
        claimed |= listed
        _stale(mine, text, name, assembly)
        if names.count(name) > 1:
            for pv in mine[:1]:
                detail = (
                    f"there are {names.count(name)} volume groups called {name}, so their volumes "
                    "have the same device names; this one, with the metadata "
                    f"at byte {pv.text_at:#x} of {pv.member.name}, has the id "
                    f"{text.sections[name].text('id')}"
                )
                assembly.about(pv.member).damage.say("duplicate", detail, pv.text_at)
        try:
            read_group(new_group(text, name, mine, assembly))
        except Corrupt as error:
            _unread(mine, error.code, f"volume group {name}: {error}", assembly)
    _orphans([pv for pv in pvs if pv.uuid not in claimed], assembly)
    return assembly


def _physical(members: Sequence[Member], assembly: Assembly) -> list[Pv]:
    """The physical volumes, each once, with rows for what LVM itself takes of them."""
    pvs: dict[str, Pv] = {}
    for member in members:
        try:
            pv = read_pv(member)
        except Corrupt as error:
            _whole(assembly, member).refuse(error)
            continue
        if pv.uuid in pvs:
            first = pvs[pv.uuid].member.name
            words = f"{first} is the same physical volume {pv.uuid}: this copy is not used"
            _whole(assembly, member).say("duplicate", words, severity=ERROR)
            continue
        pvs[pv.uuid] = pv
        about = assembly.about(member)
        about.uuid, rows = pv.uuid, about.extents
        about.damage.take(pv.damage)
        rows.add(METADATA, pv.label_offset, SECTOR, part="LVM label")
        for offset, size in pv.areas:
            rows.add(METADATA, offset, size, part="LVM metadata area")
        for offset, size in pv.boot:
            rows.add(BOOT, offset, size, part="boot loader area")
    return list(pvs.values())


def _whole(assembly: Assembly, member: Member) -> Damage:
    """A member that is not used is one piece; the result takes the reason."""
    about = assembly.about(member)
    about.extents.add(CONTENT, 0, member.reader.size, part=NAME)
    return about.damage


def _newest(pvs: list[Pv]) -> list[tuple[Section, str]]:
    """For each group the text with the highest sequence number, and the group's name."""
    best: dict[str, tuple[int, Section, str]] = {}
    for pv in pvs:
        for text in pv.copies:
            for name, group in text.sections.items():
                uuid, seqno = group.text("id"), group.number("seqno", 0)
                if uuid not in best or seqno > best[uuid][0]:
                    best[uuid] = seqno, text, name
    return [(text, name) for _, text, name in sorted(best.values(), key=lambda found: found[2])]


def _stale(pvs: list[Pv], newest: Section, name: str, assembly: Assembly) -> None:
    """Say which metadata areas hold an older text than the group's newest."""
    group = newest.sections[name]
    for pv in pvs:
        about = assembly.about(pv.member)
        about.label = name
        for copy in pv.copies:
            older = [
                part.number("seqno", 0)
                for part in copy.sections.values()
                if part.text("id") == group.text("id")
            ]
            if older and older[0] < group.number("seqno", 0):
                detail = (
                    f"a metadata area holds the group's state {older[0]}, the newest is "
                    f"{group.number('seqno', 0)}"
                )
                about.damage.say("stale", detail)


def _unread(pvs: list[Pv], code: str, detail: str, assembly: Assembly) -> None:
    """The data areas of a group that can't be read are one piece each."""
    for pv in pvs:
        assembly.about(pv.member).damage.say(code, detail, pv.text_at, severity=ERROR)
        _add_data_area(pv, assembly, CONTENT)


def _orphans(pvs: list[Pv], assembly: Assembly) -> None:
    """Physical volumes that no group's text names: in no group, as far as their label knows, or of a group
    whose metadata lies on other disks."""
    for pv in pvs:
        if pv.empty or not pv.used:
            _add_data_area(pv, assembly, UNREFERENCED)
            continue
        _unread(
            [pv],
            "missing-member",
            "its volume group's metadata lies on disks that were not given, or can't be read",
            assembly,
        )


def _add_data_area(pv: Pv, assembly: Assembly, kind: int) -> None:
    size = pv.member.reader.size
    for offset, length in pv.data:
        # length 0: up to the end, where a second metadata area may lie
        end = (
            offset + length
            if length
            else min([start for start, _ in pv.areas if start > offset], default=size)
        )
        rows = assembly.about(pv.member).extents
        rows.add(kind, min(offset, size), max(0, min(end, size) - offset), part=NAME)


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
    allocator="the group's metadata, the space maps of thin pools, the tables of snapshot stores and "
    "write caches",
    spans=True,
    structures=_structures,
)
