"""diff of disks that only make sense together: a btrfs over two devices, each compared with the other one
added."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from btrfs_images import fill, make, mounted_pool


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """The disks before and after a file got other content and another was made."""
    folder = tmp_path_factory.mktemp("disks")
    new = make(folder, "200M", "-d raid0 -m single", 2)
    with mounted_pool(new, folder / "mnt") as where:
        fill(
            where,
            "mkdir d; head -c 3000000 /dev/urandom > d/changes; head -c 3000000 /dev/urandom > "
            "d/stays; sync -f .",
        )
    old = [Path(shutil.copy(image, folder / f"old-{image.name}")) for image in new]
    with mounted_pool(new, folder / "mnt") as where:
        fill(
            where, "head -c 3000000 /dev/urandom > d/changes; head -c 700000 /dev/urandom > d/made; sync -f ."
        )
    return old, new


def diff(*words: object) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "virt_bmap", "diff", "--json", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_disk_of_a_pool(pair: tuple[list[Path], list[Path]]) -> None:
    """The rows add up to the bytes of the sectors that differ, and the files in both halves of the stripes
    are named."""
    old, new = pair
    for mine, other in ((0, 1), (1, 0)):
        rows = diff(old[mine], new[mine], "--old-add", old[other], "-a", new[other])
        before, after = (np.fromfile(disks[mine], np.uint8).reshape(-1, 512) for disks in (old, new))
        assert sum(row["bytes"] for row in rows) == 512 * int((before != after).any(axis=1).sum())
        changes = {
            row["path"]: row["change"] for row in rows if row["path"] and row["path"].startswith("/d/")
        }
        assert set(changes) == {"/d/changes", "/d/made"}
        assert changes["/d/made"] == "added"


def test_alone_one_of_them_names_nothing(pair: tuple[list[Path], list[Path]]) -> None:
    """The test above would fail without the other disk: all metadata lies on one."""
    old, new = pair
    named = [
        [row["path"] for row in diff(before, after) if row["path"] and row["path"].startswith("/d/")]
        for before, after in zip(old, new, strict=True)
    ]
    assert [] in named


def test_words_for_the_wrong_disk(pair: tuple[list[Path], list[Path]]) -> None:
    old, new = pair
    done = subprocess.run(
        [sys.executable, "-m", "virt_bmap", "diff", old[0], new[0], "-a", new[1], "--disk", "2"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--disk counts the disks of saved maps" in done.stderr
