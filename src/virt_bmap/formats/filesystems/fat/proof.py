"""What `check` asks of FAT beyond what a map needs: are the copies of the FAT copies?"""

import numpy as np

from virt_bmap.core.arrays import expand, ints, union
from virt_bmap.core.stored import spans
from virt_bmap.formats.filesystems.fat.superblock import BOOT_SECTOR, read_geometry
from virt_bmap.formats.filesystems.fat.tables import FAT_BATCH
from virt_bmap.model.contract import (
    NOT_LOOKED_AT,
    Filesystem,
    Proof,
)
from virt_bmap.model.damage import Damage


def prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Where the FATs are to be copies of each other, are they? Drivers read the active one only."""
    geometry = read_geometry(found.reader.read_clipped(0, BOOT_SECTOR.itemsize), found.reader.name)
    active, used = geometry.active_fat, (geometry.clusters + 2) * geometry.bits // 8
    for copy in sorted(set(range(geometry.fats)) - {active}) if geometry.mirrored else ():
        place, other = (geometry.reserved + number * geometry.fat_size for number in (active, copy))
        mine, others = (spans(found.reader, ints(start), ints(used)) for start in (place, other))
        low, high = union(np.append(mine[0], others[0]), np.append(mine[1], others[1]))
        row, step = expand(-(-(high - low) // FAT_BATCH))
        begin = low[row] + step * FAT_BATCH
        for at, end in zip(begin.tolist(), np.minimum(begin + FAT_BATCH, high[row]).tolist(), strict=True):
            size = ints(end - at)
            differs = np.flatnonzero(
                found.reader.read_ranges(ints(place + at), size)
                != found.reader.read_ranges(ints(other + at), size)
            )
            if len(differs):
                where = other + at + int(differs[0])
                text = f"FAT {copy + 1} differs from FAT {active + 1}, which is used, from byte {where:#x} on"
                damage.say("copy-differs", text, where)
                break
    return [Proof("checksums", NOT_LOOKED_AT, "the format has none")]
