"""Which file does every byte of a disk image belong to?

    import virt_bmap

    bmap = virt_bmap.map_disks(["disk.img"])            # or virt_bmap.load("map.parquet")
    owners = bmap.owners(1, [0x541000], [0x541400])     # who owns these bytes of disk 1?
    virt_bmap.describe(bmap, 1, owners).to_pandas()     # with names
    bmap.inodes, bmap.names, bmap.extents               # Arrow tables: pandas, Polars and DuckDB take them as they are

The tables are described in `virt_bmap.tables`, the errors in `virt_bmap.errors`.
"""

TYPE_CHECKING = (
    # as typing's, which takes longer to import than all that the command line does before it is ready for
    # signals
    False
)
if TYPE_CHECKING:
    from typing import Any

    from virt_bmap.blockmap import BlockMap
    from virt_bmap.check import check as check_map
    from virt_bmap.errors import BmapError
    from virt_bmap.maps import load, map_disks
    from virt_bmap.outputs.listing import describe

__all__ = ["BlockMap", "BmapError", "check_map", "describe", "load", "map_disks"]
__version__ = "2.0.0.dev0"

_HOME = {
    "BlockMap": ("blockmap", "BlockMap"),
    "BmapError": ("errors", "BmapError"),
    "check_map": ("check", "check"),
    "describe": ("outputs.listing", "describe"),
    "load": ("maps", "load"),
    "map_disks": ("maps", "map_disks"),
}


def __getattr__(name: str) -> "Any":
    """The public names, imported when first used: the command line needs only some of them, and start-up
    counts."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'virt_bmap' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(f"virt_bmap.{module}"), attribute)
