"""Files that hold the memory of a machine that sleeps: swap files, and hiberfil.sys of Windows where its
filesystem's reader does not look for it.

A swap space is marked at the end of its first page while it holds a hibernated system, and a swap file is
one: any large file without holes, whatever its name and mode, since no system asks for more. So the ends of
the first pages of large files are read, in batches.

Sources: kernel kernel/power/swap.c (mark_swapfiles), mm/swapfile.c (setup_swap_extents); for Windows see
`filesystems.ntfs.state`.
"""

from collections.abc import Iterator

import numpy as np

from virt_bmap.core.arrays import Bool, Bytes, Int
from virt_bmap.core.errors import FormatError
from virt_bmap.formats.filesystems import swap
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem

LEAST = 1 << 20
"""Bytes: no image of a system's memory is smaller."""
MOST = 1 << 12
"""Files that are looked at: first those of whole pages, as swap files are made and as one file in 4,096 is by
chance, then the largest."""
BATCH = 1 << 20
"""Bytes of marks that are looked at together."""
WINDOWS, WINDOWS_MARKS = b"hiberfil.sys", (b"hibr", b"HIBR")
PLACES = (0, *(page - swap.SIGNATURE for page in swap.PAGE_SIZES))
"""Where marks lie in a file: Windows' at its start, others at the ends of first pages of all sizes."""
CODED = tables.INLINE | tables.COMPRESSED | tables.ENCRYPTED | tables.SHARED
"""What the content of a swap file never is."""


def asleep_in(found: Filesystem) -> str | None:
    """The file of this filesystem that holds a sleeping machine's memory, as a path for a person; None where
    there is none."""
    size = tables.integers(found.inodes, "size")
    rows = np.flatnonzero((tables.codes(found.inodes, "type") == tables.T_FILE) & (size >= LEAST))
    if not len(rows):
        return None
    rows = rows[np.lexsort((-size[rows], size[rows] % swap.PAGE_SIZES[0] != 0))][:MOST]
    files, first = np.unique(tables.integers(found.inodes, "inode")[rows], return_index=True)
    for number, windows in _marked(found, files):
        if (
            _names(found, number) == [WINDOWS]
            if windows
            else _is_whole(found, number, int(size[rows[first[files == number]]][0]))
        ):
            return _path(found, number)
    return None


def _marked(found: Filesystem, files: Int) -> Iterator[tuple[int, bool]]:
    """The files that have a mark where one can be, and whether it is one of Windows'."""
    owner, place, offset = _marks(found, files)
    try:
        for some, data in found.reader.batches(offset, swap.SIGNATURE, BATCH):
            for marks, windows in ((swap.HIBERNATED, False), (WINDOWS_MARKS, True)):
                hit = _begin(data, marks) & ((place[some] == 0) == windows)
                yield from ((number, windows) for number in owner[some][hit].tolist())
    except FormatError:  # what can't be read is not a sign of sleep
        return


def _begin(data: Bytes, marks: tuple[bytes, ...]) -> Bool:
    """For each row: does it begin with one of the marks?"""
    found = np.zeros(len(data), bool)
    for mark in marks:
        found |= (data[:, : len(mark)] == np.frombuffer(mark, np.uint8)).all(axis=1)
    return found


def _marks(found: Filesystem, files: Int) -> tuple[Int, Int, Int]:
    """(file, place in it, byte of the volume) of all bytes
    where a mark of one of these files, sorted, can begin."""
    kind, part = tables.codes(found.extents, "kind"), found.extents.column("part").is_valid().to_numpy()
    start, flags = tables.integers(found.extents, "file_offset"), tables.integers(found.extents, "flags")
    rows = np.flatnonzero(
        (kind == tables.DATA) & (start >= 0) & (start < swap.PAGE_SIZES[-1]) & (flags & CODED == 0) & ~part
    )
    inode = tables.integers(found.extents, "inode")[rows]
    rows = rows[files[np.minimum(np.searchsorted(files, inode), len(files) - 1)] == inode]
    start, length = start[rows], tables.integers(found.extents, "length")[rows]
    inode = tables.integers(found.extents, "inode")[rows]
    offset = tables.integers(found.extents, "volume_offset")[rows]
    row, which = np.nonzero(
        (start[:, None] <= np.array(PLACES))
        & ((start + length)[:, None] >= np.array(PLACES) + swap.SIGNATURE)
    )
    place = np.array(PLACES)[which]
    offset = offset[row] + place - start[row]
    inside = (offset >= 0) & (offset <= found.reader.size - swap.SIGNATURE)
    return inode[row][inside], place[inside], offset[inside]


def _is_whole(found: Filesystem, inode: int, size: int) -> bool:
    """Has the file no holes? Nobody swaps into one that has."""
    mine = (tables.integers(found.extents, "inode") == inode) & (
        tables.integers(found.extents, "file_offset") >= 0
    )
    mine &= np.isin(tables.codes(found.extents, "kind"), (tables.DATA, tables.UNWRITTEN))
    return int(tables.integers(found.extents, "length")[mine].sum()) >= size


def _names(found: Filesystem, inode: int) -> list[bytes]:
    """The names, in lower case, that a file has in the root directory."""
    mine = (tables.integers(found.names, "inode") == inode) & (
        tables.integers(found.names, "parent") == found.root
    )
    return [found.names.column("name")[row].as_py().lower() for row in np.flatnonzero(mine).tolist()]


def _path(found: Filesystem, inode: int) -> str:
    from virt_bmap.model.paths import of_names  # takes long to import, and few machines sleep

    named = np.flatnonzero(tables.integers(found.names, "inode") == inode)
    path = (
        of_names(found.names, found.inodes, found.root)[int(named[0])].as_py()
        if len(named) and found.root >= 0
        else None
    )
    return path.decode(errors="backslashreplace") if path else f"inode {inode}"
