"""btrfs images for tests: made by mkfs.btrfs and this kernel, small, with every kind of extent, tree and
profile."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import detach, need, need_root, run, unmount

FILL = """
mkdir -p a/b a/empty; echo small > a/small; ln -s some/target a/link; ln a/small a/hard; mkfifo a/fifo
touch -d 2001-02-03T04:05:06.7 a/b
printf 'x' > "a/$(printf 'not-utf8-\\377')"
head -c 3000000 /dev/urandom > a/big; sync -f .
for i in 1 2 3 4 5
do dd if=/dev/urandom of=a/scatter bs=4k count=1 seek=$((i * 7)) conv=notrunc status=none; sync -f .; done
dd if=/dev/urandom of=a/big bs=4k count=10 seek=100 conv=notrunc status=none; sync -f .
dd if=/dev/urandom of=a/big bs=4k count=1 seek=103 conv=notrunc status=none; sync -f .
fallocate -l 1M a/prealloc; dd if=/dev/urandom of=a/prealloc bs=4k count=3 seek=20 conv=notrunc status=none
truncate -s 50M a/sparse; dd if=/dev/urandom of=a/sparse bs=4k count=1 seek=5000 conv=notrunc status=none
cp --reflink=always a/big a/reflink; sync -f .
dd if=/dev/urandom of=a/reflink bs=4k count=2 seek=50 conv=notrunc status=none
setfattr -n user.x -v "$(head -c 1000 /dev/zero | tr '\\0' v)" a/small
for c in zlib lzo zstd; do
    touch c-$c; btrfs property set c-$c compression $c; yes "$c hello world" | head -c 700000 > c-$c
    touch t-$c; btrfs property set t-$c compression $c; yes x | head -c 1500 > t-$c
done
sync -f .; cp --reflink=always c-zstd c-shared
head -c 12288 /dev/urandom | dd of=c-zstd bs=4k seek=9 conv=notrunc status=none
mkdir many; for i in $(seq 300); do echo $i > many/file$i; done
btrfs -q subvolume create sub; echo insub > sub/x; head -c 100000 /dev/urandom > sub/y
btrfs -q subvolume create sub/inner; echo inner > sub/inner/z; sync -f .
btrfs -q subvolume snapshot sub snap; btrfs -q subvolume snapshot -r . a/readonly
dd if=/dev/urandom of=snap/y bs=4k count=2 seek=3 conv=notrunc status=none
btrfs -q subvolume create gone; head -c 1000000 /dev/urandom > gone/x; sync -f .
btrfs -q subvolume delete gone
btrfs quota enable . || true
sync -f .
"""


@contextlib.contextmanager
def loops(images: list[Path]) -> Iterator[list[str]]:
    """Loop devices of image files; skips without root."""
    need_root()
    found: list[str] = []
    try:
        for image in images:
            found.append(run("losetup", "-f", "--show", image).decode().strip())
        yield found
    finally:
        for loop, image in zip(found, images, strict=False):
            detach(loop, image)


@contextlib.contextmanager
def mounted_pool(images: list[Path], where: Path, options: str = "noatime") -> Iterator[Path]:
    """The filesystem of several devices, mounted at its top level; skips where this kernel can't."""
    need("btrfs", "btrfs-progs")
    where.mkdir(exist_ok=True)
    with loops(images) as devices:
        subprocess.run(["btrfs", "device", "scan", *devices], capture_output=True)
        option = ",".join([options, "subvolid=5", *(f"device={device}" for device in devices)])
        done = subprocess.run(
            ["mount", "-t", "btrfs", "-o", option, devices[0], where], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this kernel does not mount it: {done.stderr.strip()}")
        try:
            yield where
        finally:
            unmount(where)


def make(folder: Path, size: str, options: str, count: int = 1, name: str = "disk") -> list[Path]:
    """A new filesystem on `count` devices of `size` (in truncate's words)."""
    need("mkfs.btrfs", "btrfs-progs")
    images = [folder / f"{name}{number}.img" for number in range(1, count + 1)]
    for image in images:
        image.unlink(missing_ok=True)
        run("truncate", "-s", size, image)
    if count == 1:
        _mkfs([*options.split(), images[0]])
    else:
        with loops(images) as devices:
            _mkfs([*options.split(), *devices])
    return images


def _mkfs(arguments: list[str | os.PathLike[str]]) -> None:
    done = subprocess.run(["mkfs.btrfs", "-q", "-f", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this mkfs.btrfs does not make it: {done.stderr.strip()}")


def fill(where: Path, script: str) -> None:
    """Run a shell script inside a mounted filesystem."""
    subprocess.run(["bash", "-ec", script], cwd=where, check=True, capture_output=True)
