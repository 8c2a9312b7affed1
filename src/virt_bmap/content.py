"""The content of files, read where a block map says it lies: many files in few batches, holes and unwritten parts left to the caller as zeroes.

Bytes come from the reader of the filesystem's own volume, so arrays, encryption and thin volumes are already undone. What is stored compressed or
encrypted by the filesystem itself is refused, a file at a time.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap import tables
from virt_bmap.arrays import Bytes, Int, expand, ints
from virt_bmap.blockmap import BlockMap
from virt_bmap.errors import Corrupt, Unsupported, UsageError
from virt_bmap.reader import Reader

BATCH = 8 << 20
"""Bytes of files read at once: enough for any disk's streaming speed, and no strain on memory."""
MAX_LINKS = 40
"""Symbolic links followed on the way to one file, as in Linux (MAXSYMLINKS)."""
MAX_TARGET = 64 << 10
"""Bytes of a link's target: 4095 on Linux, 32 KiB in UTF-16 on Windows."""
INTERIX_LINK = b"IntxLNK\x01"
REPARSE_LX_SYMLINK = 0xA000001D


class Piece(NamedTuple):
    """`data` is content of file number `file` (of those asked for) from `offset` on. The data is good until the next piece is asked for."""

    file: int
    offset: int
    data: Bytes


