"""How long an XFS with 200,000 files takes to map, against `xfs_repair -n` of the same image.

    python bench/xfs.py [--files N] [--rounds N] CACHE

CACHE keeps the image (1.5 GiB, sparse) for the next run. It is made by mkfs.xfs from a prototype: no root, no
mount.
"""

import subprocess
from pathlib import Path

import fair

PER_FOLDER = 1000
GOAL = 1.0
"""The whole process takes no longer than xfs_repair."""


def build(cache: Path, files: int) -> Path:
    """The image, made if it is not there yet."""
    made = cache / f"xfs-{files}.img"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        content = cache / "content"
        content.write_bytes(b"content of every file\n" * 20)
        lines = ["/", "0 0", "d--755 0 0"]
        for number in range(files):
            if number % PER_FOLDER == 0:
                lines += (["$"] if number else []) + [f"folder-{number // PER_FOLDER:04d} d--755 0 0"]
            lines.append(f"a-file-{number:07d}.txt ---644 0 0 {content}")
        proto = cache / "proto"
        proto.write_text("\n".join([*lines, "$", "$", ""]))
        part = made.with_suffix(".part")
        with open(part, "wb") as file:
            file.truncate((600 << 20) + files * 6144)
        subprocess.run(["mkfs.xfs", "-q", "-f", "-p", proto, part], check=True)
        part.rename(made)
    return made


if __name__ == "__main__":
    raise SystemExit(fair.main(fair.Match(
        __doc__ or "", "xfs", build, ["xfs_repair", "-n"], {"mkfs.xfs": "xfsprogs", "xfs_repair": "xfsprogs"},
        lambda files: GOAL,
    )))  # fmt: skip
