"""The sectors that a partition table counts in, where it does not say so itself.

A DOS table counts in its disk's logical sectors. An image does not tell them, and a disk may have lain behind
an adapter that showed others. So what the user says holds; then what lies where the sectors of each size put
the partitions; and where nothing tells, what the device says, or 512.

Sources: Linux block/partitions/msdos.c (queue_logical_block_size).
"""

from collections.abc import Iterator, Sequence

from virt_bmap.core.layers import layers
from virt_bmap.core.reader import SECTORS, Reader
from virt_bmap.formats.common.boot_record import SECTOR, SIGNATURE, Entry
from virt_bmap.model.contract import About, Member


def counted_in(disk: Member, partitions: Sequence[Entry], about: About) -> int:
    """Bytes of the sectors in which these primary partitions of a disk are counted; where that is not the
    usual, it is said in `about` the disk."""
    below = layers(disk.reader)
    usual = max((one.sector for one in below if one.sector), default=SECTOR)
    found = (
        usual if any(one.is_sector_sure for one in below) else _by_contents(disk.reader, partitions, usual)
    )
    if found != SECTOR:
        about.detail = f"sectors of {found:,} bytes"
    if found != usual:
        about.damage.say(
            "sectors",
            f"its table counts in sectors of {found:,} bytes: what lies there shows it; --blocksize says "
            "otherwise",
        )
    return found


def _by_contents(reader: Reader, partitions: Sequence[Entry], usual: int) -> int:
    """The size of sectors by which most partitions begin with something known, the usual one if in doubt.

    On nearly all disks the last partition would end behind the disk by any other: then nothing is read.
    """
    last = max((entry.start + entry.length for entry in partitions), default=0)
    sizes = [size for size in SECTORS if size == usual or last * size <= reader.size]
    if len(sizes) == 1:
        return usual
    return max(sizes, key=lambda size: (sum(_known(reader, partitions, size)), size == usual))


def _known(reader: Reader, partitions: Sequence[Entry], size: int) -> Iterator[bool]:
    """For each partition: does something known begin there?"""
    from virt_bmap.formats import registry  # it lists the formats that ask here

    for entry in partitions:
        start, length = entry.start * size, min(entry.length * size, reader.size - entry.start * size)
        if length <= 0 or start == 0:
            continue  # what begins with the disk does so by any size
        if entry.is_link:
            yield reader.read_clipped(start, SECTOR)[SIGNATURE:] == b"\x55\xaa"
        else:
            yield registry.is_known(reader, start, length)
