"""Observe files one after the other: read each through
the appliance, and keep where its bytes were read from.

A first pass reads each file once, forwards. What it leaves open (bytes that came
from a cache, zeroes of which only some were read, content that is stored in
another form) a second pass reads again, a page at a time, after the file's pages
were dropped: then trees and inodes are in memory, and what is read is the file's.
"""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.ask.hits import grouped_union
from virt_bmap.core.arrays import Int, union
from virt_bmap.core.layers import raw
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sessions import OLDER
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.observe import trace
from virt_bmap.observe.advice import mount_options
from virt_bmap.observe.appliance import Appliance, CallFailed
from virt_bmap.observe.climb import climb
from virt_bmap.observe.disks import ServedDisks
from virt_bmap.observe.files import ListedName

PIECE = 1 << 20
"""Bytes of a file read by one call: libguestfs sends 4 MiB at most in one message."""
PAGE = 4096
"""A page of the appliance's memory: what is read at least of a file through its cache."""
MANY = 4 << 20
"""Bytes of a file that are read again page by page; of what is longer, BLOCK bytes at a time."""
BLOCK = 128 << 10
"""What btrfs and squashfs compress at once."""
BATCH = 64
"""Files whose second reading is done together: dropping pages costs as much as reading ten files."""
MAX_SIZE = 1 << 40
"""Bytes of a file that are read: sizes come from the disk, and a hole costs time, too."""
QUIET = (
    "for f in /sys/class/bdi/*/read_ahead_kb; do echo 0 > $f; done; "
    "for f in /sys/block/*/queue/nomerges; do echo 2 > $f; done"
)
"""No readahead and no merged requests, on block devices and on the filesystems that have settings of their
own (btrfs, FUSE)."""


class ObservedVolume(NamedTuple):
    """A filesystem to observe: its volume in the map, the volume's bytes, and what the appliance calls it."""

    volume: int
    device: str
    type: str
    reader: Reader
    options: str = "ro"


@dataclass
class Observed:
    """What was seen of one file.

    `rows` are (file offset, place in the volume, length, file length, flags), `read` ranges that hold none of
    it, `left` ranges of the file whose bytes are not zero and were not found, `unsure` those that are zero,
    some of them read (from ranges in `read`). `failed`: it could not be read to its end, and why."""

    inode: int
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    unsure: list[tuple[int, int]] = field(default_factory=list)
    failed: str | None = None


class Observer:
    """Reads files of one mounted filesystem."""

    def __init__(
        self, appliance: Appliance, disks: ServedDisks, bmap: BlockMap, target: ObservedVolume
    ) -> None:
        self._appliance, self._disks, self._bmap, self._target = appliance, disks, bmap, target
        self._fuse = "fuse" in appliance.call("debug", "sh", ["grep ' /sysroot ' /proc/mounts || true"])

    def files(self, entries: Sequence[ListedName]) -> Iterator[Observed]:
        """Observe these regular files."""
        waiting: list[tuple[ListedName, Observed, list[tuple[int, int]]]] = []
        for entry in entries:
            seen, again = self._first(entry)
            if again and not seen.failed:
                waiting.append((entry, seen, again))
            else:
                yield seen
            if len(waiting) >= BATCH:
                yield from self._again(waiting)
                waiting = []
        yield from self._again(waiting)

    def during(self, name: str, *arguments: object) -> tuple[Int, Int]:
        """Ranges of the volume that are read during a call of libguestfs, in their order."""
        self._disks.since()
        self._appliance.call(name, *arguments)
        return climb(self._bmap, self._target.volume, self._disks.since())

    def drop_caches(self) -> None:
        """Forget what was read of files and devices, but not inodes and names."""
        self._appliance.call("drop_caches", 1)

    def _first(self, entry: ListedName) -> tuple[Observed, list[tuple[int, int]]]:
        """Read a file once: what was seen, and which ranges of it to read again."""
        seen, again = Observed(entry.inode), []
        for at in range(0, min(entry.size, MAX_SIZE), PIECE):
            found = self._read(entry, at, PIECE, seen)
            if found is None:
                break
            again += _moved(found.left, at) + _moved(found.unsure, at)
            _keep(seen, found, at)
        return seen, again

    def _read(self, entry: ListedName, at: int, length: int, seen: Observed) -> trace.Placed | None:
        """Read one piece of a file; None where it can't be read, or has ended."""
        self._disks.since()
        try:
            content = self._appliance.call("pread", entry.path, min(length, entry.size - at), at)
        except CallFailed as error:
            seen.failed = str(error)
            return None
        starts, ends = climb(self._bmap, self._target.volume, self._disks.since())
        if not content:
            seen.failed = f"it ends at byte {at}, but its size is {entry.size}"
            return None
        return trace.find(content, starts, ends, self._target.reader.read_ranges(starts, ends - starts))

    def _again(self, waiting: list[tuple[ListedName, Observed, list[tuple[int, int]]]]) -> Iterator[Observed]:
        """The second pass over files: page by page, after their pages were dropped."""
        if not waiting:
            return
        self._forget([entry.path for entry, _, _ in waiting])
        for entry, seen, ranges in waiting:
            columns = np.array(ranges, np.int64).reshape(-1, 2)
            step = PAGE if int((columns[:, 1] - columns[:, 0]).sum()) <= MANY else BLOCK
            coded = _Coded(seen)
            for start, end in trace.pages(columns[:, 0], columns[:, 1], step, entry.size):
                found = self._read(entry, start, end - start, seen)
                if found is None:
                    break
                _keep(seen, found, start)
                seen.unsure += _moved(found.unsure, start)
                coded.add(start, end, found)
            coded.close()
            yield seen

    def _forget(self, paths: Sequence[str]) -> None:
        """Drop the pages of these files; what lies below FUSE is cached a second time, as a device."""
        if self._fuse:
            self._appliance.call("drop_caches", 3)
            return
        words = "; ".join(
            f"dd if={shlex.quote('/sysroot' + path)} iflag=nocache count=0 status=none" for path in paths
        )
        with contextlib.suppress(CallFailed):  # what stays cached is said to be not found
            self._appliance.call("debug", "sh", [words])


