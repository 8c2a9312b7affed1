"""Allocation groups: headers, free space, and the B-trees of each group, all groups and trees in one walk a
kind.

The allocator of XFS is the B-tree of free extents by block number, together with the AGFL: a few blocks that
each group keeps ready for its own trees.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Bool, Bytes, Int, expand, subtract, union
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.filesystems.xfs import ondisk
from virt_bmap.formats.filesystems.xfs.btree import Nodes, Shape, Walked, fits, walk
from virt_bmap.formats.filesystems.xfs.intents import Intents, ranges
from virt_bmap.formats.filesystems.xfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

HEADERS = ("superblock", "AGF", "AGI", "AGFL")
"""One sector each, at the start of every group."""


class GroupTree(NamedTuple):
    """A B-tree that every group has one of: its shape, where its root and height stand, and the feature that
    brings it."""

    shape: Shape
    header: str
    root: str
    level: str
    feature: str = ""


TREES = (
    GroupTree(Shape("bnobt", (b"ABTB", b"AB3B"), 8, 8), "AGF", "agf_bno_root", "agf_bno_level"),
    GroupTree(Shape("cntbt", (b"ABTC", b"AB3C"), 8, 8, leaves=False), "AGF", "agf_cnt_root", "agf_cnt_level"),
    GroupTree(Shape("inobt", (b"IABT", b"IAB3"), 4, 16), "AGI", "agi_root", "agi_level"),
    GroupTree(
        Shape("finobt", (b"FIBT", b"FIB3"), 4, 16, leaves=False),
        "AGI",
        "agi_free_root",
        "agi_free_level",
        "finobt",
    ),
    GroupTree(
        Shape("rmapbt", (b"", b"RMB3"), 40, 24, leaves=False),
        "AGF",
        "agf_rmap_root",
        "agf_rmap_level",
        "rmapbt",
    ),
    GroupTree(
        Shape("refcountbt", (b"", b"R3FC"), 4, 12),
        "AGF",
        "agf_refcount_root",
        "agf_refcount_level",
        "reflink",
    ),
)


class AllocationGroups(NamedTuple):
    """What the groups say. Byte ranges are (starts, ends); `chunks` are inode chunk records with the group of
    each.

    `shared` are the ranges that several files own on purpose, sorted and merged; `unlinked` are inodes at the
    head of a list of orphans.
    """

    chunks_agno: Int
    chunks: np.ndarray
    shared: tuple[Int, Int]
    unlinked: Int


class _Header(NamedTuple):
    """AGF or AGI of those groups where it is sound, and the groups' numbers."""

    agno: Int
    record: np.ndarray


def read_groups(
    reader: Reader, geometry: Geometry, damage: Damage, intents: Intents, rows: tables.ExtentRows
) -> AllocationGroups:
    """Read all headers and trees; their own blocks, free space and staging extents become `rows`."""
    sectors, agno = _read_headers(reader, geometry, damage)
    headers = {"AGF": _header(geometry, damage, "AGF", ondisk.AGF, sectors[:, 1], agno),
               "AGI": _header(geometry, damage, "AGI", ondisk.AGI, sectors[:, 2], agno)}  # fmt: skip
    _header_rows(geometry, agno, rows)
    _free_list(geometry, damage, headers["AGF"], sectors[np.isin(agno, headers["AGF"].agno), 3], rows)
    found: dict[str, Walked] = {}
    for tree in TREES:
        if not tree.feature or geometry.has(tree.feature):
            found[tree.shape.name] = _walk(reader, geometry, damage, tree, headers[tree.header], rows)
    _free_space(geometry, damage, found["bnobt"], rows)
    shared = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if "refcountbt" in found:
        shared = _shared(geometry, damage, found["refcountbt"], intents, rows)
    inobt = found["inobt"]
    return AllocationGroups(
        inobt.owner, records(inobt.rows, ondisk.INOBT_REC), shared, _unlinked(geometry, headers["AGI"])
    )


def _read_headers(reader: Reader, geometry: Geometry, damage: Damage) -> tuple[Bytes, Int]:
    """The header sectors (groups, 4, sector size) of those groups whose headers can be read, and their
    numbers."""
    size = len(HEADERS) * geometry.sector_size
    afford(reader, geometry.groups * size, f"headers of {plural(geometry.groups, 'group')}")
    agno = np.arange(geometry.groups, dtype=np.int64)
    start = geometry.group_offset(agno)
    inside = damage.check(
        start + size <= geometry.limit,
        "group",
        "[header of a group lies|headers of groups lie] beyond the end of the volume",
        start,
    )
    agno, start = agno[inside], start[inside]
    sectors = reader.read_blocks(start, size).reshape(len(agno), len(HEADERS), geometry.sector_size)
    copies = records(sectors[:, 0], ondisk.SUPERBLOCK)["sb_magicnum"] == b"XFSB"
    damage.check(
        copies, "copy-differs", "[copy|copies] of the superblock [has|have] a wrong magic number", start
    )
    return sectors, agno


def _header(
    geometry: Geometry, damage: Damage, name: str, dtype: np.dtype[np.void], sectors: Bytes, agno: Int
) -> _Header:
    """AGF or AGI of all groups where they are sound."""
    found = records(sectors, dtype)
    prefix = name.lower()
    at = geometry.group_offset(agno) + HEADERS.index(name) * geometry.sector_size
    good = (found[f"{prefix}_magicnum"] == b"X" + name.encode()) & (found[f"{prefix}_seqno"] == agno)
    damage.check(
        good,
        "group",
        f"{name} [sector has|sectors have] a wrong magic number or group number",
        at,
    )
    length = found[f"{prefix}_length"] == geometry.group_blocks(agno)
    damage.check(
        length | ~good,
        "group",
        f"{name} [sector gives its|sectors give their] group another length than the superblock",
        at,
    )
    return _Header(agno[good], found[good])


