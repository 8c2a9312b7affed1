"""F2FS: both superblocks, the newer checkpoint, its tables NAT and SIT, all nodes, all names.

The order of a map: `ondisk` says where the areas lie, `checkpoint` chooses between the two places that each
block of a table has and lays the journals over them, `recovery` looks for what was synced after the
checkpoint, `nodes` follows the trees below inodes, or `forward` with newer nodes in them, and `directories`
finds names. The allocator is the SIT's bitmap of valid blocks. Not read are the content of files, attributes,
and the summary area (who owned a block last).

Inodes have blocks of their own, METADATA rows of the inode; data, names and attributes inside them are
INLINE. A compressed cluster is a COMPRESSED row for each run of blocks that it has, all of them with the
place and length of the whole cluster in the file.

Sources: Linux Documentation/filesystems/f2fs.rst, include/linux/f2fs_fs.h and fs/f2fs (v6.1); each module
names its own.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int, subtract, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.formats import foreign
from virt_bmap.formats.filesystems.f2fs import checkpoint, forward, nodes, recovery
from virt_bmap.formats.filesystems.f2fs.checkpoint import Checkpoint, Nat
from virt_bmap.formats.filesystems.f2fs.directories import Directories
from virt_bmap.formats.filesystems.f2fs.nodes import Found, Inodes, Runs, Trees
from virt_bmap.formats.filesystems.f2fs.ondisk import (
    BLOCK,
    MAGIC,
    SEGMENT,
    SUPER_OFFSET,
    SUPERBLOCKS,
    Volume,
    read_superblock,
)
from virt_bmap.formats.filesystems.f2fs.recovery import Chain, Newer
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    PROVEN,
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    Proof,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions
from virt_bmap.model.tables import ExtentRows

NAME = "f2fs"
FEATURES = (
    "both superblocks and both checkpoints, by their checksums and versions",
    "NAT and SIT with version bitmaps and journals in compact and plain summaries",
    "inodes with extra attributes and checksums, direct, indirect and doubly indirect nodes",
    "inline data, names, links and attributes (of any size), attribute nodes",
    "directories of all levels, casefolded and encrypted ones (names as ciphertext)",
    "compressed files, with released and reserved blocks", "verity trees, quota files",
    "files deleted while open (orphans)", "zoned and read-only volumes, sections of any size",
    "files synced after the checkpoint, rolled forward in memory",
)  # fmt: skip
REFUSED = ("several devices", "blocks of another size than 4 KiB")
ORACLES = (
    "dump.f2fs: the NAT, and the summary area for the owner of each block", "fsck.f2fs",
    "kernel FIEMAP in libguestfs's appliance",
    "content that sload.f2fs and the kernel put in, read back by the map",
    "the kernel's recovery of copies taken while mounted", "the SIT: every block owned or free, none both",
)  # fmt: skip
CHECKS = Checks(
    checksums="checkpoints; superblock and inodes where the features sb_checksum and inode_checksum are set",
    rules=(
        "superblock and checkpoint: geometry, features, versions, counts",
        "nodes: footers against the node address table, each node once",
        "segment information table: against what is owned",
        "names: inodes that are in use, inodes with links have names",
    ),
    unchecked=(
        "content of files",
        "summaries of segments, backups of superblock and checkpoint",
    ),
)

QUOTA_FILES = ("user quota", "group quota", "project quota")
VERITY_ALIGNMENT = 65536
"""The Merkle tree of a verity file begins at the next multiple of this behind its end (fs/f2fs/verity.c)."""


def probe(reader: Reader) -> bool:
    """The superblock's magic; or its copy's, where nothing else has taken the place of the first."""
    first, copy = (reader.read_clipped(offset, 4) == MAGIC.to_bytes(4, "little") for offset in SUPERBLOCKS)
    return first or (copy and not foreign.recognise(reader))


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of an F2FS. Raises Corrupt where no superblock or no checkpoint is valid, Unsupported."""
    volume = read_superblock(reader, damage)
    if volume.block_count * BLOCK > reader.size:
        damage.add("truncated", f"bytes are missing: the filesystem has {volume.block_count * BLOCK}, the "
            "volume ends earlier", reader.size, volume.block_count * BLOCK - reader.size)  # fmt: skip
    pack = checkpoint.read_checkpoint(volume, damage)
    nat_journal, sit_journal = checkpoint.read_journals(volume, pack, damage)
    nat = checkpoint.read_nat(volume, pack, nat_journal, damage)
    sit = checkpoint.read_sit(volume, pack, sit_journal, damage)
    orphans = checkpoint.read_orphans(volume, pack, damage)
    chain = recovery.read_chain(volume, pack)
    newer = _newer(volume, chain, nat, orphans, damage)
    names = Directories(damage)
    if newer:
        ahead = forward.read(volume, nat, newer, names.inline, damage)
        found, old = ahead.found, (ahead.starts, ahead.ends)
    else:
        found, old = nodes.read(volume, nat, names.inline, damage), (EMPTY, EMPTY)
    runs, inodes = stack(Runs, found.runs), found.inodes
    tree = names.table(volume, inodes, runs)
    if newer:
        tree, lost = forward.add_names(volume, newer, inodes, tree)
        inodes = _without_links(inodes, lost)
    else:
        _check_counts(pack, sit.blocks + found.promised, len(inodes.number), damage)
    types = _types(volume, inodes)
    rows = ExtentRows()
    _add_areas(rows, volume)
    _add_nodes(rows, inodes, found)
    _add_inline(rows, inodes, types)
    _add_content(rows, volume, inodes, types, runs)
    _add_free(rows, sit.free(volume), old, newer)
    return Filesystem(
        type=NAME, size=volume.block_count * BLOCK, block_size=BLOCK, root=volume.number("root_ino"),
        state=_state(pack, chain, newer, damage), reader=reader, inodes=_inode_table(inodes, types, orphans),
        names=tree, extents=rows.table(0), uuid=volume.uuid, label=volume.label,
        features=volume.feature_words,
    )  # fmt: skip


