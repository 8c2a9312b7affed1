"""Running the formats' own tools, and copying what they made to its place: sparse, without root."""

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_bmap.core.errors import ImageError, MissingTool, OutputError
from virt_bmap.host import children, programs

PACKAGES = {
    "mke2fs": "e2fsprogs", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "mkfs.fat": "dosfstools",
    "mcopy": "mtools", "mkntfs": "ntfs-3g", "mkfs.exfat": "exfatprogs", "mkfs.f2fs": "f2fs-tools",
    "sload.f2fs": "f2fs-tools", "mkfs.minix": "util-linux", "mkswap": "util-linux", "sfdisk": "fdisk",
    "lvm": "lvm2", "mount": "mount", "unshare": "util-linux", "cryptsetup": "cryptsetup-bin",
    "qemu-img": "qemu-utils", "guestfish": "libguestfs-tools", "tar": "tar", "cp": "coreutils",
}  # fmt: skip
PIECE = 64 << 20
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LO_FLAGS_AUTOCLEAR = 0x4C82, 0x4C0A, 4
"""include/uapi/linux/loop.h; struct loop_config: the file, the block size, and struct loop_info64, whose
flags are at byte 52. Since Linux 5.8."""
RIVALS = 100
"""Times that somebody else may take the loop device that was free."""
FILL = """
image=$1 folder=$2 tree=$3 keep=$4
shift 4
mount "$@" "$image" "$folder"
cp -rT $keep -- "$tree" "$folder"
umount "$folder"
while kill -0 -1 2>/dev/null; do sleep 0.02; done
"""
"""For sh, as the first process of its namespace: when it ends, all others there are killed.

The server of a FUSE filesystem may still write then, so it waits.
"""


def find(tool: str) -> str:
    """The path of a tool. Raises MissingTool with the Debian package that has it."""
    found = programs.find(tool, *programs.SYSTEM)
    if not found:
        raise MissingTool(f"{tool} is not installed (apt-get install {PACKAGES[tool]})")
    return found


def run(
    *command: str | Path,
    stdin: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """The standard output of a tool.

    Raises ImageError with its last words where it fails, OutputError where there is no space left.
    """
    words = [find(str(command[0])), *map(str, command[1:])]
    environment = programs.environment(
        {"PATH": programs.search_path(*programs.SYSTEM), "LC_ALL": "C.UTF-8", **(env or {})}
    )
    try:
        done = children.run(words, None if stdin is None else stdin.encode(), timeout, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{command[0]} did not end within {timeout:g} seconds") from error
    out, err = (words.decode(errors="replace") for words in (done.stdout, done.stderr))
    if done.returncode:
        said = [line.strip() for line in f"{out}\n{err}".splitlines() if line.strip()]
        if any(os.strerror(errno.ENOSPC).lower() in line.lower() for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in said if "error:" in line] or said or [f"exit status {done.returncode}"]
        raise ImageError(f"{command[0]} failed: {errors[-1]}")
    return out


def blank(path: Path, size: int) -> Path:
    """A new sparse file."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def place(source: Path, target: Path, offset: int) -> None:
    """Copy what a file has data for into another one, from `offset` bytes on; its holes stay holes there.

    The source is removed.
    """
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
            if error.errno != errno.ENXIO:  # no data after `end`
                raise
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def can_loop() -> bool:
    """May loop devices be used here?"""
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control")


@contextlib.contextmanager
def loop(image: Path) -> Iterator[str]:
    """A loop device of a file.

    The kernel takes it away when nobody has it open any more, and we have, until the block ends or we do.
    """
    with open(image, "r+b") as file, contextlib.ExitStack() as stack:
        for _ in range(RIVALS):
            with open("/dev/loop-control", "rb") as control:
                name = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = stack.enter_context(open(name, "r+b", buffering=0))
            try:
                fcntl.ioctl(
                    device, LOOP_CONFIGURE, struct.pack("=II52xI244x", file.fileno(), 0, LO_FLAGS_AUTOCLEAR)
                )
            except OSError as error:
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
                continue
            break
        else:
            raise ImageError("no loop device can be had: others take each that is free")
        yield name


def filled(image: Path, kind: str, folder: Path, tree: Path, keep: Sequence[str]) -> bool:
    """Copy a tree into the filesystem in a file, through a mount
    at `folder`; False where this kernel can't mount it.

    All that in namespaces of its own: nobody else sees the mount, and whatever ends us ends mount, copy and
    the server of a FUSE filesystem.
    """
    alone = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--")
    options = [] if kind == "ntfs-3g" else ["-o", "loop"]
    try:
        run(*alone, "mount", "-t", kind, *options, image, folder)
    except MissingTool:
        raise
    except ImageError:
        return False
    run(*alone, "/bin/sh", "-ec", FILL, "sh", image, folder, tree, " ".join(keep), "-t", kind, *options)
    return True


def entries(tree: Path) -> Sequence[Path]:
    """What lies in the top directory of a tree."""
    try:
        return sorted(tree.iterdir())
    except OSError as error:
        raise OutputError(f"{tree}: can't be read: {error.strerror}") from error
