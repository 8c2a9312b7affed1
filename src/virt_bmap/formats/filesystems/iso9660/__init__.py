"""ISO 9660 with Rock Ridge, Joliet and El Torito: one tree of names, and every tree's metadata.

What is read: the volume descriptors, the directories of every tree level by level, Rock Ridge with its
continuation areas, path tables, the boot catalog and the images that it names. Names come from Rock Ridge
where there is any, else from Joliet, else from the plain tree without `;1`; directories of the other trees
are metadata. ISO 9660 has neither inode numbers nor an allocator: a directory's inode is the byte offset of
its content, any other file's the offset of its (first) directory record, as Linux does; what nothing refers
to is `unreferenced` (other sessions, a second set of descriptors, padding). A
record for each name means that hard links are inodes of their own whose bytes are SHARED. The target of a
symbolic link lies in system use entries, in pieces: its rows are INLINE without a file offset.

Sources: ECMA-119 (4th edition); SUSP 1.12, RRIP 1.12; Joliet 1.0; El Torito 1.0; Linux fs/isofs; libisofs
doc/zisofs_format.txt.
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import complement
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.iso9660 import sessions
from virt_bmap.formats.filesystems.iso9660.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.iso9660.inodes import (
    FileRecords,
    features_of,
    hidden_files,
)
from virt_bmap.formats.filesystems.iso9660.links import target
from virt_bmap.formats.filesystems.iso9660.names import (
    distinct,
    main_tree,
    walk,
)
from virt_bmap.formats.filesystems.iso9660.owners import add_boot, add_content, add_metadata
from virt_bmap.formats.filesystems.iso9660.superblock import (
    FIRST_DESCRIPTOR,
    read_descriptors,
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
from virt_bmap.model.problems import NOTE
from virt_bmap.model.tables import ExtentRows

NAME = "iso9660"
INODE = "a directory's is the byte offset of its content, any other file's that of its directory record"


def probe(reader: Reader) -> bool:
    """The standard identifier of the first volume descriptor, or of a High Sierra one."""
    return reader.read_clipped(FIRST_DESCRIPTOR + 1, 5) == b"CD001" or _is_high_sierra(reader)


def _is_high_sierra(reader: Reader) -> bool:
    return reader.read_clipped(FIRST_DESCRIPTOR + 9, 5) == b"CDROM"


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    if _is_high_sierra(reader):
        raise Unsupported(
            f"{reader.name}: a High Sierra volume, the format before ISO 9660, is not supported",
            FIRST_DESCRIPTOR,
        )
    return read_session(reader, sessions.wanted(reader), damage)


def read_session(reader: Reader, start: int, damage: Damage) -> Filesystem:
    """The tables of the session that begins at byte `start`."""
    found = read_descriptors(reader, start)
    walks = [(tree, walk(reader, found.block_size, tree, damage)) for tree in distinct(found.trees)]
    main = main_tree(walks)
    files = FileRecords(main[0], main[1], found.block_size)
    rows = ExtentRows()
    owned = add_metadata(rows, reader, found, walks, main[0])
    hidden_files(files, [other for tree, other in walks if tree is not main[0]], damage)
    owned = add_content(rows, reader, found, files, owned, damage)
    owned = add_boot(rows, reader, found, owned, damage)
    end = start + found.size
    size = min(reader.size, max(end, int(owned[1].max(initial=0))))
    damage.ends_early(end, reader.size, NOTE)
    sessions.say_others(reader, start, size, damage)
    low, high = complement(*owned, 0, size)
    rows.add(tables.UNREFERENCED, low, high - low)
    features = features_of(reader, found, main[1], walks, files)
    return Filesystem(
        type=NAME, size=size, block_size=found.block_size, root=main[0].root,
        state=tables.CLEAN,
        reader=reader, inodes=files.inodes(), names=files.names(), extents=rows.table(0), uuid=found.uuid,
        label=found.label, features=" ".join(features) or None,
    )  # fmt: skip


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.iso9660.superblock import BOOT_ENTRY, VOLUME

    return {
        "volume descriptors": Structure(VOLUME, many=True),
        "El Torito boot catalog": Structure(BOOT_ENTRY, many=True),
    }


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    structures=_structures,
    inode=INODE,
    target=target,
    session="sbsector",
)
