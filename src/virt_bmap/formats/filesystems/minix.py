"""minix, versions 1 to 3: a bitmap of inodes, one of zones, a table of inodes, and trees of pointers.

    byte 1024      superblock
    block 2        inode map, zone map, inode table; then the zones

Sources: Linux v6.12, include/uapi/linux/minix_fs.h, fs/minix/ (inode.c, bitmap.c, itree_common.c, dir.c);
util-linux v2.39, disk-utils/fsck.minix.c.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, expand, ints, joined
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.formats.common.ragged import Ragged
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

NAME = "minix"
FEATURES = (
    "versions 1, 2 and 3, names of 14, 30 and 60 bytes, blocks of 1 to 32 KiB (version 3)",
    "holes, indirect blocks of all levels, device files",
    "the inode map and the zone map",
)
REFUSED = ("zones of several blocks", "volumes of big-endian machines")
ORACLES = ("fsck.minix (files, directories, zones in use)", "GRUB's reader (content)", "blkid")
CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: maps and tables fit the counts, and the volume",
        "indirect blocks: zones inside the volume, each referred to once",
        "directories: names, of inodes that are in use",
    ),
    unchecked=("link counts", "content of files"),
)

START = 1024
ROOT = 1
SUPERBLOCK = struct(24, [
    (0x00, "s_ninodes", "<u2"), (0x02, "s_nzones", "<u2"), (0x04, "s_imap_blocks", "<u2"),
    (0x06, "s_zmap_blocks", "<u2"), (0x08, "s_firstdatazone", "<u2"), (0x0A, "s_log_zone_size", "<u2"),
    (0x0C, "s_max_size", "<u4"), (0x10, "s_magic", "<u2"), (0x12, "s_state", "<u2"), (0x14, "s_zones", "<u4"),
])  # fmt: skip
SUPERBLOCK3 = struct(32, [
    (0x00, "s_ninodes", "<u4"), (0x06, "s_imap_blocks", "<u2"), (0x08, "s_zmap_blocks", "<u2"),
    (0x0A, "s_firstdatazone", "<u2"), (0x0C, "s_log_zone_size", "<u2"), (0x10, "s_max_size", "<u4"),
    (0x14, "s_zones", "<u4"), (0x18, "s_magic", "<u2"), (0x1C, "s_blocksize", "<u2"),
    (0x1E, "s_disk_version", "u1"),
])  # fmt: skip
INODE1 = struct(32, [
    (0x00, "i_mode", "<u2"), (0x02, "i_uid", "<u2"), (0x04, "i_size", "<u4"), (0x08, "i_mtime", "<u4"),
    (0x0C, "i_gid", "u1"), (0x0D, "i_nlinks", "u1"), (0x0E, "i_zone", "<u2", (9,)),
])  # fmt: skip
INODE2 = struct(64, [
    (0x00, "i_mode", "<u2"), (0x02, "i_nlinks", "<u2"), (0x04, "i_uid", "<u2"), (0x06, "i_gid", "<u2"),
    (0x08, "i_size", "<u4"), (0x0C, "i_atime", "<u4"), (0x10, "i_mtime", "<u4"), (0x14, "i_ctime", "<u4"),
    (0x18, "i_zone", "<u4", (10,)),
])  # fmt: skip
MAGICS = {0x137F: (1, 14), 0x138F: (1, 30), 0x2468: (2, 14), 0x2478: (2, 30), 0x4D5A: (3, 60)}
"""(version, bytes of a name)"""
VALID, ERRORS = 1, 2
"""Bits of s_state: unmounted in order; errors were found."""
DIRECT = 7
SECOND = 1_000_000_000
BATCH = 32 << 20


class Geometry(NamedTuple):
    """Where everything lies; offsets and sizes in bytes, but `first` and `zones`, which count zones."""

    version: int
    name_length: int
    block: int
    inodes: int
    inode_map: int
    zone_map: int
    table: int
    first: int
    zones: int
    state: int

    @property
    def inode(self) -> np.dtype[np.void]:
        return INODE1 if self.version == 1 else INODE2

    @property
    def pointer(self) -> str:
        """The type of zone numbers in indirect blocks."""
        return "<u2" if self.version == 1 else "<u4"


def probe(reader: Reader) -> bool:
    """The magic number of one of the versions."""
    return _magic(reader) is not None


def _magic(reader: Reader) -> tuple[int, int] | None:
    head = reader.read_clipped(START, SUPERBLOCK3.itemsize)
    old, new = int(record(head, SUPERBLOCK)["s_magic"]), int(record(head, SUPERBLOCK3)["s_magic"])
    found = MAGICS.get(old)
    return found if found and found[0] < 3 else MAGICS[new] if new == 0x4D5A else None


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds. Raises Corrupt where the superblock makes no sense."""
    geometry = read_superblock(reader)
    if geometry.state & ERRORS:
        damage.say("marked-damaged", "fsck.minix or the kernel has marked it as damaged", START + 0x12)
    rows = tables.ExtentRows()
    own_metadata(reader, geometry, rows)
    inode, found = read_inodes(reader, geometry)
    owner, block, zone = read_pointers(reader, geometry, inode, found, rows, damage)
    start, length, first = joined_zones(owner, block, zone)
    kind = KIND_OF_TYPE[tables.type_of_mode(widen(found["i_mode"], "i_mode"))]
    rows.add(
        kind[owner[first]], start * geometry.block, length * geometry.block,
        inode=inode[owner[first]], file_offset=block[first] * geometry.block,
    )  # fmt: skip
    return Filesystem(
        type=NAME, size=geometry.zones * geometry.block, block_size=geometry.block, root=ROOT,
        state=state_of(geometry), reader=reader,
        inodes=inode_table(geometry, inode, found),
        names=read_names(reader, geometry, inode, found, (owner, block, zone), damage),
        extents=rows.table(0), features=f"v{geometry.version} names-{geometry.name_length}",
    )  # fmt: skip


