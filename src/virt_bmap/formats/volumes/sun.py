"""Sun disk labels: SPARC machines, and what fdisk and parted write for them.

Sources: Linux block/partitions/sun.c (checksum, when the VTOC counts, slots 1 to 8); Solaris sys/dklabel.h
and sys/vtoc.h.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.partitions import SECTOR, add_partition, check_overlaps, is_disc
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Assembly,
    Checks,
    Docs,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)

NAME = "sun"
FEATURES = (
    "up to eight slices, named by the VTOC",
    "the slice that is the whole disk left out",
    "CD images left to ISO 9660",
)
REFUSED = ("Solaris x86 VTOCs inside an MBR partition (named only)",)
ORACLES = ("sfdisk --dump",)
CHECKS = Checks(
    checksums="the label",
    rules=("label: places and overlaps of partitions",),
    unchecked=(),
)

SANITY = 0x600DDEEE
WHOLE_DISK = 5
TAGS = {
    1: "Boot", 2: "SunOS root", 3: "SunOS swap", 4: "SunOS usr", 6: "SunOS stand", 7: "SunOS var",
    8: "SunOS home", 9: "SunOS alt sectors", 10: "SunOS cachefs", 11: "SunOS reserved", 0x82: "Linux swap",
    0x83: "Linux native", 0x8E: "Linux LVM", 0xFD: "Linux raid autodetect",
}  # fmt: skip

LABEL = struct(SECTOR, [
    (0, "dkl_asciilabel", "S128"),
    (128, "v_version", ">u4"),
    (132, "v_volume", "S8"),
    (140, "v_nparts", ">u2"),
    (142, "v_part", ">u2", (8, 2)),
    (188, "v_sanity", ">u4"),
    (432, "dkl_ncyl", ">u2"),
    (434, "dkl_acyl", ">u2"),
    (436, "dkl_nhead", ">u2"),
    (438, "dkl_nsect", ">u2"),
    (444, "dkl_map", ">u4", (8, 2)),
    (508, "dkl_magic", ">u2"),
    (510, "dkl_cksum", ">u2"),
])  # fmt: skip
MAGIC = 0xDABE


def labelled(reader: Reader) -> bool:
    """A label whose words add up to zero without carry."""
    sector = reader.read_clipped(0, SECTOR)
    return bool(record(sector, LABEL)["dkl_magic"] == MAGIC) and not np.bitwise_xor.reduce(
        np.frombuffer(sector, ">u2")
    )


def probe(reader: Reader) -> bool:
    """A label, on what is no CD image."""
    if not labelled(reader):
        return False
    slices = _slices(record(reader.read(0, SECTOR), LABEL))
    # in cylinders of any size, a slice may begin beyond what 64 bits count
    places = [(min(start, reader.size), min(start + length, reader.size)) for _, _, start, length in slices]
    return not is_disc(reader, *np.array(places, np.int64).reshape(-1, 2).T)


def _slices(label: np.void) -> list[tuple[int, int, int, int]]:
    """(number, tag, start, length) of the slices in use, in bytes; tag 0 where there is no VTOC that
    counts."""
    valid = label["v_sanity"] == SANITY and label["v_version"] == 1 and label["v_nparts"] <= 8
    old = not (label["v_sanity"] or label["v_version"] or label["v_nparts"])
    cylinder = int(label["dkl_nhead"]) * int(label["dkl_nsect"]) * SECTOR
    slices = zip(label["v_part"][:, 0].tolist(), label["dkl_map"].tolist(), strict=True)
    return [
        (number, tag if valid or old else 0, first * cylinder, sectors * SECTOR)
        for number, (tag, (first, sectors)) in enumerate(slices, 1)
        if sectors and (number <= label["v_nparts"] or not valid)
    ]


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk."""
    (disk,) = members
    assembly = Assembly(members)
    about = assembly.about(disk)
    label = record(disk.reader.read(0, SECTOR), LABEL)
    if volume := label["v_volume"].rstrip():
        about.label = volume.decode("latin-1")
    about.extents.add(tables.METADATA, 0, SECTOR, part="disk label")
    for number, tag, start, length in _slices(label):
        if tag != WHOLE_DISK:
            add_partition(assembly, disk, number, start, length, detail=TAGS.get(tag, f"tag {tag:#x}"))
    check_overlaps(assembly.children, about.damage)
    return assembly


def _structures() -> Structures:
    return {
        "disk label": Structure(LABEL),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
