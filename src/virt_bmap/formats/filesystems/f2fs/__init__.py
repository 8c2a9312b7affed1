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

from virt_bmap.core.arrays import EMPTY
from virt_bmap.core.columns import stack
from virt_bmap.core.reader import Reader
from virt_bmap.formats import foreign
from virt_bmap.formats.filesystems.f2fs import allocator as checkpoint
from virt_bmap.formats.filesystems.f2fs import forward, journal, owners
from virt_bmap.formats.filesystems.f2fs import inodes as nodes
from virt_bmap.formats.filesystems.f2fs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.f2fs.forward import newer_nodes, volume_state
from virt_bmap.formats.filesystems.f2fs.inodes import BlockRuns, inode_table, types_of, without_links
from virt_bmap.formats.filesystems.f2fs.names import Directories
from virt_bmap.formats.filesystems.f2fs.ondisk import BLOCK, MAGIC, SUPERBLOCKS, read_superblock
from virt_bmap.model.contract import Docs, Filesystem, FilesystemFormat, Proof, Structure, Structures
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "f2fs"


def probe(reader: Reader) -> bool:
    """The superblock's magic; or its copy's, where nothing else has taken the place of the first."""
    first, copy = (reader.read_clipped(offset, 4) == MAGIC.to_bytes(4, "little") for offset in SUPERBLOCKS)
    return first or (copy and not foreign.recognise(reader))


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of an F2FS. Raises Corrupt where no superblock or no checkpoint is valid, Unsupported."""
    volume = read_superblock(reader, damage)
    damage.ends_early(volume.block_count * BLOCK, reader.size)
    pack = checkpoint.read_checkpoint(volume, damage)
    nat_journal, sit_journal = checkpoint.read_journals(volume, pack, damage)
    nat = checkpoint.read_nat(volume, pack, nat_journal, damage)
    sit = checkpoint.read_sit(volume, pack, sit_journal, damage)
    orphans = checkpoint.read_orphans(volume, pack, damage)
    chain = journal.read_chain(volume, pack)
    newer = newer_nodes(volume, chain, nat, orphans, damage)
    names = Directories(damage)
    if newer:
        ahead = forward.read(volume, nat, newer, names.inline, damage)
        found, old = ahead.found, (ahead.starts, ahead.ends)
    else:
        found, old = nodes.read(volume, nat, names.inline, damage), (EMPTY, EMPTY)
    runs, inodes = stack(BlockRuns, found.runs), found.inodes
    tree = names.table(volume, inodes, runs)
    if newer:
        tree, lost = forward.add_names(volume, newer, inodes, tree)
        inodes = without_links(inodes, lost)
    else:
        owners.check_counts(pack, sit.blocks + found.promised, len(inodes.number), damage)
    types = types_of(volume, inodes)
    rows = ExtentRows()
    owners.add_areas(rows, volume)
    owners.add_nodes(rows, inodes, found)
    owners.add_inline(rows, inodes, types)
    owners.add_content(rows, volume, inodes, types, runs)
    owners.add_free(rows, sit.free(volume), old, newer)
    return Filesystem(
        type=NAME, size=volume.block_count * BLOCK, block_size=BLOCK, root=volume.number("root_ino"),
        state=volume_state(pack, chain, newer, damage), reader=reader,
        inodes=inode_table(inodes, types, orphans),
        names=tree, extents=rows.table(0), uuid=volume.uuid, label=volume.label,
        features=volume.feature_words,
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.f2fs.ondisk import CHECKPOINT, NODE, SUPERBLOCK

    return {
        "superblock": Structure(SUPERBLOCK),
        "record": Structure(NODE),
        "checkpoint pack 1": Structure(CHECKPOINT),
        "checkpoint pack 2": Structure(CHECKPOINT),
    }


def _prove(found: Filesystem, damage: Damage) -> list[Proof]:
    from virt_bmap.formats.filesystems.f2fs.proof import prove

    return prove(found, damage)


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