class _Coded:
    """Content that is stored in another form: pages whose bytes were not found in what was read for them.

    Reading the first page of what was compressed together reads all of it; the pages after it cost no
    further read.
    """

    def __init__(self, seen: Observed) -> None:
        self._seen = seen
        self._start = self._end = 0
        self._stored: list[tuple[int, int]] = []

    def add(self, start: int, end: int, found: trace.Placed) -> None:
        """A page (or more) [start, end) of the file, just read."""
        if not len(found.left[0]):
            self.close()
            return
        stored = list(zip(found.other[0].tolist(), found.other[1].tolist(), strict=True))
        if stored or not self._stored or start != self._end:
            self.close()
            self._start, self._stored = start, stored
        self._end = end

    def close(self) -> None:
        """What was gathered becomes rows, or is left where nothing was read for it."""
        if self._stored:
            length = self._end - self._start
            self._seen.rows += [
                (self._start, low, high - low, length, tables.COMPRESSED) for low, high in self._stored
            ]
        elif self._end > self._start:
            self._seen.left.append((self._start, self._end))
        self._start = self._end = 0
        self._stored = []


def _keep(seen: Observed, found: trace.Placed, at: int) -> None:
    """Add what was found of the piece at file offset `at`."""
    flags = np.where(found.packed, tables.INLINE, 0)
    seen.rows += zip(
        (at + found.offset).tolist(),
        found.place.tolist(),
        found.length.tolist(),
        found.length.tolist(),
        flags.tolist(),
        strict=True,
    )
    seen.read += _moved(found.other, 0) + _moved(found.zeroes, 0)


def _moved(ranges: tuple[Int, Int], by: int) -> list[tuple[int, int]]:
    return list(zip((ranges[0] + by).tolist(), (ranges[1] + by).tolist(), strict=True))


def joined(rows: list[tuple[int, int, int, int, int]]) -> Int:
    """Rows as an array (n, 5), those that overlap or go on in
    the file and on the volume made one, by file offset."""
    table = np.array(rows, np.int64).reshape(-1, 5)
    plain = table[:, 4] == 0
    offset, place, length = table[plain, :3].T
    moved, group = np.unique(place - offset, return_inverse=True)
    group, low, high = grouped_union(group, offset, offset + length)
    one = np.stack([low, low + moved[group], high - low, high - low, np.zeros(len(low), np.int64)], 1)
    both = np.unique(np.concatenate([one, table[~plain]]), axis=0)
    return both.astype(np.int64)


def quiet(appliance: Appliance) -> None:
    """No readahead from now on, on anything that is mounted."""
    with contextlib.suppress(CallFailed):  # readahead only makes more to tell apart
        appliance.call("debug", "sh", [QUIET])


def targets(
    appliance: Appliance, bmap: BlockMap, readers: Sequence[Reader]
) -> tuple[list[ObservedVolume], dict[str, str]]:
    """The filesystems that the appliance finds, by their volumes in the map; and the devices left out, with
    the reason."""
    found: list[ObservedVolume] = []
    left: dict[str, str] = {}
    names = bmap.volumes.column("name").to_pylist()
    features = {row["volume"]: row["features"] for row in bmap.filesystems.to_pylist()}
    for mountable, type in appliance.call("list_filesystems").items():
        if mountable.startswith("btrfsvol:"):
            continue  # its top-level volume shows all subvolumes
        volume = _volume(appliance, bmap, mountable, names)
        if type in ("", "unknown") or (options := mount_options(type, features.get(volume))) is None:
            continue
        if volume is None:
            left[mountable] = f"{type}, on a device that this map does not have"
        elif OLDER in (features.get(volume) or ""):
            left[mountable] = f"{type}, of which a kernel shows the newest state, whatever the session"
        else:
            found.append(
                ObservedVolume(
                    volume, mountable, type, raw(readers[volume]), f"ro,{options}" if options else "ro"
                )
            )
    return found, left


def _volume(appliance: Appliance, bmap: BlockMap, device: str, names: list[str]) -> int | None:
    """The volume of a device: by its name, else (arrays
    are numbered as they are found) by what its UUID is."""
    if device in names:
        return bmap.volume_named(device)
    with contextlib.suppress(CallFailed):
        uuid = appliance.call("vfs_uuid", device)
        same = [row["volume"] for row in bmap.filesystems.to_pylist() if uuid and row["uuid"] == uuid]
        return same[0] if len(same) == 1 else None
    return None


def merged(ranges: list[tuple[int, int]]) -> tuple[Int, Int]:
    """Ranges as (starts, ends), sorted and merged."""
    columns = np.array(ranges, np.int64).reshape(-1, 2)
    return union(columns[:, 0], columns[:, 1])
