"""UDF, as on DVDs, Blu-ray discs, memory cards and Windows' installation images.

Read are: the recognition sequence, all anchors, the volume descriptor sequences, the partitions' space
bitmaps, then the directories level by level with the file entries of a level at once. An inode is the byte of
the volume at which its ICB lies. A volume whose partition has no bitmap was written once: there what nobody
refers to is `unreferenced`.

A bridge disc is an ISO 9660 volume, too, of the same files or of others: Windows' images show one that holds
nothing but a text that says so. The tree that owns more bytes of files is mapped, ISO 9660 (with Rock Ridge)
where both own the same, and the other one's structures are named.

Sources: ECMA-167 (3rd edition); OSTA UDF 1.02 to 2.60; Linux fs/udf (v6.12); each module names its sections.
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sessions import LATER
from virt_bmap.formats.filesystems.udf import inodes as entries
from virt_bmap.formats.filesystems.udf import sessions, superblock
from virt_bmap.formats.filesystems.udf.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.udf.links import target
from virt_bmap.formats.filesystems.udf.owners import (
    add_content,
    add_free,
    add_structures,
    open_partitions,
    tiled,
)
from virt_bmap.formats.filesystems.udf.tree import T_OF, add_beside, inode_table, walk_tree
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

NAME = "udf"
INODE = "the byte of the volume at which its ICB lies"
T_OF[list(entries.MODES)] = [
    tables.T_DIRECTORY, tables.T_FILE, tables.T_BLOCK, tables.T_CHAR, tables.T_FIFO, tables.T_SOCKET,
    tables.T_SYMLINK, tables.T_FILE,
]  # fmt: skip


def probe(reader: Reader) -> bool:
    """A volume recognition sequence that names UDF, and an anchor."""
    if not superblock.recognised(reader)[0]:
        return False
    try:
        superblock.anchors_of(reader)
    except FormatError:
        return False
    return True


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the session that is wanted, of the ISO 9660 volume in it where that owns as much."""
    start, state = sessions.wanted(reader)
    if superblock.is_alone(reader, start):
        return read_alone(reader, damage, start, state)
    from virt_bmap.formats.filesystems.udf import bridge

    return bridge.read(reader, damage, start, state)


def read_alone(reader: Reader, damage: Damage, start: int = 0, state: int = 0) -> Filesystem:
    """The UDF volume, whatever lies beside it; `start` and `state` as `sessions.wanted` gives them."""
    disk = superblock.read_volume(reader, damage, start)
    rows = tables.ExtentRows()
    open_partitions(reader, disk, rows, damage, state)
    place, file_set = superblock.read_file_set(reader, disk)
    partition, block = ints(int(file_set["RootPartition"])), ints(int(file_set["RootBlock"]))
    found, extents, names, beside = walk_tree(reader, disk, partition, block, rows, damage)
    if int(file_set["StreamLength"]) & 0x3FFFFFFF:
        beside.append((ints(-1), ints(int(file_set["StreamPartition"])), ints(int(file_set["StreamBlock"]))))
    add_beside(reader, disk, beside, found.inode, rows, damage)
    add_content(rows, found, extents, disk.block_size, damage)
    add_structures(rows, reader, disk, place)
    add_free(rows, reader, disk, damage)
    root = int(disk.places(partition, block)[0])
    size = min(reader.size, max([disk.end, *(end for _, _, end in disk.areas)]))
    damage.add("hidden", LATER, sessions.later(reader, disk), severity=WARNING)
    extent_table = tiled(rows.table(0), disk, size)
    return Filesystem(
        type=NAME, size=size, block_size=disk.block_size, root=root,
        state=tables.CLEAN if disk.closed else tables.IN_USE, reader=reader,
        inodes=inode_table(found), names=names, extents=extent_table, uuid=disk.uuid,
        label=disk.label or None,
        features=" ".join(sessions.features(disk)) or None,
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.udf.superblock import ANCHOR_POINTER, FILE_SET_DESCRIPTOR

    return {
        "anchor": Structure(ANCHOR_POINTER),
        "file set descriptor": Structure(FILE_SET_DESCRIPTOR),
    }


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the space bitmaps and tables of partitions that can be rewritten; elsewhere nothing",
    structures=_structures,
    inode=INODE,
    target=target,
    session="session",
)
