"""Physical volumes: which metadata text is the newest, and what becomes of those that belong to no group."""

from collections.abc import Sequence

from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.common.duplicates import Copy, choose
from virt_bmap.formats.volumes.lvm.label import SECTOR, Pv, read_pv
from virt_bmap.formats.volumes.lvm.text import Section
from virt_bmap.model.contract import (
    Assembly,
    Member,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR
from virt_bmap.model.tables import BOOT, CONTENT, METADATA, UNREFERENCED

NAME = "LVM2_member"


def physical_volumes(members: Sequence[Member], assembly: Assembly) -> list[Pv]:
    """The physical volumes, each once, with rows for what LVM itself takes of them."""
    texts: dict[str, Section] = {}
    copies: dict[str, list[Pv]] = {}
    for member in members:
        try:
            pv = read_pv(member, texts)
        except Corrupt as error:
            _whole(assembly, member).refuse(error)
            continue
        copies.setdefault(pv.uuid, []).append(pv)
    return [_one_of(found, assembly) for found in copies.values()]


def _one_of(copies: list[Pv], assembly: Assembly) -> Pv:
    """The copy of a physical volume that is used; what it and the others hold is said."""
    claims = [Copy(pv.member, pv.seqno, assembly.about(pv.member).damage) for pv in copies]
    first = choose(claims, f"the physical volume {copies[0].uuid}", "state of its group")
    for pv in copies:
        assembly.about(pv.member).uuid = pv.uuid
        if pv is not copies[first]:
            _whole(assembly, pv.member)
    pv = copies[first]
    about = assembly.about(pv.member)
    about.damage.take(pv.damage)
    rows = about.extents
    rows.add(METADATA, pv.label_offset, SECTOR, part="LVM label")
    for offset, size in pv.areas:
        rows.add(METADATA, offset, size, part="LVM metadata area")
    for offset, size in pv.boot:
        rows.add(BOOT, offset, size, part="boot loader area")
    return pv


def _whole(assembly: Assembly, member: Member) -> Damage:
    """A member that is not used is one piece; the result takes the reason."""
    about = assembly.about(member)
    about.extents.add(CONTENT, 0, member.reader.size, part=NAME)
    return about.damage


def newest_texts(pvs: list[Pv]) -> list[tuple[Section, str]]:
    """For each group the text with the highest sequence number, and the group's name."""
    best: dict[str, tuple[int, Section, str]] = {}
    for pv in pvs:
        for text in pv.copies:
            for name, group in text.sections.items():
                uuid, seqno = group.text("id"), group.number("seqno", 0)
                if uuid not in best or seqno > best[uuid][0]:
                    best[uuid] = seqno, text, name
    return [(text, name) for _, text, name in sorted(best.values(), key=lambda found: found[2])]


def add_stale(pvs: list[Pv], newest: Section, name: str, assembly: Assembly) -> None:
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


def add_unread(pvs: list[Pv], code: str, detail: str, assembly: Assembly) -> None:
    """The data areas of a group that can't be read are one piece each."""
    for pv in pvs:
        assembly.about(pv.member).damage.say(code, detail, pv.text_at, severity=ERROR)
        _add_data_area(pv, assembly, CONTENT)


def add_orphans(pvs: list[Pv], assembly: Assembly) -> None:
    """Physical volumes that no group's text names: in no group, as far as their label knows, or of a group
    whose metadata lies on other disks."""
    for pv in pvs:
        if pv.empty or not pv.used:
            _add_data_area(pv, assembly, UNREFERENCED)
            continue
        add_unread(
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
