"""Items of leaves to columns: inodes, names, file extents, extent items, roots.

Rows carry the number of the leaf they lie in.

Sources: include/uapi/linux/btrfs_tree.h; fs/btrfs/tree-checker.c (v6.12).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int, gather
from virt_bmap.core.stored import ROW, afford
from virt_bmap.formats.filesystems.btrfs import ondisk
from virt_bmap.formats.filesystems.btrfs.tree import DROP_KEY, Items, Leaves, TreeRoots

NO_TIME = np.iinfo(np.int64).min
MAX_SECONDS = 9_200_000_000
"""Seconds from 1970 that fit in 64 bits of nanoseconds."""

Columns = dict[str, Int]


@dataclass
class Tables:
    """Columns of all leaves, a list entry a batch. `join` puts the batches of one together."""

    inodes: list[Columns] = field(default_factory=list)
    names: list[Columns] = field(default_factory=list)
    name_bytes: list[pa.Array] = field(default_factory=list)
    regular: list[Columns] = field(default_factory=list)
    inline: list[Columns] = field(default_factory=list)
    allocated: list[Columns] = field(default_factory=list)
    groups: list[Columns] = field(default_factory=list)
    free_space: list[Columns] = field(default_factory=list)
    accounts: list[Columns] = field(default_factory=list)

    def add(self, leaves: Leaves, sectorsize: int) -> None:
        """The items of one batch of leaves."""
        self.inodes.append(_inodes(leaves))
        names, name_bytes = _names(leaves)
        self.names.append(names)
        self.name_bytes.append(name_bytes)
        regular, inline = _file_extents(leaves)
        self.regular.append(regular)
        self.inline.append(inline)
        self.allocated += [_extent_items(leaves), _metadata_items(leaves)]
        self.groups.append(_groups(leaves))
        self.accounts.append(_accounts(leaves))
        self.free_space += [_free_space_extents(leaves), _free_space_bitmaps(leaves, sectorsize)]


@dataclass
class LogTables:
    """The same of the leaves of log trees, of what is replayed from them."""

    inodes: list[Columns] = field(default_factory=list)
    names: list[Columns] = field(default_factory=list)
    name_bytes: list[pa.Array] = field(default_factory=list)
    refs: list[Columns] = field(default_factory=list)
    ref_bytes: list[pa.Array] = field(default_factory=list)
    ranges: list[Columns] = field(default_factory=list)
    regular: list[Columns] = field(default_factory=list)
    inline: list[Columns] = field(default_factory=list)

    def add(self, leaves: Leaves) -> None:
        """The items of one batch of leaves."""
        self.inodes.append(_inodes(leaves))
        names, name_bytes = _names(leaves)
        self.names.append(names)
        self.name_bytes.append(name_bytes)
        refs, ref_bytes = _inode_refs(leaves)
        self.refs.append(refs)
        self.ref_bytes.append(ref_bytes)
        self.ranges.append(_dir_ranges(leaves))
        regular, inline = _file_extents(leaves, holes=True)
        self.regular.append(regular)
        self.inline.append(inline)


def join(parts: list[Columns]) -> Columns:
    """Batches of one table, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _columns(items: Items, records: np.ndarray, fields: Mapping[str, str]) -> Columns:
    """`fields` (column: field name) of the records as int64; numbers from 2^63 on turn negative, which no
    check lets pass."""
    return {column: records[name].astype(np.int64) for column, name in fields.items()} | {"leaf": items.leaf}


# ---- inodes and names --------------------------------------------------------------------------------------


