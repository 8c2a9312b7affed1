"""Inodes, names and file extents of all subvolumes: what leaves hold, once for every tree that a leaf belongs
to."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int
from virt_bmap.core.columns import take
from virt_bmap.formats.filesystems.btrfs import ondisk, owners
from virt_bmap.formats.filesystems.btrfs.items import NO_TIME, Columns, is_subvolume
from virt_bmap.formats.filesystems.btrfs.owners import FileExtents
from virt_bmap.formats.filesystems.btrfs.tree import Forest, TreeRoots
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions

TREE_BITS, OBJECT_BITS = 23, 40
SPECIAL = 256
"""Ids from -256 to -1 are special; they take the upper end of the bits of an id."""
STUB_MODE = 0o40755


def number(tree_id: Int, objectid: Int) -> Int:
    """The inode number in a map: unique over all trees, and the objectid itself in the top-level
    subvolume."""
    tree_bits = np.where(tree_id == ondisk.FS_TREE, 0, tree_id & ((1 << TREE_BITS) - 1))
    packed: Int = tree_bits << OBJECT_BITS | objectid & ((1 << OBJECT_BITS) - 1)
    return packed


def _fits(ids: Int, bits: int) -> np.ndarray:
    return (ids >= -SPECIAL) & (ids < (1 << bits) - SPECIAL)


class Links(NamedTuple):
    """How leaves, trees and subvolumes hang together."""

    roots: TreeRoots
    forest: Forest
    refs: Columns

    def only(self, rows: Columns, *trees: int) -> Columns:
        """The rows whose leaf belongs to one of these trees."""
        mine = np.isin(self.roots.id[self.forest.trees[self.forest.first]], trees)[rows["leaf"]]
        return rows if mine.all() else {name: values[mine] for name, values in rows.items()}

    def spread(self, rows: Columns) -> tuple[Int, Int]:
        """(row, tree) for each tree with files that the row's leaf belongs to: subvolumes, root tree
        (caches), data relocation, logs."""
        row, tree = self.forest.spread(rows["leaf"])
        fits = _fits(self.tree_id[tree], TREE_BITS) & _fits(rows["objectid"][row], OBJECT_BITS)
        keep = self.has_files[tree] & fits
        return (row, tree) if keep.all() else (row[keep], tree[keep])

    @property
    def tree_id(self) -> Int:
        """The tree that each root stands for: log trees and relocation trees stand for their subvolume."""
        other = np.isin(self.roots.id, (ondisk.TREE_LOG, ondisk.TREE_RELOC))
        return np.where(other, self.roots.offset, self.roots.id)

    @property
    def has_files(self) -> np.ndarray:
        """Which roots are trees with inodes.

        The log's own root tree stands for tree 0, which does not exist.
        """
        found: np.ndarray = is_subvolume(self.tree_id) | np.isin(
            self.roots.id, (ondisk.ROOT_TREE, ondisk.DATA_RELOC_TREE)
        )
        return found

    @property
    def parts(self) -> Int:
        """For each root the number in owners.PARTS that its files' extents have."""
        part = np.zeros(len(self.roots.id), np.int64)
        part[self.roots.id == ondisk.ROOT_TREE] = owners.CACHE
        part[self.roots.id == ondisk.DATA_RELOC_TREE] = owners.RELOCATION
        part[self.roots.id == ondisk.TREE_RELOC] = owners.MOVED
        return part


# ---- inodes ------------------------------------------------------------------------------------------------


class Inodes(NamedTuple):
    """Inodes as columns, in the terms of the table `inodes`; and the transaction that made each."""

    inode: Int
    type: np.ndarray
    mode: Int
    uid: Int
    gid: Int
    size: Int
    nlink: Int
    mtime_ns: Int
    flags: Int
    record_offset: Int
    generation: Int


