"""Where the space is: bytes by kind, by directory, free runs by length, and what could be given back."""

from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.resolve import Resolver, Touched
from virt_bmap.act.sparsify.estimate import estimate
from virt_bmap.core.arrays import Int, expand, union
from virt_bmap.core.escape import escape, escape_all
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.paths import MAX_DEPTH, positions

NODES = 1500
"""Rectangles of the treemap: more can't be seen."""


def kinds(resolver: Resolver, pieces: Touched) -> list[dict[str, Any]]:
    """Bytes of each kind on each volume, pieces and bytes, the most first."""
    kind, volume = resolver.kind_of(pieces.object), resolver.volume_of(pieces.object)
    kind = np.where(kind < 0, tables.GAP, kind)
    names = [escape(name.encode()) for name in resolver.bmap.volumes.column("name").to_pylist()]
    rows = []
    for key in np.unique(volume * len(tables.KINDS) + kind).tolist():
        of, what = divmod(key, len(tables.KINDS))
        mine = (volume == of) & (kind == what)
        low, high = union(pieces.start[mine], pieces.end[mine])
        rows.append(
            {
                "device": names[of],
                "volume": of,
                "kind": what,
                "bytes": int((high - low).sum()),
                "pieces": len(low),
            }
        )
    return sorted(rows, key=lambda row: -row["bytes"])


def free_runs(resolver: Resolver, pieces: Touched) -> dict[str, list[int]]:
    """Runs of free space by length: the bins are powers of two; bytes and runs of each."""
    mine = resolver.kind_of(pieces.object) == tables.FREE
    low, high = union(pieces.start[mine], pieces.end[mine])
    bins = np.frexp((high - low).astype(np.float64))[1] - 1
    used = np.unique(bins)
    return {
        "power": used.tolist(),
        "bytes": [int((high - low)[bins == b].sum()) for b in used],
        "runs": [int((bins == b).sum()) for b in used],
    }


def gains(bmap: BlockMap, disk: int) -> dict[str, list[dict[str, Any]]]:
    """What sparsify would give back of the disk, by volume, and what it would keep; and the volumes that it
    would leave alone, with the reason."""
    found, left = estimate(bmap, bmap.disk(disk), None)
    names = [escape(name.encode()) for name in bmap.volumes.column("name").to_pylist()]
    return {
        "gains": [
            {
                "device": names[gain.volume],
                "what": gain.what,
                "bytes": gain.size,
                "given_back": gain.given_back,
            }
            for gain in sorted(found, key=lambda gain: -gain.size)
        ],
        "left": [{"device": names[volume], "reason": reason} for volume, reason in left.items()],
    }


# ---- the treemap -------------------------------------------------------------------------------------------


def treemap(bmap: BlockMap, disk: str, size: int, by_kind: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rectangles: the disk, its volumes, in them kinds of space and, where names are known, directories and
    large files. Sizes are bytes on the disk; a parent has at least those of its children."""
    nodes: dict[str, list[Any]] = {
        "id": ["disk"],
        "parent": [""],
        "label": [disk],
        "bytes": [size],
        "kind": [-1],
    }

    def add(id: str, parent: str, label: str, count: int, kind: int) -> None:
        for column, value in zip(nodes.values(), (id, parent, label, count, kind), strict=True):
            column.append(value)

    for volume in dict.fromkeys(row["volume"] for row in by_kind):
        mine = [row for row in by_kind if row["volume"] == volume]
        add(f"v{volume}", "disk", mine[0]["device"], sum(row["bytes"] for row in mine), -1)
        for row in mine:
            add(
                f"v{volume}k{row['kind']}", f"v{volume}", tables.KINDS[row["kind"]], row["bytes"], row["kind"]
            )
            if row["kind"] == tables.DATA:
                _directories(bmap, volume, row["bytes"], add)
    nodes["bytes"][0] = max(
        size,
        sum(count for parent, count in zip(nodes["parent"], nodes["bytes"], strict=True) if parent == "disk"),
    )
    return nodes


def _directories(bmap: BlockMap, volume: int, limit: int, add: Any) -> None:
    """The content of files by directory, below the rectangle of the volume's data."""
    _, names = bmap.slice_of("names", volume)
    _, inodes = bmap.slice_of("inodes", volume)
    _, system = bmap.slice_of("filesystems", volume)
    root = tables.integers(system, "root")
    if not names.num_rows or not len(root) or root[0] < 0:
        return
    parent, inode, level = _tree(names, inodes, int(root[0]))
    total = allocated(bmap, volume, inode)
    for depth in range(int(level.max(initial=0)), 0, -1):
        here = np.flatnonzero(level == depth)
        np.add.at(total, parent[here], total[here])
    if total[0] > limit:  # files share bytes: what the parts add up to is more than there is
        total = (total * (limit / total[0])).astype(np.int64)
    order = np.argsort(-total, kind="stable")[:NODES]
    chosen = np.sort(order[(total[order] > 0) & (level[order] >= 0)])
    known, paths = bmap.paths(volume)
    at = np.searchsorted(known, inode[chosen])
    words = escape_all(paths.take(pa.array(np.minimum(at, len(known) - 1)))).to_pylist()
    base = f"v{volume}k{tables.DATA}"
    for node, up, count, path in zip(
        chosen.tolist(), parent[chosen].tolist(), total[chosen].tolist(), words, strict=True
    ):
        if node:
            add(f"{base}n{node}", f"{base}n{up}" if up else base, path.rpartition("/")[2], count, tables.DATA)


def _tree(names: pa.Table, inodes: pa.Table, root: int) -> tuple[Int, Int, Int]:
    """The tree of names as rows: for each the row of its directory, its inode, and its level (-1: not
    reached). Row 0 is the root; an inode counts where it is named first."""
    inode, first = np.unique(tables.integers(names, "inode"), return_index=True)
    keep = inode != root
    inode = np.append(root, inode[keep])
    above = np.append(root, tables.integers(names, "parent")[first[keep]])
    parent = positions(inode, above)
    is_directory = np.isin(
        inode, tables.integers(inodes, "inode")[tables.codes(inodes, "type") == tables.T_DIRECTORY]
    )
    order = np.argsort(parent, kind="stable")
    bounds = np.searchsorted(parent[order], np.arange(len(inode) + 1))
    level = np.full(len(inode), -1, np.int64)
    level[0], here = 0, np.zeros(1, np.int64)
    for depth in range(1, MAX_DEPTH):
        row, step = expand(bounds[here + 1] - bounds[here])
        children = order[bounds[here][row] + step]
        children = children[level[children] < 0]
        if not len(children):
            break
        level[children] = depth
        here = children[is_directory[children]]
    return np.where(level > 0, parent, 0), inode, level


def allocated(bmap: BlockMap, volume: int, inode: Int) -> Int:
    """Bytes on the disk that are the content of each inode."""
    _, extents = bmap.slice_of("extents", volume)
    owner = tables.integers(extents, "inode")
    mine = np.isin(tables.codes(extents, "kind"), (tables.DATA, tables.UNWRITTEN)) & (owner >= 0)
    at = positions(inode, owner[mine])
    total = np.zeros(len(inode), np.int64)
    np.add.at(total, at[at >= 0], tables.integers(extents, "length")[mine][at >= 0])
    return total
