"""What files and block devices are made of: a partition of a disk, a loop device of a file, a device-mapper
device of others.

Two names stand for the same bytes more often than one thinks: a link, a partition of the disk that is read,
the file behind a loop device.

Sources: Documentation/ABI/stable/sysfs-block, Documentation/block/ of Linux; include/uapi/linux/loop.h
(struct loop_info64).
"""

import contextlib
import fcntl
import os
import stat
import struct
from typing import NamedTuple

SYSFS = "/sys"
SECTOR = 512
END = 1 << 63
DEEPEST = 16
LOOP_GET_STATUS64, LOOP_INFO64_SIZE = 0x4C05, 232


class DevicePlace(NamedTuple):
    """Bytes [start, end) of a file or device, by its numbers.

    Where they are not `exact`, only some of them are meant, and which is not known.
    """

    kind: str
    numbers: tuple[int, int]
    start: int = 0
    end: int = END
    exact: bool = True


def places(about: os.stat_result) -> list[DevicePlace]:
    """What a file or device is: itself, and what it lies on, as far as that can be seen."""
    if stat.S_ISBLK(about.st_mode):
        return _device(os.major(about.st_rdev), os.minor(about.st_rdev), 0, END, True, DEEPEST)
    return [DevicePlace("file", (about.st_dev, about.st_ino))]


def overlap(one: os.stat_result, other: os.stat_result) -> bool:
    """May a write to the one change the other?"""
    if not any(stat.S_ISBLK(about.st_mode) for about in (one, other)):
        return os.path.samestat(one, other)
    return any(
        mine[:2] == theirs[:2]
        and mine.start < theirs.end
        and theirs.start < mine.end
        and (mine.exact or theirs.exact)
        for mine in places(one)
        for theirs in places(other)
    )


def _device(major: int, minor: int, start: int, end: int, exact: bool, depth: int) -> list[DevicePlace]:
    found = [DevicePlace("device", (major, minor), start, end, exact)]
    folder = os.path.realpath(f"{SYSFS}/dev/block/{major}:{minor}")
    if not depth:
        return found
    if (first := _number(folder, "partition", "start")) is not None:
        low = first * SECTOR
        size = (_number(folder, "size") or 0) * SECTOR
        if above := _numbers(os.path.dirname(folder)):
            found += _device(*above, start + low, min(end, size) + low, exact, depth - 1)
    elif file := backing_file(folder):
        low = _number(folder, "loop/offset") or 0
        found += [place._replace(start=start + low, exact=exact and place.exact) for place in places(file)]
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{folder}/slaves"):
            if below := _numbers(f"{folder}/slaves/{name}"):
                found += _device(*below, 0, END, False, depth - 1)
    return found


def backing_file(folder: str) -> os.stat_result | None:
    """The file of a loop device, by the device's folder in sysfs; None for other devices, and where its name
    leads nowhere any more."""
    try:
        with open(f"{folder}/loop/backing_file", "rb") as file:
            return os.stat(file.read().rstrip(b"\n"))
    except OSError:
        return None


def inode_below(loop: str) -> tuple[int, int] | None:
    """(device, inode) of the file that a loop device is set up on; None where only root may ask."""
    with contextlib.suppress(OSError), open(loop, "rb", buffering=0) as file:
        info = fcntl.ioctl(file, LOOP_GET_STATUS64, bytes(LOOP_INFO64_SIZE))
        found: tuple[int, int] = struct.unpack_from("=QQ", info)
        return found
    return None


def _number(folder: str, *names: str) -> int | None:
    """The number in the last of these files, if all of them are there."""
    text = ""
    for name in names:
        try:
            with open(f"{folder}/{name}") as file:
                text = file.read()
        except OSError:
            return None
    return int(text)


def _numbers(folder: str) -> tuple[int, int] | None:
    try:
        with open(f"{folder}/dev") as file:
            major, minor = file.read().split(":")
    except (OSError, ValueError):
        return None
    return int(major), int(minor)
