"""qcow2: L1, L2 and refcounts as arrays; every byte of the image file has an owner, and the owners are
compared with the refcounts.

Sources: QEMU docs/interop/qcow2.rst (v8.2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virt_bmap.core.arrays import Int, ints, weigh
from virt_bmap.core.columns import stack
from virt_bmap.core.layout import INT64_MAX
from virt_bmap.core.mapping import PACKED as IN_PACKED
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.inflate import deflated, zstd
from virt_bmap.formats.images.layer import IN_DATA, IN_ZERO, Draft
from virt_bmap.formats.images.qcow2 import clusters, header, refcounts
from virt_bmap.formats.images.qcow2.clusters import (
    IN_PLACE,
    NOWHERE,
    PACKED,
    RESERVED,
    ZERO_IN_PLACE,
    ClusterPieces,
    L2Tables,
)
from virt_bmap.formats.images.qcow2.header import Header
from virt_bmap.formats.images.qcow2.refcounts import Uses
from virt_bmap.formats.images.qcow2.references import cluster, references
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    ImageFormat,
    ImageLayer,
    Structure,
    Structures,
    Writing,
)
from virt_bmap.model.problems import ERROR, NOTE, WARNING

NAME = "qcow2"
FEATURES = (
    "versions 2 and 3, clusters of 512 bytes to 2 MiB, refcounts of 1 to 64 bits",
    "backing chains",
    "internal snapshots: data that only they hold, with the number of the snapshot; VM state",
    "compressed clusters",
    "subclusters (extended L2 entries)",
    "clusters kept for zeroes",
    "external data files",
    "persistent bitmaps",
    "refcounts compared with what refers to each cluster: free, leaked, damaged",
)
REFUSED = ("content of encrypted images (AES, LUKS): it is known where the clusters lie, not what they say",)
ORACLES = ("qemu-img map", "qemu-img check", "qemu-img info", "content read through the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "header: version, features known, places of tables",
        "L1 and L2 tables: places, alignment, reserved bits, each cluster once",
        "refcounts: against what refers to a cluster",
        "snapshots and bitmaps: sizes, places",
    ),
    unchecked=("the guest's bytes",),
)

SEVERAL = -1
"""Instead of the number of a snapshot."""
INFLATE = {"zlib": deflated, "zstd": zstd}
"""By header.COMPRESSION_TYPES."""


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one qcow2 image; `others` is its external data file, if it has one."""
    head = header.read_header(image)
    draft = Draft([image, *others], head.size)
    uses = Uses(head.cluster)
    own_header(draft, head, uses)
    own_snapshot_and_bitmap_tables(image, draft, head, uses)
    l2 = clusters.read_l2_tables(image, head, draft)
    own_l2_tables(draft, head, l2, uses)
    known, held = read_clusters(image, head, l2, draft)
    place_current(draft, head, known.take(l2.first[known.table] == 0))
    own_snapshot_data(draft, head, l2, known, held)
    if not head.external:
        uses.add(held.host, held.stored, l2.uses[held.table])
    own_free_clusters(image, draft, head, uses)
    facts = describe(head)
    return draft.finish(
        NAME,
        head.cluster,
        facts,
        f"it is encrypted ({facts['encryption']})" if head.crypt else None,
        INFLATE.get(head.compression),
    )


def own_header(draft: Draft, head: Header, uses: Uses) -> None:
    """The first cluster, and the L1 table."""
    name_at, name_size = head.backing
    draft.own("header", 0, head.length)
    draft.own("header extensions", head.length, head.extensions_end - head.length)
    if name_at >= head.extensions_end:
        draft.own("backing file name", name_at, name_size)
        draft.own("slack", head.extensions_end, name_at - head.extensions_end, tables.GAP)
        draft.own("slack", name_at + name_size, head.cluster - name_at - name_size, tables.GAP)
    else:
        draft.own("slack", head.extensions_end, head.cluster - head.extensions_end, tables.GAP)
    uses.add(ints(0), ints(head.cluster))
    _own_table(draft, head, uses, "L1 table", head.l1_offset, head.l1_size * 8)
    if head.crypto[1]:
        _own_table(draft, head, uses, "LUKS header", *head.crypto)


def _own_table(draft: Draft, head: Header, uses: Uses, part: str, offset: Any, length: Any) -> None:
    """Tables that begin at clusters; what is left of the last cluster is slack."""
    offset, length = ints(offset), ints(length)
    some = length > 0
    offset, length = offset[some], length[some]
    draft.own(part, offset, length)
    end = offset + length
    draft.own("slack", end, -end % head.cluster, tables.GAP)
    uses.add(offset, length)


