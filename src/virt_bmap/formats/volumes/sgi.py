"""SGI volume headers: disks of IRIX machines.

Sources: Linux block/partitions/sgi.c (checksum, slots 1 to 16); IRIX sys/dvh.h (types of partitions, the
volume directory).
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

NAME = "sgi"
FEATURES = (
    "up to sixteen partitions",
    "files of the volume directory",
    "the partition that is the whole volume left out",
    "CD images left to ISO 9660",
)
REFUSED = ()
ORACLES = ("sfdisk --dump",)
CHECKS = Checks(
    checksums="the label",
    rules=("label: places and overlaps of partitions",),
    unchecked=(),
)

HEADER_TYPE, WHOLE_VOLUME = 0, 6
TYPES = {
    0: "SGI volhdr", 1: "SGI trkrepl", 2: "SGI secrepl", 3: "SGI raw", 4: "SGI bsd", 5: "SGI sysv",
    7: "SGI efs", 8: "SGI lvol", 9: "SGI rlvol", 10: "SGI xfs", 11: "SGI xfslog", 12: "SGI xlv",
    13: "SGI xvm", 0x82: "Linux swap", 0x83: "Linux native", 0x8E: "Linux LVM", 0xFD: "Linux RAID",
}  # fmt: skip
MAGIC = 0x0BE5A941

FILE = np.dtype([("vd_name", "S8"), ("vd_lbn", ">i4"), ("vd_nbytes", ">i4")])
PARTITION = np.dtype([("pt_nblks", ">u4"), ("pt_firstlbn", ">u4"), ("pt_type", ">u4")])
WIDE = np.dtype([(name, np.int64) for name in PARTITION.names or ()])
HEADER = struct(SECTOR, [
    (0, "vh_magic", ">u4"),
    (4, "vh_rootpt", ">u2"),
    (6, "vh_swappt", ">u2"),
    (8, "vh_bootfile", "S16"),
    (504, "vh_csum", ">u4"),
])  # fmt: skip
FILES_AT, FILES, PARTITIONS_AT, PARTITIONS = 72, 15, 312, 16


def labelled(reader: Reader) -> bool:
    """A header whose words add up to zero."""
    sector = reader.read_clipped(0, SECTOR)
    return (
        bool(record(sector, HEADER)["vh_magic"] == MAGIC)
        and int(np.frombuffer(sector, ">u4").sum(dtype=np.uint64)) & 0xFFFFFFFF == 0
    )


def probe(reader: Reader) -> bool:
    """A header, on what is no CD image."""
    if not labelled(reader):
        return False
    entries = np.frombuffer(reader.read(0, SECTOR), PARTITION, PARTITIONS, PARTITIONS_AT).astype(WIDE)
    start = entries["pt_firstlbn"] * SECTOR
    return not is_disc(reader, start, start + entries["pt_nblks"] * SECTOR)


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk.

    The partition that the header lies in is not a volume of its own: its files are named one by one.
    """
    (disk,) = members
    assembly = Assembly(members)
    sector = disk.reader.read(0, SECTOR)
    own = assembly.about(disk).extents
    own.add(tables.METADATA, 0, SECTOR, part="volume header")
    for file in np.frombuffer(sector, FILE, FILES, FILES_AT):
        start, length = int(file["vd_lbn"]) * SECTOR, int(file["vd_nbytes"])
        if start > 0 and length > 0 and start + length <= disk.reader.size:
            own.add(
                tables.BOOT,
                start,
                length,
                part=f"volume directory: {file['vd_name'].decode('ascii', 'replace')}",
            )
    for number, entry in enumerate(np.frombuffer(sector, PARTITION, PARTITIONS, PARTITIONS_AT), 1):
        kind, length = int(entry["pt_type"]), int(entry["pt_nblks"]) * SECTOR
        if length and kind not in (HEADER_TYPE, WHOLE_VOLUME):
            add_partition(
                assembly,
                disk,
                number,
                int(entry["pt_firstlbn"]) * SECTOR,
                length,
                detail=TYPES.get(kind, f"type {kind:#x}"),
            )
    check_overlaps(assembly.children, assembly.about(disk).damage)
    return assembly


def _structures() -> Structures:
    return {
        "volume header": Structure(HEADER),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
