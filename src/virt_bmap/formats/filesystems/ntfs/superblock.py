"""The boot sector and its copy: how large everything is, and where the $MFT begins.

Sources: ntfs-3g libntfs-3g/bootsect.c; kernel fs/ntfs3/super.c ntfs_init_from_boot() (sectors_per_cluster
above 0x80, the backup sector).
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ntfs.ondisk import BOOT_SECTOR, MIRRORED, OEM_ID
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE
from virt_bmap.model.tables import ExtentRows

SECTOR_SIZES = (256, 512, 1024, 2048, 4096)
MAX_CLUSTER = 2 << 20
"""The largest that Windows formats (since version 1709)."""
RECORD_SIZES = (512, 1024, 2048, 4096)
"""fs/ntfs3 takes no larger ones (MAXIMUM_BYTES_PER_MFT)."""


class Geometry(NamedTuple):
    """Sizes and places in bytes, as the boot sector gives them; a truncated image has fewer `clusters`."""

    sector_size: int
    cluster_size: int
    record_size: int
    sectors: int
    clusters: int
    mft: int
    mirror: int
    serial: int

    @property
    def end(self) -> int:
        """Where the last whole cluster ends."""
        return self.clusters * self.cluster_size

    @property
    def backup(self) -> int:
        """Where the copy of the boot sector lies: right after the sectors that the volume counts as its
        own."""
        return self.sectors * self.sector_size


def read_boot(reader: Reader, damage: Damage) -> Geometry:
    """The geometry from the boot sector or, where that makes no sense, from the copy in the last sector."""
    sector = reader.read_clipped(0, BOOT_SECTOR.itemsize)
    try:
        geometry = parse(sector, reader.size)
    except Corrupt as error:
        at = reader.size - BOOT_SECTOR.itemsize
        copy = reader.read_clipped(at, BOOT_SECTOR.itemsize)
        if not is_boot(copy):
            raise
        geometry = parse(copy, reader.size)
        damage.say(
            "copy-used", f"{error}; the copy in the last sector was used instead", error.offset or 0, ERROR
        )
        return geometry
    if geometry.backup + geometry.sector_size > reader.size and geometry.end > reader.size:
        damage.ends_early(geometry.backup, reader.size)
    elif geometry.backup + geometry.sector_size <= reader.size:
        copy = reader.read(geometry.backup, BOOT_SECTOR.itemsize)
        if not is_boot(copy):
            damage.say(
                "copy-missing",
                "the sector after the volume holds no copy of the boot sector",
                geometry.backup,
                severity=NOTE,
            )
        elif any(
            record(copy, BOOT_SECTOR)[name] != record(sector, BOOT_SECTOR)[name]
            for name in BOOT_SECTOR.names or ()
        ):
            damage.say(
                "copy-differs", "the copy of the boot sector describes another volume", geometry.backup
            )
    return geometry


def is_boot(sector: bytes) -> bool:
    """Has it the name of NTFS where a boot sector has it?"""
    return sector[3:11] == OEM_ID


def parse(sector: bytes, size: int) -> Geometry:
    """The geometry that a boot sector describes, every number checked; `size` bytes are there."""
    boot = record(sector, BOOT_SECTOR)
    sector_size = int(boot["bytes_per_sector"])
    if sector_size not in SECTOR_SIZES:
        raise Corrupt(
            f"boot sector: bytes_per_sector at byte 0xb is {sector_size}, not one of {SECTOR_SIZES}", 0x0B
        )
    per_cluster = int(boot["sectors_per_cluster"])
    if per_cluster > 0x80:  # what does not fit a byte is written as the negative logarithm
        per_cluster = 1 << min(256 - per_cluster, 31)
    cluster_size = sector_size * per_cluster
    if per_cluster & (per_cluster - 1) or not 256 <= cluster_size <= MAX_CLUSTER:
        raise Corrupt(
            f"boot sector: sectors_per_cluster at byte 0xd gives clusters of {cluster_size} bytes, not a "
            f"power of two up to {MAX_CLUSTER}",
            0x0D,
        )
    per_record = int(boot["clusters_per_mft_record"])
    record_size = per_record * cluster_size if per_record > 0 else 1 << min(-per_record, 31)
    if record_size not in RECORD_SIZES:
        raise Corrupt(
            "boot sector: clusters_per_mft_record at byte 0x40 gives "
            f"records of {record_size} bytes, not one of {RECORD_SIZES}",
            0x40,
        )
    sectors = int(boot["number_of_sectors"])
    if not 0 < sectors < (1 << 62) // sector_size:
        raise Corrupt(
            "boot sector: number_of_sectors at byte 0x28 is "
            f"{sectors:#x}, more than any disk holds, or none at all",
            0x28,
        )
    clusters = sectors // per_cluster
    mft, mirror = (_place(boot, name, cluster_size) for name in ("mft_lcn", "mftmirr_lcn"))
    for name, at, byte in (("mft_lcn", mft, 0x30), ("mftmirr_lcn", mirror, 0x38)):
        if name == "mft_lcn" and not 0 < at <= size - MIRRORED * record_size:
            raise Corrupt(
                f"boot sector: {name} at byte {byte:#x} is "
                f"{int(boot[name]):#x}, outside the volume of {size:#x} bytes",
                byte,
            )
    return Geometry(
        sector_size,
        cluster_size,
        record_size,
        sectors,
        clusters,
        mft,
        mirror,
        int(boot["volume_serial_number"]),
    )


def _place(boot: np.void, name: str, cluster_size: int) -> int:
    return int(boot[name]) * cluster_size


def tail(reader: Reader, geometry: Geometry, rows: ExtentRows) -> int:
    """Add to `rows` what lies after the last cluster; returns how many bytes the filesystem takes in all."""
    end = geometry.backup
    if end > geometry.end:
        rows.add(tables.GAP, geometry.end, end - geometry.end, part="behind the last cluster")
    if end + geometry.sector_size > reader.size:
        return end
    rows.add(tables.BOOT, end, geometry.sector_size, part="boot sector copy")
    return end + geometry.sector_size
