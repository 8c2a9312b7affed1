"""squashfs 4.0: inodes, names and blocks as arrays, with every compressor.

What is read: the superblock, the compressor's options, the inode, directory, fragment, export, id and xattr
tables, and from the inodes where each block of a file lies. Blocks are COMPRESSED rows, one each, with the
file's bytes that they hold; a compressed fragment is a row of every file whose tail it packs, SHARED. Tables
are metadata of the filesystem; names of directories, targets of links and attributes lie inside their
metadata blocks as INLINE rows, COMPRESSED where the metadata block is, which then is shown whole.
`record_offset` is the metadata block that holds the inode. There is no allocator: what lies before
`bytes_used` and has no owner is unknown.

Sources: Linux fs/squashfs (squashfs_fs.h, super.c, inode.c, dir.c, block.c);
Documentation/filesystems/squashfs.rst.
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.squashfs.compression import (
    COMPRESSIONS,
)
from virt_bmap.formats.filesystems.squashfs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.squashfs.inodes import (
    inode_table,
    name_table,
    root_inode,
    walk,
)
from virt_bmap.formats.filesystems.squashfs.links import targets
from virt_bmap.formats.filesystems.squashfs.metadata import read_tables
from virt_bmap.formats.filesystems.squashfs.owners import add_content, add_inside_tables
from virt_bmap.formats.filesystems.squashfs.superblock import (
    FLAGS,
    SUPERBLOCK,
    read_superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "squashfs"


def probe(reader: Reader) -> bool:
    """The magic, either endianness."""
    return reader.read_clipped(0, 4) in (b"hsqs", b"sqsh")


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    superblock = read_superblock(reader)
    rows = ExtentRows()
    found = read_tables(reader, superblock, rows, damage)
    tree = walk(found, superblock, damage)
    root = root_inode(found.inodes, superblock, tree, reader)
    reader.packed = add_content(rows, reader, superblock, found, tree, damage)
    add_inside_tables(rows, found, tree)
    size = int(superblock["bytes_used"])
    damage.ends_early(size, reader.size)
    return Filesystem(
        type=NAME, size=min(size, reader.size), block_size=int(superblock["block_size"]), root=root,
        state=tables.CLEAN, reader=reader, inodes=inode_table(found, tree),
        names=name_table(tree), extents=rows.table(0),
        features=" ".join([COMPRESSIONS[int(superblock["compression"])],
                           *(name for bit, name in FLAGS.items() if int(superblock["flags"]) & bit)]),
    )  # fmt: skip


def _structures() -> Structures:
    return {
        "superblock": Structure(SUPERBLOCK),
    }


FORMAT = FilesystemFormat(
    NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures, targets=targets
)
