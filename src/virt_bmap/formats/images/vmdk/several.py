"""A VMDK that is a descriptor with its extents in files of their own.

Sources: VMware "Virtual Disk Format 5.0", "The Descriptor File".
"""

from collections.abc import Sequence

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.vmdk import descriptor
from virt_bmap.formats.images.vmdk.descriptor import Descriptor
from virt_bmap.formats.images.vmdk.extents import inflate, own_sparse
from virt_bmap.formats.images.vmdk.ondisk import MAX_CAPACITY, SECTOR
from virt_bmap.model.contract import ImageLayer


def facts(found: Descriptor | None, head: dict[str, int] | None) -> dict[str, object]:
    return {
        "subformat": found.create_type if found else None,
        "dirty": bool(head and head["uncleanShutdown"]),
    }


def read_several(image: Reader, others: Sequence[Reader], found: Descriptor) -> ImageLayer:
    """Extents one after the other on the disk; several may lie in one file."""
    files = list(dict.fromkeys([image, *others]))
    size = sum(extent.sectors for extent in found.extents) * SECTOR
    if not found.extents or size > MAX_CAPACITY * SECTOR:
        raise Corrupt(
            f"{image.name}: its descriptor at byte {found.start:#x} "
            f"gives {plural(len(found.extents), 'extent')} with {size:,} bytes",
            found.start,
        )
    draft = Draft(files, size)
    draft.own("descriptor", found.start, found.length)
    base, grain, readers = 0, 1, iter(others)
    for extent in found.extents:  # lines of text: as many as the disk has files
        length = extent.sectors * SECTOR
        reader = next(readers, None) if extent.file else None
        if extent.type == "ZERO":
            draft.zero(ints(base), ints(length))
        elif reader is None or extent.type not in (*descriptor.FLAT, "SPARSE"):
            raise Unsupported(
                f"{image.name}: has an extent of type {extent.type}, "
                "which is not supported; FLAT, VMFS, SPARSE and ZERO are",
                found.start,
            )
        elif extent.type == "SPARSE":
            grain = own_sparse(draft, reader, files.index(reader), base, length)
        else:
            draft.place(ints(base), ints(extent.offset * SECTOR), ints(length), file=files.index(reader))
        base += length
    return draft.finish("vmdk", grain, facts(found, None), inflate=inflate)
