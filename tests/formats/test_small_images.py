"""Every small image is proven as its tool made it, and there is one of every format."""

from itertools import chain
from pathlib import Path

import pytest

import small_images
from support import assert_proven
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW
from virt_bmap.survey.maps import map_disks

LAYERS = {format.name for format in formats.images() if format.read}
SEEN: dict[str, set[str]] = {}
"""By recipe, what its volumes are."""


@pytest.mark.parametrize("name", small_images.RECIPES)
def test_small_image(name: str, tmp_path: Path) -> None:
    try:
        paths = small_images.make(name, tmp_path)
    except small_images.Left as reason:
        pytest.skip(str(reason))
    host = paths[0].suffix != ".img"
    bmap = map_disks([str(path) for path in paths], None if host else "raw", host_offsets=host)
    assert_proven(bmap)
    for table in BlockMap.TABLES:
        tables.check(table, getattr(bmap, table))
    kinds = set(bmap.volumes.column("type").to_pylist())
    assert kinds & {
        *chain.from_iterable(listed.types for listed in (*formats.FILESYSTEMS, *formats.VOLUMES)),
        *LAYERS,
    }, kinds
    SEEN[name] = kinds
    assert sorted(tmp_path.iterdir()) == sorted(paths), "nothing else is left there"


def test_every_format_has_an_image() -> None:
    """Runs after the others, in the same process (pytest-xdist: --dist loadfile)."""
    if set(SEEN) != set(small_images.RECIPES):
        pytest.skip("not all images were made")
    seen = set().union(*SEEN.values())
    listed = [*formats.FILESYSTEMS, *formats.VOLUMES]
    missing = [format.package for format in listed if not seen & set(format.types)]
    assert not missing
    assert LAYERS - seen <= {RAW}