KIND_OF_TYPE = np.full(len(tables.TYPES), tables.DATA, np.int8)
KIND_OF_TYPE[tables.T_DIRECTORY], KIND_OF_TYPE[tables.T_SYMLINK] = tables.DIRECTORY, tables.SYMLINK


# ---- the superblock ----------------------------------------------------------------------------------------


def read_superblock(reader: Reader) -> Geometry:
    """Where everything lies; Corrupt where that does not fit."""
    version, name_length = _magic(reader) or (0, 0)
    head = reader.read_clipped(START, SUPERBLOCK3.itemsize)
    found = record(head, SUPERBLOCK3 if version == 3 else SUPERBLOCK)
    number = {name: int(found[name]) for name in found.dtype.names or ()}
    if number["s_log_zone_size"]:
        raise Unsupported(
            f"{reader.name}: s_log_zone_size is {number['s_log_zone_size']}; only 0 is supported", START
        )
    block = number.get("s_blocksize", 1024)
    zones = number["s_nzones"] if version == 1 else number["s_zones"]
    if block not in (1024, 2048, 4096, 8192, 16384, 32768):
        raise Corrupt(f"{reader.name}: superblock at byte {START}: blocks of {block} bytes", START)
    zone_map = (2 + number["s_imap_blocks"]) * block
    table = zone_map + number["s_zmap_blocks"] * block
    geometry = Geometry(
        version, name_length, block, number["s_ninodes"], 2 * block, zone_map, table,
        number["s_firstdatazone"], zones, number.get("s_state", VALID),
    )  # fmt: skip
    end = table + geometry.inodes * geometry.inode.itemsize
    if (
        end > geometry.first * block
        or geometry.first > zones
        or geometry.inodes >= 8 * (zone_map - 2 * block)
        or zones - geometry.first >= 8 * (table - zone_map)
    ):
        raise Corrupt(
            f"{reader.name}: superblock at byte {START}: "
            f"{plural(geometry.inodes, 'inode')}, {zones} zones, the first "
            f"for data {geometry.first}: they do not fit the maps",
            START,
        )
    if zones * block > reader.size:
        raise Corrupt(
            f"{reader.name}: superblock at byte {START}: {zones} zones of {block} bytes do not fit into "
            f"{reader.size} bytes",
            START,
        )
    return geometry


def state_of(geometry: Geometry) -> str:
    """Version 3 keeps no state. What is not marked as valid was mounted when it was copied."""
    return tables.CLEAN if geometry.state & VALID else tables.IN_USE


