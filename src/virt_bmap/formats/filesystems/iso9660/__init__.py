"""ISO 9660 with Rock Ridge, Joliet and El Torito: one tree of names, and every tree's metadata.

What is read: the volume descriptors, the directories of every tree level by level, Rock Ridge with its
continuation areas, path tables, the boot catalog and the images that it names. Names come from Rock Ridge
where there is any, else from Joliet, else from the plain tree without `;1`; directories of the other trees
are metadata. ISO 9660 has neither inode numbers nor an allocator: a directory's inode is the byte offset of
its content, any other file's the offset of its (first) directory record, as Linux does; what nothing refers
to is `unreferenced` (old sessions, HFS catalogs of hybrid discs, a second set of descriptors, padding). A
record for each name means that hard links are inodes of their own whose bytes are SHARED. The target of a
symbolic link lies in system use entries, in pieces: its rows are INLINE without a file offset.

Sources: ECMA-119 (4th edition); SUSP 1.12, RRIP 1.12; Joliet 1.0; El Torito 1.0; Linux fs/isofs; libisofs
doc/zisofs_format.txt.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import EMPTY, Bool, Int, complement, expand, ints, subtract, union
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.iso9660.descriptors import (
    FIRST_DESCRIPTOR,
    Descriptors,
    Tree,
    read_boot_catalog,
    read_descriptors,
    sorted_ranges,
)
from virt_bmap.formats.filesystems.iso9660.directories import ASSOCIATED, DIRECTORY, MULTI_EXTENT, Walk, walk
from virt_bmap.formats.filesystems.iso9660.links import target
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE
from virt_bmap.model.tables import ExtentRows

NAME = "iso9660"
INODE = "a directory's is the byte offset of its content, any other file's that of its directory record"
FEATURES = (
    "ISO 9660 levels 1 to 3 and ISO 9660:1999",
    "Rock Ridge with continuation areas and relocated directories", "Joliet", "multi-extent files",
    "interleaved files", "associated files as a stream", "extended attribute records", "path tables",
    "El Torito boot catalogs and images", "isohybrid system areas", "zisofs (as compressed)",
    "hard links (as shared)",
)  # fmt: skip
REFUSED = (
    "High Sierra",
    "earlier sessions of a multi-session disc (unreferenced)",
    "HFS of hybrid discs (unreferenced)",
)
ORACLES = ("isoinfo", "xorriso", "content read back by the map", "blkid for label and UUID")
CHECKS = Checks(
    checksums=None,
    rules=(
        "descriptors: geometry, boot catalog",
        "directory records: lengths, places, each directory once",
        "system use entries: lengths, continuation areas",
    ),
    unchecked=(
        "content of files",
        "path tables",
    ),
)

MAX_UNITS = 1 << 20
"""Rows that interleaved files may become; discs that really have some hold a handful."""
SYSTEM_AREA = 32768


def probe(reader: Reader) -> bool:
    """The standard identifier of the first volume descriptor, or of a High Sierra one."""
    return reader.read_clipped(FIRST_DESCRIPTOR + 1, 5) == b"CD001" or _is_high_sierra(reader)


looks_like_iso9660 = probe
"""For partition tables: an isohybrid image is both, and libguestfs and blkid take the whole disk for ISO
9660."""


def _is_high_sierra(reader: Reader) -> bool:
    return reader.read_clipped(FIRST_DESCRIPTOR + 9, 5) == b"CDROM"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    if _is_high_sierra(reader):
        raise Unsupported(
            f"{reader.name}: a High Sierra volume, the format before ISO 9660, is not read", FIRST_DESCRIPTOR
        )
    found = read_descriptors(reader)
    walks = [(tree, walk(reader, found.block_size, tree, damage)) for tree in _distinct(found.trees)]
    main = _main_tree(walks)
    files = _Files(main[0], main[1], found.block_size)
    rows = ExtentRows()
    owned = _metadata(rows, reader, found, walks, main[0])
    _hidden_files(files, [other for tree, other in walks if tree is not main[0]], damage)
    owned = _content(rows, reader, found, files, owned, damage)
    owned = _boot(rows, reader, found, owned, damage)
    size = min(reader.size, max(found.size, int(owned[1].max(initial=0))))
    if found.size > reader.size:
        damage.say(
            "truncated", f"the volume claims {found.size} bytes, but ends at {reader.size}", severity=NOTE
        )
    low, high = complement(*owned, 0, size)
    rows.add(tables.UNREFERENCED, low, high - low)
    features = _features(reader, found, main[1], walks, files)
    return Filesystem(
        type=NAME, size=size, block_size=found.block_size, root=main[0].root,
        state=tables.CLEAN,
        reader=reader, inodes=files.inodes(), names=files.names(), extents=rows.table(0), uuid=found.uuid,
        label=found.label, features=" ".join(features) or None,
    )  # fmt: skip


def _distinct(trees: list[Tree]) -> list[Tree]:
    """Without trees that begin at the same root directory: ISO 9660:1999 often shares the plain one's."""
    return list({tree.root: tree for tree in reversed(trees)}.values())[::-1]


