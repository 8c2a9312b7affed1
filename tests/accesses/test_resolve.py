"""What accesses touch: every byte of them, whatever a map says."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

import virt_bmap
from virt_bmap.accesses.resolve import Resolver
from virt_bmap.core.arrays import ints, total, union
from virt_bmap.model import tables


def test_inline_rows_cover_nothing(tmp_path: Path) -> None:
    """Not even in a map that calls what nothing else owns inline: the bytes are touched, without a name."""
    image = tmp_path / "blank.img"
    image.write_bytes(bytes(1 << 20))
    bmap = virt_bmap.map_disks([str(image)])
    flags = tables.arrow(np.full(bmap.extents.num_rows, tables.INLINE, np.uint8))
    at = bmap.extents.schema.get_field_index("flags")
    field = bmap.extents.schema.field(at)
    extents = bmap.extents.set_column(at, field, pa.chunked_array([flags.cast(field.type)]))
    bmap = dataclasses.replace(bmap, extents=extents)
    touched = Resolver(bmap).touched(1, ints([0, 4096]), ints([8192, 512]))
    for access, (start, end) in enumerate([(0, 8192), (4096, 4608)]):
        mine = touched.take((touched.access == access) & ~touched.inline)
        assert total(*union(mine.start, mine.end)) == end - start
        assert mine.start.min() == start
        assert mine.end.max() == end
