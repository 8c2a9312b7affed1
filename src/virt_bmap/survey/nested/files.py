"""The files of one filesystem that may be disk images: which they are, where their bytes lie, and which of
them another one means by a name."""

import bisect
import posixpath
import re
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import EMPTY, Bool, Int, scatter
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.formats.foreign import VERITY_MAGIC
from virt_bmap.model import paths, tables
from virt_bmap.model.contract import Filesystem
from virt_bmap.open.disks import Nested

LEAST_DISK, LEAST_IMAGE = 1 << 20, 64 << 10
"""Bytes of a file that is looked at without being asked for by its name.

No partition table, and no filesystem that anybody uses, is smaller than the first; images in formats of their
own grow: a new overlay has 200 KiB."""
DESCRIPTOR = ".vmdk"
"""Files of this name are looked at though they are small: some are text that names further files."""
HEAD = 2048
"""Bytes of each file that are looked at: all magic numbers
of disks that are more than a signature lie there."""
BATCH = 4096
"""Files whose heads are looked at together."""
DISKS = formats.disk_magics(HEAD)
IMAGES = (*formats.image_magics(HEAD), (0, VERITY_MAGIC))
"""A hash tree is not a disk, but vouches for one."""
MAX_NAME, MAX_LEFT_OUT = 4096, 64
"""Bytes of a name that an image may refer to, as PATH_MAX; and how many leading directories of one are left
out in search of it."""
DRIVE = re.compile(rb"[A-Za-z]:(?=/)")


class Image(NamedTuple):
    """A file to be opened: its path, size in bytes, and where its bytes lie in the filesystem's volume;
    `refused` says why it can't be."""

    inode: int
    path: bytes
    size: int
    rows: Rows
    refused: str = ""


class ImageFiles:
    """The regular files of a filesystem, by path and by inode."""

    def __init__(self, found: Filesystem) -> None:
        self._inode, self._size = (
            tables.integers(found.inodes, "inode"),
            tables.integers(found.inodes, "size"),
        )
        alive = tables.integers(found.inodes, "flags") & tables.I_DELETED == 0
        self._regular = (tables.codes(found.inodes, "type") == tables.T_FILE) & alive
        self._path = paths.of_names(found.names, found.inodes, found.root)
        self._named = tables.integers(found.names, "inode")
        self._at = paths.positions(self._inode, self._named)
        self._is_file = (
            (self._at >= 0) & self._regular[self._at] & self._path.is_valid().to_numpy(zero_copy_only=False)
        )
        self._extents = _Extents(found)

    def wanted(self, reader: Reader, wanted: Nested) -> list[Image]:
        """The images that were asked for, in the order of the filesystem's names."""
        chosen = self._is_file & pc.is_in(
            self._path, pa.array(list(wanted.paths), pa.large_binary())
        ).to_numpy(zero_copy_only=False)
        if wanted.all:
            text = (
                pc.ends_with(self._path, DESCRIPTOR, ignore_case=True)
                .fill_null(False)
                .to_numpy(zero_copy_only=False)
            )
            looked_at = np.unique(
                np.concatenate(
                    [
                        self._inode[self._regular & (self._size >= LEAST_IMAGE)],
                        self._named[text & self._is_file],
                    ]
                )
            )
            large = self._inode[self._regular & (self._size >= LEAST_DISK)]
            chosen |= self._is_file & np.isin(self._named, self._extents.like_disks(reader, looked_at, large))
        _, first = np.unique(self._named[chosen], return_index=True)  # hard links are one file
        return [self._image(row) for row in np.flatnonzero(chosen)[np.sort(first)].tolist()]

    def find(self, name: bytes, beside: bytes) -> Image | None:
        """The file that an image at path `beside` calls `name`: beside it, or from the root of the
        filesystem. Where no such path is there, the filesystem may be mounted somewhere: then leading
        directories are left out until one is."""
        if len(name) > MAX_NAME:
            return None
        name = DRIVE.sub(b"", name, count=1)
        names = posixpath.normpath(posixpath.join(posixpath.dirname(beside), name)).strip(b"/").split(b"/")
        shortest = min(len(names), MAX_LEFT_OUT) if name.startswith(b"/") else 1
        for at in range(shortest):
            path = b"/" + b"/".join(names[at:])
            place = bisect.bisect_left(self._sorted, path, key=lambda row: self._path[int(row)].as_py())
            if place < len(self._sorted) and self._path[row := int(self._sorted[place])].as_py() == path:
                return self._image(row)
        return None

    @cached_property
    def _sorted(self) -> Int:
        """Rows of files by path: a hostile image asks for many names."""
        files = np.flatnonzero(self._is_file)
        order = pc.sort_indices(self._path.take(pa.array(files))).to_numpy()
        found: Int = files[order]
        return found

    def _image(self, row: int) -> Image:
        inode, size = int(self._named[row]), int(self._size[self._at[row]])
        return Image(inode, self._path[row].as_py(), size, *self._extents.rows_of(inode, size))


