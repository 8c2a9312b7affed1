"""Does anybody else use an image? What QEMU, the kernel's loop devices and mounts, and any other process with
the file open leave to be seen.

Sources: QEMU block/file-posix.c (raw_apply_lock_bytes, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE),
include/block/block-common.h (BLK_PERM_WRITE); fcntl(2) on open file description locks and on leases;
include/uapi/linux/loop.h (struct loop_info64); proc_pid_mountinfo(5).
"""

import contextlib
import errno
import fcntl
import glob
import os
import re
import signal
import stat
import struct
from collections.abc import Iterator

from virt_bmap.core.errors import ImageError, OutputError
from virt_bmap.host.devices import inode_below, overlap

LOCKS = (100, 200)
"""Bytes of the image that QEMU locks: from 100 on one for each permission that it uses, from 200 on one for
each that it denies to others."""
WRITE_LOCK = (101, 1)
"""Whoever may write has this one."""
FLOCK = "hhqqi4x"
"""struct flock where long has 64 bits: l_type, l_whence, l_start, l_len, l_pid."""


def user_of(path: str) -> str | None:
    """Who uses the image, so that it must not be changed, in a few words; None where nobody is found."""
    return (
        _loop_of(path)
        or _mount_of(path)
        or (_locked(path, LOCKS) and "QEMU holds its lock (a running guest or another tool)")
        or writer_of(path)
    )


def writer_of(path: str) -> str | None:
    """Who may be changing the image, so that a copy could mix several states; None where nobody is found."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return writer_of_open(file.fileno())
    return None


def writer_of_open(fd: int) -> str | None:
    """As `writer_of`, of a file or device that is open for reading."""
    if _is_locked(fd, WRITE_LOCK):
        return "QEMU has it open for writing (a running guest or another tool)"
    about = os.fstat(fd)
    if stat.S_ISBLK(about.st_mode):
        point = _mounted_at(about)
        return f"{point} is mounted from it" if point else None
    return "a process or loop device has it open for writing" if _is_open_for_writing(fd) else None


def lock(fd: int) -> bool:
    """Keep QEMU away from an image that is open for writing,
    for as long as it is; False where QEMU is there already."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *LOCKS, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (
            errno.EINVAL,
            errno.ENOLCK,
            errno.EOPNOTSUPP,
        ):  # a filesystem without locks: QEMU locks nothing there either
            raise
    return True


def refuse(path: str) -> None:
    """ImageError where somebody uses an image that is to be changed."""
    if reason := user_of(path):
        raise ImageError(f"{path}: is in use: {reason}; it is not changed")


def claim(path: str) -> int:
    """A descriptor of an image that nobody else may change until it is closed, as far as others ask: QEMU
    does, and for devices the kernel.

    Raises ImageError where somebody has it already, OutputError where it can't be written.
    """
    refuse(path)
    try:
        device = stat.S_ISBLK(os.stat(path).st_mode)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if device else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageError(
                f"{path}: is in use: it is mounted, or another device lies on it; it is not changed"
            ) from error
        raise OutputError(f"{path}: can't be changed: {error.strerror}") from error
    if not lock(fd):
        os.close(fd)
        raise ImageError(
            f"{path}: is in use: QEMU holds its lock (a running guest or another tool); it is not changed"
        )
    return fd


@contextlib.contextmanager
def claimed(path: str) -> Iterator[None]:
    """`claim` until the block ends."""
    fd = claim(path)
    try:
        yield
    finally:
        os.close(fd)


def _locked(path: str, span: tuple[int, int]) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _is_locked(file.fileno(), span)
    return False


def _is_locked(fd: int, span: tuple[int, int]) -> bool:
    """Does anybody hold a lock on one of these bytes (start, length)?"""
    with contextlib.suppress(OSError):
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *span, 0)
        found: int = struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return found != fcntl.F_UNLCK
    return False


def _is_open_for_writing(fd: int) -> bool:
    """The kernel gives a read lease only on a file that nobody has open for writing."""
    try:
        # whoever opens it for writing just then has the kernel tell us, by a signal: by one that does nothing
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:  # other errors: no lease on another's file, or on this filesystem
        return error.errno == errno.EAGAIN
    return False


def _mounted_at(device: os.stat_result) -> str | None:
    """Where a filesystem is mounted, and can be written, that lies on a block device or holds it."""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            words, more = before.split(), after.split()
            if len(more) < 3 or b"rw" not in words[5].split(b",") or not more[1].startswith(b"/"):
                continue
            with contextlib.suppress(OSError):
                source = os.stat(_plain(more[1]))
                if stat.S_ISBLK(source.st_mode) and overlap(source, device):
                    return os.fsdecode(_plain(words[4]))
    return None


def _loop_of(path: str) -> str | None:
    """Loop devices are asked for the inode, not their file's name for its inode: what a name leads to may be
    on a server that is gone."""
    about = os.stat(path)
    for entry in glob.glob("/sys/block/loop*/loop/backing_file"):
        device = f"/dev/{entry.split('/')[3]}"
        if inode_below(device) == (about.st_dev, about.st_ino) or _first_line(entry) == os.path.realpath(
            path
        ):
            return f"the loop device {device} is set up on it (losetup -d {device} detaches it)"
    return None


def _first_line(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.readline().rstrip("\n")
    return ""


def _mount_of(path: str) -> str | None:
    """FUSE filesystems name the image that they serve."""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            before, _, after = line.partition(b" - ")
            if len(after.split()) > 1 and _plain(after.split()[1]) == os.fsencode(os.path.realpath(path)):
                return f"it is mounted on {os.fsdecode(_plain(before.split()[4]))}"
    return None


def _plain(word: bytes) -> bytes:
    """mountinfo writes spaces and the like as octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), word)
