"""Who owns which bytes of the file: header and tables, and what the current state holds.

Snapshots, bitmaps and refcounts own theirs in modules of their own.
"""

import numpy as np

from virt_bmap.core.arrays import ints
from virt_bmap.core.mapping import PACKED as IN_PACKED
from virt_bmap.formats.images.layer import IN_DATA, IN_ZERO, Draft
from virt_bmap.formats.images.qcow2.allocator import Uses
from virt_bmap.formats.images.qcow2.extents import (
    IN_PLACE,
    NOWHERE,
    RESERVED,
    ZERO_IN_PLACE,
    ClusterPieces,
    L2Tables,
)
from virt_bmap.formats.images.qcow2.header import Header
from virt_bmap.model import tables


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
    uses.own_table(draft, "L1 table", *head.l1)
    uses.own_table(draft, "LUKS header", *head.crypto)


def own_l2_tables(draft: Draft, head: Header, l2: L2Tables, uses: Uses) -> None:
    """By who uses them: the current state, or only snapshots."""
    current = l2.first == 0
    draft.own("L2 table", l2.offset[current], head.cluster)
    draft.own("L2 table of a snapshot", l2.offset[~current], head.cluster)
    uses.add(l2.offset, np.full(len(l2.offset), head.cluster), l2.uses)


def place_current(draft: Draft, head: Header, known: ClusterPieces) -> None:
    """Where the disk lies now, and what of the clusters is kept without being in use; beyond the disk's end
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