def _inodes(leaves: Leaves) -> Columns:
    items = leaves.of(ondisk.INODE_ITEM_KEY, ondisk.INODE_ITEM.itemsize)
    records = items.records(ondisk.INODE_ITEM)
    columns = _columns(
        items,
        records,
        {name: name for name in ("generation", "size", "nlink", "uid", "gid", "mode", "flags")},
    )
    seconds = records["mtime.sec"].astype(np.int64)
    known = (seconds > -MAX_SECONDS) & (seconds < MAX_SECONDS)
    columns["mtime_ns"] = np.where(
        known, np.where(known, seconds, 0) * 1_000_000_000 + records["mtime.nsec"], NO_TIME
    )
    return columns | {"objectid": items.objectid, "record": items.logical}


def _names(leaves: Leaves) -> tuple[Columns, pa.Array]:
    """Directory entries from DIR_INDEX items, which hold one name each (DIR_ITEM says the same by hash, and
    can hold several)."""
    items = leaves.of(ondisk.DIR_INDEX_KEY, ondisk.DIR_ITEM.itemsize)
    records = items.records(ondisk.DIR_ITEM)
    length = records["name_len"].astype(np.int64)
    whole = (length > 0) & (ondisk.DIR_ITEM.itemsize + length <= items.size)
    if not whole.all():
        leaves.damage.add(
            "directory",
            "directory [entry is longer than its|entries are longer than their] item",
            items.logical[~whole],
        )
        items, records, length = items.select(whole), records[whole], length[whole]
    columns = _columns(items, records, {"target": "location.objectid", "target_type": "location.type"})
    columns |= {"objectid": items.objectid, "index": items.offset}
    return columns, binary(items.data, items.start + ondisk.DIR_ITEM.itemsize, length)


def _inode_refs(leaves: Leaves) -> tuple[Columns, pa.Array]:
    """The names that inodes say they have: (`objectid`, the directory; `target`, the inode; `index`), from
    INODE_REF and INODE_EXTREF items, which hold one or more each. The n-th names of all items are one step.
    """
    parts, starts, lengths = [], [EMPTY], [EMPTY]
    for key, record in (
        (ondisk.INODE_REF_KEY, ondisk.INODE_REF),
        (ondisk.INODE_EXTREF_KEY, ondisk.INODE_EXTREF),
    ):
        items = leaves.of(key, record.itemsize)
        at = items.start
        end = items.start + items.size
        while len(items):
            fields = ondisk.records_at(items.data, at, record)
            length = fields["name_len"].astype(np.int64)
            whole = (length > 0) & (at + record.itemsize + length <= end)
            leaves.damage.add(
                "directory",
                "[name of an inode is|names of inodes are] longer than [its|their] item",
                items.logical[~whole],
            )
            parent = items.offset if key == ondisk.INODE_REF_KEY else fields["parent"].astype(np.int64)
            columns = {"target": items.objectid, "objectid": parent, "leaf": items.leaf}
            columns["index"] = fields["index"].astype(np.int64)
            parts.append({name: values[whole] for name, values in columns.items()})
            starts.append((at + record.itemsize)[whole])
            lengths.append(length[whole])
            at = at + record.itemsize + length
            more = whole & (at + record.itemsize <= end)
            items, at, end = items.select(more), at[more], end[more]
    none = dict.fromkeys(("target", "objectid", "leaf", "index"), EMPTY)
    return join(parts) or none, binary(leaves.data, np.concatenate(starts), np.concatenate(lengths))


def _dir_ranges(leaves: Leaves) -> Columns:
    """Of which indexes of a directory a log has every entry that there is: [`start`, `end`], both
    included."""
    items = leaves.of(ondisk.DIR_LOG_INDEX_KEY, ondisk.DIR_LOG_ITEM.itemsize)
    end = items.records(ondisk.DIR_LOG_ITEM)["end"].astype(np.int64)
    end = np.where(end < 0, np.iinfo(np.int64).max, end)
    return {"leaf": items.leaf, "objectid": items.objectid, "start": items.offset, "end": end}


