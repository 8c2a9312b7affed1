"""What no run touched, by directory: advice for slimming an image.

Files are put together by the directory that a package would own: the first name of the path, or of /usr, /var
and /opt the second.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.profile.saved import Profile
from virt_bmap.core.arrays import Int
from virt_bmap.core.escape import escape_all
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved.results import field

SHARED = ("usr", "var", "opt")
"""Directories whose own directories are what one thinks of."""
UNUSED = pa.schema([
    field("files", pa.int64(), "files in the directory and below", "count"),
    field("never", pa.int64(), "of these, files that no run read", "count"),
    field("bytes", pa.int64(), "bytes on the disk of all of them", "bytes"),
    field("never_bytes", pa.int64(), "bytes on the disk of those that no run read", "bytes"),
    field("share", pa.float64(), "per cent of the bytes that no run read"),
    field("device", pa.large_string(), "the filesystem's volume"),
    field("directory", pa.large_string(), "path, escaped"),
])  # fmt: skip


def unused(bmap: BlockMap, profile: Profile, depth: int | None = None) -> pa.Table:
    """By directory, `depth` names deep (default: as packages
    do), what no run of the profile read, most bytes first."""
    parts = []
    for volume in tables.integers(bmap.filesystems, "volume").tolist():
        parts.append(_of_volume(bmap, volume, profile, depth))
    found = pa.concat_tables(parts) if parts else UNUSED.empty_table()
    return found.sort_by([("never_bytes", "descending"), ("never", "descending")])


def _of_volume(bmap: BlockMap, volume: int, profile: Profile, depth: int | None) -> pa.Table:
    inode, path = bmap.paths(volume)
    first = np.append(True, inode[1:] != inode[:-1])[: len(inode)]  # a file with several names counts once
    inode, path = inode[first], path.filter(pa.array(first))
    size = _allocated(bmap, volume, inode)
    held = size >= 0
    inode, path, size = inode[held], path.filter(pa.array(held)), size[held]
    device = bmap.volumes.column("name")[volume].as_py()
    rows = profile.ranges.filter(pc.equal(profile.ranges.column("device"), device))
    seen = pc.is_in(path, pc.unique(rows.column("path").combine_chunks())).to_numpy(zero_copy_only=False)
    group = pc.dictionary_encode(_directory(path, depth))
    code, count = group.indices.to_numpy(zero_copy_only=False), len(group.dictionary)

    def added(values: np.ndarray) -> Int:
        total: Int = np.zeros(count, np.int64)
        np.add.at(total, code, values)
        return total

    whole, never = added(size), added(np.where(seen, 0, size))
    return pa.table([
        pa.array(added(np.ones(len(size), np.int64))), pa.array(added((~seen).astype(np.int64))),
        pa.array(whole), pa.array(never), pa.array(100 * never / np.maximum(whole, 1)),
        pa.array([device] * count, pa.large_string()), escape_all(group.dictionary),
    ], schema=UNUSED)  # fmt: skip


def _allocated(bmap: BlockMap, volume: int, inode: Int) -> Int:
    """Bytes on the disk of each inode's content, -1 for what has none: directories, metadata, empty files."""
    _, extents = bmap.slice_of("extents", volume)
    owner = tables.integers(extents, "inode")
    mine = np.isin(tables.codes(extents, "kind"), (tables.DATA, tables.UNWRITTEN)) & (owner >= 0)
    owners, row = np.unique(owner[mine], return_inverse=True)
    total = np.zeros(len(owners), np.int64)
    np.add.at(total, row, tables.integers(extents, "length")[mine])
    at = np.searchsorted(owners, inode)
    inside = at < len(owners)
    inside[inside] = owners[at[inside]] == inode[inside]
    return (
        np.where(inside, total[np.minimum(at, max(0, len(owners) - 1))], -1)
        if len(owners)
        else np.full(len(inode), -1, np.int64)
    )


def _directory(path: pa.Array, depth: int | None) -> pa.Array:
    """The directory that each file is counted in; / where it lies in none so deep."""
    name = r"/[^/]+"
    pattern = (
        rf"^(?P<top>(?:/(?:{'|'.join(SHARED)})(?:/[^/]+)?|{name}))/"
        if depth is None
        else rf"^(?P<top>(?:{name}){{1,{depth}}})/"
    )
    found = pc.extract_regex(path, f"(?s){pattern}")
    return pc.coalesce(
        pc.if_else(found.is_valid(), found.field("top"), None), pa.scalar(b"/", pa.large_binary())
    )