def inodes(rows: Columns, links: Links, damage: Damage) -> Inodes:
    """Every inode of every tree."""
    beyond = ~_fits(rows["objectid"], OBJECT_BITS)
    damage.add(
        "inode",
        "[inode has|inodes have] an objectid beyond 2^40 and [is|are] left out",
        rows["record"][beyond],
    )
    far = links.roots.bytenr[links.has_files & ~_fits(links.tree_id, TREE_BITS)]
    damage.add(
        "inode",
        "[subvolume has|subvolumes have] an id beyond 2^23 and [is|are] left out",
        np.maximum(far, -1),
    )
    row, tree = links.spread(rows)
    part = links.parts[tree]
    if (mine := part != owners.MOVED).sum() < len(part):
        row, tree, part = row[mine], tree[mine], part[mine]
    column = {name: values[row] for name, values in rows.items()}
    damage.add("inode", "[inode has|inodes have] an impossible size", column["record"][column["size"] < 0])
    special = (part == owners.CACHE) | (part == owners.RELOCATION) | (column["objectid"] < 0)
    mode, nlink = column["mode"] & 0xFFFF, column["nlink"]
    gone = ~special & ((nlink == 0) | (links.roots.refs[tree] == 0))
    flags = np.where(gone, tables.I_DELETED, 0)
    for bit, flag in (
        (ondisk.INODE_COMPRESS, tables.I_COMPRESSED), (ondisk.INODE_IMMUTABLE, tables.I_IMMUTABLE),
        (ondisk.INODE_RO_VERITY, tables.I_VERITY),
    ):  # fmt: skip
        flags |= np.where((column["flags"] & bit) != 0, flag, 0)
    kind = np.where(special, tables.T_METADATA, tables.type_of_mode(mode))
    return Inodes(
        number(links.tree_id[tree], column["objectid"]), kind, mode, column["uid"], column["gid"],
        np.maximum(column["size"], 0), nlink, column["mtime_ns"], flags, column["record"],
        column["generation"],
    )  # fmt: skip


def inode_table(found: Inodes, stubs: Int) -> pa.Table:
    """The table `inodes`, with the empty directories in the place of subvolumes inside snapshots."""
    columns = found._asdict()
    del columns["generation"]
    if len(stubs):
        n = len(stubs)
        extra: dict[str, int] = {
            "type": tables.T_DIRECTORY, "mode": STUB_MODE, "uid": 0, "gid": 0, "size": 0, "nlink": 1,
            "mtime_ns": NO_TIME, "flags": 0, "record_offset": -1,
        }  # fmt: skip
        added = {"inode": stubs, **{name: np.full(n, value) for name, value in extra.items()}}
        columns = {name: np.append(column, added[name]) for name, column in columns.items()}
    return tables.make("inodes", volume=0, **columns)


