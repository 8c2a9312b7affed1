"""qcow2: L1, L2 and refcounts as arrays; every byte of the image file has an owner, and the owners are
compared with the refcounts.

Sources: QEMU docs/interop/qcow2.rst (v8.2).
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.qcow2.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.images.qcow2.references import cluster, marked, references
from virt_bmap.model.contract import Docs, ImageFormat, ImageLayer, Structure, Structures, Writing

NAME = "qcow2"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one qcow2 image; `others` is its external data file, if it has one."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.formats.images.layer import Draft
    from virt_bmap.formats.images.qcow2 import allocator, bitmaps, extents, header, owners, snapshots

    head = header.read_header(image)
    saved = snapshots.read_snapshots(image, head)
    marked = bitmaps.read_bitmaps(image, head)
    draft = Draft([image, *others], head.size, may_end_early=True)
    uses = allocator.Uses(head.cluster)
    owners.own_header(draft, head, uses)
    snapshots.own_tables(draft, head, saved, uses)
    bitmaps.own_tables(image, draft, head, marked, uses)
    l2 = extents.read_l2_tables(image, head, [head.l1, *(one.l1 for one in saved.entries)], draft)
    owners.own_l2_tables(draft, head, l2, uses)
    known, held = extents.read_clusters(image, head, l2, draft)
    owners.place_current(draft, head, known.take(l2.first[known.table] == 0))
    snapshots.own_data(draft, head, saved, l2, known, held)
    if not head.external:
        uses.add(held.host, held.stored, l2.uses[held.table])
    allocator.own_free_clusters(image, draft, head, uses)
    return draft.finish(
        NAME,
        head.cluster,
        head.facts() | saved.facts() | marked.facts(),
        head.unreadable(),
        extents.INFLATE.get(head.compression),
    )


def probe(image: Reader) -> bool:
    """Version 1 is a format of its own, qcow."""
    return image.read_clipped(4, 4) in (b"\0\0\0\2", b"\0\0\0\3")


def _structures() -> Structures:
    from virt_bmap.formats.images.qcow2.ondisk import HEADER

    return {"header": Structure(HEADER)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    probe=probe,
    read=read,
    allocator="the refcounts",
    structures=_structures,
    references=references,
    marked=marked,
    cluster=cluster,
    writing=Writing.ANYWHERE | Writing.COMPRESSED | Writing.FREEING,
    suffix=".qcow2",
)