def own_metadata(reader: Reader, geometry: Geometry, rows: tables.ExtentRows) -> None:
    """The filesystem's own structures, and what its zone map calls free: bit 1 is the first data zone."""
    data = geometry.first * geometry.block
    places = {
        "superblock": (START, geometry.inode_map), "inode map": (geometry.inode_map, geometry.zone_map),
        "zone map": (geometry.zone_map, geometry.table), "inode table": (geometry.table, data),
    }  # fmt: skip
    rows.add(tables.BOOT, 0, START, part="boot block")
    for part, (start, end) in places.items():
        rows.add(tables.METADATA, start, end - start, part=part)
    size = ints(geometry.table - geometry.zone_map)
    bits = geometry.zones - geometry.first + 1
    low, high = bitmap_runs(reader, ints(geometry.zone_map), size, bits, value=False)
    low, high = np.maximum(low, 1) + geometry.first - 1, np.maximum(high, 1) + geometry.first - 1
    rows.add(tables.FREE, low * geometry.block, (high - low) * geometry.block)


# ---- inodes ------------------------------------------------------------------------------------------------


def read_inodes(reader: Reader, geometry: Geometry) -> tuple[Int, np.ndarray]:
    """(number, record) of every inode that the inode map calls used; bit 1 is the root's."""
    size = ints(geometry.zone_map - geometry.inode_map)
    low, high = bitmap_runs(reader, ints(geometry.inode_map), size, geometry.inodes + 1, value=True)
    run, step = expand(high - low)
    inode = low[run] + step
    inode = inode[inode > 0]
    record_size = geometry.inode.itemsize
    found = np.zeros(len(inode), geometry.inode)
    for part, blocks in reader.batches(geometry.table + (inode - 1) * record_size, record_size, BATCH):
        found[part] = records(blocks, geometry.inode)
    return inode, found


def inode_table(geometry: Geometry, inode: Int, found: np.ndarray) -> pa.Table:
    mode = widen(found["i_mode"], "i_mode")
    return tables.make(
        "inodes", volume=0, inode=inode, type=tables.type_of_mode(mode), mode=mode,
        uid=widen(found["i_uid"], "i_uid"), gid=widen(found["i_gid"], "i_gid"),
        size=widen(found["i_size"], "i_size"), nlink=widen(found["i_nlinks"], "i_nlinks"),
        mtime_ns=widen(found["i_mtime"], "i_mtime") * SECOND,
        flags=np.where(found["i_nlinks"] == 0, tables.I_DELETED, 0),
        record_offset=geometry.table + (inode - 1) * geometry.inode.itemsize,
    )  # fmt: skip


# ---- where content lies ------------------------------------------------------------------------------------


def read_pointers(
    reader: Reader, geometry: Geometry, inode: Int, found: np.ndarray, rows: tables.ExtentRows, damage: Damage
) -> tuple[Int, Int, Int]:
    """(position of the inode, block of the file, zone) of all content, sorted; indirect blocks become rows.

    The trees of all inodes are walked together, a level at a time. A block is read for the first that
    refers to it: so a disk of n bytes has no more than n / 2 pointers.
    """
    kind = tables.type_of_mode(widen(found["i_mode"], "i_mode"))
    has_content = np.isin(kind, (tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK))
    pointers = np.where(has_content[:, None], widen(found["i_zone"], "i_zone"), 0)
    fan = geometry.block // np.dtype(geometry.pointer).itemsize
    owner, block = (each.ravel() for each in np.indices((len(inode), DIRECT)))
    files = "[zone of a file lies|zones of files lie]"
    done = [_there(geometry, owner, block, pointers[:, :DIRECT].ravel(), files, damage)]
    base = DIRECT
    seen = np.zeros(geometry.zones, bool)
    for level in range(1, pointers.shape[1] - DIRECT + 1):
        at = np.arange(len(inode)), np.full(len(inode), base), pointers[:, DIRECT + level - 1]
        base += fan**level
        for depth in range(level, 0, -1):
            owner, block, zone = _there(geometry, *at, "indirect [block lies|blocks lie]", damage)
            new = np.zeros(len(zone), bool)
            new[np.unique(zone, return_index=True)[1]] = True
            new &= ~seen[zone]
            what = "indirect [block is|blocks are] referred to again"
            damage.check(new, "twice", what, zone * geometry.block)
            owner, block, zone = owner[new], block[new], zone[new]
            seen[zone] = True
            rows.add(
                tables.TREE, zone * geometry.block, np.full(len(zone), geometry.block),
                inode=inode[owner], part="indirect block",
            )  # fmt: skip
            at = _children(reader, geometry, owner, block, zone, fan ** (depth - 1))
        done.append(_there(geometry, *at, files, damage))
    owner, block, zone = joined(done, 3)
    order = np.lexsort((block, owner))
    return owner[order], block[order], zone[order]


