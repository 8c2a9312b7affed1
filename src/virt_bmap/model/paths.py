"""Full paths, joined level by level from the root, only when an output asks for them.

A path is bytes. A name that holds '/' or NUL (damage, or an encrypted name) has these bytes replaced by
`\\x2f` and `\\x00`, so that a path always splits into its names. What has no name is written in brackets,
`[inode 12]`, which no absolute path looks like.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import Bool, Int, expand, in_order
from virt_bmap.model import tables

MAX_DEPTH = 1024
"""Levels of directories that get a path.

A chain of n directories has n * n / 2 names in its paths: a hostile one must end.
"""


def positions(keys: Int, wanted: Int) -> Int:
    """For each wanted key its first position in `keys`, -1 where it is missing."""
    if len(keys) == 0:
        return np.full(len(wanted), -1, np.int64)
    low, high = int(keys.min()), int(keys.max())
    # dense numbers, as inodes mostly are: a table beats a search
    if low >= 0 and high < 4 * len(keys) + 65536:
        where = np.full(high + 2, -1, np.int64)
        where[keys[::-1]] = np.arange(len(keys) - 1, -1, -1)
        inside = (wanted >= 0) & (wanted <= high)
        found: Int = where[np.where(inside, wanted, high + 1)]
        return found
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    return np.where(keys[order[at]] == wanted, order[at], -1)


def of_names(names: pa.Table, inodes: pa.Table, root: int) -> pa.Array:
    """The path of each row of `names` of one volume, as large_binary; null where its directory can't be
    reached from the root."""
    parent, inode = tables.integers(names, "parent"), tables.integers(names, "inode")
    name = _splittable(names.column("name").combine_chunks().cast(pa.large_binary()))
    is_directory = tables.codes(inodes, "type") == tables.T_DIRECTORY
    directories = tables.integers(inodes, "inode")[is_directory]
    # a directory's own path comes from the first name that
    # leads to it; hard links to directories do not exist
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
    """For each wanted inode the list of its paths, from `path` (of_names) or, where the directory is not
    known, the bare name."""
    inode = tables.integers(names, "inode")
    order = np.argsort(inode, kind="stable")
    low, high = (np.searchsorted(inode[order], wanted, side) for side in ("left", "right"))
    row, step = expand(high - low)
    at = pa.array(order[low[row] + step])
    bare = _splittable(names.column("name").combine_chunks().cast(pa.large_binary()).take(at))
    ends = np.append(0, np.cumsum(high - low)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pc.coalesce(path.take(at), bare))


class Climb:
    """Paths of a few inodes of one volume: from each name up to the root, by searches in sorted columns.

    The answers are the first that `of_names` knows of each inode; the cost follows what is asked for, not
    what the volume holds.
    """

    def __init__(self, names: pa.Table, inodes: pa.Table, root: int) -> None:
        self._root = root
        self._name = names.column("name").combine_chunks()
        self._parent = tables.integers(names, "parent")
        inode = tables.integers(names, "inode")
        self._order = np.argsort(inode, kind="stable")
        self._inode = inode[self._order]
        directories = tables.codes(inodes, "type") == tables.T_DIRECTORY
        self._directories = in_order(tables.integers(inodes, "inode")[directories])

    def paths(self, wanted: Int) -> pa.Array:
        """The first path of each wanted inode as large_binary; null where none is known."""
        low, high = (np.searchsorted(self._inode, wanted, side) for side in ("left", "right"))
        found = np.full(len(wanted), -1, np.int64)
        first = np.flatnonzero(high > low)
        found[first] = self._order[low[first]]
        chain = self._chain(found)
        failed = np.flatnonzero((found >= 0) & (chain[-1] < 0) & (high - low > 1))
        if len(failed):  # the first name hangs in the air: another one may not
            query, step = expand(high[failed] - low[failed])
            rows = self._order[low[failed][query] + step]
            known = np.flatnonzero(self._chain(rows)[-1] >= 0)[::-1]
            found[failed[query[known]]] = rows[known]  # of several the first one stays: it is written last
            chain = self._chain(found)
        joined = self._joined(chain)
        root = (wanted == self._root) & (chain[-1] < 0)
        return (
            pc.if_else(pa.array(root), pa.scalar(b"/", pa.large_binary()), joined) if root.any() else joined
        )

    def _chain(self, rows: Int) -> list[Int]:
        """The rows of names on the way up from each row, a level at a time, -1 above the root; the last array
        is 0 where the root was reached, else -1."""
        levels, at, reached = [rows], rows, np.full(len(rows), -1, np.int64)
        for _ in range(MAX_DEPTH + 1):
            parent = (
                np.where(at >= 0, self._parent[at], -1)
                if len(self._parent)
                else np.full(len(at), -1, np.int64)
            )
            known = (at >= 0) & contains(self._directories, parent)
            reached[known & (parent == self._root)] = 0
            up = np.searchsorted(self._inode, parent)
            climbs = known & (parent != self._root) & (up < len(self._inode))
            climbs[climbs] = self._inode[up[climbs]] == parent[climbs]
            if not climbs.any():
                break
            at = np.full(len(at), -1, np.int64)
            at[climbs] = self._order[up[climbs]]
            levels.append(at)
        return [*levels, reached]

    def _joined(self, chain: list[Int]) -> pa.Array:
        *levels, reached = chain
        nothing, slash = pa.scalar(b"", pa.large_binary()), pa.scalar(b"/", pa.large_binary())
        path = pa.repeat(nothing, len(reached))
        for rows in levels:
            climbing = pa.array(rows >= 0)
            name = _splittable(
                self._name.take(pa.array(rows, mask=rows < 0)).cast(pa.large_binary())
            ).fill_null(b"")
            path = pc.binary_join_element_wise(pc.if_else(climbing, slash, nothing), name, path, nothing)
        return pc.if_else(pa.array(reached >= 0), path, pa.scalar(None, pa.large_binary()))


def contains(ordered: Int, wanted: Int) -> Bool:
    """Which of the wanted values are among these, which are in order."""
    at = np.searchsorted(ordered, wanted)
    found: Bool = at < len(ordered)
    found[found] = ordered[at[found]] == wanted[found]
    return found


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
