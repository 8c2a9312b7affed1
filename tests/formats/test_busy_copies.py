"""Copies of filesystems that are being written: their map is what the kernel's own recovery makes of them.

A few copies of each kind here; BMAP_COPIES=40 asks for more of them.
"""

import os
from pathlib import Path

import pytest

from busy_copies import FLAVOURS, by_kernel, by_map, copies, differences
from support import need_root, run
from virt_bmap.model import tables

COPIES = int(os.environ.get("BMAP_COPIES", "3"))


@pytest.mark.parametrize("name", FLAVOURS)
def test_a_busy_copy_is_mapped_as_the_kernel_recovers_it(name: str, tmp_path: Path) -> None:
    """All paths, modes, links, sizes, extents and contents."""
    need_root()
    found: dict[int, list[str]] = {}
    dirty = 0
    flavour = FLAVOURS[name]
    for number, copy in enumerate(copies(flavour, tmp_path, COPIES)):
        bmap, mine = by_map(copy)
        state = bmap.filesystems.column("state")[0].as_py()
        dirty += state == tables.RECOVERED
        if flavour.torn and state == tables.DAMAGED:  # what was torn apart, and is said
            continue
        recovered = copy.with_suffix(".recovered")
        run("cp", "--reflink=always", copy, recovered)
        found[number] = differences(by_kernel(recovered, flavour), mine, flavour.moves)
        recovered.unlink()
    assert dirty, "no copy needed recovery"
    assert not any(found.values()), found
