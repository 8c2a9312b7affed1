"""The header of a sparse VMDK extent, checked.

Sources: VMware "Virtual Disk Format 5.0", "Hosted Sparse Extent Header".
"""

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.closing import not_closed
from virt_bmap.formats.images.vmdk.ondisk import (
    AT_END,
    HEADER,
    MAX_CAPACITY,
    MAX_GRAIN,
    MAX_TABLE_ENTRIES,
    SECTOR,
)


def read_header(image: Reader, at: int = 0) -> dict[str, int]:
    """The sparse extent header, or the footer that stands for it in a stream; checked.

    Raises Corrupt or Unsupported.
    """
    raw = record(image.read_clipped(at, HEADER.itemsize), HEADER)
    if bytes(raw["magicNumber"]) != b"KDMV":
        what = (
            "is a COWD (vmfsSparse) extent, which is not supported"
            if bytes(raw["magicNumber"]) == b"COWD"
            else "has no VMDK sparse header"
        )
        raise (Unsupported if "COWD" in what else Corrupt)(f"{image.name}: {what} at byte {at:#x}", at)
    head = {name: int(raw[name]) for name in (HEADER.names or ())[1:]}
    if head["version"] not in (1, 2, 3):
        raise Unsupported(
            f"{image.name}: is a VMDK of version {head['version']}; 1 to 3 are supported", at + 4
        )
    grain, entries = head["grainSize"], head["numGTEsPerGT"]
    if (
        not 0 < grain * SECTOR <= MAX_GRAIN
        or grain & (grain - 1)
        or not 0 < entries <= MAX_TABLE_ENTRIES
        or head["capacity"] > MAX_CAPACITY
    ):
        raise Corrupt(
            f"{image.name}: its VMDK header at byte {at:#x} says "
            f"{plural(head['capacity'], 'sector')}, {grain:,} a "
            f"grain and {entries:,} grains a table",
            at + 12,
        )
    if head["gdOffset"] == AT_END and at == 0:
        return read_header(image, image.size - 2 * SECTOR)
    return head


def marked(image: Reader) -> Mark | None:
    """An extent says so itself, also where a descriptor beside it names the disk."""
    head = record(image.read_clipped(0, HEADER.itemsize), HEADER)
    if bytes(head["magicNumber"]) != b"KDMV" or not head["uncleanShutdown"]:
        return None
    return not_closed(image, "VMDK's uncleanShutdown", "vmware-vdiskmanager -R puts it in order")
