"""What must hold of the tables of every volume, whatever its format.

No byte has two owners that do not share it on purpose (`tables.SHARED`), nothing that is owned is free; names
lead to inodes that are in use, and inodes in use have names, but those that have none by their nature: the
root, what is deleted, and the filesystem's own (`tables.T_METADATA`).
"""

import numpy as np

from virt_bmap.core.arrays import Bool, Int, covered_twice, in_order, intersect, union
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem
from virt_bmap.model.damage import Damage

DENSE = 8
"""Numbers of inodes for each that is in use, up to which a table of all is quicker than a search, and not
larger than what is known of them."""


def check_owners(start: Int, end: Int, kind: Int, flags: Int, damage: Damage) -> tuple[Int, Int]:
    """Look for bytes with two owners among extents of which none is empty or lies in another.

    Returns their starts and their ends, each sorted by itself: enough to know what they cover.
    """
    shared = flags & tables.SHARED != 0
    if shared.any():  # those that share bytes are one owner of them
        low, high = union(start[shared], end[shared])
        start, end = np.append(start[~shared], low), np.append(end[~shared], high)
        kind = np.append(kind[~shared], np.full(len(low), tables.DATA))
    low, high = in_order(start), in_order(end)
    # where nothing overlaps, the n-th range to begin is also the n-th to end
    if (low[1:] < high[:-1]).any():
        free = kind == tables.FREE
        twice, _ = covered_twice(start[~free], end[~free])
        damage.add("two-owners", "[range has|ranges have] two owners", twice)
        both, _ = intersect(start[~free], end[~free], start[free], end[free])
        damage.add("owned-but-free", "[range is|ranges are] owned, but free by the allocator", both)
    return low, high


def check_names(found: Filesystem, damage: Damage) -> None:
    """There must be a root; every name must lead to a used inode, every inode with links must have a name."""
    number, kind = tables.integers(found.inodes, "inode"), tables.codes(found.inodes, "type")
    target = tables.integers(found.names, "inode")
    if (found.root < 0 and not len(target)) or damage.has("simplified"):
        return  # there are none, or some were left out on purpose
    is_root = number == found.root
    if not (kind[is_root] == tables.T_DIRECTORY).any():
        damage.say("no-root", f"inode {found.root}, the root directory, is not in use or not a directory")
    used, named = _each_other(target, number)
    damage.add(
        "dangling-name",
        "[name leads to an inode that is|names lead to inodes that are] not in use",
        count=int((~used).sum()),
    )
    gone = tables.integers(found.inodes, "flags") & tables.I_DELETED != 0
    linked = tables.integers(found.inodes, "nlink") > 0
    alone = ~(named | gone | is_root) & linked & (kind != tables.T_METADATA)
    if alone.any():  # Arrow's functions, which nulls need, are slow to import
        offsets = tables.integers(found.inodes, "record_offset")[alone]
        damage.add("nameless-inode", "[inode has|inodes have] links, but no name", offsets)


def _each_other(target: Int, number: Int) -> tuple[Bool, Bool]:
    """Which targets are among the numbers, and which numbers among the targets."""
    if not len(number) or not len(target):
        return np.zeros(len(target), bool), np.zeros(len(number), bool)
    last = int(number.max())
    if last <= DENSE * (len(target) + len(number)):
        used, named = np.zeros(last + 2, bool), np.zeros(last + 2, bool)
        used[number] = True
        clipped = np.minimum(target, last + 1)
        named[clipped] = True
        return used[clipped], named[number]
    if (number[1:] < number[:-1]).any():
        order = np.argsort(number, kind="stable")
        used, named = _each_other(target, number[order])
        result = np.empty(len(number), bool)
        result[order] = named
        return used, result
    at = np.minimum(np.searchsorted(number, target), len(number) - 1)
    used = number[at] == target
    named = np.zeros(len(number), bool)
    named[at[used]] = True
    return used, named
