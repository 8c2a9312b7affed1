"""What the volume says of itself: how it was left, its label, how much is free."""

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.fat.allocator import ClusterRuns
from virt_bmap.formats.filesystems.fat.inodes import Parser
from virt_bmap.formats.filesystems.fat.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE

FSINFO = struct(
    512, [(0, "FSI_LeadSig", "<u4"), (484, "FSI_StrucSig", "<u4"), (488, "FSI_Free_Count", "<u4")]
)


FSINFO_SIGNATURES = 0x41615252, 0x61417272


UNKNOWN_COUNT = 0xFFFFFFFF


def volume_state(reader: Reader, geometry: Geometry, damage: Damage) -> str:
    """What the marks in FAT entry 1 (Windows) and in the boot sector (Linux) say; FAT12 has the latter
    only."""
    dirty, errors = bool(geometry.state & 1), bool(geometry.state & 2)
    if geometry.bits > 12:
        width = geometry.bits // 8
        active = geometry.reserved + geometry.active_fat * geometry.fat_size
        mark = int.from_bytes(reader.read(active + width, width), "little")
        high = geometry.bits - (1 if geometry.bits == 16 else 5)
        dirty |= not mark >> high & 1
        errors |= not mark >> high - 1 & 1
    if errors:
        damage.say(
            "marked-damaged", "a driver met errors of the disk and says so in the FAT or the boot sector"
        )
    return tables.IN_USE if dirty else tables.CLEAN


def volume_label(labels: list[bytes]) -> str | None:
    """The volume label in the root directory, as blkid has it; the boot sector's copy is often out of
    date."""
    return labels[0].replace(b"\x05", b"\xe5").rstrip(b" \0").decode("cp437") or None if labels else None


def check_rest(reader: Reader, geometry: Geometry, runs: ClusterRuns, parser: Parser, damage: Damage) -> None:
    """A volume that ends too early, FATs that are too short for it, slots of long names that are nobody's, a
    wrong count of free clusters."""
    damage.ends_early(geometry.size, reader.size)
    clusters = (geometry.size - geometry.data_start) // geometry.cluster_size
    if clusters > geometry.clusters:
        sentence = (
            f"a FAT has entries for {geometry.clusters:,} of the volume's {plural(clusters, 'cluster')}"
        )
        damage.say("superblock", sentence, 0)
    what = "[entry|entries] of long names [belongs|belong] to no file"
    damage.add("directory", what, count=parser.orphans, severity=NOTE)
    if geometry.fsinfo:
        info = record(reader.read(geometry.fsinfo, FSINFO.itemsize), FSINFO)
        start, end = runs.free
        free, said = int((end - start).sum()), int(info["FSI_Free_Count"])
        if (info["FSI_LeadSig"], info["FSI_StrucSig"]) != FSINFO_SIGNATURES:
            damage.say("count", "the FSInfo sector has no signature", geometry.fsinfo, severity=NOTE)
        elif said not in (free, UNKNOWN_COUNT):
            damage.say(
                "count",
                f"FSInfo says that {counted(said, '[cluster is|clusters are] free')}, the FAT says {free:,}",
                geometry.fsinfo,
                severity=NOTE,
            )