class _Extents:
    """The content of a filesystem's files: its extents by inode."""

    def __init__(self, found: Filesystem) -> None:
        table = found.extents
        kind, inode = tables.codes(table, "kind"), tables.integers(table, "inode")
        at, plain = tables.integers(table, "file_offset"), ~table.column("part").is_valid().to_numpy()
        rows = np.flatnonzero((kind == tables.DATA) & (inode >= 0) & (at >= 0) & plain)
        rows = rows[np.lexsort((at[rows], inode[rows]))]
        self._inode, self._at, self._flags = inode[rows], at[rows], tables.integers(table, "flags")[rows]
        self._start, self._length = (
            tables.integers(table, "volume_offset")[rows],
            tables.integers(table, "length")[rows],
        )

    def like_disks(self, reader: Reader, inodes: Int, large: Int) -> Int:
        """Those of the files whose first bytes are those of
        an image, or, among the `large` ones, of a disk."""
        coded = self._flags & (tables.INLINE | tables.COMPRESSED | tables.ENCRYPTED)
        rows = np.flatnonzero((self._at < HEAD) & (coded == 0) & np.isin(self._inode, inodes))
        files, which = np.unique(self._inode[rows], return_inverse=True)
        found = [EMPTY]
        for low in range(0, len(files), BATCH):
            mine = files[low : low + BATCH]
            first, last = np.searchsorted(which, [low, low + len(mine)])
            heads = self._heads(reader, rows[first:last], which[first:last] - low, len(mine))
            found.append(mine[_begin(heads, IMAGES) | (_begin(heads, DISKS) & np.isin(mine, large))])
        return np.concatenate(found)

    def _heads(self, reader: Reader, rows: Int, which: Int, count: int) -> np.ndarray:
        """The first bytes of `count` files, read at once; a
        hole may come first: boot sectors are often zeroes."""
        length = np.minimum(self._length[rows], HEAD - self._at[rows])
        heads = np.zeros((count, HEAD), np.uint8)
        scatter(
            heads.reshape(-1),
            which * HEAD + self._at[rows],
            length,
            reader.read_ranges(self._start[rows], length),
        )
        return heads

    def rows_of(self, inode: int, size: int) -> tuple[Rows, str]:
        """Mapping rows of one file's bytes in the volume, and why it can't be read through them."""
        low, high = np.searchsorted(self._inode, [inode, inode + 1])
        mine = slice(low, high)
        keep = self._at[mine] < size
        at, start = self._at[mine][keep], self._start[mine][keep]
        run = np.minimum(self._length[mine][keep], size - at)
        flags = int(np.bitwise_or.reduce(self._flags[mine], initial=0))
        rows = Rows.make(at, 0, start, run)
        if flags & (tables.COMPRESSED | tables.ENCRYPTED):
            return rows, "is stored compressed or encrypted: copy it out (virt-bmap extract) and map the copy"
        if (at[1:] < at[:-1] + run[:-1]).any():
            return rows, "has overlapping extents"
        return rows, ""


def _begin(heads: np.ndarray, magics: tuple[tuple[int, bytes], ...]) -> Bool:
    """For each row: is one of the magics there?"""
    found = np.zeros(len(heads), bool)
    for offset, content in magics:
        found |= (heads[:, offset : offset + len(content)] == np.frombuffer(content, np.uint8)).all(axis=1)
    return found
