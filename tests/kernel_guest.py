"""This machine's kernel as the guest of a watch: mounts the served disk through qemu-storage-daemon's FUSE
export and a loop device, and writes files.

    kernel_guest.py SOCKET FOLDER COUNT     (run by `virt-bmap watch`
    FOLDER gets `written`: a line for each step, when its fsync returned)

What a file holds follows from its number alone, so that the test can say of any bytes of the disk whether
they are that file's.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MOVED, GROWN = 20, 20
"""Files that are renamed and then appended to; files that are appended to."""
REST = 1.0
"""Seconds that names get to become known before they change, or are used again."""


def content(number: int) -> bytes:
    """All that file `number` ever holds: its first two thirds are written first, the rest is appended."""
    chooser = random.Random(number)
    return chooser.randbytes(3 * chooser.randrange(1000, 12_000))


def final(number: int) -> bytes:
    """What it holds in the end."""
    data = content(number)
    return data if number < MOVED + GROWN else data[: len(data) // 3 * 2]


def path(number: int) -> str:
    """The name under which file `number` is created."""
    return f"/d{number % 7}/file {number:04d}"


def moved(number: int) -> str:
    """The name that the first MOVED files are given."""
    return f"/moved/renamed {number:04d}"


def main() -> None:
    """Mount, write in a known order with fsync, move, grow, delete."""
    socket, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with mounted(socket, folder) as top, open(folder / "written", "w") as log:

        def write(name: str, data: bytes) -> None:
            target = Path(f"{top}{name}")
            target.parent.mkdir(exist_ok=True)
            with open(target, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            log.write(f"{time.time():.6f}\t{name}\n")

        for number in range(count):
            data = content(number)
            write(path(number), data[: len(data) // 3 * 2])
        time.sleep(REST)
        (top / "moved").mkdir()
        for number in range(MOVED):
            os.rename(f"{top}{path(number)}", f"{top}{moved(number)}")
        sync(top)
        for number in range(MOVED + GROWN, MOVED + 2 * GROWN):
            os.unlink(f"{top}{path(number)}")
        sync(top)
        time.sleep(REST)
        for number in range(MOVED + GROWN):
            data = content(number)
            write(moved(number) if number < MOVED else path(number), data[len(data) // 3 * 2 :])


def sync(top: Path) -> None:
    """Everything of this filesystem, and only of this one."""
    fd = os.open(top, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    subprocess.run(["sync", "-f", top], check=True)


@contextlib.contextmanager
def mounted(socket: str, folder: Path) -> Iterator[Path]:
    """The served disk, mounted until the block ends."""
    export, top = folder / "export", folder / "top"
    export.touch()
    top.mkdir()
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=nbd,node-name=disk,server.type=unix,server.path={socket}",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on",
        ]
    )
    try:
        while export.stat().st_size == 0:
            if daemon.poll() is not None:
                sys.exit("the disk can't be exported")
            time.sleep(0.02)
        subprocess.run(["mount", "-o", "loop", export, top], check=True)
        try:
            yield top
        finally:
            subprocess.run(["umount", top], check=True)
    finally:
        daemon.terminate()
        daemon.wait()


if __name__ == "__main__":
    main()
