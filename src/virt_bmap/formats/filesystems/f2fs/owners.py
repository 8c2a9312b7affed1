"""Who owns the volume's blocks: areas, nodes, content, and what is free."""

import numpy as np

from virt_bmap.core.arrays import Int, subtract, union
from virt_bmap.core.columns import stack, take
from virt_bmap.formats.filesystems.f2fs import inodes as nodes
from virt_bmap.formats.filesystems.f2fs.allocator import Checkpoint
from virt_bmap.formats.filesystems.f2fs.inodes import BlockRuns, Inodes, Trees, WalkedNodes
from virt_bmap.formats.filesystems.f2fs.journal import Newer
from virt_bmap.formats.filesystems.f2fs.ondisk import (
    BLOCK,
    SEGMENT,
    SUPER_OFFSET,
    Superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

QUOTA_FILES = ("user quota", "group quota", "project quota")


VERITY_ALIGNMENT = 65536
"""The Merkle tree of a verity file begins at the next multiple of this behind its end (fs/f2fs/verity.c)."""


def add_areas(rows: ExtentRows, volume: Superblock) -> None:
    """What lies before the main area, and after it."""
    rows.add(tables.BOOT, 0, SUPER_OFFSET)
    rows.add(tables.METADATA, SUPER_OFFSET, BLOCK - SUPER_OFFSET, part="superblock")
    rows.add(tables.GAP, BLOCK, SUPER_OFFSET, part="alignment")
    rows.add(tables.METADATA, BLOCK + SUPER_OFFSET, BLOCK - SUPER_OFFSET, part="backup superblock")
    rows.add(tables.GAP, 2 * BLOCK, (volume.segment0 - 2) * BLOCK, part="alignment")
    for part, start, end in (
        ("checkpoint pack 1", volume.cp, volume.cp + SEGMENT),
        ("checkpoint pack 2", volume.cp + SEGMENT, volume.cp + 2 * SEGMENT),
        ("checkpoint area", volume.cp + 2 * SEGMENT, volume.sit), ("SIT", volume.sit, volume.nat),
        ("NAT", volume.nat, volume.ssa), ("SSA", volume.ssa, volume.main),
    ):  # fmt: skip
        rows.add(tables.METADATA, start * BLOCK, (end - start) * BLOCK, part=part)
    rows.add(
        tables.GAP,
        volume.main_end * BLOCK,
        (volume.block_count - volume.main_end) * BLOCK,
        part="excess blocks",
    )


def add_nodes(rows: ExtentRows, inodes: Inodes, found: WalkedNodes) -> None:
    """Blocks of inodes, of the trees below them, and of attributes."""
    rows.add(
        tables.METADATA,
        inodes.block * BLOCK,
        np.full(len(inodes.block), BLOCK),
        part="inode",
        inode=inodes.number,
    )
    trees, attributes = stack(Trees, found.trees), stack(Trees, found.attributes)
    for kind, part, some in (
        (tables.TREE, "direct node", take(trees, trees.depth == 0)),
        (tables.TREE, "indirect node", take(trees, trees.depth > 0)), (tables.XATTR, None, attributes),
    ):  # fmt: skip
        rows.add(
            kind,
            some.block * BLOCK,
            np.full(len(some.block), BLOCK),
            part=part,
            inode=inodes.number[some.owner],
        )


def add_free(rows: ExtentRows, free: tuple[Int, Int], old: tuple[Int, Int], newer: Newer) -> None:
    """What the SIT calls free; of a volume that is rolled forward without what newer nodes own, and with what
    older ones needed."""
    start, end = free[0] * BLOCK, free[1] * BLOCK
    if newer:
        extents = rows.table(0)
        low, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
        of = np.isin(
            tables.integers(extents, "inode"),
            np.concatenate([newer.inodes.ino, newer.direct.ino, newer.attributes.ino]),
        )
        start, end = subtract(start, end, low[of], (low + length)[of])
        given_up = subtract(old[0] * BLOCK, old[1] * BLOCK, low, low + length)
        start, end = union(np.append(start, given_up[0]), np.append(end, given_up[1]))
    rows.add(tables.FREE, start, end - start)


def add_inline(rows: ExtentRows, inodes: Inodes, types: np.ndarray) -> None:
    """Data, names and attributes inside blocks of inodes."""
    kind_of = {
        tables.T_FILE: tables.DATA,
        tables.T_SYMLINK: tables.SYMLINK,
        tables.T_DIRECTORY: tables.DIRECTORY,
    }
    start, encrypted = inodes.block * BLOCK + inodes.inline_start, _encrypted(inodes)
    for code, kind in kind_of.items():
        mine = np.flatnonzero((types == code) & inodes.is_inline)
        room = inodes.inline_room[mine]
        length = room if code == tables.T_DIRECTORY else np.minimum(inodes.size[mine], room)
        rows.add(kind, start[mine], length, inode=inodes.number[mine],
            file_offset=np.zeros(len(mine), np.int64),
                 flags=tables.INLINE | encrypted[mine])  # fmt: skip
    mine = np.flatnonzero(inodes.has_xattrs)
    end = start[mine] + inodes.inline_room[mine]
    rows.add(tables.XATTR, end, 4 * inodes.xattrs[mine], inode=inodes.number[mine], flags=tables.INLINE)


def _encrypted(inodes: Inodes) -> Int:
    """The flag of extents; names lie in directories' blocks between what is plain."""
    secret = (inodes.advise & nodes.ADVISE_ENCRYPT != 0) & (inodes.form != nodes.S_IFDIR)
    return np.where(secret, np.int64(tables.ENCRYPTED), 0)


def add_content(
    rows: ExtentRows, volume: Superblock, inodes: Inodes, types: np.ndarray, runs: BlockRuns
) -> None:
    """Blocks of files, directories, links, quota files, and the trees of verity."""
    if "quota" in volume.features:
        for part, number in zip(QUOTA_FILES, volume.record["qf_ino"].tolist(), strict=True):
            some = take(
                runs, (inodes.number[runs.owner] == number) & (types[runs.owner] == tables.T_METADATA)
            )
            rows.add(
                tables.METADATA,
                some.start * BLOCK,
                some.count * BLOCK,
                part=part,
                inode=number,
                file_offset=some.logical * BLOCK,
            )
        runs = take(runs, types[runs.owner] != tables.T_METADATA)
    runs, merkle = _without_verity(inodes, runs)
    rows.add(
        tables.METADATA,
        merkle.start * BLOCK,
        merkle.count * BLOCK,
        part="verity tree",
        inode=inodes.number[merkle.owner],
    )
    kind_of = np.full(len(tables.TYPES), tables.DATA, np.int8)
    kind_of[[tables.T_DIRECTORY, tables.T_SYMLINK]] = tables.DIRECTORY, tables.SYMLINK
    offset, held, packed = runs.logical * BLOCK, runs.span * BLOCK, runs.span != runs.count
    left = inodes.size[runs.owner] - offset
    rows.add(kind_of[types[runs.owner]], runs.start * BLOCK, runs.count * BLOCK,
        inode=inodes.number[runs.owner], file_offset=offset,
             file_length=np.where(packed & (left > 0), np.minimum(held, left), held),
             flags=_encrypted(inodes)[runs.owner] | packed * np.int64(tables.COMPRESSED))  # fmt: skip


def _without_verity(inodes: Inodes, runs: BlockRuns) -> tuple[BlockRuns, BlockRuns]:
    """(content, Merkle trees): the runs of verity files are cut where their trees begin."""
    border = -(-inodes.size[runs.owner] // VERITY_ALIGNMENT) * (VERITY_ALIGNMENT // BLOCK)
    before = np.where(
        inodes.advise[runs.owner] & nodes.ADVISE_VERITY != 0,
        np.clip(border - runs.logical, 0, runs.count),
        runs.count,
    )
    span = np.where(runs.span == runs.count, before, runs.span)
    content = BlockRuns(runs.owner, runs.logical, runs.start, before, span)
    rest = runs.count - before
    return take(content, before > 0), take(
        BlockRuns(runs.owner, runs.logical + before, runs.start + before, rest, rest), rest > 0
    )


def check_counts(pack: Checkpoint, blocks: int, inodes: int, damage: Damage) -> None:
    """The checkpoint's own counts."""
    for field, count in (("valid_block_count", blocks), ("valid_inode_count", inodes)):
        if count != (said := int(pack.record[field])):
            words = f"a count of the checkpoint is wrong: {field} is {said}, found are {count}"
            damage.say("count", words, pack.start * BLOCK)