def _newer(volume: Volume, chain: Chain, nat: Nat, orphans: Int, damage: Damage) -> Newer:
    """What was synced after the checkpoint and is read in place of what the checkpoint knows."""
    if not chain.whole:
        text = (
            "nodes behind the checkpoint were followed, the rest of their chain was not: the state of "
            "the checkpoint is mapped"
        )
        damage.add("not-replayed", text, int(chain.nodes.block[0]) * BLOCK, len(chain.nodes.block))
        return recovery.NOTHING
    newer = recovery.newer(volume, chain, nat, orphans)
    count = len(newer.inodes.block) + len(newer.direct.block) + len(newer.attributes.block)
    if count:
        text = (
            "nodes that were synced after the checkpoint are rolled forward in memory, the image "
            "itself is unchanged"
        )
        damage.add("journal-replayed", text, int(chain.nodes.block[0]) * BLOCK, count)
    return newer


def _state(pack: Checkpoint, chain: Chain, newer: Newer, damage: Damage) -> str:
    """A checkpoint is consistent in itself; what is synced after it waits for the next mount."""
    if pack.has(checkpoint.ERROR | checkpoint.FSCK):
        damage.say("marked-damaged", "the checkpoint says that the kernel found errors", pack.start * BLOCK)
    if not chain.whole:
        return tables.NEEDS_RECOVERY
    if newer:
        return tables.RECOVERED
    return tables.CLEAN if pack.has(checkpoint.UMOUNT) else tables.FROZEN


def _without_links(inodes: Inodes, lost: Int) -> Inodes:
    """Inodes with a link less for each name that they lost."""
    nlink = np.append(inodes.nlink, 0)
    np.subtract.at(nlink, positions(inodes.number, lost), 1)
    return inodes._replace(nlink=np.maximum(nlink[:-1], 0))


def _types(volume: Volume, inodes: Inodes) -> np.ndarray:
    """Codes of tables.TYPES."""
    types = tables.type_of_mode(inodes.mode).copy()
    if "quota" in volume.features:
        types[np.isin(inodes.number, volume.record["qf_ino"])] = tables.T_METADATA
    return types


