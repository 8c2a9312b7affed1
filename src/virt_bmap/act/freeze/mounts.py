"""Filesystems of this host, frozen with FIFREEZE and thawed with FITHAW.

Sources: include/uapi/linux/fs.h, fs/ioctl.c (ioctl_fsfreeze), fs/super.c (freeze_super) of Linux 6.1;
proc_pid_mountinfo(5).
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Sequence
from typing import NamedTuple

from virt_bmap.core.errors import FreezeError, UsageError

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
WORDS: dict[int | None, str] = {
    errno.EPERM: "freezing needs root",
    errno.EOPNOTSUPP: "a filesystem of its type can't be frozen",
    errno.EBUSY: "is frozen already, by someone else",
}


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo; `device` names the filesystem, also where it is mounted twice."""

    point: str
    device: str
    type: str


def mounted() -> list[Mount]:
    """All mounts that this process sees, the first one first."""
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [os.fsdecode(line).split() for line in file]
    return [Mount(_unescaped(line[4]), line[2], line[line.index("-", 6) + 1]) for line in lines]


def _unescaped(text: str) -> str:
    """Blanks and backslashes are written in octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def chosen(folders: Sequence[str], all_mounts: Sequence[Mount]) -> list[Mount]:
    """The mounts at these mount points, each filesystem once, in the order to freeze them: one that came
    later may lie in a file on one that was there before, and has to write to it when it is frozen."""
    by_device = {mount.device: mount for mount in (_mount_at(folder, all_mounts) for folder in folders)}
    devices = [mount.device for mount in all_mounts]
    return sorted(by_device.values(), key=lambda mount: devices.index(mount.device), reverse=True)


def _mount_at(folder: str, all_mounts: Sequence[Mount]) -> Mount:
    """What is mounted at a directory; the last one hides others."""
    real = os.path.realpath(folder)
    if not os.path.exists(real):
        raise UsageError(f"{folder}: there is no such directory")
    points = [mount.point for mount in all_mounts]
    if real not in points:
        above = real
        while above != "/" and above not in points:
            above = os.path.dirname(above)
        raise UsageError(f"{folder}: is not a mount point; it lies on the filesystem mounted at {above}")
    return [mount for mount in all_mounts if mount.point == real][-1]


class Mounts:
    """Some mounted filesystems of this host."""

    def __init__(self, folders: Sequence[str]) -> None:
        """Raises UsageError where one is not a mount point, FreezeError where it can't be opened."""
        self.mounts = chosen(folders, mounted())
        self.files: list[int] = []
        try:
            self.files.extend(os.open(mount.point, os.O_RDONLY) for mount in self.mounts)
        except OSError as error:
            self.close()
            raise FreezeError(f"{error.filename}: can't be frozen: {error.strerror}") from error

    def freeze(self, limit: float) -> str:
        """One after the other; the kernel writes out what
        is dirty first, and can't be interrupted in that."""
        done: list[int] = []
        for mount, file in zip(self.mounts, self.files, strict=True):
            try:
                fcntl.ioctl(file, FIFREEZE, 0)
            except OSError as error:
                for other in reversed(done):
                    fcntl.ioctl(other, FITHAW, 0)
                about = WORDS.get(error.errno) or error.strerror
                raise FreezeError(f"{mount.point} ({mount.type}): can't be frozen: {about}") from error
            done.append(file)
        return ", ".join(mount.point for mount in reversed(self.mounts))

    def thaw(self) -> bool:
        """The one frozen last comes first."""
        mine, failed = True, []
        for mount, file in zip(reversed(self.mounts), reversed(self.files), strict=True):
            try:
                fcntl.ioctl(file, FITHAW, 0)
            except OSError as error:
                if error.errno == errno.EINVAL:  # not frozen
                    mine = False
                else:
                    failed.append(f"{mount.point} ({error.strerror})")
        if failed:
            raise FreezeError(f"NOT THAWED: {', '.join(failed)}; try: fsfreeze --unfreeze MOUNTPOINT")
        return mine

    def close(self) -> None:
        """Close the directories."""
        while self.files:
            os.close(self.files.pop())


def refuse_own_output(folders: Sequence[str]) -> None:
    """UsageError where standard output or error is a file on one of the filesystems: who writes there while
    it is frozen waits for the thaw."""
    devices = {os.stat(folder).st_dev: folder for folder in folders if os.path.exists(folder)}
    for number, name in ((1, "standard output"), (2, "standard error")):
        about = os.fstat(number)
        if stat.S_ISREG(about.st_mode) and about.st_dev in devices:
            raise UsageError(
                f"{name} goes to a file on {devices[about.st_dev]}, "
                "which is to be frozen: send it somewhere else"
            )