def _children(
    reader: Reader, geometry: Geometry, owner: Int, block: Int, zone: Int, step: int
) -> tuple[Int, Int, Int]:
    """What these indirect blocks hold but holes; each pointer stands for `step` blocks of the file."""
    parts = []
    for part, data in reader.batches(zone * geometry.block, geometry.block, BATCH):
        child = data.view(geometry.pointer)
        row, place = np.nonzero(child)
        parts.append(
            (owner[part][row], block[part][row] + place * step, widen(child[row, place], "zone")),
        )
    found = joined(parts, 3)
    return found[0], found[1], found[2]


def _there(
    geometry: Geometry, owner: Int, block: Int, zone: Int, what: str, damage: Damage
) -> tuple[Int, Int, Int]:
    """Without holes, and without what lies outside."""
    good = zone != 0
    owner, block, zone = owner[good], block[good], zone[good]
    inside = (zone >= geometry.first) & (zone < geometry.zones)
    damage.check(inside, "outside", f"{what} outside the data zones", zone * geometry.block)
    return owner[inside], block[inside], zone[inside]


def joined_zones(owner: Int, block: Int, zone: Int) -> tuple[Int, Int, Int]:
    """(first zone, zones, position of the first pointer) of each run that goes on in file and volume."""
    if not len(zone):
        return zone, zone, zone
    goes_on = (np.diff(owner) == 0) & (np.diff(block) == 1) & (np.diff(zone) == 1)
    first = np.flatnonzero(np.append(True, ~goes_on))
    return zone[first], np.diff(np.append(first, len(zone))), first


# ---- names -------------------------------------------------------------------------------------------------


def read_names(
    reader: Reader, geometry: Geometry, inode: Int, found: np.ndarray, content: tuple[Int, Int, Int],
    damage: Damage,
) -> pa.Table:  # fmt: skip
    """The names of all directories: records of one size, an inode and a name up to the first NUL."""
    kind, size = tables.type_of_mode(widen(found["i_mode"], "i_mode")), widen(found["i_size"], "i_size")
    owner, block, zone = content
    mine = (kind[owner] == tables.T_DIRECTORY) & (block * geometry.block < size[owner])
    owner, block, zone = owner[mine], block[mine], zone[mine]
    number = 4 if geometry.version == 3 else 2
    entry = struct(number + geometry.name_length, [(0, "inode", f"<u{number}")])
    parts, parents, children = [], [], []
    for part, data in reader.batches(zone * geometry.block, geometry.block, BATCH):
        per_block = geometry.block // entry.itemsize
        table = data[:, : per_block * entry.itemsize].reshape(-1, entry.itemsize)
        child, name = widen(records(table, entry)["inode"], "inode"), table[:, number:]
        holder, place = np.repeat(owner[part], per_block), np.tile(np.arange(per_block), len(data))
        inside = np.repeat(block[part], per_block) * geometry.block + place * entry.itemsize < size[holder]
        length = np.where((name == 0).any(axis=1), (name == 0).argmax(axis=1), geometry.name_length)
        dots = (name[:, 0] == ord(".")) & ((length == 1) | ((length == 2) & (name[:, 1] == ord("."))))
        row = np.flatnonzero((child > 0) & inside & ~dots)
        places = (zone[part][:, None] * geometry.block + np.arange(per_block) * entry.itemsize).ravel()[row]
        good = (child[row] <= geometry.inodes) & (length[row] > 0)
        damage.check(good, "directory", "[entry has|entries have] no name, or an impossible inode", places)
        row = row[good]
        flat = np.ascontiguousarray(name).reshape(-1)
        parts.append(Ragged.cut(flat, row * geometry.name_length, length[row]))
        parents.append(inode[holder[row]])
        children.append(child[row])
    if not parts:
        return tables.empty("names")
    return tables.make(
        "names", volume=0, parent=np.concatenate(parents), inode=np.concatenate(children),
        name=Ragged.concat(parts).arrow(),
    )  # fmt: skip


def _structures() -> Structures:
    return {
        "superblock": Structure(SUPERBLOCK), "superblock, v3": Structure(SUPERBLOCK3),
        "inode table": Structure(INODE2, many=True), "inode table, v1": Structure(INODE1, many=True),
    }  # fmt: skip


FORMAT = FilesystemFormat(
    NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, allocator="the zone map",
    structures=_structures, fixed_records=True,
)  # fmt: skip
