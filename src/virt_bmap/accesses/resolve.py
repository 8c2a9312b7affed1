"""Accesses to objects: every file, directory and piece of metadata that a request touches, in batches.

An object is what one line of the log names: (volume, kind, inode, part), or a whole volume where the map
knows nothing better. Objects are numbered once for the map, so that all later work on accesses is arithmetic
on numbers; names are looked up when they are shown.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Bytes, Int, Intervals, complement
from virt_bmap.core.columns import stack, take
from virt_bmap.core.escape import escape
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.listing import LETTERS

KNOWN, OLDER, HELD, GUESSED, CONFIRMED, UNCONFIRMED = range(6)
"""What is known of a name.

Known: it is right; older: the map that gave it is of another time, and metadata was written in between.

Two are not the last word, and come again. Held: nobody's bytes were written, and a map to come may know whose
they became. Guessed: as older, while a map is still awaited. What comes again after it was guessed is known
or older, as anything else; or, where the name is still the one that was told, confirmed (known now) or
unconfirmed (older still).
"""
BATCH = 1 << 15
"""Requests that are resolved at a time: bounds the memory
that a batch takes, as one may touch many objects."""
MOST_LABELS = 1 << 17
"""Names that are kept as text: some 50 MiB."""
IDENTITY = ("device", "kind", "path", "part")
"""What makes two mentions of an object one. Inodes don't: a file that is written anew may get another one."""
OPEN, DOUBTFUL, TOLD = (HELD, GUESSED), (OLDER, GUESSED, UNCONFIRMED), (CONFIRMED, UNCONFIRMED)

_KINDS = np.arange(len(tables.KINDS) + 1)  # the last element is for -1, a volume of which nothing is known
_NOBODYS = np.isin(_KINDS, (tables.FREE, tables.UNKNOWN, tables.UNREFERENCED, tables.GAP))
_FIXED = np.isin(_KINDS, (tables.METADATA, tables.BOOT))
_METADATA = np.isin(
    _KINDS, (tables.DIRECTORY, tables.SYMLINK, tables.XATTR, tables.TREE, tables.METADATA, tables.BOOT)
)


@dataclass(frozen=True)
class Touched:
    """Pieces of accesses, by access and then by place: access number `access` touches bytes [start, end) of
    the disk, which belong to `object`.

    `file_offset` is where in the file the piece begins, -1 where that means nothing or is not known. `inline`
    marks objects that lie inside another's block (a symbolic link in its inode): they are touched whenever
    that block is. `state` says how sure the name is.
    """

    access: Int
    object: Int
    start: Int
    end: Int
    file_offset: Int
    inline: Bool
    state: Bytes

    def __len__(self) -> int:
        return len(self.access)

    def take(self, keep: np.ndarray) -> "Touched":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


