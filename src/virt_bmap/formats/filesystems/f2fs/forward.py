"""Rolling forward in memory: files as they are after the recovery that the next mount would do.

A synced inode takes the place of the older one, but for its tree: that stays as the checkpoint knows it, and
each synced direct node takes its place in there. What the newer nodes replace is free afterwards. New inodes
get the name that they bear.

Sources: Linux fs/f2fs/recovery.c (recover_inode, recover_dentry, do_recover_data), node.c
(f2fs_recover_inode_page, f2fs_recover_xattr_data), inline.c (f2fs_recover_inline_data).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import records
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.f2fs import allocator as checkpoint
from virt_bmap.formats.filesystems.f2fs import inodes as nodes
from virt_bmap.formats.filesystems.f2fs import journal
from virt_bmap.formats.filesystems.f2fs.allocator import BATCH, Checkpoint, Nat
from virt_bmap.formats.filesystems.f2fs.inodes import Inodes, Pointers, Trees, WalkedNodes
from virt_bmap.formats.filesystems.f2fs.journal import Chain, Newer
from virt_bmap.formats.filesystems.f2fs.names import NAME_LEN
from virt_bmap.formats.filesystems.f2fs.ondisk import (
    BLOCK,
    NODE,
    Superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions


class Forward(NamedTuple):
    """What is there after recovery, and the blocks [starts[i], ends[i]) that older nodes needed."""

    found: WalkedNodes
    starts: Int
    ends: Int


def read(
    volume: Superblock, nat: Nat, newer: Newer, inline_names: Callable[[Inodes, Bytes], None], damage: Damage
) -> Forward:
    """Everything that the NAT and the newer nodes lead to."""
    merged = nat.with_inodes(newer.inodes.ino, newer.inodes.block)
    found = nodes.read_inodes(volume, merged, inline_names, damage)
    was = take(nat, np.isin(nat.nid, newer.inodes.ino) & (nat.nid == nat.ino))
    former = nodes.read_inodes(volume, was, lambda inodes, data: None, Damage())
    fresh, back = (
        positions(found.inodes.number, number) for number in (newer.inodes.ino, former.inodes.number)
    )
    _keep_trees(found, former, fresh, back)
    given_up = _keep_attributes(found, former, nat, newer, fresh, back)
    owner = positions(found.inodes.number, newer.direct.ino)
    mine = np.flatnonzero((owner >= 0) & ~np.append(found.inodes.is_inline, True)[owner])
    owner, block = owner[mine], newer.direct.block[mine]
    before = journal.first_index(newer.direct.number[mine]) * found.inodes.addresses_per_node[owner]
    none = np.zeros(len(mine), np.int64)
    direct = Pointers(owner, none, found.inodes.addresses[owner] + before, none)
    dropped = nodes.follow(volume, merged, found, damage, direct.slots)
    for low in range(0, len(block), BATCH // BLOCK):
        part = slice(low, low + BATCH // BLOCK)
        data = volume.reader.read_blocks(block[part] * BLOCK, BLOCK)
        nodes.add_level(volume, found, take(direct, part), data, block[part], damage)
    nodes.add_attributes(merged, found, damage)
    gone = WalkedNodes(found.inodes, dropped, np.zeros(len(nat.nid) + 1, bool))
    former.taken = gone.taken
    for old in (former, gone):
        nodes.follow(volume, nat, old, Damage())
    return Forward(found, *_blocks([former, gone], np.append(former.inodes.block, given_up)))


def _keep_trees(found: WalkedNodes, former: WalkedNodes, fresh: Int, back: Int) -> None:
    """Pointers to nodes are those of the former inodes, unless content is inside the new ones; what nobody
    follows stays with the former."""
    pointers = former.pointers
    stays = (back >= 0) & ~np.append(found.inodes.is_inline, True)[back]
    kept = take(pointers, stays[pointers.owner])
    found.pointers = stack(
        Pointers,
        [take(found.pointers, ~np.isin(found.pointers.owner, fresh)), kept._replace(owner=back[kept.owner])],
    )
    former.pointers = take(pointers, ~stays[pointers.owner])


def _keep_attributes(
    found: WalkedNodes, former: WalkedNodes, nat: Nat, newer: Newer, fresh: Int, back: Int
) -> Int:
    """Likewise the attribute node, unless there is a newer one; returns blocks that nobody needs any more."""
    nid = np.append(found.inodes.xattr_nid, 0)
    nid[fresh] = 0
    nid[back] = former.inodes.xattr_nid
    owner = positions(found.inodes.number, newer.attributes.ino)
    block = newer.attributes.block[owner >= 0]
    owner = owner[owner >= 0]
    old = nat.find(nid[owner])
    nid[owner] = 0
    found.inodes = found.inodes._replace(xattr_nid=nid[:-1])
    found.attributes.append(Trees(owner, block, np.zeros(len(owner), np.int64)))
    return nat.block[old[old >= 0]]


def _blocks(old: list[WalkedNodes], more: Int) -> tuple[Int, Int]:
    """(starts, ends) of all blocks of these."""
    starts = [
        more,
        *(part.block for found in old for part in found.trees),
        *(run.start for found in old for run in found.runs),
    ]
    counts = [np.ones(len(more), np.int64),
        *(np.ones(len(part.block), np.int64) for found in old for part in found.trees),
              *(run.count for found in old for run in found.runs)]  # fmt: skip
    first = np.concatenate(starts)
    return union(first, first + np.concatenate(counts))


# ---- names -------------------------------------------------------------------------------------------------


def add_names(volume: Superblock, newer: Newer, inodes: Inodes, names: pa.Table) -> tuple[pa.Table, Int]:
    """The table `names` with those that new inodes bear; a file that had the name before loses it.

    Also returned: inodes, once for each name that they lost.
    """
    import pyarrow.compute as pc  # takes longer to import than most maps take, and is needed only here

    raw = records(volume.reader.read_blocks(newer.named.block * BLOCK, BLOCK), NODE)
    parent, ino, length = raw["i_pino"].astype(np.int64), newer.named.ino, raw["i_namelen"].astype(np.int64)
    at = positions(inodes.number, parent)
    good = (
        (positions(inodes.number, ino) >= 0)
        & (np.append(inodes.form, 0)[at] == nodes.S_IFDIR)
        & (length > 0)
        & (length <= NAME_LEN)
    )
    rows = np.flatnonzero(good)
    text = np.frombuffer(raw["i_name"][rows].tobytes(), np.uint8)
    name = Ragged.cut(text, np.arange(len(rows), dtype=np.int64) * NAME_LEN, length[rows]).arrow()
    new = tables.make("names", volume=0, parent=parent[rows], inode=ino[rows], name=name)

    def keys(table: pa.Table) -> pa.Array:
        where = table.column("parent").cast(pa.string()).cast(pa.binary())
        return pc.binary_join_element_wise(
            where, table.column("name"), pa.scalar(b"/", pa.binary())
        ).combine_chunks()

    if not len(rows):
        return names, EMPTY
    taken = keys(new)
    last = journal.last_of(taken.dictionary_encode().indices.to_numpy())
    late = np.isin(np.arange(len(rows)), last)
    there = pc.is_in(keys(names), value_set=taken)
    lost = np.append(tables.integers(names.filter(there), "inode"), ino[rows[~late]])
    return tables.concat("names", [names.filter(pc.invert(there)), new.filter(pa.array(late))]), lost


def newer_nodes(volume: Superblock, chain: Chain, nat: Nat, orphans: Int, damage: Damage) -> Newer:
    """What was synced after the checkpoint and is read in place of what the checkpoint knows."""
    if not chain.whole:
        text = (
            "[node|nodes] after the checkpoint [was|were] followed, the rest of the chain was not: the "
            "state of the checkpoint is mapped"
        )
        damage.add("not-replayed", text, int(chain.nodes.block[0]) * BLOCK, len(chain.nodes.block))
        return journal.NOTHING
    newer = journal.newer(volume, chain, nat, orphans)
    count = len(newer.inodes.block) + len(newer.direct.block) + len(newer.attributes.block)
    if count:
        text = (
            "[node that was|nodes that were] synced after the checkpoint "
            "[is|are] rolled forward in memory; the image itself is unchanged"
        )
        damage.add("journal-replayed", text, int(chain.nodes.block[0]) * BLOCK, count)
    return newer


def volume_state(pack: Checkpoint, chain: Chain, newer: Newer, damage: Damage) -> str:
    """A checkpoint is consistent in itself; what is synced after it waits for the next mount."""
    if pack.has(checkpoint.ERROR | checkpoint.FSCK):
        damage.say("marked-damaged", "the checkpoint says that the kernel found errors", pack.start * BLOCK)
    if not chain.whole:
        return tables.NEEDS_RECOVERY
    if newer:
        return tables.RECOVERED
    return tables.CLEAN if pack.has(checkpoint.UMOUNT) else tables.FROZEN
