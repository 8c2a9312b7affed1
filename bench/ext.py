"""How long an ext4 with 200,000 or 1,000,000 files takes to map, against `e2fsck -fn` of the same image.

    python bench/ext.py [--files N] [--rounds N] CACHE

CACHE keeps the image (5 KiB a file, sparse) for the next run. It is made by mke2fs from a tree of files: no
root, no mount. A million files need some 15 GiB and ten minutes the first time.
"""

import shutil
import subprocess
from pathlib import Path

import fair

PER_FOLDER = 100


def build(cache: Path, files: int) -> Path:
    """The image, made if it is not there yet."""
    made = cache / f"ext4-{files}.img"
    if not made.exists():
        folder = cache / f"tree-{files}"
        for number in range(files):
            where = folder / f"d{number // PER_FOLDER // 100:03d}" / f"sub{number // PER_FOLDER % 100:03d}"
            if number % PER_FOLDER == 0:
                where.mkdir(parents=True, exist_ok=True)
            (where / f"file-{number:07d}.dat").write_bytes(b"x" * (number % 7 * 1000 + 1))
        part = made.with_suffix(".part")
        with open(part, "wb") as file:
            file.truncate((1 << 30) + files * 8192)
        inodes = str(files + files // 4)
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-N", inodes, "-d", folder, part],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        shutil.rmtree(folder)
        part.rename(made)
    return made


if __name__ == "__main__":
    raise SystemExit(fair.main(fair.Match(
        __doc__ or "", "ext", build, ["e2fsck", "-fn"], {"mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs"},
        lambda files: 1.5 if files < 1_000_000 else 1.0,
    )))  # fmt: skip