def _walk(
    reader: Reader,
    geometry: Geometry,
    damage: Damage,
    tree: GroupTree,
    header: _Header,
    rows: tables.ExtentRows,
) -> Walked:
    """One kind of tree in all groups; its blocks become rows."""
    root, level = header.record[tree.root].astype(np.int64), header.record[tree.level].astype(np.int64) - 1
    block = np.where(root < geometry.agblocks, (header.agno << geometry.agblklog) | root, -1)
    walked = walk(reader, geometry, damage, tree.shape, Nodes(header.agno, block, level))
    rows.add(
        tables.METADATA, geometry.block_offset(walked.nodes.block), geometry.block_size, part=tree.shape.name
    )
    return walked


def _unlinked(geometry: Geometry, agi: _Header) -> Int:
    """Inodes at the heads of the lists of orphans, of which each group has 64."""
    heads = agi.record["agi_unlinked"].astype(np.int64)
    group, bucket = np.nonzero(heads != ondisk.NULLAGINO)
    return (agi.agno[group] << geometry.agi_bits) | heads[group, bucket]


def _header_rows(geometry: Geometry, agno: Int, rows: tables.ExtentRows) -> None:
    """The four sectors, and what is left of their last block."""
    start, sector = geometry.group_offset(agno), geometry.sector_size
    for number, name in enumerate(HEADERS):
        rows.add(tables.METADATA, start + number * sector, sector, part=name)
    size = len(HEADERS) * sector
    rows.add(tables.METADATA, start + size, -size % geometry.block_size, part="AG header padding")


def _free_list(
    geometry: Geometry, damage: Damage, agf: _Header, sectors: Bytes, rows: tables.ExtentRows
) -> None:
    """The AGFL: `agf_flcount` entries from `agf_flfirst`, round and round the sector."""
    header = ondisk.AGFL_HEADER if geometry.crc else 0
    entries = np.ascontiguousarray(
        sectors[:, header : header + (geometry.sector_size - header) // 4 * 4]
    ).view(">u4")
    agno = agf.agno
    count, first = agf.record["agf_flcount"].astype(np.int64), agf.record["agf_flfirst"].astype(np.int64)
    at = geometry.group_offset(agno) + HEADERS.index("AGFL") * geometry.sector_size
    good = (count <= entries.shape[1]) & (first < entries.shape[1])
    if geometry.crc:
        good &= (sectors[:, :4].copy().view("S4")[:, 0] == ondisk.AGFL_MAGIC) if len(sectors) else True
    damage.check(good, "group", "AGFL [sector has|sectors have] a wrong magic number or count", at)
    group, step = expand(np.where(good, count, 0))
    block = entries[group, (first[group] + step) % entries.shape[1]].astype(np.int64)
    one = np.ones(len(block), np.int64)
    good = damage.check(
        fits(geometry, block, one, agno[group]),
        "outside",
        "AGFL [entry lies outside its|entries lie outside their] group",
        at[group],
    )
    start = geometry.block_offset((agno[group] << geometry.agblklog) | block)[good]
    rows.add(tables.FREE, start, geometry.block_size, part="AGFL")


def _ranges(
    geometry: Geometry, damage: Damage, walked: Walked, start: Int, count: Int, name: str
) -> tuple[Int, Int, Bool]:
    """Records of a tree as (starts, ends) in bytes, and which of the records these are."""
    where = geometry.group_offset(walked.owner)
    good = damage.check(
        fits(geometry, start, count, walked.owner),
        "outside",
        f"[record of a {name} lies outside its|records of a {name} lie outside their] group",
        where,
    )
    first = where[good] + start[good] * geometry.block_size
    return first, first + count[good] * geometry.block_size, good


def _free_space(geometry: Geometry, damage: Damage, walked: Walked, rows: tables.ExtentRows) -> None:
    found = records(walked.rows, ondisk.ALLOC_REC)
    start, count = found["ar_startblock"].astype(np.int64), found["ar_blockcount"].astype(np.int64)
    starts, ends, _ = _ranges(geometry, damage, walked, start, count, "bnobt")
    starts, ends = union(starts, ends)
    rows.add(tables.FREE, starts, ends - starts)


def _shared(
    geometry: Geometry, damage: Damage, walked: Walked, intents: Intents, rows: tables.ExtentRows
) -> tuple[Int, Int]:
    """Ranges with more than one owner, merged.

    Copy-on-write staging extents, which no file owns yet, become rows, but for those that a file takes.
    """
    found = records(walked.rows, ondisk.REFCOUNT_REC)
    raw, count = found["rc_startblock"].astype(np.int64), found["rc_blockcount"].astype(np.int64)
    starts, ends, good = _ranges(geometry, damage, walked, raw & ~ondisk.REFC_COWFLAG, count, "refcountbt")
    staging = (raw[good] & ondisk.REFC_COWFLAG) != 0
    low, high = starts[staging], ends[staging]
    if len(intents.landed[0]):
        low, high = subtract(low, high, *ranges(geometry, intents.landed))
    rows.add(tables.METADATA, low, high - low, part=tables.STAGING)
    several = ~staging & (found["rc_refcount"][good] > 1)
    return union(starts[several], ends[several])