def _main_tree(walks: list[tuple[Tree, Walk]]) -> tuple[Tree, Walk]:
    """The tree that names come from: one with Rock Ridge, else Joliet, else the primary one."""
    rock = [
        pair for pair in walks if pair[1].root.get("mode", -1) >= 0 or (pair[1].column["mode"] >= 0).any()
    ]
    joliet = [pair for pair in walks if pair[0].name == "Joliet" and pair[1].root]
    return (rock or joliet or walks)[0]


def _features(
    reader: Reader, found: Descriptors, main: Walk, walks: list[tuple[Tree, Walk]], files: "_Files"
) -> list[str]:
    system = reader.read_clipped(0, 2048)
    known = {
        "rock-ridge": main.root.get("mode", -1) >= 0,
        "joliet": any(tree.name == "Joliet" for tree, _ in walks), "el-torito": bool(found.boot_catalogs),
        "zisofs": bool((files.real_size >= 0).any()), "isohybrid": system[510:512] == b"\x55\xaa",
        "apple-hybrid": system[:2] == b"ER",
    }  # fmt: skip
    return [name for name, there in known.items() if there]


class _Files:
    """The files of the main tree: one row for each record that begins a file, in columns of one length, and
    its extents."""

    def __init__(self, tree: Tree, found: Walk, block_size: int) -> None:
        column = found.column
        self.tree, self.walk, self.block_size = tree, found, block_size
        is_directory = (column["flags"] & DIRECTORY) != 0
        real = is_directory & ~found.moved
        kept = ~(found.moved & np.isin(column["extent"], column["extent"][real])) & ~(
            is_directory & (column["extent"] == tree.root)
        )
        # consecutive records of one file: all but the last have MULTI_EXTENT set
        parent, flags = column["parent"], column["flags"]
        goes_on = ((flags & MULTI_EXTENT) != 0) & ~is_directory
        begins = np.append(True, ~goes_on[:-1] | (parent[1:] != parent[:-1]))[: len(parent)]
        self.file = np.cumsum(begins) - 1
        first = np.flatnonzero(begins)
        self.associated = (flags[first] & ASSOCIATED) != 0
        owner = column["offset"][first]
        after = np.minimum(np.arange(len(first)) + 1, max(len(first) - 1, 0))
        owner = np.where(self.associated, owner[after] if len(owner) else owner, owner)
        self.inode = np.where(is_directory[first], column["extent"][first], owner)
        self.column = {name: values[first] for name, values in column.items()}
        self.directory, self.kept = is_directory[first], kept[first] & ~self.associated
        self.real_size = self.column["real_size"]
        self.size = np.zeros(len(first), np.int64)
        np.add.at(self.size, self.file, column["size"])
        self.first = first
        self.hidden: dict[str, Int] = {"offset": EMPTY, "extent": EMPTY, "size": EMPTY, "mtime_ns": EMPTY}

    def inodes(self) -> pa.Table:
        """The table `inodes`: the root, then every file once, then files that only another tree names."""
        lowest = np.iinfo(np.int64).min
        root = {"mode": -1, "nlink": 1, "uid": -1, "gid": -1, "mtime_ns": lowest, **self.walk.root}
        keep = self.kept & ~self.associated
        _, unique = np.unique(self.inode[keep], return_index=True)
        rows = np.flatnonzero(keep)[np.sort(unique)]
        hidden = len(self.hidden["offset"])

        def join(name: str, missing: int) -> Int:
            return np.concatenate(
                [ints(root[name]), self.column[name][rows], np.full(hidden, missing, np.int64)]
            )

        mode = join("mode", -1)
        is_directory = np.concatenate([[True], self.directory[rows], np.zeros(hidden, bool)])
        plain = np.where(is_directory, tables.T_DIRECTORY, tables.T_FILE)
        size = np.where(self.real_size >= 0, self.real_size, self.size)
        size = np.where(self.column["link_size"] >= 0, self.column["link_size"], size)[rows]
        zisofs = (self.real_size[rows] >= 0) * tables.I_COMPRESSED
        inode = np.concatenate([ints(self.tree.root), self.inode[rows], self.hidden["offset"]])
        record = np.where(self.directory, self.column["extent"], self.column["offset"])[rows]
        return tables.make(
            "inodes", volume=np.zeros(len(inode), np.int64), inode=inode,
            type=np.where((mode < 0) | is_directory, plain,
                tables.type_of_mode(np.maximum(mode, 0))).astype(np.uint8),
            mode=mode, uid=join("uid", -1), gid=join("gid", -1),
            size=np.concatenate([ints(self.tree.root_size), size, self.hidden["size"]]),
            nlink=np.where(join("nlink", 0) < 0, 1, join("nlink", 0)), mtime_ns=join("mtime_ns", lowest),
            flags=np.concatenate([[0], zisofs, np.zeros(hidden, np.int64)]).astype(np.int64),
            record_offset=np.concatenate([ints(self.tree.root), record, self.hidden["offset"]]),
        )  # fmt: skip

    def names(self) -> pa.Table:
        """The table `names`."""
        data, length = self.walk.name, self.walk.column["name_length"]
        ends = np.cumsum(length)
        names = pa.Array.from_buffers(
            pa.large_binary(), len(length), [None, pa.py_buffer(np.append(0, ends)), pa.py_buffer(data)]
        )
        names = names.take(pa.array(self.first[self.kept]))
        if self.tree.name == "Joliet":
            names = _utf8(names)
        if not self.walk.root.get("mode", -1) >= 0:
            names = _without_version(names)
        return tables.make("names", volume=np.zeros(len(names), np.int64),
            parent=self.column["parent"][self.kept],
                           inode=self.inode[self.kept], name=names.cast(pa.binary()))  # fmt: skip


