"""The content of files, read where a block map says it lies: many files in few batches, holes and unwritten
parts left to the caller as zeroes.

Bytes come from the reader of the filesystem's own volume, so arrays, encryption and thin volumes are already
undone, journals replayed, and copies checked. What can't be had is told with each piece (`Piece.lost`). What
is stored encrypted by the filesystem itself, or compressed in a way that is not read, is refused, a file at a
time.

A deleted file that a map still names (NTFS) has the clusters
that its record names, as far as they are nobody's now.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.ask import history
from virt_bmap.core.arrays import Bytes, Int, Intervals, complement_by, expand, ints, scatter, union
from virt_bmap.core.columns import take
from virt_bmap.core.errors import Corrupt, ImageError, Unsupported, UsageError
from virt_bmap.core.lost import BEHIND, NOTHING, NOWHERE, REUSED, Lost, Missing
from virt_bmap.core.reader import Packed, Reader
from virt_bmap.core.salvage import read_known
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.paths import positions

BATCH = 8 << 20
"""Bytes of files read at once: enough for any disk's streaming speed, and no strain on memory."""
MAX_LINKS = 40
"""Symbolic links followed on the way to one file, as in Linux (MAXSYMLINKS)."""
MAX_TARGET = 64 << 10
"""Bytes of a link's target: 4095 on Linux, 32 KiB in UTF-16 on Windows."""


class Piece(NamedTuple):
    """`data` is content of file number `file` (of those asked for) from `offset` on; where it is `lost` (in
    bytes of the file) zeroes, or nothing if it lies nowhere. It is good until the next piece is asked for."""

    file: int
    offset: int
    data: Bytes
    lost: Lost = NOTHING