class Resolver:
    """Finds the objects of a map's disks.

    `number` counts the maps of a watch, from 0; this one was read from `begun_ns` to `ended_ns`.
    """

    def __init__(self, bmap: BlockMap, number: int = 0, begun_ns: int = 0, ended_ns: int = 0) -> None:
        self.bmap = bmap
        self.number = number
        self.begun_ns = begun_ns
        self.ended_ns = max(begun_ns, ended_ns)
        table = bmap.extents
        self._offset = tables.integers(table, "volume_offset")
        self._file_offset = tables.integers(table, "file_offset")
        self._inline = (tables.integers(table, "flags") & tables.INLINE) != 0
        volume, inode, kind = (
            tables.integers(table, "volume"),
            tables.integers(table, "inode"),
            tables.codes(table, "kind").astype(np.int64),
        )
        code, self._parts = tables.parts(table)
        first, self._object = _number(volume, kind, inode, code)
        self._volume, self._kind, self._inode, self._part = (
            volume[first],
            kind[first],
            inode[first],
            code[first],
        )
        self.named = len(first)
        """Objects from this number on are whole volumes."""
        self._labels: dict[int, tuple[str, str, str]] = {}
        self._in_place = np.zeros(bmap.volumes.num_rows, bool)
        moving = {tables.STAGING}
        for number, type in zip(
            tables.integers(bmap.filesystems, "volume").tolist(),
            bmap.filesystems.column("type").to_pylist(),
            strict=True,
        ):
            if format := formats.filesystem(type):
                self._in_place[number] = format.in_place
                moving |= set(format.moving)
        self._moving = [number for number, part in enumerate(self._parts) if part in moving]
        self._staging = (
            self._parts.index(tables.STAGING) if tables.STAGING in self._parts else len(self._parts)
        )

    def touched(self, disk: int, offset: Int, length: Int) -> Touched:
        """What the requests for [offset[i], +length[i]) of disk number `disk` (from 1) touch."""
        size = self.bmap.size_of(self.bmap.disk(disk))
        offset = np.minimum(offset, size)
        length = np.minimum(length, size - offset)
        found = self.bmap.owners(disk, offset, offset + length)
        extents = found.take(found.extent >= 0)
        row = extents.extent
        file_offset = self._file_offset[row]
        file_offset = np.where(file_offset >= 0, file_offset + extents.inside - self._offset[row], -1)
        known = np.full(len(row), KNOWN, np.uint8)
        pieces = Touched(
            extents.query,
            self._object[row],
            extents.start,
            extents.end,
            file_offset,
            self._inline[row],
            known,
        )
        # places all requests one after the other, so that they can't overlap; inline rows cover nothing
        base = np.cumsum(length) - length - offset
        place = base[pieces.access]
        own = ~pieces.inline
        left = complement((pieces.start + place)[own], (pieces.end + place)[own], 0, int(length.sum()))
        if len(left[0]):
            volumes = found.take(found.extent < 0)
            pieces = stack(
                Touched,
                [
                    pieces,
                    self._nameless(
                        left, volumes.query, volumes.volume, volumes.start, volumes.end, volumes.depth, base
                    ),
                ],
            )
        return pieces.take(np.lexsort((pieces.inline, pieces.start, pieces.access)))

    def _nameless(
        self, left: tuple[Int, Int], query: Int, volume: Int, start: Int, end: Int, depth: Int, base: Int
    ) -> Touched:
        """The innermost volumes that hold the bytes `left` (in places as `base` gives them)."""
        index = Intervals(start + base[query], end + base[query])
        at, row = index.overlaps(*left)
        low, high = np.maximum(left[0][at], index.starts[row]), np.minimum(left[1][at], index.ends[row])
        covered = Intervals(low, high)
        # a piece goes to a volume unless a deeper one covers it too: volumes of one request nest, so one
        # comparison is enough
        one, other = covered.overlaps(low, high)
        hidden = np.zeros(len(low), bool)
        inner = (depth[row[other]] > depth[row[one]]) & (low[other] <= low[one]) & (high[other] >= high[one])
        hidden[one[inner]] = True
        keep = np.flatnonzero(~hidden)
        access = query[row[keep]]
        nothing = np.full(len(keep), -1, np.int64)
        return Touched(access, self.named + volume[row[keep]], low[keep] - base[access],
            high[keep] - base[access], nothing,
                       np.zeros(len(keep), bool), np.full(len(keep), KNOWN, np.uint8))  # fmt: skip

    def volume_of(self, objects: Int) -> Int:
        """The volume on which each object lies."""
        extent = np.minimum(objects, max(0, self.named - 1))
        inside: Int = (
            np.where(objects < self.named, self._volume[extent], objects - self.named)
            if self.named
            else objects
        )
        return inside

    def kind_of(self, objects: Int) -> Int:
        """The kind of each object as a code of tables.KINDS, -1 for a whole volume."""
        return self._of(self._kind, objects)

    def inode_of(self, objects: Int) -> Int:
        """The inode of each object, -1 where it has none."""
        return self._of(self._inode, objects)

    def nobodys(self, objects: Int) -> Bool:
        """Which objects are bytes without an owner: free, of an unknown owner, in a gap, or set aside for
        what some file is about to be written."""
        found: Bool = _NOBODYS[self.kind_of(objects)] | (self._of(self._part, objects) == self._staging)
        return found

    def written(self, objects: Int) -> Bool:
        """Which objects are sure to have written the bytes that they own.

        Metadata may be in the journal as yet, and its bytes be what was there before.
        """
        kind = self.kind_of(objects)
        found: Bool = (kind == tables.DATA) | (_METADATA[kind] & self._in_place[self.volume_of(objects)])
        return found

    def metadata(self, objects: Int) -> Bool:
        """Which objects say where things lie, and what they are called."""
        found: Bool = _METADATA[self.kind_of(objects)] & (self._of(self._part, objects) != self._staging)
        return found

    def fixed(self, objects: Int) -> Bool:
        """Which objects lie where they lay from the first, and always will."""
        found: Bool = _FIXED[self.kind_of(objects)] & ~np.isin(self._of(self._part, objects), self._moving)
        return found

    def identities(self, objects: Int) -> pa.Table:
        """What makes an object the same one in another map: device, kind, path, part; and its inode.

        Content is content, written or not.
        """
        volume, kind = self.volume_of(objects), self.kind_of(objects)
        kind = np.where(kind == tables.UNWRITTEN, tables.DATA, kind)
        return pa.table({
            "device": self.bmap.volumes.column("name").take(pa.array(volume)).cast(pa.string()),
            "kind": pa.array(kind), "path": self.paths(objects),
            "part": self.parts(objects).cast(pa.string()), "inode": pa.array(self.inode_of(objects)),
        })  # fmt: skip

    def _of(self, column: Int, objects: Int) -> Int:
        result = np.full(len(objects), -1, np.int64)
        is_named = objects < self.named
        result[is_named] = column[objects[is_named]]
        return result

    def paths(self, objects: Int) -> pa.Array:
        """The path of each object as large_binary, the first one of a file with several names; null where
        there is none."""
        inode, volume = self.inode_of(objects), self.volume_of(objects)
        where = np.full(len(objects), -1, np.int64)
        parts, base = [pa.array([], pa.large_binary())], 0
        for number in np.unique(volume[inode >= 0]).tolist():
            mine = np.flatnonzero((volume == number) & (inode >= 0))
            wanted, at = np.unique(inode[mine], return_inverse=True)
            parts.append(self.bmap.first_paths(number, wanted))
            where[mine] = base + at
            base += len(wanted)
        return pa.concat_arrays(parts).take(pa.array(where, mask=where < 0))

    def parts(self, objects: Int) -> pa.Array:
        """The metadata structure or named stream that each object is; null where it is plain content."""
        code = self._of(self._part, objects).astype(np.int16)
        return pa.DictionaryArray.from_arrays(
            pa.array(code, mask=code < 0), pa.array(self._parts, pa.string())
        )

    def labels(self, objects: Int) -> dict[int, tuple[str, str, str]]:
        """(letter of the kind, device, escaped name) of each object, kept once found.

        A volume and free space have an empty name.
        """
        if len(self._labels) > MOST_LABELS:
            self._labels = {}
        new = np.array(
            [number for number in np.unique(objects).tolist() if number not in self._labels], np.int64
        )
        if len(new):
            names = self.bmap.volumes.column("name").to_pylist()
            kinds = self.bmap.volumes.column("kind").to_pylist()
            columns = (
                new,
                self.volume_of(new),
                self.kind_of(new),
                self.inode_of(new),
                self._of(self._part, new),
            )
            for number, volume, kind, inode, part, path in zip(
                *(c.tolist() for c in columns), self.paths(new).to_pylist(), strict=True
            ):
                letter = LETTERS[tables.KINDS[kind] if kind >= 0 else kinds[volume]]
                word = f"[{escape(self._parts[part].encode())}]" if part >= 0 else ""
                if path is None:
                    name = word or (f"[inode {inode}]" if inode >= 0 else "")
                else:
                    name = (
                        f"{escape(path)}:{word}"
                        if word and kind in (tables.DATA, tables.UNWRITTEN)
                        else escape(path)
                    )
                self._labels[number] = letter, escape(names[volume].encode()), name
        return self._labels


