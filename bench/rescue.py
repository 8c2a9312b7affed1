"""10,000 bad blocks on an ext4: does `lookup --ranges` name exactly the files that can't be read?

    python bench/rescue.py IMAGE [SEED]

The bad blocks, anywhere but in the first 8 MiB, are a ddrescue map. The image is mounted through nbdkit's
ddrescue filter, which fails reads of them, and every file is read through the kernel: what fails must be what
was named, and nothing else. Needs root, nbdkit, nbdfuse (libnbd-bin) and an ext4 with blocks of 4 KiB on the
whole image (bench/ext.py makes one).
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

BLOCK, BAD, SPARED = 4096, 10_000, 8 << 20


def rescue_map(size: int, seed: int) -> str:
    """A map of GNU ddrescue with BAD bad blocks."""
    lines, at = ["# Mapfile. Created by GNU ddrescue version 1.27", "0x0 + 1"], 0
    for block in sorted(random.Random(seed).sample(range(SPARED // BLOCK, size // BLOCK), BAD)):
        if block * BLOCK > at:
            lines.append(f"{at:#x} {block * BLOCK - at:#x} +")
        at = (block + 1) * BLOCK
        lines.append(f"{at - BLOCK:#x} {BLOCK:#x} -")
    return "\n".join([*lines, f"{at:#x} {size - at:#x} +"] if at < size else lines) + "\n"


def named(image: Path, bad: Path) -> set[str]:
    """The paths that virt-bmap says are damaged: in their content, their own record, or the blocks that say
    where the content lies."""
    command = [sys.executable, "-m", "virt_bmap", "lookup", image, "--ranges", bad, "--json"]
    rows = map(
        json.loads, subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    )
    hit = [row for row in rows if row["path"] and row["kind"] in ("data", "record", "tree", "directory")]
    return {path for row in hit for path in (row["path"], *row["also"])}


def unreadable(top: Path) -> Iterator[str]:
    """The paths below a mount point that can't be read: files, and directories that can't be listed."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            yield f"/{folder.relative_to(top)}"
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    with open(entry.path, "rb") as file:
                        while file.read(1 << 20):
                            pass
            except OSError:
                yield f"/{Path(entry.path).relative_to(top)}"


def read_all(image: Path, bad: Path, folder: Path) -> set[str]:
    """What can't be read of the image where reads of bad blocks fail."""
    socket, fuse, mount = folder / "s", folder / "fuse", folder / "mount"
    fuse.mkdir(), mount.mkdir()
    server = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-U", socket, "--filter=ddrescue", "file", image, f"ddrescue-mapfile={bad}"]
    )
    while not socket.exists():
        time.sleep(0.05)
    client = subprocess.Popen(
        ["nbdfuse", "-r", fuse, f"nbd+unix:///?socket={socket}"], stderr=subprocess.DEVNULL
    )
    while not (fuse / "nbd").exists():
        time.sleep(0.05)
    try:
        subprocess.run(["mount", "-t", "ext4", "-o", "loop,ro,noload", fuse / "nbd", mount], check=True)
        found = set(unreadable(mount))
        subprocess.run(["umount", mount], check=True)
        return found
    finally:
        subprocess.run(["umount", fuse], check=False)
        client.wait()
        server.terminate()
        server.wait()


def main() -> int:
    image, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad = folder / "rescue.map"
        bad.write_text(rescue_map(image.stat().st_size, seed))
        start = time.perf_counter()
        expected = named(image, bad)
        took = time.perf_counter() - start
        start = time.perf_counter()
        failed = read_all(image, bad, folder)
        slow = time.perf_counter() - start
    # what lies below a directory that can't be listed is named, but can't even be tried
    reachable = {
        path for path in expected if not any(str(parent) in failed for parent in PurePosixPath(path).parents)
    }
    print(
        f"{BAD:,} bad blocks: virt-bmap names {len(expected):,} damaged paths in {took:.2f} s; "
        f"reading every file takes {slow:.0f} s and fails for {len(failed):,}"
    )
    print(
        f"failed, but not named: {len(failed - expected)}; named and reachable, but read well: "
        f"{len(reachable - failed)}"
    )
    return 0 if failed == reachable else 1


if __name__ == "__main__":
    sys.exit(main())
