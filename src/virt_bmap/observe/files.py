"""The files of a mounted filesystem as the kernel lists them: names, inodes, sizes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import ImageError
from virt_bmap.model import tables
from virt_bmap.observe.appliance import Appliance, CallFailed

MAX_FILES = 1 << 24
"""Names that are listed: a hostile filesystem can have directories without end."""
DEVICE_SHIFT = 40
"""Inode numbers are unique in one device; further devices below one mount (btrfs's subvolumes) number theirs
from here on, as the direct map does."""


class ListedName(NamedTuple):
    """One name. `path` starts with a slash."""

    path: str
    parent: int
    inode: int
    stat: dict[str, int]

    @property
    def type(self) -> int:
        """A code of tables.TYPES."""
        return int(tables.type_of_mode(ints(self.stat["st_mode"]))[0])

    @property
    def size(self) -> int:
        return self.stat["st_size"]


@dataclass
class Listing:
    """All names of a filesystem, parents before children;
    and how many could not be listed, with the first."""

    root: int
    entries: list[ListedName] = field(default_factory=list)
    left: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave(self, reason: str, path: str) -> None:
        """Count a name that is left out."""
        count, first = self.left.get(reason, (0, path))
        self.left[reason] = count + 1, first

    def once(self, kind: int) -> list[ListedName]:
        """One entry for each inode of a type."""
        return list({entry.inode: entry for entry in reversed(self.entries) if entry.type == kind}.values())[
            ::-1
        ]

    def inodes(self) -> pa.Table:
        """As the table `inodes`, of volume 0."""
        known = list({entry.inode: entry for entry in self.entries}.values())

        def column(name: str) -> list[int]:
            return [entry.stat[name] for entry in known]

        return tables.make(
            "inodes",
            volume=0,
            inode=ints([entry.inode for entry in known]),
            type=ints([entry.type for entry in known]),
            mode=ints(column("st_mode")),
            uid=ints(column("st_uid")),
            gid=ints(column("st_gid")),
            size=ints(column("st_size")),
            nlink=ints(column("st_nlink")),
            mtime_ns=ints(
                [entry.stat["st_mtime_sec"] * 10**9 + entry.stat["st_mtime_nsec"] for entry in known]
            ),
            flags=0,
        )

    def names(self) -> pa.Table:
        """As the table `names`, of volume 0."""
        known = [entry for entry in self.entries if entry.path != "/"]
        return tables.make(
            "names", volume=0, parent=ints([entry.parent for entry in known]),
            inode=ints([entry.inode for entry in known]),
            name=[entry.path.rpartition("/")[2].encode() for entry in known],
        )  # fmt: skip


def listed(appliance: Appliance, folder: str) -> Listing:
    """List what is mounted at /; `folder` is for a temporary file."""
    place = f"{folder}/names"
    appliance.call("find0", "/", place)
    with open(place, "rb") as file:
        names = file.read().split(b"\0")[:-1]
    if len(names) > MAX_FILES:
        raise ImageError(f"the filesystem has more than {MAX_FILES:,} names")
    inode_of: dict[tuple[int, int], int] = {}
    devices: dict[int, int] = {}

    def inode(stat: dict[str, int]) -> int:
        device = devices.setdefault(stat["st_dev"], len(devices))
        return inode_of.setdefault((stat["st_dev"], stat["st_ino"]), device << DEVICE_SHIFT | stat["st_ino"])

    top = _checked(appliance.call("lstatns", "/"))
    listing = Listing(inode(top))
    listing.entries.append(ListedName("/", listing.root, listing.root, top))
    known = {"": listing.root}
    for directory, inside in _by_directory(names, listing):
        if directory not in known:
            listing.leave("below directories that were not listed", directory)
            continue
        try:
            stats = appliance.call("lstatnslist", directory or "/", inside)
        except CallFailed as error:
            listing.leave(str(error), directory)
            continue
        for name, stat in zip(inside, stats, strict=True):
            if stat["st_ino"] < 0:
                listing.leave("names that lead to no inode", f"{directory}/{name}")
                continue
            entry = ListedName(f"{directory}/{name}", known[directory], inode(_checked(stat)), stat)
            listing.entries.append(entry)
            if entry.type == tables.T_DIRECTORY:
                known[entry.path] = entry.inode
    return listing


def _by_directory(names: Iterable[bytes], listing: Listing) -> list[tuple[str, list[str]]]:
    """Names by their directories, parents first. libguestfs's binding takes UTF-8 alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        try:
            directory, _, leaf = name.decode().rpartition("/")
        except UnicodeDecodeError:
            listing.leave("names that are not UTF-8", "/" + name.decode(errors="backslashreplace"))
            continue
        found.setdefault(f"/{directory}" if directory else "", []).append(leaf)
    return sorted(found.items(), key=lambda item: item[0].count("/"))


def _checked(stat: dict[str, Any]) -> dict[str, int]:
    """What the kernel says of an inode, sizes included, comes from the disk."""
    if not all(
        isinstance(stat.get(name), int) for name in ("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_sec")
    ):
        raise ImageError("the appliance's answer to lstatns is not valid")
    return {
        **stat,
        "st_size": max(0, stat["st_size"]),
        "st_mtime_sec": min(max(stat["st_mtime_sec"], -(1 << 33)), 1 << 33),
    }
