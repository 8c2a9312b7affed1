"""Former owners from tables: a format reads itself again as if what is dead were alive, and here the dead
become the table `former`."""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, touching
from virt_bmap.model import paths, tables
from virt_bmap.model.paths import positions

MAX_NAMED = 1 << 16
"""Former owners that are named in one answer; a disk can be full of what is dead."""


def chosen(extents: pa.Table, starts: Int, ends: Int, dead: np.ndarray | bool = True) -> Int:
    """Rows of `extents` that are `dead` (a boolean for each) and touch the ranges [starts[i], ends[i]), at
    most MAX_NAMED."""
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    plain = tables.integers(extents, "flags") & tables.INLINE == 0
    return np.flatnonzero(dead & plain & touching(start, start + length, starts, ends))[:MAX_NAMED]


def former(
    inodes: pa.Table, names: pa.Table, root: int, extents: pa.Table, *,
    said_by: str, sequence: Int | None = None, doubt: list[str | None] | None = None,
) -> pa.Table:  # fmt: skip
    """The table `former` of these rows of `extents`; `inodes` and `names` are those of a whole filesystem as
    it was. `sequence` and `doubt` are by row."""
    owner = tables.integers(extents, "inode")
    at = positions(tables.integers(inodes, "inode"), owner)
    mtime = inodes.column("mtime_ns").fill_null(np.iinfo(np.int64).min).to_numpy()
    compressed = tables.integers(extents, "flags") & tables.COMPRESSED != 0
    return tables.make(
        "former", volume_offset=tables.integers(extents, "volume_offset"),
        length=tables.integers(extents, "length"), inode=owner,
        names=paths.lists(names, paths.of_names(names, inodes, root), owner),
        part=extents.column("part").cast(pa.string()),
        file_offset=np.where(compressed, -1, tables.integers(extents, "file_offset")),
        size=np.where(at >= 0, np.append(tables.integers(inodes, "size"), -1)[at], -1),
        mtime_ns=np.append(mtime, np.iinfo(np.int64).min)[at], said_by=said_by, sequence=sequence,
        doubt=doubt,
    )  # fmt: skip
