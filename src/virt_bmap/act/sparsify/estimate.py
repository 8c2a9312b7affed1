"""What sparsify would give back of a disk image, without writing anything, and what it would keep though
nobody owns it; and which of it takes space now.

Sources: lseek(2) on SEEK_DATA and SEEK_HOLE; fallocate(2)
on FALLOC_FL_PUNCH_HOLE, which frees whole blocks only.
"""

import os
import stat
from typing import NamedTuple

from virt_bmap.act.sparsify.plan import SWAP, kinds_of, whole_blocks
from virt_bmap.ask.space import Ranges, doubts, free_space, overlap
from virt_bmap.core.errors import ImageError
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import data_ranges


class Gain(NamedTuple):
    """`size` bytes of one kind on one volume, of which `held` take space on the host; None where that is not
    known. `given_back`: by sparsify."""

    volume: int
    what: str
    size: int
    held: int | None
    given_back: bool


class HostSpace(NamedTuple):
    """Where a raw image file has data on its host, and the host's block size in bytes."""

    data: Ranges
    block: int


def host_of(path: str) -> HostSpace | None:
    """What of a file takes space on this host; None for what is not a regular file.

    Raises ImageError where it can't be read.
    """
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return None
            return HostSpace(data_ranges(file.fileno(), about.st_size), about.st_blksize)
    except OSError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror}") from error


def estimate(
    bmap: BlockMap, disk: int, host: HostSpace | None, swap: bool = False
) -> tuple[list[Gain], dict[int, str]]:
    """What the volume `disk`, a whole disk, would give back, what it would keep, and the volumes that are
    left alone, with the reason. `swap`: as for `plan`."""
    gains: list[Gain] = []
    left: dict[int, str] = {}
    unbelieved, systems = doubts(bmap), set(bmap.filesystems.column("volume").to_pylist())
    for what, given_back in (("free", True), (SWAP, swap), ("gap", False), ("unreferenced", False)):
        space = free_space(bmap, disk, kinds_of(bmap, (what,)), unbelieved)
        left |= space.left
        for volume, ranges in space.free.items():
            if len(ranges[0]):
                size = int((ranges[1] - ranges[0]).sum())
                held = None if host is None else overlap(whole_blocks(ranges, host.block), host.data)
                gains.append(
                    Gain(
                        volume,
                        "slack" if what == "gap" and volume in systems else what,
                        size,
                        held,
                        given_back,
                    )
                )
    return sorted(gains, key=lambda gain: (not gain.given_back, gain.volume, gain.what)), left