def _utf8(names: pa.Array) -> pa.Array:
    """UCS-2 big-endian names as UTF-8, all in one decoding; what is no character becomes U+FFFD, a NUL
    too."""
    if len(names) == 0:
        return names
    offsets = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
    data = np.frombuffer(names.buffers()[2], np.uint8) if names.buffers()[2] else np.zeros(0, np.uint8)
    units = (offsets[1:] - offsets[:-1]) // 2
    row, step = expand(units)
    at = offsets[:-1][row] + 2 * step
    text = data[at].astype(">u2") << 8 | data[at + 1]
    text[text == 0] = 0xFFFD
    ends = np.cumsum(units)
    joined = np.insert(text.astype(">u2"), ends[:-1], 0)
    return pa.array(joined.tobytes().decode("utf-16-be", "replace").split("\0"), pa.large_string()).cast(
        pa.large_binary()
    )


def _without_version(names: pa.Array) -> pa.Array:
    """File names without `;` and version number, and without the dot before an empty extension, as every
    system shows them."""
    stripped = pc.replace_substring_regex(names, r"\.?;[0-9]*$", "")
    return pc.if_else(pc.equal(pc.binary_length(stripped), 0), names, stripped)


def _metadata(
    rows: ExtentRows,
    reader: Reader,
    found: Descriptors,
    walks: list[tuple[Tree, Walk]],
    main: Tree,
) -> tuple[Int, Int]:
    """Rows of everything but files; returns the ranges they take."""
    system = reader.read_clipped(0, 512)
    rows.add(
        tables.BOOT,
        0,
        SYSTEM_AREA,
        part="isohybrid system area" if system[510:] == b"\x55\xaa" else "system area",
    )
    rows.add(tables.METADATA, FIRST_DESCRIPTOR, found.end - FIRST_DESCRIPTOR, part="volume descriptors")
    owned: tuple[Int, Int] = (ints(0), ints(found.end))
    for tree, seen in walks:
        low, size = seen.directories
        high = np.minimum(low + _whole(size, found.block_size), reader.size)
        kind, part = (tables.DIRECTORY, None) if tree is main else (tables.METADATA, f"{tree.name} directory")
        rows.add(kind, low, high - low, part=part, inode=low if tree is main else -1)
        owned = union(np.append(owned[0], low), np.append(owned[1], high))
    tables_at = sorted_ranges(
        [
            (at, at + _whole_int(size, found.block_size))
            for tree in found.trees
            for at, size in tree.path_tables
        ]
    )
    areas = [seen.areas for _, seen in walks]
    low, high = union(
        np.concatenate([area[0] for area in areas]), np.concatenate([area[1] for area in areas])
    )
    blocks = low // found.block_size * found.block_size, _whole(high, found.block_size)
    for part, ranges in (("path table", union(*tables_at)), ("continuation area", blocks)):
        inside = ranges[0], np.minimum(ranges[1], reader.size)
        low, high = subtract(*inside, *owned)
        rows.add(tables.METADATA, low, high - low, part=part)
        owned = union(np.append(owned[0], low), np.append(owned[1], high))
    return owned


