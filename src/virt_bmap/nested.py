"""Disk images that are files of a guest's disk, opened as further disks where that is asked for.

A raw image becomes a volume of kind `image`, named DEVICE:PATH; its rows lie in the filesystem's volume, so all that holds for other layers holds for it: lookups
climb into it, and `locate` goes down through it. Its bytes keep their owner, the file. An image in another format is named by its magic and not looked into:
its clusters would have to be followed by QEMU, which reads files of this host.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import EMPTY, Int
from virt_bmap.contract import Filesystem
from virt_bmap.images import magic
from virt_bmap.mapping import ROLES, Rows, Side
from virt_bmap.reader import Reader, scatter

LEAST = 1 << 20
"""Bytes of a file that is looked at without being asked for by its name: no partition table, and no filesystem that anybody uses, is smaller."""
HEAD = 2048
"""Bytes of each file that are looked at: all magic numbers of disks that are more than a signature lie there."""
MAX_IMAGES = 256
"""Images opened in one map. A disk can hold a million small files that look like disks."""
MAX_LEVELS = 3
"""Images inside images. A hostile filesystem can have itself as a file, without end."""
MAGICS = (
    (510, b"\x55\xaa"), (512, b"EFI PART"), (0x438, b"\x53\xef"), (0, b"XFSB"), (0, b"LUKS\xba\xbe"), (512, b"LABELONE"), (3, b"NTFS    "),
    (0, b"hsqs"), *((offset, content) for _, offset, content in magic.MAGICS if offset >= 0),
)  # fmt: skip


@dataclass(frozen=True)
class Nested:
    """Which files to open: these paths (bytes, from the root of whichever filesystem has them), and with `all` every file that begins as a disk does."""

    paths: frozenset[bytes] = frozenset()
    all: bool = False

    def __bool__(self) -> bool:
        return self.all or bool(self.paths)


NOTHING = Nested()


def parse(options: list[str]) -> Nested:
    """The files of `--nested` options: paths, or `all`."""
    return Nested(
        frozenset(b"/" + option.encode(errors="surrogateescape").strip(b"/") for option in options if option != "all"),
        "all" in options,
    )


@dataclass(frozen=True)
class Image:
    """A file to be opened: its path, size in bytes, and where its bytes lie in the filesystem's volume; `refused` says why it can't be."""

    path: bytes
    size: int
    rows: Rows
    refused: str = ""


def images(found: Filesystem, reader: Reader, wanted: Nested) -> Iterator[Image]:
    """The images among the files of one filesystem, in the order of its names."""
    from virt_bmap import paths  # with pyarrow.compute: slow to import, and seldom needed

    if found.root < 0 or not found.names.num_rows:
        return
    inode, size = tables.integers(found.inodes, "inode"), tables.integers(found.inodes, "size")
    regular = tables.codes(found.inodes, "type") == tables.T_FILE
    joined = paths.of_names(found.names, found.inodes, found.root)
    named = tables.integers(found.names, "inode")
    at = paths.positions(inode, named)
    file = (at >= 0) & regular[at] & joined.is_valid().to_numpy(zero_copy_only=False)
    asked = np.isin(joined.to_numpy(zero_copy_only=False), list(wanted.paths)) if wanted.paths else np.zeros(len(named), bool)
    chosen = file & asked
    columns = _Extents(found)
    if wanted.all:
        large = np.unique(inode[regular & (size >= LEAST)])
        chosen |= file & np.isin(named, columns.like_disks(reader, large))
    _, first = np.unique(named[chosen], return_index=True)  # hard links are one file
    for row in np.flatnonzero(chosen)[np.sort(first)][:MAX_IMAGES].tolist():
        rows, refused = columns.rows_of(int(named[row]), int(size[at[row]]))
        yield Image(joined[row].as_py(), int(size[at[row]]), rows, refused)


class _Extents:
    """The content of a filesystem's files: its extents by inode."""

    def __init__(self, found: Filesystem) -> None:
        table = found.extents
        kind, inode = tables.codes(table, "kind"), tables.integers(table, "inode")
        at, plain = tables.integers(table, "file_offset"), ~table.column("part").is_valid().to_numpy()
        rows = np.flatnonzero((kind == tables.DATA) & (inode >= 0) & (at >= 0) & plain)
        rows = rows[np.lexsort((at[rows], inode[rows]))]
        self._inode, self._at, self._flags = inode[rows], at[rows], tables.integers(table, "flags")[rows]
        self._start, self._length = tables.integers(table, "volume_offset")[rows], tables.integers(table, "length")[rows]

    def like_disks(self, reader: Reader, inodes: Int) -> Int:
        """Those of the files whose first bytes are those of a disk or disk image: one read for all."""
        coded = self._flags & (tables.INLINE | tables.COMPRESSED | tables.ENCRYPTED)
        rows = np.flatnonzero((self._at < HEAD) & (coded == 0) & np.isin(self._inode, inodes))
        if not len(rows):
            return EMPTY
        files, which = np.unique(self._inode[rows], return_inverse=True)
        length = np.minimum(self._length[rows], HEAD - self._at[rows])
        heads = np.zeros((len(files), HEAD), np.uint8)  # a hole may come first: boot sectors are often zeroes
        scatter(heads.reshape(-1), which * HEAD + self._at[rows], length, reader.read_ranges(self._start[rows], length))
        disk = np.zeros(len(files), bool)
        for offset, content in MAGICS:
            disk |= (heads[:, offset : offset + len(content)] == np.frombuffer(content, np.uint8)).all(axis=1)
        found: Int = files[disk]
        return found

    def rows_of(self, inode: int, size: int) -> tuple[Rows, str]:
        """Mapping rows of one file's bytes in the volume, and why it can't be read through them."""
        low, high = np.searchsorted(self._inode, [inode, inode + 1])
        mine = slice(low, high)
        keep = self._at[mine] < size
        at, start = self._at[mine][keep], self._start[mine][keep]
        run = np.minimum(self._length[mine][keep], size - at)
        flags = int(np.bitwise_or.reduce(self._flags[mine], initial=0))
        none = np.zeros(len(at), np.int64)
        role = np.full(len(at), ROLES.index("data"), np.int64)
        rows = Rows(none, none, role, run, none + 1, Side(at, none), Side(start, none))
        if flags & (tables.COMPRESSED | tables.ENCRYPTED):
            return rows, "is stored compressed or encrypted: copy it out (virt-bmap extract) and map the copy"
        if (at[1:] < at[:-1] + run[:-1]).any():
            return rows, "has overlapping extents"
        return rows, ""
