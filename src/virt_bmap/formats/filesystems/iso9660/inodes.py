"""Files: which records are one file, and what it is called."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import EMPTY, Bool, Int, expand, ints
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sessions import feature
from virt_bmap.formats.filesystems.iso9660.names import ASSOCIATED, DIRECTORY, MULTI_EXTENT, Walk
from virt_bmap.formats.filesystems.iso9660.superblock import (
    Descriptors,
    DirectoryTree,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def features_of(
    reader: Reader,
    found: Descriptors,
    main: Walk,
    walks: list[tuple[DirectoryTree, Walk]],
    files: "FileRecords",
) -> list[str]:
    system = reader.read_clipped(0, 2048)
    known = {
        "rock-ridge": main.root.get("mode", -1) >= 0,
        "joliet": any(tree.name == "Joliet" for tree, _ in walks), "el-torito": bool(found.boot_catalogs),
        "zisofs": bool((files.real_size >= 0).any()), "isohybrid": system[510:512] == b"\x55\xaa",
        "apple-hybrid": system[:2] == b"ER",
    }  # fmt: skip
    return [*(name for name, there in known.items() if there), *feature(found.start)]


class FileRecords:
    """The files of the main tree: one row for each record that begins a file, in columns of one length, and
    its extents."""

    def __init__(self, tree: DirectoryTree, found: Walk, block_size: int) -> None:
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
    """UCS-2 big-endian names as UTF-8, all in one decoding; what is not a character becomes U+FFFD, a NUL
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


def hidden_files(files: FileRecords, walks: list[Walk], damage: Damage) -> None:
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
    damage.add("hidden", "[file is|files are] named in another directory tree only", files.hidden["offset"])


def without_content(column: dict[str, Int]) -> Bool:
    """Which records are of links and special files: makefs of the BSDs gives them an extent and a length all
    the same, which mean nothing."""
    kind = tables.type_of_mode(np.maximum(column["mode"], 0))
    special: Bool = (column["mode"] >= 0) & ~np.isin(
        kind, (tables.T_FILE, tables.T_DIRECTORY, tables.T_UNKNOWN)
    )
    return special | (column["link_size"] >= 0)
