"""A btrfs in which `btrfs check` finds nothing has nothing to be noted."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support import mapped, need, run
from virt_bmap.formats.filesystems.btrfs.owners import check_free_space
from virt_bmap.model.damage import Damage


@pytest.mark.parametrize("options", ["", "-m single", "-M", "-d dup", "-n 65536"])
@pytest.mark.parametrize("size", ["300M", "3G"])
def test_a_fresh_filesystem(options: str, size: str, tmp_path: Path) -> None:
    """mkfs.btrfs leaves an account of the free space of a chunk that it removes again."""
    need("mkfs.btrfs", "btrfs-progs")
    image = tmp_path / "disk"
    run("truncate", "-s", size, image)
    run("mkfs.btrfs", "-q", *options.split(), image)
    run("btrfs", "check", "--readonly", image)
    assert mapped(image).problems.to_pylist() == []


def test_ranges_outside_of_every_account_are_noted() -> None:
    def columns(start: list[int], length: list[int]) -> dict[str, np.ndarray]:
        return {"start": np.array(start, np.int64), "length": np.array(length, np.int64)}

    chunks = SimpleNamespace(starts=np.array([1000]), ends=np.array([2000]))
    free = (np.array([1500]), np.array([2000]))
    for told, accounts, wanted in (
        (columns([1500], [500]), columns([1000], [1000]), []),
        (columns([1500, 3000], [500, 100]), columns([1000, 3000], [1000, 500]), []),
        (columns([1500, 3000], [500, 100]), columns([1000], [1000]), ["allocator"]),
        (columns([1500, 3000], [500, 900]), columns([1000, 3000], [1000, 500]), ["allocator"]),
    ):
        damage = Damage()
        check_free_space(free, told, accounts, SimpleNamespace(chunks=chunks), damage)  # type: ignore[arg-type]
        assert [problem.code for problem in damage.problems()] == wanted