def binary(data: np.ndarray, starts: Int, lengths: Int) -> pa.Array:
    """data[starts[i]:+lengths[i]] as an Arrow binary array."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)  # one batch of leaves is far from 2 GiB
    values = gather(data, starts, lengths)
    return pa.Array.from_buffers(
        pa.binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(values)]
    )


# ---- where files lie ---------------------------------------------------------------------------------------


def _file_extents(leaves: Leaves, holes: bool = False) -> tuple[Columns, Columns]:
    """Extents in blocks of their own, with or without holes, and extents inside their item."""
    items = leaves.of(ondisk.EXTENT_DATA_KEY, ondisk.FILE_EXTENT_HEAD.itemsize)
    kind = items.records(ondisk.FILE_EXTENT_HEAD)["type"]
    inline = kind == ondisk.FILE_EXTENT_INLINE
    regular = ~inline & (kind <= ondisk.FILE_EXTENT_PREALLOC) & (items.size >= ondisk.FILE_EXTENT.itemsize)
    leaves.damage.add(
        "extents",
        "file extent [item has|items have] an unknown type, or [is|are] too short",
        items.logical[~inline & ~regular],
    )
    return _regular(items.select(regular), holes), _inline(items.select(inline))


def _regular(items: Items, holes: bool) -> Columns:
    """Rows with the fields of btrfs_file_extent_item; holes (disk_bytenr 0) only where they are asked for."""
    records = items.records(ondisk.FILE_EXTENT)
    fields = {
        name: name
        for name in (
            "type",
            "ram_bytes",
            "compression",
            "encryption",
            "disk_bytenr",
            "disk_num_bytes",
            "offset",
            "num_bytes",
        )
    }
    columns = _columns(items, records, fields) | {"objectid": items.objectid, "file_offset": items.offset}
    data = columns["disk_bytenr"] != 0
    return columns if holes or data.all() else {name: values[data] for name, values in columns.items()}


def _inline(items: Items) -> Columns:
    """Rows of content inside tree blocks: `start` is the first byte in the volume, `length` how many there
    are, `ram_bytes` how many they hold."""
    records = items.records(ondisk.FILE_EXTENT_HEAD)
    columns = _columns(items, records, {name: name for name in ("compression", "encryption", "ram_bytes")})
    start = items.logical + ondisk.FILE_EXTENT_HEAD.itemsize
    length = items.size - ondisk.FILE_EXTENT_HEAD.itemsize
    return columns | {
        "objectid": items.objectid,
        "file_offset": items.offset,
        "start": start,
        "length": length,
    }


# ---- what the allocator says -------------------------------------------------------------------------------


def _extent_items(leaves: Leaves) -> Columns:
    items = leaves.of(ondisk.EXTENT_ITEM_KEY, ondisk.EXTENT_ITEM.itemsize)
    flags = items.records(ondisk.EXTENT_ITEM)["flags"].astype(np.int64)
    return {
        "leaf": items.leaf,
        "start": items.objectid,
        "length": items.offset,
        "data": flags & ondisk.EXTENT_FLAG_DATA,
    }


def _metadata_items(leaves: Leaves) -> Columns:
    """Skinny extent items of tree blocks: their key's offset is the level, the length is a node's."""
    items = leaves.of(ondisk.METADATA_ITEM_KEY, ondisk.EXTENT_ITEM.itemsize)
    none = np.zeros(len(items), np.int64)
    return {"leaf": items.leaf, "start": items.objectid, "length": none - 1, "data": none}


def _groups(leaves: Leaves) -> Columns:
    items = leaves.of(ondisk.BLOCK_GROUP_ITEM_KEY, ondisk.BLOCK_GROUP_ITEM.itemsize)
    used = items.records(ondisk.BLOCK_GROUP_ITEM)["used"].astype(np.int64)
    return {"leaf": items.leaf, "start": items.objectid, "length": items.offset, "used": used}


def _accounts(leaves: Leaves) -> Columns:
    """The groups of which the free space tree has an account."""
    items = leaves.of(ondisk.FREE_SPACE_INFO_KEY, 0)
    return {"leaf": items.leaf, "start": items.objectid, "length": items.offset}


def _free_space_extents(leaves: Leaves) -> Columns:
    items = leaves.of(ondisk.FREE_SPACE_EXTENT_KEY, 0)
    return {"leaf": items.leaf, "start": items.objectid, "length": items.offset}


BITMAPS = 1 << 20
"""Bytes of free space bitmaps that are taken apart together."""


def _free_space_bitmaps(leaves: Leaves, sectorsize: int) -> Columns:
    """A bit for each sector of [objectid, objectid + offset), one where it is free, as runs."""
    items = leaves.of(ondisk.FREE_SPACE_BITMAP_KEY, 1)
    batch = np.cumsum(items.size) // BITMAPS
    parts, count = [], 0
    for number in np.unique(batch):
        parts.append(_bit_runs(items.select(batch == number), sectorsize))
        count += len(parts[-1]["leaf"])
        afford(leaves.reader, count * ROW, f"the rows of {count:,} runs of bitmaps")
    return join(parts) or _bit_runs(items, sectorsize)


def _bit_runs(items: Items, sectorsize: int) -> Columns:
    bits = np.unpackbits(gather(items.data, items.start, items.size), bitorder="little").astype(bool)
    ends = np.cumsum(items.size) * 8
    starts = ends - items.size * 8
    rising, falling = bits.copy(), bits.copy()
    rising[1:] &= ~bits[:-1]
    falling[:-1] &= ~bits[1:]
    rising[starts], falling[ends - 1] = bits[starts], bits[ends - 1]  # no run reaches into the next item
    low, high = np.flatnonzero(rising), np.flatnonzero(falling) + 1
    item = np.searchsorted(starts, low, "right") - 1
    begin = (low - starts[item]) * sectorsize
    length = np.minimum((high - starts[item]) * sectorsize, items.offset[item]) - begin
    return {"leaf": items.leaf[item], "start": items.objectid[item] + begin, "length": np.maximum(length, 0)}


# ---- the root tree -----------------------------------------------------------------------------------------


def roots_of(leaves: Leaves, wanted: set[int]) -> TreeRoots:
    """The trees that ROOT_ITEMs name. Subvolumes are always wanted."""
    items = leaves.of(ondisk.ROOT_ITEM_KEY, ondisk.ROOT_ITEM.itemsize)
    records = items.records(ondisk.ROOT_ITEM)
    used = records["bytenr"] != 0  # a subvolume whose creation was never committed has no tree yet
    items, records = items.select(used), records[used]
    drop_key = np.zeros(len(items), DROP_KEY)
    for name in drop_key.dtype.names or ():
        drop_key[name] = records[f"drop_progress.{name}"]
    column = {
        name: records[name].astype(np.int64)
        for name in ("bytenr", "level", "generation", "refs", "drop_level")
    }
    read = np.isin(items.objectid, list(wanted)) | is_subvolume(items.objectid)
    return TreeRoots(
        items.objectid, items.offset, column["bytenr"], column["level"], column["generation"], column["refs"],
        read, drop_key, column["drop_level"],
    )  # fmt: skip


def root_refs(leaves: Leaves) -> Columns:
    """ROOT_REFs: directory `dirid` of subvolume `parent` holds the subvolume `child`."""
    items = leaves.of(ondisk.ROOT_REF_KEY, ondisk.ROOT_REF.itemsize)
    dirid = items.records(ondisk.ROOT_REF)["dirid"].astype(np.int64)
    return {"leaf": items.leaf, "parent": items.objectid, "child": items.offset, "dirid": dirid}


def is_subvolume(tree_id: Int) -> np.ndarray:
    """Which tree ids are of subvolumes and snapshots (is_fstree)."""
    found: np.ndarray = (tree_id == ondisk.FS_TREE) | (tree_id >= ondisk.FIRST_FREE)
    return found
