"""The block map: which object owns these bytes of a disk, and where do the bytes of this object lie?

Both questions are answered layer by layer through the mapping rows; nothing is flattened to disk offsets
before an output asks.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int, Intervals, ints
from virt_bmap.core.columns import stack, take
from virt_bmap.core.errors import UsageError
from virt_bmap.core.mapping import PACKED, ROLES, Groups, Pieces, Rows
from virt_bmap.model import tables
from virt_bmap.model.contract import Proof

T = TypeVar("T")

FILE = "file"
"""The kind of volume that is a file of the host."""


class Owners(NamedTuple):
    """Who owns bytes, as columns of one length: query `query` meets row `extent` of `extents` (-1: the volume
    itself) of `volume`.

    The shared bytes are [start, end) on the disk, and [inside, inside + length) in the volume: as many,
    unless `role` is compressed, where offsets on one side say nothing of the other. `depth` counts layers
    from the disk.
    """

    query: Int
    volume: Int
    extent: Int
    start: Int
    end: Int
    inside: Int
    depth: Int
    role: Int
    length: Int

    @staticmethod
    def concat(parts: "list[Owners]") -> "Owners":
        """All rows of the parts, in order."""
        return stack(Owners, parts)

    def take(self, keep: np.ndarray) -> "Owners":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


@dataclass
class BlockMap:
    """The tables of `model/tables.py`, and lookups in them.

    Tables are what is saved; all else is derived when first used.
    """

    volumes: pa.Table
    mappings: pa.Table
    filesystems: pa.Table
    inodes: pa.Table
    names: pa.Table
    extents: pa.Table
    problems: pa.Table
    given_paths: dict[int, tuple[Int, pa.Array]] = field(default_factory=dict, repr=False)
    """For volumes whose paths are known though their names are not (text maps): as `paths` returns them."""
    proofs: list[tuple[int, Proof]] | None = field(default=None, repr=False, compare=False)
    """What the readers say that they looked at, with the volume; None where they were not asked: a saved map
    does not keep it."""
    _cache: dict[tuple[str, int], object] = field(default_factory=dict, repr=False, compare=False)

    TABLES = ("volumes", "mappings", "filesystems", "inodes", "names", "extents", "problems")

    # ---- parts of it ---------------------------------------------------------------------------------------

    def volume_named(self, name: str) -> int:
        """The number of a device; the innermost where several layers share a name. A device of a machine
        whose disks are files may be called by what follows their name, where no other is called so.

        UsageError lists the names there are.
        """
        names = self.volumes.column("name").to_pylist()
        found = [number for number, known in enumerate(names) if known == name]
        inner = [(number, known) for number, known in enumerate(names) if known.endswith(f":{name}")]
        if not found and len({known for _, known in inner}) == 1:
            found = [number for number, _ in inner]
        if not found:
            raise UsageError(f"no device {name} in this map; there are: {', '.join(dict.fromkeys(names))}")
        return found[-1]

    @cached_property
    def disks(self) -> list[int]:
        """The volumes that nothing contains, in order, disk 1 first: whole disks, or the files of the host
        that hold their images."""
        kinds = self.volumes.column("kind").to_pylist()
        top = FILE if FILE in kinds else "disk"
        return [number for number, kind in enumerate(kinds) if kind == top]

    def disk(self, number: int, map: str = "this map") -> int:
        """The volume that is disk `number`, from 1. UsageError where there are not as many in `map`."""
        if not 1 <= number <= len(self.disks):
            raise UsageError(f"there is no disk {number} in {map}, which has {len(self.disks)}")
        return self.disks[number - 1]

    def size_of(self, volume: int) -> int:
        """The bytes of a volume."""
        size: int = self.volumes.column("size")[volume].as_py()
        return size

    @cached_property
    def on_files(self) -> bool:
        """Are the offsets of this map those of image files on
        the host, rather than those that the guest sees?"""
        return FILE in self.volumes.column("kind").to_pylist()

    @cached_property
    def depth(self) -> Int:
        """For each volume the number of layers between it and a disk."""
        depth = np.zeros(self.volumes.num_rows, np.int64)
        for volume in np.unique(self.rows.volume).tolist():  # parents come before children
            depth[volume] = 1 + depth[self._by_volume.of(volume).parent].max()
        return depth

    @cached_property
    def rows(self) -> Rows:
        """All mapping rows."""
        column = {
            name: tables.integers(self.mappings, name)
            for name in self.mappings.column_names
            if name != "role"
        }
        return Rows(**column, role=tables.codes(self.mappings, "role").astype(np.int64))

    @cached_property
    def _by_parent(self) -> Groups:
        return Groups(self.rows, self.rows.parent)

    @cached_property
    def _by_volume(self) -> Groups:
        return Groups(self.rows, self.rows.volume)

    def rows_into(self, parent: int) -> Rows:
        """The mapping rows that lie in `parent`."""
        return self._once("into", parent, lambda: self._by_parent.of(parent))

    def rows_of(self, volume: int) -> Rows:
        """The mapping rows of `volume`."""
        return self._once("of", volume, lambda: self._by_volume.of(volume))

    def slice_of(self, name: str, volume: int) -> tuple[int, pa.Table]:
        """The rows of one volume in a table that is grouped by volume, and the number of the first."""
        table: pa.Table = getattr(self, name)
        column = self._once(f"{name}.volume", 0, lambda: tables.integers(table, "volume"))
        low, high = np.searchsorted(column, [volume, volume + 1])
        return int(low), table.slice(low, high - low)

    def filesystem_type(self, volume: int) -> str | None:
        """The type of the filesystem on a volume, in blkid's words; None where none was read."""
        found = self.slice_of("filesystems", volume)[1].column("type").to_pylist()
        return found[0] if found else None

    def _once(self, what: str, number: int, make: Callable[[], T]) -> T:
        key = (what, number)
        if key not in self._cache:
            self._cache[key] = make()
        return cast(T, self._cache[key])

    # ---- what owns these bytes -----------------------------------------------------------------------------

    def owners(self, disk: int, starts: Int, ends: Int) -> Owners:
        """Every owner of the ranges [starts[i], ends[i]) of disk number `disk` (from 1), a volume at a time,
        most general first.

        Layers are climbed breadth first; one call answers a million ranges.
        """
        starts, ends = ints(starts), ints(ends)
        query = np.arange(len(starts), dtype=np.int64)
        parts: list[Owners] = []
        queue = [
            (
                self.disk(disk),
                _Way(query, starts, ends - starts, starts, ends - starts, np.zeros(len(starts), np.int64)),
            )
        ]
        while queue:
            volume, way = queue.pop(0)
            parts.append(self._owned(volume, way, np.full(len(way.query), -1, np.int64)))
            for first, index in self._indexes(volume):
                at, row = index.overlaps(way.here, way.here + way.length)
                low = np.maximum(way.here[at], index.starts[row])
                high = np.minimum(way.here[at] + way.length[at], index.ends[row])
                parts.append(self._owned(volume, way.step(at, low, high - low, low, high - low), first[row]))
            rows = self.rows_into(volume)
            if len(rows):
                queue += _steps(way, rows.up(way.here, way.here + way.length), rows.volume, rows.role)
        return Owners.concat(parts)

    def _owned(self, volume: int, way: "_Way", extent: Int) -> Owners:
        """What was reached on the way up from a disk, as rows of one volume."""
        number, depth = np.full(len(way.query), volume, np.int64), np.full(len(way.query), self.depth[volume])
        return Owners(
            way.query,
            number,
            extent,
            way.asked,
            way.asked + way.asked_length,
            way.here,
            depth,
            way.role,
            way.length,
        )

    def _indexes(self, volume: int) -> list[tuple[Int, Intervals]]:
        """Two indexes over a volume's extents: those with
        blocks of their own, and those inside others' bytes."""

        def build() -> list[tuple[Int, Intervals]]:
            first, mine = self.slice_of("extents", volume)
            start, length = tables.integers(mine, "volume_offset"), tables.integers(mine, "length")
            inline = (tables.integers(mine, "flags") & tables.INLINE) != 0
            groups = [np.flatnonzero(~inline), np.flatnonzero(inline)]
            return [
                (first + rows, Intervals(start[rows], start[rows] + length[rows]))
                for rows in groups
                if len(rows)
            ]

        return self._once("index", volume, build)

    # ---- where they lie ------------------------------------------------------------------------------------

    def descend(self, volume: int, starts: Int, ends: Int) -> Owners:
        """Where ranges of a volume lie on the disks, with every copy and parity run: `volume` is then the
        disk's, `inside` the offset in the volume asked about. Bytes that lie nowhere (a missing member)
        give no row."""
        starts, ends = ints(starts), ints(ends)
        parts: list[Owners] = []
        query, zero = np.arange(len(starts), dtype=np.int64), np.zeros(len(starts), np.int64)
        queue = [(volume, _Way(query, starts, ends - starts, starts, ends - starts, zero))]
        while queue:
            number, way = queue.pop(0)
            if number in self.disks:  # not by depth: a volume that lies nowhere has depth 0, too
                n = len(way.query)
                parts.append(
                    Owners(
                        way.query,
                        np.full(n, number, np.int64),
                        np.full(n, -1, np.int64),
                        way.here,
                        way.here + way.length,
                        way.asked,
                        np.zeros(n, np.int64),
                        way.role,
                        way.asked_length,
                    )
                )
                continue
            rows = self.rows_of(number)
            queue += _steps(way, rows.down(way.here, way.here + way.length), rows.parent, rows.role)
        return Owners.concat(parts)

    # ---- names ---------------------------------------------------------------------------------------------

    def paths(self, volume: int) -> tuple[Int, pa.Array]:
        """(inode, path) of every name of a filesystem whose path is known, sorted by inode; the root
        directory is `/`."""

        # with pyarrow.compute: slow to import, and not needed where only tables are written
        from virt_bmap.model import paths

        def build() -> tuple[Int, pa.Array]:
            if volume in self.given_paths:
                return self.given_paths[volume]
            _, names = self.slice_of("names", volume)
            _, inodes = self.slice_of("inodes", volume)
            _, system = self.slice_of("filesystems", volume)
            root = tables.integers(system, "root")
            if len(root) == 0 or root[0] < 0:
                return np.zeros(0, np.int64), pa.array([], pa.large_binary())
            joined = paths.of_names(names, inodes, int(root[0]))
            inode = np.append(tables.integers(names, "inode"), root[0])
            joined = pa.concat_arrays([joined, pa.array([b"/"], pa.large_binary())])
            known = np.flatnonzero(joined.is_valid().to_numpy(zero_copy_only=False))
            order = known[np.argsort(inode[known], kind="stable")]
            return inode[order], joined.take(pa.array(order))

        return self._once("paths", volume, build)

    def first_paths(self, volume: int, wanted: Int) -> pa.Array:
        """The first path of each wanted inode of a filesystem, null where none is known: for a few of many,
        where `paths` would join all."""
        from virt_bmap.model import paths

        if volume in self.given_paths:
            inode, path = self.given_paths[volume]
            at = np.minimum(np.searchsorted(inode, wanted), max(0, len(inode) - 1))
            missing = inode[at] != wanted if len(inode) else np.full(len(wanted), True)
            return path.take(pa.array(at, mask=missing))

        def build() -> "paths.Climb | None":
            root = tables.integers(self.slice_of("filesystems", volume)[1], "root")
            if len(root) == 0 or root[0] < 0:
                return None
            return paths.Climb(
                self.slice_of("names", volume)[1], self.slice_of("inodes", volume)[1], int(root[0])
            )

        climb = self._once("climb", volume, build)
        return climb.paths(wanted) if climb else pa.nulls(len(wanted), pa.large_binary())

    def inode_of(self, volume: int, path: bytes) -> int:
        """The inode that a path leads to; UsageError where there is none."""
        import pyarrow.compute as pc

        device = self.volumes.column("name")[volume].as_py()
        inode, known = self.paths(volume)
        if len(inode) == 0:
            raise UsageError(f"{device} holds no filesystem whose names can be read")
        at = pc.index(known, pa.scalar(b"/" + path.strip(b"/"), pa.large_binary())).as_py()
        if at < 0:
            raise UsageError(f"no file {os.fsdecode(path)!r} on {device}")
        return int(inode[at])

    # ---- a whole disk --------------------------------------------------------------------------------------

    def disk_extents(self, disk: int) -> Owners:
        """Every extent and volume, in offsets of one disk, unsorted: the flattened map, which outputs that
        list a disk need."""
        target = self.disk(disk)
        parts = []
        for volume in self.volumes_on(target):
            first, mine = self.slice_of("extents", volume)
            start = np.append(tables.integers(mine, "volume_offset"), 0)
            length = np.append(tables.integers(mine, "length"), self.size_of(volume))
            extent = np.append(first + np.arange(mine.num_rows), -1)
            found = self.descend(volume, start, start + length)
            found = found.take(found.volume == target)
            parts.append(
                Owners(
                    found.query,
                    np.full(len(found.query), volume, np.int64),
                    extent[found.query],
                    found.start,
                    found.end,
                    found.inside,
                    np.full(len(found.query), self.depth[volume]),
                    found.role,
                    found.length,
                )
            )
        return Owners.concat(parts)

    def volumes_on(self, volume: int) -> list[int]:
        """The volumes that lie at least partly on this one, itself included, parents first."""
        inside = {volume}
        child = tables.integers(self.mappings, "volume").tolist()
        parent = tables.integers(self.mappings, "parent").tolist()
        for number, up in zip(child, parent, strict=True):
            if up in inside:
                inside.add(number)
        return sorted(inside)

    def role_name(self, role: int) -> str:
        """data, copy or parity."""
        return ROLES[role]