def identify(objects: pa.Table) -> tuple[Int, Int]:
    """(the number of each row's object, the first row of each object), by the columns of IDENTITY; what has
    no path is told apart by its `inode`."""
    key = np.zeros(len(objects), np.int64)
    for name in IDENTITY:
        code = (
            objects.column(name)
            .combine_chunks()
            .dictionary_encode(null_encoding="encode")
            .indices.to_numpy(zero_copy_only=False)
        )
        key = key * (int(code.max(initial=0)) + 1) + code
        key = np.unique(key, return_inverse=True)[1].astype(np.int64)
    nameless = objects.column("path").combine_chunks().is_null().to_numpy(zero_copy_only=False)
    inode = np.where(nameless, tables.integers(objects, "inode"), -1)
    order = np.lexsort((inode, key))
    new = np.append(True, (key[order][1:] != key[order][:-1]) | (inode[order][1:] != inode[order][:-1]))[
        : len(order)
    ]
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    return number, order[new]


def _number(volume: Int, kind: Int, inode: Int, part: Int) -> tuple[Int, Int]:
    """Give equal rows one number: (the first row of each number, the number of each row)."""
    columns = [volume, kind, inode + 1, part + 1]
    if len(volume) == 0:
        return columns[0], columns[0]
    widths = [int(column.max()) + 1 for column in columns]
    # inode numbers near 2**63: take their ranks instead
    if widths[0] * widths[1] * widths[2] * widths[3] >= 1 << 62:
        columns[2] = np.unique(columns[2], return_inverse=True)[1].astype(np.int64)
        widths[2] = len(volume)
    key = columns[0]
    for column, width in zip(columns[1:], widths[1:], strict=True):
        key = key * width + column
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    return first.astype(np.int64), number.astype(np.int64)
