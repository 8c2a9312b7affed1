"""Apple partition maps: disks of PowerPC Macs, and disk images made for them.

Sources: Inside Macintosh: Devices, chapter 3 (driver descriptor record, partition map entries); Linux
block/partitions/mac.c for numbering: every entry is a slot, the map's own one too;
libblkid/src/partitions/mac.c.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.partitions import (
    SECTOR,
    add_partition,
    check_overlaps,
    holds_descriptors,
    is_cd,
)
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

NAME = "mac"
FEATURES = (
    "blocks of 512, 1024, 2048 and 4096 bytes",
    "drivers and the map itself named",
    "hybrid CD images left to ISO 9660",
)
REFUSED = ()
ORACLES = ("parted", "mmls of The Sleuth Kit")
CHECKS = Checks(
    checksums=None,
    rules=("entries: signature, count, overlaps",),
    unchecked=(),
)

BLOCKS = (512, 1024, 2048, 4096)
MAX_ENTRIES = 255
"""Entries that are read, as the kernel."""
FREE = (b"Apple_Free", b"Apple_Void", b"Apple_Scratch", b"Apple_Extra")
"""Types of entries that are not partitions: what they cover is a gap."""
FILLER = b"ISO9660_data"
"""The type of entries that libisofs makes of what is left of a CD image."""
DRIVERS = (b"Apple_Driver", b"Apple_Patches", b"Apple_FWDriver")

DRIVER_DESCRIPTOR = struct(SECTOR, [
    (0, "sbSig", "S2"),
    (2, "sbBlkSize", ">u2"),
    (4, "sbBlkCount", ">u4"),
    (16, "sbDrvrCount", ">u2"),
])  # fmt: skip
ENTRY = struct(SECTOR, [
    (0, "pmSig", "S2"),
    (4, "pmMapBlkCnt", ">u4"),
    (8, "pmPyPartStart", ">u4"),
    (12, "pmPartBlkCnt", ">u4"),
    (16, "pmPartName", "S32"),
    (48, "pmParType", "S32"),
    (80, "pmLgDataStart", ">u4"),
    (84, "pmDataCnt", ">u4"),
    (88, "pmPartStatus", ">u4"),
    (120, "pmProcessor", "S16"),
])  # fmt: skip


def labelled(reader: Reader) -> bool:
    """An entry after block 0."""
    return _block_size(reader) is not None


def probe(reader: Reader) -> bool:
    """A map, on what is no CD image: that lies where the map has something of it or nothing at all, an older
    one that was left there in what the map calls free."""
    size = _block_size(reader)
    if size is None or not is_cd(reader):
        return size is not None
    entries, _ = _entries(reader, size)
    entries = entries[np.isin(np.char.rstrip(entries["pmParType"]), FREE)]
    start = widen(entries["pmPyPartStart"], "pmPyPartStart") * size
    length = widen(entries["pmPartBlkCnt"], "pmPartBlkCnt") * size
    return holds_descriptors(start, start + length)


def _block_size(reader: Reader) -> int | None:
    """Bytes of a block: as the driver descriptor says, if an entry lies there; some disks have no descriptor,
    or one that says something else."""
    descriptor = record(reader.read_clipped(0, SECTOR), DRIVER_DESCRIPTOR)
    said = int(descriptor["sbBlkSize"]) if descriptor["sbSig"] == b"ER" else SECTOR
    sizes = sorted(BLOCKS, key=lambda size: size != said)
    return next((size for size in sizes if reader.read_clipped(size, 4) == b"PM\0\0"), None)


def _entries(reader: Reader, size: int) -> tuple[np.ndarray, int]:
    """(the entries of the map, how many it says that it has)."""
    promised = int(record(reader.read_clipped(size, SECTOR), ENTRY)["pmMapBlkCnt"])
    count = max(1, min(promised, MAX_ENTRIES))
    blocks = np.frombuffer(reader.read_clipped(size, count * size), np.uint8).reshape(count, size)
    entries = records(blocks[:, :SECTOR], ENTRY)
    wrong = np.flatnonzero(entries["pmSig"] != b"PM")
    return entries[: int(wrong[0])] if len(wrong) else entries, promised


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk."""
    (disk,) = members
    assembly = Assembly(members)
    damage = assembly.about(disk).damage
    size = _block_size(disk.reader) or SECTOR
    entries, promised = _entries(disk.reader, size)
    count = len(entries)
    if count < min(promised, MAX_ENTRIES):
        damage.say(
            "mapping",
            f"there is no partition map entry at byte {(count + 1) * size:#x}, though the map "
            f"says that it has {promised}",
            (count + 1) * size,
        )
    for number, entry in enumerate(entries, 1):
        _add(assembly, disk, number, entry, size)
    own = assembly.about(disk).extents
    own.add(tables.METADATA, 0, SECTOR, part="driver descriptor")
    own.add(tables.METADATA, size, count * size, part="partition map")
    check_overlaps(assembly.children, damage)
    return assembly


def _add(assembly: Assembly, disk: Member, number: int, entry: np.void, size: int) -> None:
    kind = entry["pmParType"].rstrip()
    if not entry["pmPartBlkCnt"] or kind in (*FREE, FILLER):
        return
    unread = (
        "partition map" if kind == b"Apple_partition_map" else "driver" if kind.startswith(DRIVERS) else None
    )
    add_partition(
        assembly, disk, number, int(entry["pmPyPartStart"]) * size, int(entry["pmPartBlkCnt"]) * size,
        label=_text(entry["pmPartName"]) or None, detail=_text(kind), contents=unread is None, unread=unread,
    )  # fmt: skip


def _text(raw: bytes) -> str:
    return raw.rstrip().decode("mac_roman")


def _structures() -> Structures:
    return {
        "driver descriptor": Structure(DRIVER_DESCRIPTOR),
        "partition map": Structure(ENTRY, many=True),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