class _Way(NamedTuple):
    """Pieces on their way through the layers: bytes [asked, +asked_length) of where the question began are
    bytes [here, +length) of the volume reached."""

    query: Int
    asked: Int
    asked_length: Int
    here: Int
    length: Int
    role: Int

    def step(self, at: Int, source: Int, length: Int, target: Int, target_length: Int) -> "_Way":
        """Parts of the pieces `at`: bytes [source, +length) of the volume reached, which are [target,
        +target_length) of the next one."""
        packed = self.role[at] == PACKED  # inside a compressed run there is nothing to cut
        asked = np.where(packed, self.asked[at], self.asked[at] + source - self.here[at])
        asked_length = np.where(packed, self.asked_length[at], length)
        return _Way(self.query[at], asked, asked_length, target, target_length, self.role[at])

    def take(self, keep: np.ndarray) -> "_Way":
        return take(self, keep)


def _steps(way: _Way, pieces: Pieces, volume: Int, role: Int) -> "list[tuple[int, _Way]]":
    """The next layer: for each volume that mapping rows lead to, the pieces there.

    `volume` and `role` are columns of the rows.
    """
    further = way.step(pieces.query, pieces.source, pieces.length, pieces.target, pieces.target_length)
    further = further._replace(role=np.maximum(further.role, role[pieces.row]))
    reached = volume[pieces.row]
    numbers = np.unique(reached).tolist()
    return [(number, further.take(reached == number)) for number in numbers]