def own_snapshot_and_bitmap_tables(image: Reader, draft: Draft, head: Header, uses: Uses) -> None:
    """What names snapshots and bitmaps, their own tables, and the bitmaps' data."""
    _own_table(draft, head, uses, "snapshot table", *head.snapshot_table)
    _own_table(
        draft,
        head,
        uses,
        "L1 table of a snapshot",
        [s.l1_offset for s in head.snapshots],
        [s.l1_size * 8 for s in head.snapshots],
    )
    _own_table(draft, head, uses, "bitmap directory", *head.bitmap_directory[:2])
    offset, entries = ints([b.table_offset for b in head.bitmaps]), ints([b.table_size for b in head.bitmaps])
    _own_table(draft, head, uses, "bitmap table", offset, entries * 8)
    if len(offset):
        words = np.frombuffer(image.read_ranges(offset, entries * 8), ">u8")
        place = (words & np.uint64(clusters.OFFSET_MASK)).astype(np.int64)
        place = place[place != 0]
        wrong = (place % head.cluster != 0) | (place >= image.size)
        draft.damage.add(
            "outside", "entries of bitmap tables lead outside the file or between clusters", place[wrong]
        )
        place = place[~wrong]
        draft.own("bitmap data", place, head.cluster)
        uses.add(place, np.full(len(place), head.cluster))


def own_l2_tables(draft: Draft, head: Header, l2: L2Tables, uses: Uses) -> None:
    current = l2.first == 0
    draft.own("L2 table", l2.offset[current], head.cluster)
    draft.own("L2 table of a snapshot", l2.offset[~current], head.cluster)
    uses.add(l2.offset, np.full(len(l2.offset), head.cluster), l2.uses)


def read_clusters(
    image: Reader, head: Header, l2: L2Tables, draft: Draft
) -> tuple[ClusterPieces, ClusterPieces]:
    """(what guest bytes are where, which host clusters are held), of all L2 tables."""
    batches = list(clusters.pieces(image, head, l2, draft))

    def join(side: int) -> ClusterPieces:
        return stack(ClusterPieces, [batch[side] for batch in batches])

    return _packed_cut(join(0)), join(1)


def _packed_cut(found: ClusterPieces) -> ClusterPieces:
    """Compressed clusters cut where the next one begins: their length is stored in sectors only, and they are
    packed without gaps."""
    packed = np.flatnonzero(found.kind == PACKED)
    if len(packed) == 0:
        return found
    start = np.unique(found.host[packed])
    behind = np.append(start[1:], np.iinfo(np.int64).max)[np.searchsorted(start, found.host[packed])]
    stored = found.stored.copy()
    stored[packed] = np.minimum(stored[packed], behind - found.host[packed])
    return ClusterPieces(found.guest, found.host, found.length, stored, found.kind, found.table)


