"""Running the formats' own tools, and copying what they made to its place: sparse, without root."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_bmap.errors import ImageError, MissingTool, OutputError

PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
"""With the folders of system tools, which are not on every user's path."""
PACKAGES = {
    "mke2fs": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "mkfs.fat": "dosfstools", "mcopy": "mtools",
    "mkntfs": "ntfs-3g", "mkfs.exfat": "exfatprogs", "mkfs.f2fs": "f2fs-tools", "sload.f2fs": "f2fs-tools", "mkfs.minix": "util-linux",
    "mkswap": "util-linux", "sfdisk": "fdisk", "lvm": "lvm2", "losetup": "mount", "mount": "mount", "cryptsetup": "cryptsetup-bin",
    "qemu-img": "qemu-utils", "guestfish": "libguestfs-tools", "tar": "tar", "cp": "coreutils",
}  # fmt: skip
PIECE = 64 << 20


def find(tool: str) -> str:
    """The path of a tool. Raises MissingTool with the Debian package that has it."""
    found = shutil.which(tool, path=PATH)
    if not found:
        raise MissingTool(f"{tool} is not installed (apt-get install {PACKAGES[tool]})")
    return found


def run(*command: str | Path, stdin: str | None = None, env: dict[str, str] | None = None, timeout: float | None = None) -> str:
    """The standard output of a tool. Raises ImageError with its last words where it fails, OutputError where there is no space left."""
    words = [find(str(command[0])), *map(str, command[1:])]
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8", **(env or {})}
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, errors="replace", env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{command[0]} did not end within {timeout:g} seconds") from error
    if done.returncode:
        said = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        if any(os.strerror(errno.ENOSPC).lower() in line.lower() for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in said if "error:" in line] or said or [f"exit status {done.returncode}"]
        raise ImageError(f"{command[0]} failed: {errors[-1]}")
    return done.stdout


def blank(path: Path, size: int) -> Path:
    """A new sparse file."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def place(source: Path, target: Path, offset: int) -> None:
    """Copy what a file has data for into another one, from `offset` bytes on; its holes stay holes there. The source is removed."""
    with open(source, "rb") as read, open(target, "r+b") as write:
        for start, end in _data(read.fileno()):
            at = start
            while at < end:
                piece = os.pread(read.fileno(), min(PIECE, end - at), at)
                if not piece:
                    break
                if piece.count(0) < len(piece):
                    os.pwrite(write.fileno(), piece, offset + at)
                at += len(piece)
    source.unlink()


def _data(file: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are not holes (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data behind `end`
                raise
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def can_loop() -> bool:
    """May loop devices be used here?"""
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control")


@contextlib.contextmanager
def loop(image: Path) -> Iterator[str]:
    """A loop device of a file."""
    device = run("losetup", "-f", "--show", image).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def mounted(image: Path, kind: str, folder: Path) -> Iterator[None]:
    """A filesystem in a file, mounted at `folder`. Raises ImageError where this kernel can't."""
    run("mount", "-t", kind, *([] if kind == "ntfs-3g" else ["-o", "loop"]), image, folder)
    try:
        yield
    finally:
        run("umount", folder)


def entries(tree: Path) -> Sequence[Path]:
    """What lies in the top directory of a tree."""
    try:
        return sorted(tree.iterdir())
    except OSError as error:
        raise OutputError(f"{tree}: can't be read: {error.strerror}") from error
