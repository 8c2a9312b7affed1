"""Allocation groups: headers, free space, and the B-trees of each group, all groups and trees in one walk a kind.

The allocator of XFS is the B-tree of free extents by block number, together with the AGFL: a few blocks that each group
keeps ready for its own trees.
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Bool, Bytes, Int, expand, union
from virt_bmap.filesystems.xfs import disk
from virt_bmap.filesystems.xfs.btree import Nodes, Shape, Walked, fits, walk
from virt_bmap.filesystems.xfs.damage import Damage
from virt_bmap.filesystems.xfs.geometry import Geometry
from virt_bmap.layout import records
from virt_bmap.reader import Reader

HEADERS = ("superblock", "AGF", "AGI", "AGFL")
"""One sector each, at the start of every group."""

BNOBT = Shape("bnobt", (b"ABTB", b"AB3B"), 8, 8)
CNTBT = Shape("cntbt", (b"ABTC", b"AB3C"), 8, 8, leaves=False)
RMAPBT = Shape("rmapbt", (b"", b"RMB3"), 40, 24, leaves=False)
REFCOUNTBT = Shape("refcountbt", (b"", b"R3FC"), 4, 12)
INOBT = Shape("inobt", (b"IABT", b"IAB3"), 4, 16)
FINOBT = Shape("finobt", (b"FIBT", b"FIB3"), 4, 16, leaves=False)


@dataclass(frozen=True)
class Groups:
    """What the groups say. Byte ranges are (starts, ends); `chunks` are inode chunk records with the group of each.

    `shared` are the ranges that several files own on purpose, sorted and merged; `unlinked` are inodes at the head of a list of orphans.
    """

    chunks_agno: Int
    chunks: np.ndarray
    shared: tuple[Int, Int]
    unlinked: Int


def read_groups(reader: Reader, geometry: Geometry, damage: Damage, rows: tables.ExtentRows) -> Groups:
    """Read all headers and trees; their own blocks, free space and staging extents become `rows`."""
    agno = np.arange(geometry.groups, dtype=np.int64)
    headers, agno = _read_headers(reader, geometry, damage, agno)
    agf, agi = records(headers[:, 1], disk.AGF), records(headers[:, 2], disk.AGI)
    agf_good = _check_header(geometry, damage, agno, agf["agf_magicnum"], b"XAGF", agf["agf_seqno"], "AGF")
    agi_good = _check_header(geometry, damage, agno, agi["agi_magicnum"], b"XAGI", agi["agi_seqno"], "AGI")
    _header_rows(geometry, agno, rows)
    _free_list(geometry, damage, agno[agf_good], agf[agf_good], headers[agf_good, 3], rows)

    def tree(shape: Shape, good: Bool, header: np.ndarray, root: str, level: str) -> Walked:
        group = agno[good]
        block = (group << geometry.agblklog) | header[root][good].astype(np.int64)
        block = np.where(header[root][good] < geometry.agblocks, block, -1)
        walked = walk(reader, geometry, damage, shape, Nodes(group, block, header[level][good].astype(np.int64) - 1))
        rows.add(tables.METADATA, geometry.block_offset(walked.nodes.block), geometry.block_size, part=shape.name)
        return walked

    _free_space(geometry, damage, tree(BNOBT, agf_good, agf, "agf_bno_root", "agf_bno_level"), rows)
    tree(CNTBT, agf_good, agf, "agf_cnt_root", "agf_cnt_level")
    inobt = tree(INOBT, agi_good, agi, "agi_root", "agi_level")
    if geometry.has("finobt"):
        tree(FINOBT, agi_good, agi, "agi_free_root", "agi_free_level")
    if geometry.has("rmapbt"):
        tree(RMAPBT, agf_good, agf, "agf_rmap_root", "agf_rmap_level")
    shared = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if geometry.has("reflink"):
        shared = _shared(geometry, damage, tree(REFCOUNTBT, agf_good, agf, "agf_refcount_root", "agf_refcount_level"), rows)
    heads = agi["agi_unlinked"][agi_good].astype(np.int64)
    group, bucket = np.nonzero(heads != disk.NULLAGINO)
    unlinked = (agno[agi_good][group] << geometry.agi_bits) | heads[group, bucket]
    return Groups(inobt.owner, records(inobt.rows, disk.INOBT_REC), shared, unlinked)


def _read_headers(reader: Reader, geometry: Geometry, damage: Damage, agno: Int) -> tuple[Bytes, Int]:
    """The header sectors (groups, 4, sector size) of those groups whose headers can be read, and their numbers."""
    size = len(HEADERS) * geometry.sector_size
    start = geometry.group_offset(agno)
    inside = damage.check(
        start + size <= geometry.limit, "group-header", "allocation groups' headers lie behind the volume's end", start
    )
    agno = agno[inside]
    return reader.read_blocks(start[inside], size).reshape(len(agno), len(HEADERS), geometry.sector_size), agno


def _check_header(
    geometry: Geometry, damage: Damage, agno: Int, magic: np.ndarray, wanted: bytes, seqno: np.ndarray, name: str
) -> Bool:
    at = geometry.group_offset(agno) + HEADERS.index(name) * geometry.sector_size
    good = (magic == wanted) & (seqno == agno)
    return damage.check(good, f"{name.lower()}-header", f"{name} sectors have a wrong magic number or group number", at)


def _header_rows(geometry: Geometry, agno: Int, rows: tables.ExtentRows) -> None:
    """The four sectors, and what is left of their last block."""
    start, sector = geometry.group_offset(agno), geometry.sector_size
    for number, name in enumerate(HEADERS):
        rows.add(tables.METADATA, start + number * sector, sector, part=name)
    size = len(HEADERS) * sector
    rows.add(tables.METADATA, start + size, -size % geometry.block_size, part="AG header padding")


def _free_list(geometry: Geometry, damage: Damage, agno: Int, agf: np.ndarray, sectors: Bytes, rows: tables.ExtentRows) -> None:
    """The AGFL: `agf_flcount` entries from `agf_flfirst`, round and round the sector."""
    header = disk.AGFL_HEADER if geometry.crc else 0
    entries = np.ascontiguousarray(sectors[:, header : header + (geometry.sector_size - header) // 4 * 4]).view(">u4")
    count, first = agf["agf_flcount"].astype(np.int64), agf["agf_flfirst"].astype(np.int64)
    at = geometry.group_offset(agno) + HEADERS.index("AGFL") * geometry.sector_size
    good = (count <= entries.shape[1]) & (first < entries.shape[1])
    if geometry.crc:
        good &= (sectors[:, :4].copy().view("S4")[:, 0] == disk.AGFL_MAGIC) if len(sectors) else True
    damage.check(good, "agfl", "AGFL sectors have a wrong magic number or count", at)
    group, step = expand(np.where(good, count, 0))
    block = entries[group, (first[group] + step) % entries.shape[1]].astype(np.int64)
    one = np.ones(len(block), np.int64)
    good = damage.check(fits(geometry, block, one, agno[group]), "agfl-entry", "AGFL entries lie outside their group", at[group])
    start = geometry.block_offset((agno[group] << geometry.agblklog) | block)[good]
    rows.add(tables.FREE, start, geometry.block_size, part="AGFL")


def _ranges(geometry: Geometry, damage: Damage, walked: Walked, start: Int, count: Int, name: str) -> tuple[Int, Int, Bool]:
    """Records of a tree as (starts, ends) in bytes, and which of the records these are."""
    where = geometry.group_offset(walked.owner)
    good = damage.check(
        fits(geometry, start, count, walked.owner), f"{name}-record", f"records of a {name} lie outside their group", where
    )
    first = where[good] + start[good] * geometry.block_size
    return first, first + count[good] * geometry.block_size, good


def _free_space(geometry: Geometry, damage: Damage, walked: Walked, rows: tables.ExtentRows) -> None:
    found = records(walked.rows, disk.ALLOC_REC)
    start, count = found["ar_startblock"].astype(np.int64), found["ar_blockcount"].astype(np.int64)
    starts, ends, _ = _ranges(geometry, damage, walked, start, count, BNOBT.name)
    starts, ends = union(starts, ends)
    rows.add(tables.FREE, starts, ends - starts)


def _shared(geometry: Geometry, damage: Damage, walked: Walked, rows: tables.ExtentRows) -> tuple[Int, Int]:
    """Ranges with more than one owner, merged. Copy-on-write staging extents, which no file owns yet, become rows."""
    found = records(walked.rows, disk.REFCOUNT_REC)
    raw, count = found["rc_startblock"].astype(np.int64), found["rc_blockcount"].astype(np.int64)
    starts, ends, good = _ranges(geometry, damage, walked, raw & ~disk.REFC_COWFLAG, count, REFCOUNTBT.name)
    staging = (raw[good] & disk.REFC_COWFLAG) != 0
    rows.add(tables.METADATA, starts[staging], (ends - starts)[staging], part="CoW staging")
    several = ~staging & (found["rc_refcount"][good] > 1)
    return union(starts[several], ends[several])
