"""dump of a partition against `guestfish download` of the same device, whole processes, and the bytes
compared.

    python bench/dump.py CACHE-FOLDER [FILES] [TIMES]

The image is that of bench/ext.py in a partition. guestfish has to start its small virtual machine first; that
is told apart by a download of nothing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ext import build
from fair import seconds

EMULATED = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
FILES, START = 50_000, 1 << 20


def disk(cache: Path, files: int) -> Path:
    """A GPT disk with the filesystem as its only partition, made if it is not there yet."""
    made = cache / f"dump-{files}.img"
    if not made.exists():
        part = build(cache, files)
        size = part.stat().st_size
        with made.open("wb") as file:
            file.truncate(size + 2 * START)
        subprocess.run(
            ["sfdisk", "-q", made],
            input=f"label: gpt\nstart={START // 512}, size={size // 512}\n".encode(),
            check=True,
        )
        subprocess.run(
            ["dd", f"if={part}", f"of={made}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"],
            check=True,
        )
    return made


def main() -> None:
    cache = Path(sys.argv[1])
    cache.mkdir(parents=True, exist_ok=True)
    files, times = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, FILES), (3, 3)))
    source, ours, theirs = disk(cache, files), cache / "ours", cache / "theirs"
    program = Path(sys.executable).with_name("virt-bmap")
    mine = min(seconds([program, "dump", "-q", "--force", source, "/dev/sda1", ours]) for _ in range(times))
    stored, size = source.stat().st_blocks // 2048, ours.stat().st_size >> 20
    print(f"virt-bmap dump       {mine:8.2f} s   {stored} MiB on the host, {size} MiB in all")
    if not shutil.which("guestfish"):
        return
    os.environ.update(EMULATED)
    guestfish = ["guestfish", "--ro", "--format=raw", "-a", source, "run", ":"]
    peer = seconds([*guestfish, "download", "/dev/sda1", theirs])
    start = seconds([*guestfish, "list-devices"])
    same = subprocess.run(["cmp", ours, theirs]).returncode == 0
    print(
        f"guestfish download   {peer:8.2f} s   of which {start:.2f} s to start; {peer / mine:.0f} "
        f"times as long; the same bytes: {same}"
    )
    ours.unlink(), theirs.unlink()


if __name__ == "__main__":
    main()
