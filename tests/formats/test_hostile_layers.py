"""Images of VHDX, VDI, parallels, bochs and dmg that lie about places, sizes and parents: in little memory
and time they are read, or refused in one line, by QEMU behind its walls and by the readers of their
layers."""

from pathlib import Path

import pytest
from test_bombs import MEMORY, SECONDS, cost

from hostile_layers import IMAGES, write
from support import need, run

WORDS = {
    "vhdx of 2^63 bytes": "Invalid argument",
    "vhdx of 64 TiB, its table in a hole": "Cannot allocate memory",
    "vhdx, a log of 4 GiB in a hole": "its log would take 4,293,918,720 bytes",
    "vhdx with a parent": "'/dev/null'",
    "vdi of 0 bytes": "the export is empty",
    "vdi of 256 TiB, its map in a hole": "Cannot allocate memory",
    "vdi with a parent": "non-NULL link UUID",
    "parallels of 2^55 sectors": "File too large",
    "parallels with clusters of 0 bytes": "Zero sectors per track",
    "parallels with 2^28 entries in a hole": "Cannot allocate memory",
    "bochs with extents of 2 GiB": "is too large",
    "bochs with a parent": "not in Bochs format",
    "dmg, a list of 2^63 bytes": "Invalid argument",
}
"""What is said of some, so that these images are known to be read as far as their lie."""


@pytest.mark.parametrize("name", IMAGES)
def test_lies_cost_nothing(name: str, tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-utils")
    path = write(name, tmp_path)
    for offsets in ([], ["--host-offsets"]) if name.startswith(("vhdx", "vdi")) else ([],):
        memory, seconds, said = cost("map", "-q", "-o", "/dev/null", *offsets, path)
        assert memory < MEMORY, said
        assert seconds < SECONDS, said
        assert len(said.splitlines()) <= 1, said
        if not offsets:
            assert WORDS.get(name, "") in said


def test_an_honest_table_is_read_whole(tmp_path: Path) -> None:
    """16 TiB of VDI, whose map of 64 MiB is there."""
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "vdi", tmp_path / "honest.vdi", "16T")
    memory, seconds, said = cost("map", "-q", "-o", "/dev/null", tmp_path / "honest.vdi")
    assert "nothing known is on this disk" in said
    assert memory < MEMORY
    assert seconds < SECONDS