def _whole(lengths: Int, block_size: int) -> Int:
    """Lengths rounded up to whole blocks."""
    return -(-lengths // block_size) * block_size


def _whole_int(length: int, block_size: int) -> int:
    return -(-length // block_size) * block_size


def _hidden_files(files: _Files, walks: list[Walk], damage: Damage) -> None:
    """Files that only another tree names: they keep their bytes, but have no name in this map."""
    known = np.unique(files.walk.column["extent"])
    parts: dict[str, list[Int]] = {name: [] for name in files.hidden}
    for other in walks:
        column = other.column
        new = ((column["flags"] & DIRECTORY) == 0) & (column["size"] > 0) & ~np.isin(column["extent"], known)
        for name, values in parts.items():
            values.append(column[name][new])
        known = np.union1d(known, column["extent"][new])
    files.hidden = {name: np.concatenate([EMPTY, *values]) for name, values in parts.items()}
    damage.add("hidden", "files are named in another directory tree only", files.hidden["offset"])


def _content(
    rows: ExtentRows,
    reader: Reader,
    found: Descriptors,
    files: _Files,
    owned: tuple[Int, Int],
    damage: Damage,
) -> tuple[Int, Int]:
    """Rows of file contents, extended attribute records and link targets; returns all ranges taken so far."""
    column = files.walk.column
    record = np.flatnonzero(
        ((column["flags"] & DIRECTORY) == 0) & (column["size"] > 0) & ~_without_content(column)
    )
    file = files.file[record]
    before = np.cumsum(column["size"][record]) - column["size"][record]
    new = np.append(True, file[1:] != file[:-1])[: len(file)]
    in_file = before - np.repeat(before[new], np.diff(np.append(np.flatnonzero(new), len(file))))
    start, length, at, row = _units(column, record, in_file, found.block_size, damage)
    inode, stream = files.inode[file][row], files.associated[file][row]
    packed = files.real_size[file][row]
    start = np.append(start, files.hidden["extent"])
    length = np.append(length, _whole(files.hidden["size"], found.block_size))
    hidden = len(files.hidden["extent"])
    inode, at = np.append(inode, files.hidden["offset"]), np.append(at, np.zeros(hidden, np.int64))
    stream = np.append(stream, np.zeros(hidden, bool))
    packed = np.append(packed, np.full(hidden, -1, np.int64))
    end = np.minimum(start + length, reader.size)
    outside = start + length > _whole_int(reader.size, found.block_size)
    damage.add("outside", f"extents of files reach beyond the end at {reader.size:#x}", start[outside])
    start = np.minimum(start, end)
    pieces = cut_shared(start, end)
    where = pieces.row
    low, size = pieces.start, pieces.end - pieces.start
    flags = pieces.shared * tables.SHARED + (packed[where] >= 0) * tables.COMPRESSED
    file_offset = at[where] + np.where(packed[where] >= 0, 0, low - start[where])
    file_length = np.where(packed[where] >= 0, packed[where], size)
    for associated, part in ((False, None), (True, "associated file")):
        mine = stream[where] == associated
        rows.add(tables.DATA, low[mine], size[mine], part=part, inode=inode[where][mine],
            file_offset=file_offset[mine],
                 file_length=file_length[mine], flags=flags[mine])  # fmt: skip
    owned = union(np.append(owned[0], start), np.append(owned[1], end))
    return _attributes(rows, files, record, reader, owned)


def _without_content(column: dict[str, Int]) -> Bool:
    """Which records are of links and special files: makefs of the BSDs gives them an extent and a length all
    the same, which mean nothing."""
    kind = tables.type_of_mode(np.maximum(column["mode"], 0))
    special: Bool = (column["mode"] >= 0) & ~np.isin(
        kind, (tables.T_FILE, tables.T_DIRECTORY, tables.T_UNKNOWN)
    )
    return special | (column["link_size"] >= 0)


def _units(
    column: dict[str, Int], record: Int, in_file: Int, block_size: int, damage: Damage
) -> tuple[Int, Int, Int, Int]:
    """(start, length, file offset, position in `record`) of the records' bytes; one row each, but interleaved
    files have one for each unit."""
    size, unit, gap = column["size"][record], column["unit"][record], column["gap"][record]
    woven = (unit > 0) & (gap > 0)
    count = np.where(woven, -(-size // np.maximum(unit, 1)), 1)
    if int(count.sum()) > len(record) + MAX_UNITS:
        damage.say(
            "simplified",
            f"{int(woven.sum())} interleaved files have more than {MAX_UNITS} units and are "
            "shown as one piece",
            severity=ERROR,
        )
        woven, count = np.zeros(len(record), bool), np.ones(len(record), np.int64)
    row, nth = expand(count)
    start = column["extent"][record][row] + nth * (unit + gap)[row]
    left = size[row] - nth * unit[row]
    length = _whole(np.where(woven[row], np.minimum(left, unit[row]), left), block_size)
    return start, length, in_file[row] + nth * unit[row], row


def _attributes(
    rows: ExtentRows, files: _Files, record: Int, reader: Reader, owned: tuple[Int, Int]
) -> tuple[Int, Int]:
    """Extended attribute records before the content, and link targets inside system use entries."""
    column = files.walk.column
    mine = record[column["xar"][record] > 0]
    low = np.maximum(column["extent"][mine] - column["xar"][mine], 0)
    high = np.minimum(column["extent"][mine], reader.size)
    rows.add(
        tables.XATTR,
        low,
        np.maximum(high - low, 0),
        part="extended attribute record",
        inode=files.inode[files.file[mine]],
    )
    at, where, length = files.walk.links
    rows.add(tables.SYMLINK, where, length, part="SL", inode=at, flags=tables.INLINE)
    return union(np.append(owned[0], low), np.append(owned[1], high))


def _boot(
    rows: ExtentRows, reader: Reader, found: Descriptors, owned: tuple[Int, Int], damage: Damage
) -> tuple[Int, Int]:
    """The boot catalog and its images: rows of their own where no file has these bytes, named inside the
    file's where one does."""
    for catalog in found.boot_catalogs:
        length, images = read_boot_catalog(reader, catalog, damage)
        named = [(tables.METADATA, "El Torito boot catalog", catalog, length)]
        named += [(tables.BOOT, image.name, image.offset, image.length) for image in images]
        for kind, part, offset, size in named:
            low, high = subtract(ints(offset), ints(offset + size), *owned)
            rows.add(kind, low, high - low, part=part)
            inside = subtract(ints(offset), ints(offset + size), low, high)
            rows.add(kind, inside[0], inside[1] - inside[0], part=part, flags=tables.INLINE)
            owned = union(np.append(owned[0], low), np.append(owned[1], high))
    return owned


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.iso9660.descriptors import BOOT_ENTRY, VOLUME

    return {
        "volume descriptors": Structure(VOLUME, many=True),
        "El Torito boot catalog": Structure(BOOT_ENTRY, many=True),
    }


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    structures=_structures,
    inode=INODE,
    target=target,
)