# ---- names -------------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """Names in directories, as columns: `name` counts the rows of an array of names, `place` is the entry's
    index in its directory, `subvolume` says which lead to the root of another tree, or to an empty directory
    (a stub) where that tree is not."""

    parent: Int
    inode: Int
    place: Int
    name: Int
    subvolume: np.ndarray
    stub: np.ndarray


class Subvolumes(NamedTuple):
    """Inodes and names of all subvolumes. `logged` are the inodes whose items a log has, `cut` those of them
    that end at the size they have now."""

    inodes: Inodes
    entries: Entries
    name_bytes: list[pa.Array]
    logged: Int = EMPTY
    cut: Int = EMPTY


def entries(rows: Columns, links: Links, damage: Damage) -> Entries:
    """Every name of every tree."""
    row, tree = links.spread(rows)
    keep = (links.parts[tree] == 0) & _fits(rows["target"][row], OBJECT_BITS)
    row, tree = row[keep], tree[keep]
    tree_id, objectid, target = links.tree_id[tree], rows["objectid"][row], rows["target"][row]
    child = number(tree_id, target)
    subvolume = rows["target_type"][row] == ondisk.ROOT_ITEM_KEY
    odd = ~subvolume & (rows["target_type"][row] != ondisk.INODE_ITEM_KEY)
    damage.add(
        "directory",
        "directory [entry leads|entries lead] neither to an inode nor to a subvolume",
        np.full(int(odd.sum()), -1, np.int64),
    )
    at = np.flatnonzero(subvolume)
    there = _mounted(links, tree_id[at], target[at], objectid[at])
    root = np.full(len(at), ondisk.FIRST_FREE, np.int64)
    child[at] = np.where(
        there,
        number(target[at], root),
        number(tree_id[at], np.full(len(at), ondisk.EMPTY_SUBVOL_DIR, np.int64)),
    )
    stub = np.zeros(len(row), bool)
    stub[at] = ~there
    found = Entries(number(tree_id, objectid), child, rows["index"][row], row, subvolume, stub)
    return take(found, ~odd) if odd.any() else found


def name_table(found: Entries, name_bytes: list[pa.Array]) -> tuple[pa.Table, Int]:
    """The table `names`, and the inode numbers of directories that stand where a subvolume is not."""
    every = pa.chunked_array(name_bytes, pa.binary()).combine_chunks()
    if len(found.name) != len(every) or (np.diff(found.name) != 1).any():
        every = every.take(pa.array(found.name))
    table = tables.make("names", volume=0, parent=found.parent, inode=found.inode, name=every)
    return table, np.unique(found.inode[found.stub])


def _mounted(links: Links, parent: Int, child: Int, dirid: Int) -> np.ndarray:
    """Which entries for subvolumes are backed by a ROOT_REF and a tree.

    A snapshot has the entry, but not the reference.
    """
    alive = links.roots.id[is_subvolume(links.roots.id) & (links.roots.refs > 0)]
    refs = np.stack([links.refs["parent"], links.refs["child"], links.refs["dirid"]], axis=1)
    asked = np.stack([parent, child, dirid], axis=1)
    _, code = np.unique(np.concatenate([refs, asked]), axis=0, return_inverse=True)
    backed: np.ndarray = np.isin(code[len(refs) :], code[: len(refs)]) & np.isin(child, alive)
    return backed


# ---- file extents ------------------------------------------------------------------------------------------


def regular(rows: Columns, links: Links) -> FileExtents:
    """Extents with blocks of their own, a row for every inode of every tree that refers to them."""
    row, tree = links.spread(rows)
    column = {name: values[row] for name, values in rows.items()}
    inode, part = number(links.tree_id[tree], column["objectid"]), links.parts[tree]
    compressed = column["compression"] != 0
    base, whole = column["disk_bytenr"], column["disk_num_bytes"]
    unwritten = column["type"] == ondisk.FILE_EXTENT_PREALLOC
    kind = np.where(
        (part == owners.CACHE) | (part == owners.RELOCATION) | (part == owners.MOVED),
        tables.METADATA,
        np.where(unwritten, tables.UNWRITTEN, tables.DATA),
    )
    return FileExtents(
        inode=inode, kind=kind, part=part, file_offset=column["file_offset"],
        file_length=column["num_bytes"], start=np.where(compressed, base, base + column["offset"]),
        length=np.where(compressed, whole, column["num_bytes"]), flags=_flags(column), base=base, whole=whole,
        origin=column["file_offset"] - column["offset"],
    )  # fmt: skip


def _flags(column: Columns) -> Int:
    flags: Int = (column["compression"] != 0).astype(np.int64) * tables.COMPRESSED
    flags |= (column["encryption"] != 0).astype(np.int64) * tables.ENCRYPTED
    return flags


class Inline(NamedTuple):
    """Content that lies in tree blocks, as columns; `file_length` is what it holds, uncompressed."""

    inode: Int
    file_offset: Int
    file_length: Int
    start: Int
    length: Int
    flags: Int


def inline(rows: Columns, links: Links) -> Inline:
    """What of every inode of every tree lies in tree blocks."""
    row, tree = links.spread(rows)
    keep = links.parts[tree] == 0
    row, tree = row[keep], tree[keep]
    column = {name: values[row] for name, values in rows.items()}
    held = np.where(column["compression"] == 0, column["length"], np.maximum(column["ram_bytes"], 0))
    shared = np.where(np.bincount(row)[row] > 1, tables.SHARED, 0)
    return Inline(
        number(links.tree_id[tree], column["objectid"]), np.maximum(column["file_offset"], 0), held,
        column["start"], column["length"], _flags(column) | shared | tables.INLINE,
    )  # fmt: skip


def add_inline(out: tables.ExtentRows, found: Inline, known: Inodes) -> None:
    """Rows of content and link targets that lie in tree blocks."""
    at = positions(known.inode, found.inode)
    symlink: np.ndarray = (
        (at >= 0) & (known.type[np.maximum(at, 0)] == tables.T_SYMLINK) if len(known.inode) else at >= 0
    )
    out.add(
        np.where(symlink, tables.SYMLINK, tables.DATA), found.start, found.length, inode=found.inode,
        file_offset=found.file_offset, file_length=found.file_length, flags=found.flags,
    )  # fmt: skip
