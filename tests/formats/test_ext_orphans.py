"""Inodes that a mount finishes: the kernel, mounting the same image, is the judge."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from support import assert_proven, fiemap, file_extents, mapped, mounted, need, run, tree
from virt_bmap.model import tables

SIZE = {"cut": 5000, "empty": 0, "whole": 100_000}
"""What is left of files of 100,000 bytes that are on the list."""


def being_cut(folder: Path, options: str) -> tuple[Path, dict[str, int]]:
    """An image whose files were being cut when it was copied, and their inodes."""
    debugfs, image = need("debugfs", "e2fsprogs"), folder / "disk.img"
    source = folder / "tree"
    source.mkdir()
    for name in (*SIZE, "other"):
        (source / name).write_bytes(name.encode() * (100_000 // len(name) + 1))
    run("truncate", "-s", "32M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", *options.split(), "-d", source, image)
    shutil.rmtree(source)
    inodes = {path[1:]: inode for path, inode in tree(mapped(image), 0).items()}
    words = [f"sif /{name} size {size}" for name, size in SIZE.items()]
    if "orphan_file" in options:
        words.append("feature orphan_present")
        row = next(row for row in mapped(image).extents.to_pylist() if row["part"] == "orphan file")
        with open(image, "r+b") as file:
            file.seek(row["volume_offset"] + 12)
            file.write(np.array([inodes[name] for name in SIZE], "<u4").tobytes())
    else:
        chain = [*SIZE]
        words.append(f"ssv last_orphan {inodes[chain[0]]}")
        for name, following in zip(chain, [*chain[1:], None], strict=True):
            words.append(f"sif /{name} dtime @{inodes[following] if following else 0:#x}")
    run(debugfs, "-w", "-f", "-", image, stdin="\n".join(words).encode())
    return image, inodes


@pytest.mark.parametrize(
    "options", ["-O ^metadata_csum", "-O orphan_file,^metadata_csum", "-O ^extents,^64bit -b 1024"]
)
def test_a_truncate_in_progress_is_as_the_mount_leaves_it(options: str, tmp_path: Path) -> None:
    image, inodes = being_cut(tmp_path, options)
    bmap = mapped(image)
    assert_proven(bmap)
    mine = {name: file_extents(bmap, 0, inodes[name]) for name in (*SIZE, "other")}
    cut = [row for row in bmap.extents.to_pylist() if row["part"] == "cut off"]
    assert {row["inode"] for row in cut} == {inodes["cut"], inodes["empty"]}
    recovered = tmp_path / "recovered.img"
    run("cp", image, recovered)
    with mounted(recovered) as where:
        kernel = {name: fiemap(where / name) for name in mine}
    assert mine == kernel
    free = [row for row in mapped(recovered).extents.to_pylist() if row["kind"] == tables.KINDS[tables.FREE]]
    for row in cut:
        low, high = row["volume_offset"], row["volume_offset"] + row["length"]
        assert any(f["volume_offset"] <= low and high <= f["volume_offset"] + f["length"] for f in free)