# ---- rows --------------------------------------------------------------------------------------------------


def _add_areas(rows: ExtentRows, volume: Volume) -> None:
    """What lies in front of the main area, and behind it."""
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


def _add_nodes(rows: ExtentRows, inodes: Inodes, found: Found) -> None:
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


def _add_free(rows: ExtentRows, free: tuple[Int, Int], old: tuple[Int, Int], newer: Newer) -> None:
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


def _add_inline(rows: ExtentRows, inodes: Inodes, types: np.ndarray) -> None:
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


def _add_content(rows: ExtentRows, volume: Volume, inodes: Inodes, types: np.ndarray, runs: Runs) -> None:
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


def _without_verity(inodes: Inodes, runs: Runs) -> tuple[Runs, Runs]:
    """(content, Merkle trees): the runs of verity files are cut where their trees begin."""
    border = -(-inodes.size[runs.owner] // VERITY_ALIGNMENT) * (VERITY_ALIGNMENT // BLOCK)
    before = np.where(
        inodes.advise[runs.owner] & nodes.ADVISE_VERITY != 0,
        np.clip(border - runs.logical, 0, runs.count),
        runs.count,
    )
    span = np.where(runs.span == runs.count, before, runs.span)
    content = Runs(runs.owner, runs.logical, runs.start, before, span)
    rest = runs.count - before
    return take(content, before > 0), take(
        Runs(runs.owner, runs.logical + before, runs.start + before, rest, rest), rest > 0
    )


def _inode_table(inodes: Inodes, types: np.ndarray, orphans: Int) -> pa.Table:
    own = types != tables.T_METADATA
    flags = np.where(((inodes.nlink == 0) & own) | np.isin(inodes.number, orphans), tables.I_DELETED, 0)
    for has, meaning in (
        (inodes.advise & nodes.ADVISE_ENCRYPT, tables.I_ENCRYPTED), (inodes.cluster, tables.I_COMPRESSED),
        (inodes.flags & nodes.IMMUTABLE_FL, tables.I_IMMUTABLE),
        (inodes.advise & nodes.ADVISE_VERITY, tables.I_VERITY),
    ):  # fmt: skip
        flags |= np.where(has != 0, meaning, 0)
    return tables.make(
        "inodes", volume=0, inode=inodes.number, type=types, mode=inodes.mode, uid=inodes.uid, gid=inodes.gid,
        size=inodes.size, nlink=inodes.nlink, mtime_ns=inodes.mtime_ns, flags=flags,
        record_offset=inodes.block * BLOCK,
    )  # fmt: skip


# ---- what must hold ----------------------------------------------------------------------------------------


def _check_counts(pack: Checkpoint, blocks: int, inodes: int, damage: Damage) -> None:
    """The checkpoint's own counts."""
    for field, count in (("valid_block_count", blocks), ("valid_inode_count", inodes)):
        if count != (said := int(pack.record[field])):
            words = f"a count of the checkpoint is wrong: {field} is {said}, found are {count}"
            damage.say("count", words, pack.start * BLOCK)


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.f2fs.ondisk import CHECKPOINT, NODE, SUPERBLOCK

    return {
        "superblock": Structure(SUPERBLOCK),
        "record": Structure(NODE),
        "checkpoint pack 1": Structure(CHECKPOINT),
        "checkpoint pack 2": Structure(CHECKPOINT),
    }


def _prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Names and targets; all checksums are verified whenever a volume is read."""
    from virt_bmap.formats.common.proving import check_names, check_targets

    check_names(found, damage)
    check_targets(found, damage)
    features = (found.features or "").split()
    with_sums = [
        what
        for feature, what in (("sb_checksum", "superblock"), ("inode_checksum", "inodes"))
        if feature in features
    ]
    return [Proof("checksums", PROVEN, ", ".join(["checkpoints", *with_sums]))]


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the segment information table",
    prove=_prove,
    structures=_structures,
)