def place_current(draft: Draft, head: Header, known: ClusterPieces) -> None:
    """Where the disk lies now, and what of the clusters is kept without being in use; behind the disk's end
    lies the VM state."""
    state = known.guest >= -(-head.size // head.cluster) * head.cluster
    draft.own("VM state", known.host[state & (known.host >= 0)], known.stored[state & (known.host >= 0)])
    known = known.take(~state)
    nowhere = known.kind == NOWHERE
    draft.zero(known.guest[nowhere], known.length[nowhere])
    file = 1 if head.external else 0
    kept = (known.kind == RESERVED) & (head.backing[0] != 0)  # without a backing file they read as zeroes
    draft.own("subclusters not in use", known.host[kept], known.length[kept], tables.UNWRITTEN, file)
    mine = known.take(~nowhere & ~kept)
    role = np.select(
        [mine.kind == IN_PLACE, np.isin(mine.kind, (ZERO_IN_PLACE, RESERVED))], [IN_DATA, IN_ZERO], IN_PACKED
    )
    draft.place(mine.guest, mine.host, mine.length, role, file, mine.stored)


def own_snapshot_data(
    draft: Draft, head: Header, l2: L2Tables, known: ClusterPieces, held: ClusterPieces
) -> None:
    """Clusters that the current state does not hold, by the snapshot that does; where several do, that is
    said."""
    current = l2.first[held.table] == 0
    theirs = held.take(~current)
    if len(theirs.host) == 0:
        return
    sizes = ints([head.size, *(min(snapshot.size, INT64_MAX) for snapshot in head.snapshots)])
    first, last = l2.first[theirs.table], l2.last[theirs.table]
    state = theirs.guest >= -(-sizes[first] // head.cluster) * head.cluster
    mine = known.take((l2.first[known.table] == 0) & (known.host >= 0))
    for what, some in (("data", ~state), ("VM state", state)):
        _own_by_snapshot(draft, head, what, theirs.take(some), first[some], last[some], mine)


def _own_by_snapshot(
    draft: Draft, head: Header, what: str, theirs: ClusterPieces, first: Int, last: Int, mine: ClusterPieces
) -> None:
    """Ranges held by snapshots but not by the current state.

    All numbers of a range are equal where n * sum of squares is the square of the sum.
    """
    start, end = theirs.host, theirs.host + theirs.stored
    points = np.unique(np.concatenate([start, end, mine.host, mine.host + mine.stored]))
    count = weigh(points, start, end)
    number = weigh(points, start, end, first) // np.maximum(count, 1)
    alone = (weigh(points, start, end, first * first) == count * number * number) & (
        weigh(points, start, end, last - first) == 0
    )
    only = (count > 0) & (weigh(points, mine.host, mine.host + mine.stored) == 0)
    label = np.where(alone, number, SEVERAL)
    for who in np.unique(label[only]).tolist():
        some = only & (label == who)
        name = "several snapshots" if who == SEVERAL else f"snapshot {who}"
        draft.own(
            f"{what} of {name}",
            points[:-1][some],
            (points[1:] - points[:-1])[some],
            tables.CONTENT,
            1 if head.external else 0,
        )


def own_free_clusters(image: Reader, draft: Draft, head: Header, uses: Uses) -> None:
    """Refcount structures, and what they say against what refers to the clusters.

    Of a dirty image they say nothing.
    """
    at, block = refcounts.read_blocks(image, head, draft)
    _own_table(
        draft,
        head,
        uses,
        "refcount table",
        head.refcount_offset,
        head.refcount_clusters << head.cluster_bits,
    )
    draft.own("refcount block", block, head.cluster)
    uses.add(block, np.full(len(block), head.cluster))
    found = refcounts.compare(uses, refcounts.read_counts(image, head, at, block), image.size)
    draft.own("free cluster", found.free[0], found.free[1] - found.free[0], tables.FREE)
    if head.incompatible & header.DIRTY:
        draft.damage.say(
            "unclean",
            "the image was not closed: its refcounts are out of date until qemu-img check -r all",
            72,
            severity=NOTE,
        )
        draft.own("leaked cluster", found.leaked[0], found.leaked[1] - found.leaked[0], tables.GAP)
        return
    draft.own("leaked cluster", found.leaked[0], found.leaked[1] - found.leaked[0], tables.UNKNOWN)
    for code, ranges, what, severity in (
        (
            "unowned",
            found.leaked,
            (
                "ranges of clusters are uses as used, but nothing refers to them (qemu-img check -r "
                "leaks frees them)"
            ),
            WARNING,
        ),
        (
            "count",
            found.low,
            "ranges of clusters have a refcount below the number of uses to them",
            ERROR,
        ),
        (
            "count",
            found.high,
            "ranges of clusters have a refcount above the number of uses to them",
            WARNING,
        ),
    ):
        draft.damage.add(code, what, ranges[0], severity=severity)


def describe(head: Header) -> dict[str, Any]:
    """What the header says, for people and JSON; bytes, and dates in seconds since 1970."""
    return {
        "version": head.version, "cluster_size": head.cluster, "features": head.features,
        "refcount_bits": head.refcount_bits, "compression": head.compression,
        "encryption": header.CRYPT.get(head.crypt, f"method {head.crypt}"),
        "dirty": bool(head.incompatible & header.DIRTY), "corrupt": bool(head.incompatible & header.CORRUPT),
        "snapshots": [{"number": number, "id": s.id, "name": s.name, "date": s.date, "size": s.size,
                "vm_state": s.vm_state}
                      for number, s in enumerate(head.snapshots, 1)],
        "bitmaps": [{"name": b.name, "granularity": b.granularity, "in_use": bool(b.flags & header.IN_USE),
                "enabled": bool(b.flags & header.AUTO)}
                    for b in head.bitmaps],
    }  # fmt: skip


def probe(image: Reader) -> bool:
    """Version 1 is a format of its own, qcow."""
    return image.read_clipped(4, 4) in (b"\0\0\0\2", b"\0\0\0\3")


def _structures() -> Structures:
    return {"header": Structure(header.HEADER)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    probe=probe,
    read=read,
    allocator="the refcounts",
    structures=_structures,
    references=references,
    cluster=cluster,
    writing=Writing.ANYWHERE | Writing.COMPRESSED | Writing.FREEING,
    suffix=".qcow2",
)
