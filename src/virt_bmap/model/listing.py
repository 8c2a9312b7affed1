"""Owners as rows with names: what every output that people read is made of."""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, expand
from virt_bmap.core.mapping import ROLES
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners

LETTERS = {
    "data": "f", "directory": "d", "symlink": "s", "unwritten": "u", "xattr": "x", "tree": "t",
    "metadata": "m", "boot": "b", "gap": "g", "free": "e", "content": "c", "unknown": "n",
    "unreferenced": "o", "file": "h", "disk": "v", "partition": "p", "lv": "l", "md": "r", "crypt": "k",
    "pool": "w", "image": "i",
}  # fmt: skip
"""One letter for each kind of owner, extents first, then volumes. v, p, l, d and f are the original's."""
NAMES_OF = {letter: name for name, letter in LETTERS.items()}

LISTING = pa.schema([
    pa.field("query", pa.int64(), False, {"meaning": "number of the range that was asked about, from 0"}),
    pa.field("disk", pa.int32(), False, {"meaning": "number of the disk, from 1"}),
    pa.field("start", pa.int64(), False, {"meaning": "first byte, on the disk"}),
    pa.field("end", pa.int64(), False, {"meaning": "byte after the last, on the disk"}),
    pa.field("kind", pa.dictionary(pa.int8(), pa.string()), False,
        {"meaning": "kind of extent or of volume, see LETTERS"}),
    pa.field("device", pa.dictionary(pa.int32(), pa.string()), False, {"meaning": "the volume's name"}),
    pa.field("path", pa.large_binary(), True, {"meaning": "path in the filesystem; null: has none"}),
    pa.field("part", pa.dictionary(pa.int16(), pa.string()), True,
        {"meaning": "metadata structure or named stream"}),
    pa.field("inode", pa.int64(), True, {"meaning": "number of the inode"}),
    pa.field("file_offset", pa.int64(), True, {"meaning": "where in the file the range begins"}),
    pa.field("volume_offset", pa.int64(), False, {"meaning": "where in the device the range begins"}),
    pa.field("length", pa.int64(), False, {"meaning": "bytes of the device: end - "
        "start, unless role is compressed"}),
    pa.field("role", pa.dictionary(pa.int8(), pa.string()), False,
        {"meaning": "data, copy, zero, parity or compressed"}),
    pa.field("flags", pa.int32(), False, {"meaning": "bit mask as in the table extents"}),
    pa.field("depth", pa.int32(), False, {"meaning": "layers between the disk and the device"}),
])  # fmt: skip


def specificity(bmap: BlockMap, owners: Owners) -> Int:
    """The order that puts the most specific owner first: inner layers before outer, inline data before its
    container, extents before volumes."""
    flags = tables.integers(bmap.extents, "flags")
    inline = (
        np.where(owners.extent >= 0, (flags[owners.extent] & tables.INLINE) != 0, False)
        if len(flags)
        else np.zeros(len(owners.extent), bool)
    )
    return np.lexsort((-owners.volume, ~inline, owners.extent < 0, -owners.depth))


def describe(bmap: BlockMap, disk: int, owners: Owners) -> pa.Table:
    """Owners on one disk as a table of the schema LISTING, in the order given; one row for each name of a
    file with hard links."""
    counts, path = _paths(bmap, owners)
    row, _ = expand(counts)
    owners = owners.take(row)
    is_extent = owners.extent >= 0
    at = np.where(is_extent, owners.extent, 0)
    kinds = np.array(
        [tuple(LETTERS).index(kind) for kind in bmap.volumes.column("kind").to_pylist()], np.int8
    )

    def extent(column: np.ndarray, otherwise: int) -> np.ndarray:
        return np.where(is_extent, column[at], otherwise) if len(column) else np.full(len(at), otherwise)

    inode = extent(tables.integers(bmap.extents, "inode"), -1)
    file_offset = extent(tables.integers(bmap.extents, "file_offset"), -1)
    inside = owners.inside - extent(tables.integers(bmap.extents, "volume_offset"), 0)
    file_offset = np.where(file_offset >= 0, file_offset + inside, -1)
    part, words = tables.parts(bmap.extents)
    columns = [
        owners.query,
        np.full(len(row), disk, np.int32),
        owners.start,
        owners.end,
        _dictionary(
            np.where(is_extent, extent(tables.codes(bmap.extents, "kind"), 0), kinds[owners.volume]).astype(
                np.int8
            ),
            tuple(LETTERS),
        ),
        _dictionary(owners.volume.astype(np.int32), bmap.volumes.column("name").to_pylist()),
        path,
        pa.DictionaryArray.from_arrays(
            _nullable(extent(part, -1).astype(np.int16)), pa.array(words, pa.string())
        ),
        _nullable(inode),
        _nullable(file_offset),
        owners.inside,
        owners.length,
        _dictionary(owners.role.astype(np.int8), ROLES),
        extent(tables.integers(bmap.extents, "flags"), 0).astype(np.int32),
        owners.depth.astype(np.int32),
    ]
    return pa.Table.from_arrays(
        [pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], schema=LISTING
    )


def _paths(bmap: BlockMap, owners: Owners) -> tuple[Int, pa.Array]:
    """How many rows each owner becomes (one for each path, at least one), and the path of each such row."""
    n = len(owners.query)
    counts, first = np.ones(n, np.int64), np.full(n, -1, np.int64)
    inode = tables.integers(bmap.extents, "inode")
    mine = (
        np.where(owners.extent >= 0, inode[np.maximum(owners.extent, 0)], -1)
        if len(inode)
        else np.full(n, -1)
    )
    all_paths: list[pa.Array] = []
    base = 0
    for volume in np.unique(owners.volume[mine >= 0]).tolist():
        rows = np.flatnonzero((owners.volume == volume) & (mine >= 0))
        known, path = bmap.paths(volume)
        low, high = np.searchsorted(known, mine[rows], "left"), np.searchsorted(known, mine[rows], "right")
        counts[rows] = np.maximum(1, high - low)
        first[rows] = np.where(high > low, base + low, -1)
        all_paths.append(path)
        base += len(path)
    row, step = expand(counts)
    at = np.where(first[row] >= 0, first[row] + step, -1)
    everything = pa.concat_arrays(all_paths) if all_paths else pa.array([], pa.large_binary())
    return counts, everything.take(_nullable(at)) if len(everything) else pa.nulls(
        len(row), pa.large_binary()
    )


def _nullable(values: np.ndarray) -> pa.Array:
    missing = values < 0
    return pa.array(values, mask=missing) if missing.any() else pa.array(values)


def _dictionary(codes: np.ndarray, words: tuple[str, ...] | list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.string()))
