"""How long a btrfs with 200,000 files takes to map, against `btrfs check --readonly` of the same image.

    python bench/btrfs.py [--files N] [--rounds N] CACHE

CACHE keeps the image for the next run. It is made by `mkfs.btrfs --rootdir` from files of mixed sizes: half
of them lie inline in the trees. Both are whole processes with everything in the page cache, in turns; the
fastest runs are compared.
"""

import os
import random
import shutil
import subprocess
from pathlib import Path

import fair

GOAL = 1.0
"""The whole process takes no longer than btrfs check."""


def build(cache: Path, files: int) -> Path:
    """The image, made once."""
    image = cache / f"btrfs-{files}.img"
    if image.exists():
        return image
    tree, part = cache / "btrfs-tree", image.with_suffix(".part")
    chooser = random.Random(1)
    filler = os.urandom(65536)
    for number in range(files):
        path = tree / f"d{number % 500}" / f"some file {number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filler[: chooser.choice([100, 900, 5000, 9000])])
    part.unlink(missing_ok=True)
    with open(part, "wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mkfs.btrfs", "-q", "--rootdir", str(tree), str(part)], check=True, capture_output=True)
    shutil.rmtree(tree)
    part.rename(image)
    return image


if __name__ == "__main__":
    raise SystemExit(fair.main(fair.Match(
        __doc__ or "", "", build, ["btrfs", "check", "--readonly"],
        {"btrfs": "btrfs-progs", "mkfs.btrfs": "btrfs-progs"}, lambda files: GOAL,
    )))  # fmt: skip
