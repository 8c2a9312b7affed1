"""What the metadata of a filesystem still says of the past: whose free bytes were, and of what a block in a
journal is a copy.

Formats that remember declare a `contract.History`; here their answers are put in order.
"""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, intersect, ints
from virt_bmap.core.layers import raw
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import History


def history_of(bmap: BlockMap, volume: int) -> History | None:
    """What knows the past of the filesystem on a volume;
    None where there is none, or the format keeps nothing."""
    format = formats.filesystem(bmap.filesystem_type(volume))
    return format.history() if format and format.history else None


def former_owners(bmap: BlockMap, volume: int, reader: Reader, starts: Int, ends: Int) -> pa.Table | None:
    """Whose the free bytes among [starts[i], ends[i]) of a
    volume were, the last owners first: the table `former`.

    None where the format keeps nothing. A row reaches as far as the owner did, so also over bytes that are
    somebody's now.
    """
    history = history_of(bmap, volume)
    if history is None:
        return None
    _, extents = bmap.slice_of("extents", volume)
    free = extents.take(np.flatnonzero(tables.codes(extents, "kind") == tables.FREE))
    low, length = tables.integers(free, "volume_offset"), tables.integers(free, "length")
    starts, ends = intersect(ints(starts), ints(ends), low, low + length)
    if not len(starts):
        return tables.empty("former")
    found = history.former(raw(reader), extents, starts, ends)
    return found.take(_latest_first(found))


def contents(bmap: BlockMap, volume: int, reader: Reader) -> pa.Table | None:
    """Where deleted files that the map names lay, as rows of `extents`; None where its format names none."""
    history = history_of(bmap, volume)
    return history.contents(raw(reader)) if history and history.contents else None


def _latest_first(found: pa.Table) -> Int:
    """Rows by sequence and time, what has neither last."""
    mtime = found.column("mtime_ns").fill_null(np.iinfo(np.int64).min).to_numpy()
    order: Int = np.lexsort((mtime, tables.integers(found, "sequence")))[::-1]
    return order
