"""Which file does every byte of a disk image belong to?

    import virt_bmap

    bmap = virt_bmap.map_disks(["disk.img"])            # or virt_bmap.load("map.parquet")
    owners = bmap.owners(1, [0x541000], [0x541400])     # who owns these bytes of disk 1?
    virt_bmap.describe(bmap, 1, owners).to_pandas()     # with names
    bmap.inodes, bmap.names, bmap.extents               # Arrow tables: pandas, Polars and DuckDB take them

`opened` keeps the disks open, to read what lies on them; `map_disks` is short for the map alone:

    with virt_bmap.opened(virt_bmap.Disks(["disk.qcow2"])) as (bmap, readers):
        readers[bmap.volume_named("/dev/sda1")].read(0, 4096)

The tables are described in `virt_bmap.model.tables`, the errors in `virt_bmap.core.errors`.
"""

TYPE_CHECKING = (
    # as typing's, which takes longer to import than all that
    # the command line does before it is ready for signals
    False
)
if TYPE_CHECKING:
    from typing import Any

    from virt_bmap.ask.check import check as check_map
    from virt_bmap.core.errors import BmapError
    from virt_bmap.model.blockmap import BlockMap
    from virt_bmap.model.listing import describe
    from virt_bmap.open.disks import Disks
    from virt_bmap.survey.maps import load, map_disks, opened

__all__ = ["BlockMap", "BmapError", "Disks", "check_map", "describe", "load", "map_disks", "opened"]
__version__ = "2.0.0.dev0"

_HOME = {
    "BlockMap": ("model.blockmap", "BlockMap"),
    "BmapError": ("core.errors", "BmapError"),
    "Disks": ("open.disks", "Disks"),
    "check_map": ("ask.check", "check"),
    "describe": ("model.listing", "describe"),
    "load": ("survey.maps", "load"),
    "map_disks": ("survey.maps", "map_disks"),
    "opened": ("survey.maps", "opened"),
}


def __getattr__(name: str) -> "Any":
    """The public names, imported when first used: the command
    line needs only some of them, and start-up counts."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'virt_bmap' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(f"virt_bmap.{module}"), attribute)
