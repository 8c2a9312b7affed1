"""What the metadata of a filesystem still says of the past: whose free bytes were, and of what a block in a journal is a copy.

Each format that remembers has a module `history` with

    former(reader, extents, starts, ends) -> Table     the table `former`: owners that are gone, of bytes that touch the ranges; `extents` are those of the map
    copy_of(reader, offset) -> (offset, transaction)   where a journal's byte belongs, None where it is no copy (optional)

which is imported only when somebody asks. Here their answers are put in order.
"""

import importlib
from types import ModuleType

import numpy as np
import pyarrow as pa

from virt_bmap import tables
from virt_bmap.arrays import Int, intersect, ints
from virt_bmap.blockmap import BlockMap
from virt_bmap.reader import Reader

HISTORIES = {
    "ext2": "ext", "ext3": "ext", "ext4": "ext", "ntfs": "ntfs", "vfat": "fat", "exfat": "exfat", "btrfs": "btrfs",
}  # fmt: skip
"""Types of filesystems, and the package of each that has a module `history`."""


def module_of(bmap: BlockMap, volume: int) -> ModuleType | None:
    """The module that knows the past of the filesystem on a volume; None where there is none, or the format keeps nothing."""
    types = bmap.slice_of("filesystems", volume)[1].column("type").to_pylist()
    package = HISTORIES.get(types[0]) if types else None
    return importlib.import_module(f"virt_bmap.filesystems.{package}.history") if package else None


def former_owners(bmap: BlockMap, volume: int, reader: Reader, starts: Int, ends: Int) -> pa.Table | None:
    """Whose the free bytes among [starts[i], ends[i]) of a volume were, the last owners first: the table `former`.

    None where the format keeps nothing. A row reaches as far as the owner did, so also over bytes that are somebody's now.
    """
    module = module_of(bmap, volume)
    if module is None:
        return None
    _, extents = bmap.slice_of("extents", volume)
    free = extents.take(np.flatnonzero(tables.codes(extents, "kind") == tables.FREE))
    low, length = tables.integers(free, "volume_offset"), tables.integers(free, "length")
    starts, ends = intersect(ints(starts), ints(ends), low, low + length)
    if not len(starts):
        return tables.empty("former")
    found = module.former(reader, extents, starts, ends)
    return found.take(_latest_first(found))


def _latest_first(found: pa.Table) -> Int:
    """Rows by sequence and time, what has neither last."""
    mtime = found.column("mtime_ns").fill_null(np.iinfo(np.int64).min).to_numpy()
    order: Int = np.lexsort((mtime, tables.integers(found, "sequence")))[::-1]
    return order
