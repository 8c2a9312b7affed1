"""How long an NTFS volume with 200,000 files takes to map, against `fls -r -p` of The Sleuth Kit on the same
image.

    python bench/ntfs.py [--files N] [--rounds N] CACHE

CACHE keeps the image for the next run. It is made by mkntfs and filled through ntfs-3g (root, FUSE): three
files in four are resident. Both are whole processes with everything in the page cache, in turns; the fastest
runs are compared. The map has all extents, where fls prints names only.
"""

import subprocess
import tempfile
import time
from pathlib import Path

import fair

GOAL = 1 / 3
"""The whole process takes a third of the time of fls, start-up included."""


def build(cache: Path, files: int) -> Path:
    """The image, made once."""
    image = cache / f"ntfs-{files}.img"
    if image.exists():
        return image
    part = image.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(part, "wb") as file:
        file.truncate((files * 5120 + (64 << 20)) & ~0xFFFF)
    subprocess.run(["mkntfs", "-F", "-Q", "-q", str(part)], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        daemon = subprocess.Popen(
            ["ntfs-3g", "-o", "no_detach,noatime", str(part), folder], stderr=subprocess.DEVNULL
        )
        while not Path(folder).is_mount() and daemon.poll() is None:
            time.sleep(0.05)
        try:
            for number in range(files):
                path = Path(folder, f"folder {number // 1000}", f"file number {number:06}.txt")
                if number % 1000 == 0:
                    path.parent.mkdir()
                path.write_bytes(b"x" * (100 if number % 4 else 5000))
        finally:
            subprocess.run(["umount", folder], check=True)
            daemon.wait()
    part.rename(image)
    return image


if __name__ == "__main__":
    raise SystemExit(fair.main(fair.Match(
        __doc__ or "", "ntfs", build, ["fls", "-r", "-p"],
        {"mkntfs": "ntfs-3g", "ntfs-3g": "ntfs-3g", "fls": "sleuthkit"}, lambda files: GOAL,
    )))  # fmt: skip
