"""Is a superblock on a partitioned disk that of the disk, or left over, or that of the last partition?

Versions 0.90 and 1.0 lie at the end: the table can be the array's content, as on any mirror of whole disks.
Then its partitions lie where the array has bytes. Where the array begins behind the table, its first bytes,
or those of the partitions, tell which of the two was there last.
"""

from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry
from virt_bmap.formats.volumes.md.arrays import RAID1
from virt_bmap.formats.volumes.md.superblock import read
from virt_bmap.model.contract import Beside, Identity, Member


def is_leftover(reader: Reader, table: Beside) -> bool | None:
    """As `contract.VolumeFormat` asks it."""
    try:
        found = read(Member(0, reader.name, reader))
    except FormatError:
        return any(part.known for part in table.partitions)
    start = found.data_offset
    if start == 0 and found.level != RAID1 and table.reaches_beyond:
        return None  # it counts in bytes of a larger array
    if any(part.start <= found.offset < part.end for part in table.partitions):
        return True
    if start == 0 and found.level == RAID1:
        return any(part.end > found.size for part in table.partitions) or None
    if 0 < start < reader.size and registry.is_known(
        reader, start, min(found.data_size, reader.size - start)
    ):
        return False
    own = max(start, found.chunk)  # what the array itself has written, or would have
    found_there = any(part.known and part.start >= own for part in table.partitions)
    return found_there if start else found_there or None


def identify(reader: Reader) -> Identity | None:
    """As `contract.VolumeFormat` asks it."""
    try:
        found = read(Member(0, reader.name, reader))
    except FormatError:
        return None
    return Identity(found.uuid, str(found.number), found.events)
