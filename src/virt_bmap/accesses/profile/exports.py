"""Lists of what was needed, for other tools.

Sources: nbdkit-extentlist-filter(1), "FILE FORMAT"; vmtouch(8), -b; posix_fadvise(2).
"""

from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.profile.saved import Profile
from virt_bmap.accesses.profile.summary import disk_ranges, grouped
from virt_bmap.core.arrays import union
from virt_bmap.model import tables

CONTENT = ("data", "unwritten")


def write(
    profile: Profile,
    what: str,
    file: BinaryIO,
    disk: int = 1,
    device: str | None = None,
    common: bool = False,
) -> int:
    """Write a list of EXPORTS of one disk, or of the files of one device; how many files were left out.

    `common`: only what every run needed.
    """
    lines = EXPORTS[what](profile, disk, device, common)
    file.write(b"".join(lines))
    return (
        sum(b"\n" in path for path in _paths(profile, device, common)) if what in ("files", "prefetch") else 0
    )


def _ranges(profile: Profile, disk: int, _device: str | None, common: bool) -> list[bytes]:
    start, end = disk_ranges(profile, disk, common)
    rows = zip(start.tolist(), (end - start).tolist(), strict=True)
    return [b"offset,length\n", *(b"%d,%d\n" % row for row in rows)]


def _extentlist(profile: Profile, disk: int, _device: str | None, common: bool) -> list[bytes]:
    start, end = union(*disk_ranges(profile, disk, common))
    return [b"%d %d\n" % row for row in zip(start.tolist(), (end - start).tolist(), strict=True)]


def _files(profile: Profile, _disk: int, device: str | None, common: bool) -> list[bytes]:
    return [path + b"\n" for path in _paths(profile, device, common) if b"\n" not in path]


def _files0(profile: Profile, _disk: int, device: str | None, common: bool) -> list[bytes]:
    return [path + b"\0" for path in _paths(profile, device, common)]


def _paths(profile: Profile, device: str | None, common: bool) -> list[bytes]:
    """The files in order of first use."""
    chosen = _chosen(profile, device, common)
    rows = chosen.ranges.take(pa.array(grouped(chosen).first))
    return list(dict.fromkeys(rows.column("path").to_pylist()))


def _prefetch(profile: Profile, _disk: int, device: str | None, common: bool) -> list[bytes]:
    chosen = _chosen(profile, device, common).ranges
    chosen = chosen.filter(chosen.column("file_offset").is_valid())
    columns = (
        tables.integers(chosen, "file_offset").tolist(),
        tables.integers(chosen, "length").tolist(),
        chosen.column("path").to_pylist(),
    )
    return [b"%d %d %s\n" % row for row in zip(*columns, strict=True) if b"\n" not in row[2]]


def _chosen(profile: Profile, device: str | None, common: bool) -> Profile:
    """The content of files only."""
    rows = profile.ranges
    keep = pc.and_(
        pc.is_in(rows.column("kind"), pa.array(CONTENT, pa.large_string())), rows.column("path").is_valid()
    )
    if device is not None:
        keep = pc.and_(keep, pc.equal(rows.column("device"), device))
    if common:
        keep = pc.and_(keep, pa.array(profile.column("runs") == len(profile.runs)))
    return Profile(rows.filter(keep), profile.runs, profile.sizes)


EXPORTS: dict[str, Callable[[Profile, int, str | None, bool], list[bytes]]] = {
    "files": _files, "files0": _files0, "prefetch": _prefetch, "ranges": _ranges, "extentlist": _extentlist,
}  # fmt: skip
"""files: paths, one a line, for vmtouch -b; files0: the same ended by NUL, for vmtouch -0 -b; prefetch:
offset, length and path for posix_fadvise(2) or readahead(2); ranges: offset,length on the disk;
extentlist: sorted and merged, for nbdkit's filter of that name."""
