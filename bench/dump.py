"""dump of a partition against `guestfish download` of the same device, whole processes, and the bytes compared.

    python bench/dump.py CACHE-FOLDER [FILES] [TIMES]

The image is that of bench/ext.py in a partition. guestfish has to start its small virtual machine first; that is told apart by a download of nothing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ext import best, image

EMULATED = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
FILES, START = 50_000, 1 << 20


def disk(cache: Path, files: int) -> Path:
    """A GPT disk with the filesystem as its only partition, made if it is not there yet."""
    made = cache / f"dump-{files}.img"
    if not made.exists():
        part, size = image(cache, files), image(cache, files).stat().st_size
        with made.open("wb") as file:
            file.truncate(size + 2 * START)
        subprocess.run(
            ["sfdisk", "-q", made], input=f"label: gpt\nstart={START // 512}, size={size // 512}\n".encode(), check=True
        )
        subprocess.run(["dd", f"if={part}", f"of={made}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"], check=True)
    return made


def main() -> None:
    cache = Path(sys.argv[1])
    cache.mkdir(parents=True, exist_ok=True)
    files, times = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, FILES), (3, 3)))
    source, ours, theirs = disk(cache, files), cache / "ours", cache / "theirs"
    program = Path(sys.executable).with_name("virt-bmap")
    mine = best(lambda: subprocess.run([program, "dump", "-q", "--force", source, "/dev/sda1", ours], check=True), times)
    print(
        f"virt-bmap dump       {mine:8.2f} s   {source.stat().st_blocks / 2048:.0f} MiB on the host, {ours.stat().st_size >> 20} MiB in all"
    )
    if not shutil.which("guestfish"):
        return
    guestfish = ["guestfish", "--ro", "--format=raw", "-a", source, "run", ":"]
    peer = best(lambda: subprocess.run([*guestfish, "download", "/dev/sda1", theirs], check=True, env=os.environ | EMULATED), 1)
    start = best(
        lambda: subprocess.run([*guestfish, "list-devices"], check=True, env=os.environ | EMULATED, stdout=subprocess.DEVNULL), 1
    )
    same = subprocess.run(["cmp", ours, theirs]).returncode == 0
    print(
        f"guestfish download   {peer:8.2f} s   of which {start:.2f} s to start; {peer / mine:.0f} times as long; the same bytes: {same}"
    )
    ours.unlink(), theirs.unlink()


if __name__ == "__main__":
    main()
