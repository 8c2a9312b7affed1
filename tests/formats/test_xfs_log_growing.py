"""XFS' log while a kernel writes it: what is found of it is never older than the search."""

import os
import random
from pathlib import Path

import numpy as np

import xfs_images
from support import fiemap, file_extents, mapped, mounted, need, need_root, run, sync, tree
from virt_bmap.formats.filesystems.xfs.journal import _search


def test_the_head_is_found_while_it_moves_on() -> None:
    """A log that is written while it is searched: each look finds more of it written.

    What was its head when the search began is behind its head.
    """
    blocks, chooser = 131072, random.Random(3)
    for _ in range(50):
        head = begun = chooser.randrange(1, blocks - 5000)

        def cycles(at: np.ndarray) -> np.ndarray:
            nonlocal head
            head += chooser.choice([0, 1, 40, 1000])
            return np.where(at < head, 2, 1)

        assert begun <= _search(cycles, lambda cycle: cycle != 2, blocks) <= head


def test_a_filesystem_that_was_just_grown_is_mapped(tmp_path: Path) -> None:
    """Its superblock and its new groups are in the log alone. The kernel that recovers it is the judge."""
    need("mkfs.xfs", "xfsprogs")
    need_root()
    image = xfs_images.make(tmp_path / "disk", "--unsupported", "-d", "size=64m,agcount=2", size=256 << 20)
    with mounted(image) as where:
        (where / "before").write_bytes(os.urandom(1 << 20))
        sync(where)
        run("xfs_growfs", where)
        for number in range(8):  # each folder in the next group
            (where / f"d{number}").mkdir()
            with open(where / f"d{number}" / "file", "wb") as file:
                file.write(os.urandom(100_000))
                os.fsync(file.fileno())
        xfs_images.shut_down(where)
    found = mapped(image)
    assert found.problems.column("code").to_pylist() == ["journal-replayed"]
    assert found.filesystems.column("size").to_pylist() == [256 << 20]
    copy = tmp_path / "recovered"
    run("cp", "--sparse=always", image, copy)
    with mounted(copy) as where:
        paths = tree(found, 0)
        for number in range(8):
            name = f"/d{number}/file"
            assert file_extents(found, 0, paths[name]) == fiemap(where / name[1:])
