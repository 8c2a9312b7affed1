"""Inodes and directories, level by level from the root.

An inode lies at 32 bytes times its number, so a level is one read.

Sources: Linux fs/erofs/erofs_fs.h (structures), inode.c, dir.c, namei.c.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, gather, union
from virt_bmap.core.layout import records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import allowance
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions

FLAT_PLAIN, COMPRESSED_FULL, FLAT_INLINE, COMPRESSED_COMPACT, CHUNK_BASED = range(5)
MAX_LEVELS = 2048
"""More levels than a path of 4096 bytes can name."""
BATCH = 32 << 20
"""Bytes of directories or indexes read at a time."""
NEAR = 4096
"""Pieces at most this far apart are read in one go."""
HOLE = 0xFFFFFFFF

INODE = struct(64, [
    (0, "i_format", "<u2"), (2, "i_xattr_icount", "<u2"), (4, "i_mode", "<u2"), (16, "i_u", "<u4"),
    (6, "compact_nlink", "<u2"), (8, "compact_size", "<u4"), (24, "compact_uid", "<u2"),
    (26, "compact_gid", "<u2"), (8, "i_size", "<u8"), (24, "i_uid", "<u4"), (28, "i_gid", "<u4"),
    (32, "i_mtime", "<u8"), (40, "i_mtime_nsec", "<u4"), (44, "i_nlink", "<u4"),
])  # fmt: skip
"""Both kinds of inode as one struct: the compact one has
32 bytes and fields of its own, the extended one 64."""
DIRENT = struct(12, [(0, "nid", "<u8"), (8, "nameoff", "<u2"), (10, "file_type", "u1")])
COLUMNS = (
    "nid",
    "at",
    "layout",
    "mode",
    "uid",
    "gid",
    "size",
    "nlink",
    "mtime_ns",
    "union",
    "xattr_at",
    "xattr_size",
    "body",
)


@dataclass
class InodeTree:
    """All inodes in the columns COLUMNS, and all names.

    `at` is where the inode lies, `xattr_at` and `body` where its attributes and what follows them (index,
    chunks or inline tail) do, in bytes of the volume."""

    column: dict[str, Int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, EMPTY))
    parent: Int = field(default_factory=lambda: EMPTY)
    child: Int = field(default_factory=lambda: EMPTY)
    name: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    name_length: Int = field(default_factory=lambda: EMPTY)


class InodeLayout(NamedTuple):
    """What the superblock says that inodes need: sizes and places in bytes, times in nanoseconds."""

    reader: Reader
    block_size: int
    meta: int
    build_time_ns: int


def pieces(reader: Reader, at: Int, length: Int) -> Bytes:
    """The ranges one after the other; what lies near each other is read in one go, what is beyond the end is
    zero."""
    low, high = np.clip(at, 0, reader.size), np.clip(at + length, 0, reader.size)
    starts, ends = union(low, high, NEAR)
    data = np.append(
        reader.read_ranges(starts, ends - starts), np.zeros(int(length.max(initial=0)), np.uint8)
    )
    base = np.cumsum(ends - starts) - (ends - starts)
    row = np.clip(np.searchsorted(starts, low, "right") - 1, 0, max(len(starts) - 1, 0))
    where = base[row] + low - starts[row] if len(starts) else np.zeros(len(at), np.int64)
    inside = high - low
    if (inside == length).all():
        return gather(data, where, length)
    result = np.zeros(int(length.sum()), np.uint8)
    owner, nth = expand(inside)
    result[(np.cumsum(length) - length)[owner] + nth] = data[where[owner] + nth]
    return result


def walk(volume: InodeLayout, roots: Int, damage: Damage) -> InodeTree:
    """Everything that can be reached from the inode numbers `roots`: the root directory, the packed inode."""
    found: list[dict[str, Int]] = []
    names: list[tuple[Int, Int, Bytes, Int]] = []
    seen, level, lost, budget = EMPTY, roots, 0, 0
    for _ in range(MAX_LEVELS):
        level = np.unique(level)
        level = level[positions(seen, level) < 0] if len(seen) else level
        if not len(level):
            break
        seen = np.append(seen, level)
        column = read_inodes(volume, level)
        good = (column["layout"] <= CHUNK_BASED) & (column["mode"] >> 12 != 0) & (column["size"] >= 0)
        lost += int((~good).sum())
        column = {name: values[good] for name, values in column.items()}
        found.append(column)
        own = {name: values[column["mode"] >> 12 == 0o4] for name, values in column.items()}
        small = np.minimum(own["size"], volume.reader.size + 1).astype(float)  # sums of these stay numbers
        usable = np.cumsum(small) + budget <= allowance(volume.reader)
        lost += int((~usable).sum())
        own = {name: values[usable] for name, values in own.items()}
        budget += int(own["size"].sum())
        batch = np.cumsum(own["size"]) // BATCH
        below = [EMPTY]
        for number in np.unique(batch):
            part = {name: values[batch == number] for name, values in own.items()}
            parent, nid, name, length, broken = read_directories(volume, part)
            lost += broken
            names.append((parent, nid, name, length))
            below.append(nid)
        level = np.concatenate(below)
    else:
        damage.say("too-deep", f"more than {MAX_LEVELS} levels of directories")
    what = (
        "[inode, directory or directory block contradicts itself or lies|inodes, directories or directory "
        "blocks contradict themselves or lie] outside the volume"
    )
    damage.add("inode", what, count=lost)
    return _join(found, names)


def _join(found: list[dict[str, Int]], names: list[tuple[Int, Int, Bytes, Int]]) -> InodeTree:
    column = {name: np.concatenate([EMPTY, *(part[name] for part in found)]) for name in COLUMNS}
    parent, child, length = (np.concatenate([EMPTY, *(part[i] for part in names)]) for i in (0, 1, 3))
    name = np.concatenate([np.zeros(0, np.uint8), *(part[2] for part in names)])
    keep = positions(column["nid"], child) >= 0 if len(child) else np.zeros(0, bool)
    if not keep.all():
        name = gather(name, (np.cumsum(length) - length)[keep], length[keep])
    return InodeTree(column, parent[keep], child[keep], name, length[keep])


def read_inodes(volume: InodeLayout, nid: Int) -> dict[str, Int]:
    """The inodes of these numbers as COLUMNS; layout 255 where one lies outside the volume."""
    at = volume.meta + nid * 32
    raw = records(pieces(volume.reader, at, np.full(len(at), 64, np.int64)).reshape(-1, 64), INODE)
    form = widen(raw["i_format"], "i_format")
    extended = (form & 1) != 0
    size = np.where(
        extended, np.minimum(raw["i_size"], np.uint64(2**62)).astype(np.int64), raw["compact_size"]
    )
    own = np.where(extended, 64, 32)
    count = widen(raw["i_xattr_icount"], "i_xattr_icount")
    xattr_size = np.where(count > 0, 12 + 4 * (count - 1), 0)
    inside = (nid < 2**56) & (at >= 0) & (at + own + xattr_size <= volume.reader.size) & (form < 32)
    seconds = np.minimum(raw["i_mtime"], np.uint64(2**33)).astype(np.int64) * 1_000_000_000 + raw[
        "i_mtime_nsec"
    ].astype(np.int64)

    def either(long: str, short: str) -> Int:
        return np.where(extended, raw[long], raw[short]).astype(np.int64)

    return {
        "nid": nid, "at": at, "layout": np.where(inside, form >> 1 & 7, 255),
        "mode": widen(raw["i_mode"], "i_mode"), "uid": either("i_uid", "compact_uid"),
        "gid": either("i_gid", "compact_gid"), "size": size, "nlink": either("i_nlink", "compact_nlink"),
        "mtime_ns": np.where(extended, seconds, volume.build_time_ns), "union": widen(raw["i_u"], "i_u"),
        "xattr_at": at + own, "xattr_size": xattr_size, "body": at + own + xattr_size,
    }  # fmt: skip


def flat_ranges(column: dict[str, Int], block_size: int) -> tuple[Int, Int, Int]:
    """(start, whole bytes there, bytes of the inline tail) of files in one piece: the tail of FLAT_INLINE
    lies after the inode."""
    inline = column["layout"] == FLAT_INLINE
    tail = np.where(inline, np.where(column["size"] > 0, (column["size"] - 1) % block_size + 1, 0), 0)
    whole = column["size"] - tail
    return np.where(whole > 0, column["union"] * block_size, 0), whole, tail


def read_directories(volume: InodeLayout, own: dict[str, Int]) -> tuple[Int, Int, Bytes, Int, int]:
    """(parent, nid, names, their lengths, how many blocks are broken) of all entries but '.' and '..' of flat
    directories."""
    size = volume.block_size
    start, whole, tail = flat_ranges(own, size)
    flat = (own["layout"] == FLAT_PLAIN) | (own["layout"] == FLAT_INLINE)
    flat &= (start + whole <= volume.reader.size) & (own["body"] + tail <= volume.reader.size)
    broken = int((~flat).sum())
    start, whole, tail, body, nid = start[flat], whole[flat], tail[flat], own["body"][flat], own["nid"][flat]
    row, nth = expand(-(-whole // size))
    at = np.concatenate([start[row] + nth * size, body[tail > 0]])
    length = np.concatenate([np.minimum(size, whole[row] - nth * size), tail[tail > 0]])
    owner = np.concatenate([nid[row], nid[tail > 0]])
    data = np.append(pieces(volume.reader, at, length), np.zeros(16, np.uint8))
    base = np.cumsum(length) - length
    first = data[base + 8].astype(np.int64) | data[base + 9].astype(np.int64) << 8 if len(base) else EMPTY
    good = (first >= 12) & (first % 12 == 0) & (first <= length)
    broken += int((~good).sum())
    block, nth = expand(np.where(good, first // 12, 0))
    entry = base[block] + 12 * nth
    raw = records(data[entry[:, None] + np.arange(12)], DIRENT) if len(entry) else np.zeros(0, DIRENT)
    low = widen(raw["nameoff"], "nameoff")
    last = np.append(block[1:] != block[:-1], True)[: len(block)]
    high = np.where(last, length[block], np.append(low[1:], 0)[: len(low)])
    sane = (low < high) & (high <= length[block]) & (low >= first[block])
    broken += int((~sane).sum())
    low, high = np.where(sane, low, 0), np.where(sane, high, 0)
    high = _without_padding(data, base[block], low, high, np.flatnonzero(last & sane))
    begin = base[block] + low
    dots = (
        ((high - low == 1) | ((high - low == 2) & (data[begin + 1] == ord(".")))) & (data[begin] == ord("."))
        if len(begin)
        else sane
    )
    keep = sane & ~dots & (high > low)
    name = gather(data, begin[keep], (high - low)[keep])
    child = np.minimum(raw["nid"], np.uint64(2**57)).astype(np.int64)
    return owner[block][keep], child[keep], name, (high - low)[keep], broken


def _without_padding(data: Bytes, base: Int, low: Int, high: Int, rows: Int) -> Int:
    """The last name of a block ends at its first NUL."""
    row, nth = expand(high[rows] - low[rows])
    zero = data[base[rows][row] + low[rows][row] + nth] == 0
    where, first = np.unique(row[zero], return_index=True)
    high = high.copy()
    high[rows[where]] = low[rows[where]] + nth[zero][first]
    return high


def inode_table(tree: InodeTree, packed: int) -> pa.Table:
    column = tree.column
    kind = tables.type_of_mode(column["mode"])
    compressed = np.isin(column["layout"], (COMPRESSED_FULL, COMPRESSED_COMPACT))
    return tables.make(
        "inodes", volume=np.zeros(len(kind), np.int64), inode=column["nid"],
        type=np.where(column["nid"] == packed, tables.T_METADATA, kind).astype(np.uint8), mode=column["mode"],
        uid=column["uid"], gid=column["gid"], size=column["size"], nlink=column["nlink"],
        mtime_ns=column["mtime_ns"], flags=compressed * np.int64(tables.I_COMPRESSED),
        record_offset=column["at"],
    )  # fmt: skip


def name_table(tree: InodeTree) -> pa.Table:
    offsets = np.append(0, np.cumsum(tree.name_length)).astype(np.int32)
    names = pa.Array.from_buffers(
        pa.binary(), len(tree.name_length), [None, pa.py_buffer(offsets), pa.py_buffer(tree.name)]
    )
    return tables.make(
        "names", volume=np.zeros(len(names), np.int64), parent=tree.parent, inode=tree.child, name=names
    )