class Files:
    """The files of one filesystem: names, links, sizes, content.

    Derived columns are made once, lookups are batches.
    """

    def __init__(self, bmap: BlockMap, volume: int, reader: Reader) -> None:
        _, system = bmap.slice_of("filesystems", volume)
        self.device: str = bmap.volumes.column("name")[volume].as_py()
        if system.num_rows == 0 or (root := system.column("root")[0].as_py()) is None:
            raise UsageError(f"{self.device} holds no filesystem whose files can be read")
        self.root: int = root
        self.type: str = system.column("type")[0].as_py()
        self.state: str = system.column("state")[0].as_py()
        self.reader = reader
        self._map, self._volume, self._recalled = bmap, volume, False
        self._targets: tuple[Int, pa.Array] | None = None
        self._inode_columns(bmap.slice_of("inodes", volume)[1])
        self._name_columns(bmap.slice_of("names", volume)[1])
        self._extent_columns(bmap.slice_of("extents", volume)[1])
        if system.column("size")[0].as_py() > reader.size:
            self._doubt_holes(bmap.slice_of("extents", volume)[1])

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
        code, words = tables.parts(table)
        self.streams = {
            word.removeprefix("stream:"): at for at, word in enumerate(words) if word.startswith("stream:")
        }
        content = (inode >= 0) & (file_offset >= 0) & np.isin(kind, (tables.DATA, tables.SYMLINK))
        rows = np.flatnonzero(content)
        rows = rows[np.lexsort((file_offset[rows], code[rows], inode[rows]))]
        self._owner, self._part, self._at = inode[rows], code[rows], file_offset[rows]
        self._start, self._length = (
            tables.integers(table, "volume_offset")[rows],
            tables.integers(table, "length")[rows],
        )
        self._inline = (flags[rows] & tables.INLINE) != 0
        self._coded = (flags[rows] & (tables.COMPRESSED | tables.ENCRYPTED)) != 0
        self._why = np.full(len(rows), -1, np.int64)
        """Of rows that lie nowhere the reason, a number of lost.REASONS."""
        self._unpacked = np.zeros(len(rows), bool)
        """Which rows lie in what the filesystem's compressed content unpacks to, and not in the volume."""
        links = np.flatnonzero((kind == tables.SYMLINK) & (file_offset < 0))
        self._links = links[np.argsort(inode[links], kind="stable")]
        self._link_owner = inode[self._links]
        self._link_at, self._link_length = (
            tables.integers(table, name)[self._links] for name in ("volume_offset", "length")
        )
        self._link_coded = flags[self._links] & (tables.COMPRESSED | tables.ENCRYPTED) != 0
        wof = np.flatnonzero(code == self.streams.get("WofCompressedData", -2))
        self._elsewhere = np.unique(inode[wof])
        if self.reader.packed:
            self._unpack(self.reader.packed, tables.integers(table, "file_length")[rows])
        reparse = [at for at, word in enumerate(words) if "REPARSE_POINT" in word]
        self._reparse = np.unique(inode[np.isin(code, reparse)])

    def _unpack(self, packed: Packed, held: Int) -> None:
        """Of files of which all is known that is compressed, rows that lie in what it unpacks to take the
        place of those that lie in the volume. `held`: bytes that each row holds."""
        mine = self._coded & (self._part == -1)
        files = np.unique(self._owner[mine])
        of, known_of = positions(files, self._owner[mine]), positions(files, packed.inode)
        stored, known = np.zeros(len(files), np.int64), np.zeros(len(files), np.int64)
        np.add.at(stored, of, held[mine])
        np.add.at(known, known_of[known_of >= 0], packed.length[known_of >= 0])
        whole = files[stored == known]
        new = np.isin(packed.inode, whole)
        self._keep(~(mine & np.isin(self._owner, whole)))
        owner, at, length, start = (column[new] for column in packed[1:])
        self._add(owner, at, start, length, np.zeros(len(owner), np.int64), -1, unpacked=True)

    # ---- names ---------------------------------------------------------------------------------------------

    def rows_of(self, inodes: Int) -> Int:
        """For each inode its row in the columns `kind`, `size`, `mode`, ...; -1 where there is none."""
        inodes = ints(inodes)
        at = np.minimum(np.searchsorted(self._inode, inodes), max(0, len(self._inode) - 1))
        return (
            np.where(self._inode[at] == inodes, self._rows[at], -1)
            if len(self._inode)
            else np.full(len(inodes), -1, np.int64)
        )

    def children(self, directory: int) -> list[tuple[bytes, int]]:
        """(name, inode) of a directory's names, as the disk has them: nothing is promised of their bytes.

        Of deleted files only in a deleted directory.
        """
        found = self._listed(directory)
        return (
            found
            if self.is_deleted([directory])[0]
            else [
                pair
                for pair, gone in zip(found, self.is_deleted([inode for _, inode in found]), strict=True)
                if not gone
            ]
        )

    def _listed(self, directory: int) -> list[tuple[bytes, int]]:
        low, high = np.searchsorted(self._parent, [directory, directory + 1]).tolist()
        return list(
            zip(self._name.slice(low, high - low).to_pylist(), self._child[low:high].tolist(), strict=True)
        )

    def is_deleted(self, inodes: Sequence[int]) -> list[bool]:
        """Which of the inodes are of deleted files."""
        rows = self.rows_of(ints(inodes))
        gone: list[bool] = ((rows >= 0) & (np.append(self.flags, 0)[rows] & tables.I_DELETED != 0)).tolist()
        return gone

    def find(self, path: bytes, follow: bool = True) -> int:
        """The inode that a path from the root leads to, links on the way followed inside the filesystem; the
        last name only with `follow`.

        '/' and NUL in a name on the disk are written as in all paths of a map. A deleted file is found where
        no other has its name. Raises UsageError where there is no such file.
        """
        trail, todo, links = [self.root], _names(path), 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                trail = trail[:-1] or trail
                continue
            found = [
                inode for known, inode in self._listed(trail[-1]) if known == name or _shown(known) == name
            ]
            found = [
                inode
                for _, inode in sorted(
                    zip(self.is_deleted(found), found, strict=True), key=lambda pair: pair[0]
                )
            ]
            if not found:
                raise UsageError(f"no file {_text(path)} on {self.device}")
            if self.is_kind(found[0], tables.T_SYMLINK) and (todo or follow):
                links += 1
                if links > MAX_LINKS:
                    raise UsageError(
                        f"{_text(path)} on {self.device}: more than {MAX_LINKS} symbolic links on the way"
                    )
                target = self.target(found[0])
                if target is None:
                    raise Unsupported(
                        f"{_text(path)} on {self.device}: {_text(name)} "
                        "is a symbolic link whose target is not read"
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
        """What a symbolic link leads to; None where it is damaged, or the format keeps it in a way that is
        not read here."""
        row = int(self.rows_of(ints(inode))[0])
        if row < 0:
            return None
        format, size = formats.filesystem(self.type), int(self.size[row])
        if format and format.targets:
            self._targets = self._targets or format.targets(self.reader)
            at = int(np.searchsorted(self._targets[0], inode))
            there = at < len(self._targets[0]) and self._targets[0][at] == inode
            return self._targets[1][at].as_py() if there else None
        data = self._target_bytes(inode)
        if data is None or not 0 < len(data) <= MAX_TARGET:
            return None
        if format and format.target:
            return format.target(data, size)
        return data if len(data) == size else None

    def _target_bytes(self, inode: int) -> bytes | None:
        """All bytes in which the target of a link lies; None where any can't be had."""
        low, high = self._content(inode, -1)
        at, length, coded = self._start[low:high], self._length[low:high], self._coded[low:high]
        length = np.clip(self.size[self.rows_of(ints(inode))] - self._at[low:high], 0, length)
        if (self._at[low:high] != np.cumsum(length) - length).any():
            return None
        if low == high:
            low, high = np.searchsorted(self._link_owner, [inode, inode + 1]).tolist()
            at = self._link_at[low:high]
            length = self._link_length[low:high]
            coded = self._link_coded[low:high]
        if coded.any() or not 0 < length.sum() <= MAX_TARGET:
            return None
        data, lost = read_known(self.reader, at, length)
        return None if len(lost.starts) else data.tobytes()

    # ---- deleted files -------------------------------------------------------------------------------------

    def _recall(self, inodes: Sequence[int]) -> None:
        """If any of these is deleted: add where such files lay.

        What is not free any more, and what is not told, has a reason instead of a place.
        """
        if self._recalled or not any(self.is_deleted(inodes)):
            return
        self._recalled = True
        table = history.contents(self._map, self._volume, self.reader)
        if table is None:
            return
        gone = self._inode[
            (self.flags[self._rows] & tables.I_DELETED != 0) & (self.kind[self._rows] == tables.T_FILE)
        ]
        gone = np.setdiff1d(gone, self._owner)
        kind, plain = tables.codes(table, "kind"), ~table.column("part").is_valid().to_numpy()
        owner, at, start, length, held, flags = (
            tables.integers(table, name)
            for name in ("inode", "file_offset", "volume_offset", "length", "file_length", "flags")
        )
        rows = np.flatnonzero(
            plain & (at >= 0) & np.isin(owner, gone) & np.isin(kind, (tables.DATA, tables.UNWRITTEN))
        )
        file, low, high = complement_by(
            self.size[self.rows_of(gone)], np.searchsorted(gone, owner[rows]), at[rows], (at + held)[rows]
        )
        self._add(
            gone[file],
            low,
            np.full(len(file), -1, np.int64),
            high - low,
            np.zeros(len(file), np.int64),
            NOWHERE,
        )
        rows = rows[kind[rows] == tables.DATA]
        own = rows[flags[rows] & (tables.INLINE | tables.COMPRESSED | tables.ENCRYPTED) != 0]
        self._add(owner[own], at[own], start[own], length[own], flags[own], -1)
        rows = np.setdiff1d(rows, own)
        free = self._free()
        nth, which = free.overlaps(start[rows], start[rows] + length[rows])
        row = rows[nth]
        low = np.maximum(start[row], free.starts[which])
        high = np.minimum((start + length)[row], free.ends[which])
        self._add(owner[row], at[row] + low - start[row], low, high - low, flags[row], -1)
        nth, low, high = complement_by(length[rows], nth, low - start[row], high - start[row])
        row = rows[nth]
        self._add(owner[row], at[row] + low, np.full(len(row), -1, np.int64), high - low, flags[row], REUSED)

    def _doubt_holes(self, table: pa.Table) -> None:
        """On a volume that was cut off, what has no place is not a hole: a map has no rows beyond the end."""
        inodes = np.unique(
            self._inode[
                (self.kind[self._rows] == tables.T_FILE) & (self.flags[self._rows] & tables.I_DELETED == 0)
            ]
        )
        kind, plain = tables.codes(table, "kind"), ~table.column("part").is_valid().to_numpy()
        owner, at, held = (tables.integers(table, name) for name in ("inode", "file_offset", "file_length"))
        rows = np.flatnonzero(
            plain & (at >= 0) & np.isin(kind, (tables.DATA, tables.UNWRITTEN)) & np.isin(owner, inodes)
        )
        sizes = self.size[self.rows_of(inodes)]
        file, low, high = complement_by(
            sizes, np.searchsorted(inodes, owner[rows]), at[rows], (at + held)[rows]
        )
        self._add(
            inodes[file],
            low,
            np.full(len(file), -1, np.int64),
            high - low,
            np.zeros(len(file), np.int64),
            BEHIND,
        )

    def _free(self) -> Intervals:
        _, table = self._map.slice_of("extents", self._volume)
        free = tables.codes(table, "kind") == tables.FREE
        start, length = (tables.integers(table, name)[free] for name in ("volume_offset", "length"))
        return Intervals(*union(start, start + length))

    def _keep(self, keep: np.ndarray) -> None:
        """Only these rows of content."""
        self._owner, self._part, self._at = self._owner[keep], self._part[keep], self._at[keep]
        self._start, self._length = self._start[keep], self._length[keep]
        self._inline, self._coded, self._why = self._inline[keep], self._coded[keep], self._why[keep]
        self._unpacked = self._unpacked[keep]

    def _add(
        self, owner: Int, at: Int, start: Int, length: Int, flags: Int, why: int, unpacked: bool = False
    ) -> None:
        """More rows of plain content; `why` as in `_why`, `unpacked` as in `_unpacked`."""
        owner, at = np.append(self._owner, owner), np.append(self._at, at)
        part = np.append(self._part, np.full(len(owner) - len(self._part), -1, np.int64))
        order = np.lexsort((at, part, owner))
        self._owner, self._part, self._at = owner[order], part[order], at[order]
        self._start, self._length = (
            np.append(self._start, start)[order],
            np.append(self._length, length)[order],
        )
        self._inline = np.append(self._inline, flags & tables.INLINE != 0)[order]
        self._coded = np.append(self._coded, flags & (tables.COMPRESSED | tables.ENCRYPTED) != 0)[order]
        self._why = np.append(self._why, np.full(len(start), why, np.int64))[order]
        self._unpacked = np.append(self._unpacked, np.full(len(start), unpacked))[order]

    # ---- content -------------------------------------------------------------------------------------------

    def refusal(self, inode: int, stream: str | None = None) -> str | None:
        """Why the content of a file can't be given, in a few words; None where it can."""
        row = int(self.rows_of(ints(inode))[0])
        if row < 0:
            return "its inode is damaged or missing"
        if self.flags[row] & tables.I_ENCRYPTED:
            return "encrypted by the filesystem"
        self._recall([inode])
        low, high = self._content(inode, self._code(stream))
        if stream is not None and not (high > low and self._inline[low:high].all()):
            return (
                "it has no such stream, or an empty one, or one of "
                "whole clusters, whose exact length is not in a map"
            )
        if self._coded[low:high].any() or (stream is None and np.isin(inode, self._elsewhere)):
            return "stored compressed or encrypted"
        if stream is None and low == high and self.size[row] and np.isin(inode, self._reparse):
            return "kept elsewhere, where its reparse point says"
        return None

    def length(self, inode: int, stream: str | None = None) -> int:
        """The size of a file, or of a stream, in bytes."""
        if stream is None:
            return int(self.size[self.rows_of(ints(inode))[0]])
        low, high = self._content(inode, self._code(stream))
        return int((self._at[low:high] + self._length[low:high]).max(initial=0))

    def pieces(self, inodes: Sequence[int], stream: str | None = None) -> Iterator[Piece]:
        """The stored content of these files, file by file and by offset, none of it beyond a file's end; what
        no piece covers is zero.

        Reads are batches of BATCH bytes, however many files that is. `refusal` must have had nothing to say
        of any of them.
        """
        self._recall(inodes)
        size = np.array([self.length(inode, stream) for inode in inodes], np.int64)
        bounds = np.array([self._content(inode, self._code(stream)) for inode in inodes], np.int64).reshape(
            -1, 2
        )
        file, step = expand(bounds[:, 1] - bounds[:, 0])
        row = bounds[file, 0] + step
        length = np.clip(size[file] - self._at[row], 0, self._length[row])
        # what lies nowhere may be as long as a size can be, and is only told
        count = np.where(self._why[row] >= 0, length > 0, -(-length // BATCH))
        part, nth = expand(count)
        file, row, skip = file[part], row[part], nth * BATCH
        at = self._at[row] + skip
        start = self._start[row] + skip
        why = self._why[row]
        length = np.where(why >= 0, length[part], np.minimum(length[part] - skip, BATCH))
        stored = np.where(why >= 0, 0, length)
        group = (np.cumsum(stored) - 1) // BATCH
        edges = np.append(np.flatnonzero(np.diff(group, prepend=-2)), len(group)).tolist()
        for low, high in pairwise(edges):
            data, lost = self._read(row[low:high], start[low:high], stored[low:high], length[low:high])
            piece, gone = lost
            bounds = np.searchsorted(piece, np.arange(high - low + 1)).tolist()
            ends = np.cumsum(stored[low:high]).tolist()
            columns = (
                file[low:high].tolist(),
                at[low:high].tolist(),
                stored[low:high].tolist(),
                ends,
                pairwise(bounds),
            )
            for number, offset, n, end, (first, last) in zip(*columns, strict=True):
                told = NOTHING
                if last > first:
                    told = take(gone, slice(first, last))
                    told = told._replace(starts=told.starts + offset, ends=told.ends + offset)
                yield Piece(number, offset, data[end - n : end], told)

    def _read(self, row: Int, start: Int, length: Int, held: Int) -> tuple[Bytes, tuple[Int, Lost]]:
        """The bytes of pieces of rows, one after the other; and (which piece, what of it is lost, in bytes of
        the piece), by piece. Pieces that lie nowhere have no bytes, but would hold as many as `held` says."""
        why, unpacked = self._why[row], self._unpacked[row]
        nowhere = np.flatnonzero(why >= 0)
        parts = [(self.reader, (why < 0) & ~unpacked)]
        if self.reader.packed:
            parts.append((self.reader.packed.reader, unpacked))
        place = np.cumsum(length) - length
        whole = np.zeros(0 if any(mine.all() for _, mine in parts) else int(length.sum()), np.uint8)
        pieces = [nowhere]
        told = [Lost(np.zeros(len(nowhere), np.int64), held[nowhere], why[nowhere])]
        for reader, mine in parts:
            data, lost = read_known(reader, start[mine], length[mine])
            piece, gone = lost.within(start[mine], (start + length)[mine])
            piece = np.flatnonzero(mine)[piece]
            pieces.append(piece)
            told.append(gone._replace(starts=gone.starts - start[piece], ends=gone.ends - start[piece]))
            if mine.all():
                whole = data
            else:
                scatter(whole, place[mine], length[mine], data)
        piece, gone = np.concatenate(pieces), Lost.join(told)
        order = np.argsort(piece, kind="stable")
        return whole, (piece[order], take(gone, order))

    def _code(self, stream: str | None) -> int:
        if stream is not None and stream not in self.streams:
            raise UsageError(
                f"no file on {self.device} has a stream {_text(stream.encode(errors='surrogateescape'))}"
            )
        return -1 if stream is None else self.streams[stream]

    def _content(self, inode: int, part: int) -> tuple[int, int]:
        """The rows [low, high) of content of an inode in one part."""
        low, high = np.searchsorted(self._owner, [inode, inode + 1])
        first, last = low + np.searchsorted(self._part[low:high], [part, part + 1])
        return int(first), int(last)


def spread(pieces: Iterator[Piece], size: int, missing: Missing | None = None) -> Iterator[Bytes]:
    """The whole content of one file from its pieces, zeroes between them, at most BATCH bytes at a time.

    Raises Corrupt where pieces overlap, ImageError where bytes are lost, unless they are to be added to
    `missing`; then they are zeroes."""
    zeroes = np.zeros(min(BATCH, size), np.uint8)
    done = 0

    def gap(end: int) -> Iterator[Bytes]:
        for at in range(done, end, BATCH):
            yield zeroes[: min(BATCH, end - at)]

    for piece in pieces:
        if piece.offset < done:
            raise Corrupt(f"two extents of the file hold byte {piece.offset:#x} of it")
        yield from gap(piece.offset)
        if len(piece.lost.starts):
            told = Missing() if missing is None else missing
            told.add(piece.lost)
            if missing is None:
                raise ImageError(f"can't be read whole: {told}; --partial gives zeroes instead")
        yield piece.data
        done = piece.offset + len(piece.data)
    yield from gap(size)


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _shown(name: bytes) -> bytes:
    return name.replace(b"/", b"\\x2f").replace(b"\0", b"\\x00")


def _text(name: bytes) -> str:
    from virt_bmap.core.escape import escape

    return escape(name)
