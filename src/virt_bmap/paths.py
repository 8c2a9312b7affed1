"""Full paths, joined level by level from the root, only when an output asks for them.

A path is bytes. A name that holds '/' or NUL (damage, or an encrypted name) has these bytes replaced by `\\x2f` and `\\x00`, so that a path
always splits into its names. What has no name is written in brackets, `[inode 12]`, which no absolute path looks like.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap import tables
from virt_bmap.arrays import Int, expand

MAX_DEPTH = 1024
"""Levels of directories that get a path. A chain of n directories has n * n / 2 names in its paths: a hostile one must end."""


def positions(keys: Int, wanted: Int) -> Int:
    """For each wanted key its first position in `keys`, -1 where it is missing."""
    if len(keys) == 0:
        return np.full(len(wanted), -1, np.int64)
    low, high = int(keys.min()), int(keys.max())
    if low >= 0 and high < 4 * len(keys) + 65536:  # dense numbers, as inodes mostly are: a table beats a search
        where = np.full(high + 2, -1, np.int64)
        where[keys[::-1]] = np.arange(len(keys) - 1, -1, -1)
        inside = (wanted >= 0) & (wanted <= high)
        found: Int = where[np.where(inside, wanted, high + 1)]
        return found
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    return np.where(keys[order[at]] == wanted, order[at], -1)


def of_names(names: pa.Table, inodes: pa.Table, root: int) -> pa.Array:
    """The path of each row of `names` of one volume, as large_binary; null where its directory can't be reached from the root."""
    parent, inode = tables.integers(names, "parent"), tables.integers(names, "inode")
    name = _splittable(names.column("name").combine_chunks().cast(pa.large_binary()))
    is_directory = tables.codes(inodes, "type") == tables.T_DIRECTORY
    directories = tables.integers(inodes, "inode")[is_directory]
    # a directory's own path comes from the first name that leads to it; hard links to directories do not exist
    row_of = positions(inode, directories)
    parent_at = positions(directories, parent)
    inode_at = positions(directories, inode)
    paths: list[pa.Array] = [pa.array([b""], pa.large_binary())]
    path_at = np.full(len(directories), -1, np.int64)
    top = positions(directories, np.array([root], np.int64))[0]
    if top < 0:
        return pa.nulls(len(names), pa.large_binary())
    path_at[top] = 0
    order = np.argsort(parent_at, kind="stable")
    bounds = np.searchsorted(parent_at[order], np.arange(len(directories) + 1))
    known = 1
    level = np.array([top], np.int64)
    for _ in range(MAX_DEPTH):
        rows = _children(order, bounds, level)
        rows = rows[inode_at[rows] >= 0]
        rows = rows[(row_of[inode_at[rows]] == rows) & (path_at[inode_at[rows]] < 0)]
        if len(rows) == 0:
            break
        longest = pa.concat_arrays(paths) if len(paths) > 1 else paths[0]
        paths = [longest, _join(longest, path_at[parent_at[rows]], name, rows)]
        level = inode_at[rows]
        path_at[level] = known + np.arange(len(rows))
        known += len(rows)
    base = pa.concat_arrays(paths)
    at = np.where(parent_at >= 0, path_at[parent_at], -1)
    return _join(base, at, name, None)


def lists(names: pa.Table, path: pa.Array, wanted: Int) -> pa.Array:
    """For each wanted inode the list of its paths, from `path` (of_names) or, where the directory is not known, the bare name."""
    inode = tables.integers(names, "inode")
    order = np.argsort(inode, kind="stable")
    low, high = (np.searchsorted(inode[order], wanted, side) for side in ("left", "right"))
    row, step = expand(high - low)
    at = pa.array(order[low[row] + step])
    bare = _splittable(names.column("name").combine_chunks().cast(pa.large_binary()).take(at))
    ends = np.append(0, np.cumsum(high - low)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pc.coalesce(path.take(at), bare))


def _children(order: Int, bounds: Int, level: Int) -> Int:
    row, step = expand(bounds[level + 1] - bounds[level])
    children: Int = order[bounds[level][row] + step]
    return children


def _join(base: pa.Array, at: Int, name: pa.Array, rows: Int | None) -> pa.Array:
    index = pa.array(at, mask=at < 0) if (at < 0).any() else pa.array(at)
    leaf = name if rows is None else name.take(pa.array(rows))
    joined: pa.Array = pc.binary_join_element_wise(base.take(index), leaf, pa.scalar(b"/", pa.large_binary()))
    return joined


def _splittable(name: pa.Array) -> pa.Array:
    for byte, escape in ((b"/", b"\\x2f"), (b"\0", b"\\x00")):
        bad = pc.match_substring(name, byte.decode("latin-1"))
        if pc.any(bad).as_py():
            name = pc.replace_substring(name, byte.decode("latin-1"), escape.decode())
    return name