class Files:
    """The files of one filesystem: names, links, sizes, content. Derived columns are made once, lookups are batches."""

    def __init__(self, bmap: BlockMap, volume: int, reader: Reader) -> None:
        _, system = bmap.slice_of("filesystems", volume)
        self.device: str = bmap.volumes.column("name")[volume].as_py()
        if system.num_rows == 0 or (root := system.column("root")[0].as_py()) is None:
            raise UsageError(f"{self.device} holds no filesystem whose files can be read")
        self.root: int = root
        self.type: str = system.column("type")[0].as_py()
        self.state: str = system.column("state")[0].as_py()
        self.reader = reader
        self._inode_columns(bmap.slice_of("inodes", volume)[1])
        self._name_columns(bmap.slice_of("names", volume)[1])
        self._extent_columns(bmap.slice_of("extents", volume)[1])

    def _inode_columns(self, table: pa.Table) -> None:
        inode = tables.integers(table, "inode")
        self._rows = np.argsort(inode, kind="stable")
        self._inode = inode[self._rows]
        self.kind = tables.codes(table, "type")
        self.size, self.nlink = tables.integers(table, "size"), tables.integers(table, "nlink")
        self.flags = tables.integers(table, "flags")
        self.mode, self.uid, self.gid = (tables.integers(table, name) for name in ("mode", "uid", "gid"))
        self.mtime = table.column("mtime_ns").combine_chunks()

    def _name_columns(self, table: pa.Table) -> None:
        parent = tables.integers(table, "parent")
        order = np.argsort(parent, kind="stable")
        self._parent, self._child = parent[order], tables.integers(table, "inode")[order]
        self._name = table.column("name").combine_chunks().take(pa.array(order))

    def _extent_columns(self, table: pa.Table) -> None:
        """Rows of content by inode, part and offset; and which inodes' content is not as it lies there."""
        inode, file_offset = tables.integers(table, "inode"), tables.integers(table, "file_offset")
        kind, flags = tables.codes(table, "kind"), tables.integers(table, "flags")
        part = table.column("part").combine_chunks()
        words = part.dictionary.to_pylist() if len(part) else []
        code = part.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        self.streams = {word.removeprefix("stream:"): at for at, word in enumerate(words) if word.startswith("stream:")}
        content = (inode >= 0) & (file_offset >= 0) & np.isin(kind, (tables.DATA, tables.SYMLINK))
        rows = np.flatnonzero(content)
        rows = rows[np.lexsort((file_offset[rows], code[rows], inode[rows]))]
        self._owner, self._part, self._at = inode[rows], code[rows], file_offset[rows]
        self._start, self._length = tables.integers(table, "volume_offset")[rows], tables.integers(table, "length")[rows]
        self._inline = (flags[rows] & tables.INLINE) != 0
        self._coded = (flags[rows] & (tables.COMPRESSED | tables.ENCRYPTED)) != 0
        links = np.flatnonzero((kind == tables.SYMLINK) & (file_offset < 0))
        self._links = links[np.argsort(inode[links], kind="stable")]
        self._link_owner = inode[self._links]
        self._link_at, self._link_length = (tables.integers(table, name)[self._links] for name in ("volume_offset", "length"))
        wof = np.flatnonzero(code == self.streams.get("WofCompressedData", -2))
        self._elsewhere = np.unique(inode[wof])
        reparse = [at for at, word in enumerate(words) if "REPARSE_POINT" in word]
        self._reparse = np.unique(inode[np.isin(code, reparse)])

    # ---- names ------------------------------------------------------------------------------------------------------

    def rows_of(self, inodes: Int) -> Int:
        """For each inode its row in the columns `kind`, `size`, `mode`, ...; -1 where there is none."""
        inodes = ints(inodes)
        at = np.minimum(np.searchsorted(self._inode, inodes), max(0, len(self._inode) - 1))
        return np.where(self._inode[at] == inodes, self._rows[at], -1) if len(self._inode) else np.full(len(inodes), -1, np.int64)

    def children(self, directory: int) -> list[tuple[bytes, int]]:
        """(name, inode) of a directory's names, as the disk has them: nothing is promised of their bytes."""
        low, high = np.searchsorted(self._parent, [directory, directory + 1]).tolist()
        return list(zip(self._name.slice(low, high - low).to_pylist(), self._child[low:high].tolist(), strict=True))

    def find(self, path: bytes, follow: bool = True) -> int:
        """The inode that a path from the root leads to, links on the way followed inside the filesystem; the last name only with `follow`.

        '/' and NUL in a name on the disk are written as in all paths of a map. Raises UsageError where there is no such file.
        """
        trail, todo, links = [self.root], _names(path), 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                trail = trail[:-1] or trail
                continue
            found = [inode for known, inode in self.children(trail[-1]) if known == name or _shown(known) == name]
            if not found:
                raise UsageError(f"no file {_text(path)} on {self.device}")
            if self.is_kind(found[0], tables.T_SYMLINK) and (todo or follow):
                links += 1
                if links > MAX_LINKS:
                    raise UsageError(f"{_text(path)} on {self.device}: more than {MAX_LINKS} symbolic links on the way")
                target = self.target(found[0])
                if target is None:
                    raise Unsupported(
                        f"{_text(path)} on {self.device}: {_text(name)} is a symbolic link whose target is not read"
                    )
                trail = [self.root] if target.startswith(b"/") else trail
                todo = _names(target) + todo
            else:
                trail.append(found[0])
        return trail[-1]

    def is_kind(self, inode: int, kind: int) -> bool:
        """Is this inode of this type (a code of tables.TYPES)?"""
        row = int(self.rows_of(ints(inode))[0])
        return row >= 0 and int(self.kind[row]) == kind

    def target(self, inode: int) -> bytes | None:
        """What a symbolic link leads to; None where it is damaged, or the format keeps it in a way that is not read here."""
        row = int(self.rows_of(ints(inode))[0])
        if self.type == "ntfs":
            return self._ntfs_target(inode, row)
        if row < 0 or not 0 < self.size[row] <= MAX_TARGET or self.refusal(inode):
            return None
        result = bytearray(int(self.size[row]))
        known = 0
        for piece in self.pieces([inode]):
            result[piece.offset : piece.offset + len(piece.data)] = piece.data.tobytes()
            known += len(piece.data)
        return bytes(result) if known == len(result) else None

    def _ntfs_target(self, inode: int, row: int) -> bytes | None:
        """Links of Interix and ntfs-3g (UTF-16 behind a magic) and of WSL (UTF-8 in a reparse point); those of Windows name devices, not files."""
        low, high = np.searchsorted(self._link_owner, [inode, inode + 1]).tolist()
        at, length = self._link_at[low:high], self._link_length[low:high]
        if low == high:
            first, last = self._content(inode, -1)
            at, length = self._start[first:last], self._length[first:last]
        if row < 0 or not 0 < length.sum() <= MAX_TARGET or (at + length > self.reader.size).any():
            return None
        data = self.reader.read_ranges(at, length).tobytes()
        if data.startswith(INTERIX_LINK):
            data = data[: int(self.size[row])] if self.size[row] > len(INTERIX_LINK) else data
            words = data[len(INTERIX_LINK) : len(data) // 2 * 2]
            return words.decode("utf-16-le", "surrogatepass").encode(errors="surrogatepass") or None
        if int.from_bytes(data[:4], "little") == REPARSE_LX_SYMLINK:
            return data[12 : 8 + int.from_bytes(data[4:6], "little")] or None
        return None

    # ---- content ----------------------------------------------------------------------------------------------------

    def refusal(self, inode: int, stream: str | None = None) -> str | None:
        """Why the content of a file can't be given, in a few words; None where it can."""
        row = int(self.rows_of(ints(inode))[0])
        if row < 0:
            return "its inode is damaged or missing"
        if self.flags[row] & tables.I_ENCRYPTED:
            return "encrypted by the filesystem"
        low, high = self._content(inode, self._code(stream))
        if stream is not None and not (high > low and self._inline[low:high].all()):
            return "it has no such stream, an empty one, or one of whole clusters, whose exact length a map does not keep"
        if self._coded[low:high].any() or (stream is None and np.isin(inode, self._elsewhere)):
            return "stored compressed or encrypted"
        if stream is None and low == high and self.size[row] and np.isin(inode, self._reparse):
            return "kept elsewhere by what its reparse point names"
        if (self._start[low:high] + self._length[low:high] > self.reader.size).any():
            return "its blocks lie outside the volume"
        return None

    def length(self, inode: int, stream: str | None = None) -> int:
        """The size of a file, or of a stream, in bytes."""
        if stream is None:
            return int(self.size[self.rows_of(ints(inode))[0]])
        low, high = self._content(inode, self._code(stream))
        return int((self._at[low:high] + self._length[low:high]).max(initial=0))

    def pieces(self, inodes: Sequence[int], stream: str | None = None) -> Iterator[Piece]:
        """The stored content of these files, file by file and by offset, none of it behind a file's end; what no piece covers is zero.

        Reads are batches of BATCH bytes, however many files that is. `refusal` must have had nothing to say of any of them.
        """
        size = np.array([self.length(inode, stream) for inode in inodes], np.int64)
        bounds = np.array([self._content(inode, self._code(stream)) for inode in inodes], np.int64).reshape(-1, 2)
        file, step = expand(bounds[:, 1] - bounds[:, 0])
        row = bounds[file, 0] + step
        length = np.clip(size[file] - self._at[row], 0, self._length[row])
        part, nth = expand(-(-length // BATCH))
        file, row, skip = file[part], row[part], nth * BATCH
        at, start, length = self._at[row] + skip, self._start[row] + skip, np.minimum(length[part] - skip, BATCH)
        group = (np.cumsum(length) - 1) // BATCH
        edges = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group)).tolist()
        for low, high in pairwise(edges):
            data = self.reader.read_ranges(start[low:high], length[low:high])
            ends = np.cumsum(length[low:high]).tolist()
            for number, offset, n, end in zip(
                file[low:high].tolist(), at[low:high].tolist(), length[low:high].tolist(), ends, strict=True
            ):
                yield Piece(number, offset, data[end - n : end])

    def _code(self, stream: str | None) -> int:
        if stream is not None and stream not in self.streams:
            raise UsageError(f"no file on {self.device} has a stream {_text(stream.encode(errors='surrogateescape'))}")
        return -1 if stream is None else self.streams[stream]

    def _content(self, inode: int, part: int) -> tuple[int, int]:
        """The rows [low, high) of content of an inode in one part."""
        low, high = np.searchsorted(self._owner, [inode, inode + 1])
        first, last = low + np.searchsorted(self._part[low:high], [part, part + 1])
        return int(first), int(last)


def spread(pieces: Iterator[Piece], size: int) -> Iterator[Bytes]:
    """The whole content of one file from its pieces, zeroes between them, at most BATCH bytes at a time. Raises Corrupt where pieces overlap."""
    zeroes = np.zeros(min(BATCH, size), np.uint8)
    done = 0

    def gap(end: int) -> Iterator[Bytes]:
        for at in range(done, end, BATCH):
            yield zeroes[: min(BATCH, end - at)]

    for piece in pieces:
        if piece.offset < done:
            raise Corrupt(f"two extents of the file hold its byte {piece.offset:#x}")
        yield from gap(piece.offset)
        yield piece.data
        done = piece.offset + len(piece.data)
    yield from gap(size)


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _shown(name: bytes) -> bytes:
    return name.replace(b"/", b"\\x2f").replace(b"\0", b"\\x00")


def _text(name: bytes) -> str:
    from virt_bmap.outputs.escape import escape

    return escape(name)
