"""Whose bytes were these, then? A map that was read after an access, and how far it can be believed.

What a map says of an access is certain where
- no metadata was written between the access and the end of the map's reading; or
- the map from before the access says the same, same object and same place in it, and the bytes can't have
  been another's in between: metadata that never moves; or no metadata was written between that map and the
  access, or none between the access and the last time that the owner wrote them; or
- nobody wrote to the bytes from then on until the map was read, and their owner has written them: then they
  are still what the access read or wrote. (So it is for reads the other way round, too: what nobody wrote to
  since the map before was right still belonged to whom that map says.)

(Bytes are given back, and to another one, by metadata that is written before that one writes: so do ext4, XFS
and btrfs.)

A write to bytes that are nobody's, or of an owner who has not written them yet as far as the map knows, may
get its owner by a later map. That it was nobody's is certain only where no metadata is written for as long as
a filesystem may keep an owner in memory: a file that is deleted before never gets into any map.

    time  ----- map before ------- m ---- access ---- m ---- w ---- map after ---->
    m: metadata is written, w: the same bytes are
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import KNOWN, OLDER, Resolver, Touched, identify
from virt_bmap.core.arrays import EMPTY, Bool, Int, expand, first_covers
from virt_bmap.core.columns import stack, take
from virt_bmap.model import tables

MS = 1_000_000
SETTLE = 150 * MS
"""ns that a write may be under way: it is logged before it is served. What was written less than this before
a map was begun may not be in it; a write that takes longer counts again when it ends (`under_way.py`)."""
MOST = 1 << 21
"""Parts of accesses that are looked at together: some 300 MiB."""

_OPS = np.arange(len(tables.OPS))
WRITING, FILLING = (
    np.isin(_OPS, [tables.OPS.index(op) for op in ops])
    for ops in (("write", "trim", "zero"), ("write", "zero"))
)
TRIM = tables.OPS.index("trim")


@dataclass(frozen=True)
class Asked:
    """Accesses, or parts of some, of one disk that wait for a
    map: each with the number of its access on this disk.

    `before` is a map that was read wholly before them, and `said` what they touch by it; None: there is none
    to ask. `guessed` marks what was handed on with a name already.
    """

    number: Int
    accesses: Accesses
    guessed: Bool
    before: Resolver | None
    said: Touched

    def __len__(self) -> int:
        return len(self.number)

    def take(self, keep: np.ndarray) -> "Asked":
        """The rows that a boolean or index array asks for, index arrays in order."""
        rows = np.flatnonzero(keep) if keep.dtype == bool else keep
        new = np.full(len(self), -1, np.int64)
        new[rows] = np.arange(len(rows))
        said = self.said.take(new[self.said.access] >= 0)
        return Asked(
            self.number[rows],
            self.accesses.take(rows),
            self.guessed[rows],
            self.before,
            replace(said, access=new[said.access]),
        )


class Writes(NamedTuple):
    """Writes, trims and zeroes of one disk in their order, by the numbers of the accesses."""

    number: Int
    time_ns: Int
    start: Int
    end: Int


NO_WRITES = Writes(EMPTY, EMPTY, EMPTY, EMPTY)
NOTHING = Touched(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY.astype(bool), EMPTY.astype(np.uint8))


class Judged(NamedTuple):
    """What became of the rows of an Asked: by the map after and by the map before, with their states.

    `waits` marks pieces of the former whose owner is still to come; `agrees` those of which the map before
    says the same."""

    after: Touched
    waits: Bool
    agrees: Bool
    before: Touched


def clean(changes: Int, resolver: Resolver, time_ns: Int) -> Bool:
    """For each time: was no metadata written between it and the reading of the map? `changes` are the times
    of such writes, in order."""
    low = np.minimum(time_ns, resolver.begun_ns - SETTLE)
    after = time_ns < resolver.ended_ns
    high = np.where(after, resolver.ended_ns, time_ns)
    # a write is not its own past
    count = np.searchsorted(changes, high, "right") - np.searchsorted(changes, low, "left")
    count -= np.where(
        after, 0, np.searchsorted(changes, high, "right") - np.searchsorted(changes, high, "left")
    )
    found: Bool = count <= 0
    return found


def judge(asked: Asked, disk: int, resolver: Resolver, changes: Int, writes: Writes) -> Judged:
    """What a map that was read after these accesses (its reading began when they had happened) says of them,
    and what of it is certain."""
    found = resolver.touched(disk, asked.accesses.offset, asked.accesses.length)
    writes = take(writes, writes.time_ns <= resolver.ended_ns)
    points = np.unique(np.concatenate([
        found.start, found.end, asked.said.start, asked.said.end, asked.accesses.offset,
        asked.accesses.offset + asked.accesses.length, *_around(writes, asked.accesses),
    ]))  # fmt: skip
    parts = int((np.searchsorted(points, found.end) - np.searchsorted(points, found.start)).sum())
    if parts > MOST and len(asked) > 1:
        middle = np.arange(len(asked)) < len(asked) // 2
        halves = [judge(asked.take(half), disk, resolver, changes, writes) for half in (middle, ~middle)]
        return _joined(halves, int(middle.sum()))
    return _judged(asked, found, resolver, changes, writes, points)


def _around(writes: Writes, accesses: Accesses) -> tuple[Int, Int]:
    """Ends of writes that lie inside the accesses, as far as a quick look tells."""
    if not len(accesses):
        return EMPTY, EMPTY
    low, high = accesses.offset.min(), (accesses.offset + accesses.length).max()
    near = (writes.end > low) & (writes.start < high)
    return writes.start[near], writes.end[near]


def _judged(
    asked: Asked, found: Touched, resolver: Resolver, changes: Int, writes: Writes, points: Int
) -> Judged:
    op, number = asked.accesses.op, asked.number
    slots = len(points)
    low, high = np.searchsorted(points, writes.start), np.searchsorted(points, writes.end)
    cover = first_covers(low[::-1], high[::-1], slots)
    last, last_ns = (np.append(column[::-1], -1)[cover] for column in (writes.number, writes.time_ns))
    new, old = _atoms(found, points), _atoms(asked.said, points)

    # the map after: its pieces, cut at every point
    nobodys = resolver.nobodys(found.object)[new.piece]
    trim, fills = op[new.row] == TRIM, FILLING[op[new.row]]
    fills |= ~trim & (last[new.slot] >= 0)  # or it reads what was written just now
    written = np.where(
        trim, resolver.kind_of(found.object)[new.piece] == tables.FREE, _written(resolver, found)[new.piece]
    )
    untouched = last[new.slot] <= number[new.row]
    agrees = _agree(found, new, resolver, asked, old)
    time_ns = asked.accesses.time_ns[new.row]
    until = np.where(written, np.maximum(time_ns, last_ns[new.slot]), resolver.ended_ns)
    kept = resolver.fixed(found.object)[new.piece] | _same_owner(changes, asked, time_ns, until)
    quiet = clean(changes, resolver, asked.accesses.time_ns)[new.row]
    certain = quiet | (agrees & kept) | (untouched & written)
    waits = fills & (nobodys | (~certain & (resolver.kind_of(found.object)[new.piece] == tables.UNWRITTEN)))

    # the map before, where the one after is not certain of any owner
    keep_new, keep_old, state_old = _choose(
        asked, new, old, certain | waits, nobodys, changes, writes, (low, high), slots
    )
    state = np.where(certain, KNOWN, OLDER).astype(np.uint8)
    after, after_piece = _merged(
        found, new.take(keep_new), state[keep_new], (waits * 2 + agrees)[keep_new], points
    )
    before, _ = _merged(asked.said, old.take(keep_old), state_old[keep_old], state_old[keep_old], points)
    return Judged(after, after_piece >= 2, after_piece % 2 == 1, before)


def _written(resolver: Resolver, touched: Touched) -> Bool:
    """Which pieces their owner is sure to have written: of content, what it can be asked for."""
    found: Bool = resolver.written(touched.object) & (
        (resolver.kind_of(touched.object) != tables.DATA) | (touched.file_offset >= 0)
    )
    return found


def _same_owner(changes: Int, asked: Asked, time_ns: Int, until: Int) -> Bool:
    """Whose bytes were the same one's at the map before and are again: were they so at these times? To be
    another's in between takes metadata on either side."""
    if asked.before is None:
        return np.zeros(len(time_ns), bool)
    before = np.searchsorted(changes, time_ns) - np.searchsorted(changes, asked.before.begun_ns - SETTLE)
    after = np.searchsorted(changes, until, "right") - np.searchsorted(changes, time_ns, "right")
    found: Bool = (before <= 0) | (after <= 0)
    return found


class _Atoms(NamedTuple):
    """Pieces cut at points: atom i is what piece `piece`
    has of slot `slot`, for row `row` of the accesses."""

    row: Int
    slot: Int
    piece: Int

    def take(self, keep: np.ndarray) -> "_Atoms":
        return take(self, keep)


def _atoms(touched: Touched, points: Int) -> _Atoms:
    first = np.searchsorted(points, touched.start)
    piece, step = expand(np.searchsorted(points, touched.end) - first)
    return _Atoms(touched.access[piece], first[piece] + step, piece)


def _agree(found: Touched, new: _Atoms, resolver: Resolver, asked: Asked, old: _Atoms) -> Bool:
    """Which atoms of the map after are, by the map before, the same place of the same object."""
    if asked.before is None or not len(old.row) or not len(new.row):
        return np.zeros(len(new.row), bool)
    objects = [np.unique(touched.object) for touched in (found, asked.said)]
    names = pa.concat_tables(
        [which.identities(some) for which, some in zip((resolver, asked.before), objects, strict=True)]
    )
    identity, _ = identify(names)
    count = len(objects[0])
    mine = identity[:count][np.searchsorted(objects[0], found.object)][new.piece]
    theirs = identity[count:][np.searchsorted(objects[1], asked.said.object)][old.piece]
    keys = []
    for touched, atoms, object in ((found, new, mine), (asked.said, old, theirs)):
        # where the object begins, counted from the disk's byte 0: equal where the place in it is
        origin = np.where(
            touched.file_offset >= 0, touched.file_offset - touched.start, np.iinfo(np.int64).min
        )
        keys.append((atoms.row, atoms.slot, object, origin[atoms.piece]))
    both = [np.concatenate(columns) for columns in zip(*keys, strict=True)]
    order = np.lexsort(both)
    same = np.ones(len(order) - 1, bool)
    for column in both:
        same &= column[order][1:] == column[order][:-1]
    group = np.append(0, np.cumsum(~same))
    is_old = order >= len(new.row)
    has_old = np.zeros(int(group[-1]) + 1, bool)
    has_old[group[is_old]] = True
    result = np.zeros(len(new.row), bool)
    result[order[~is_old]] = has_old[group[~is_old]]
    return result & (asked.accesses.time_ns[new.row] >= asked.before.ended_ns)


def _choose(
    asked: Asked, new: _Atoms, old: _Atoms, settled: Bool, nobodys: Bool, changes: Int, writes: Writes,
    covered: tuple[Int, Int], slots: int
) -> tuple[Bool, Bool, np.ndarray]:  # fmt: skip
    """Which atoms of either map are kept, and the state of those of the map before.

    It is asked where no owner by the map after is certain: it knows for
    certain whose bytes were read when nobody had written to them since it
    was right; and it is the better guess where the other one knows nobody.
    """
    none = np.zeros(len(old.row), bool)
    if asked.before is None or not len(old.row):
        return np.full(len(new.row), True), none, none.astype(np.uint8)
    wide = np.int64(slots)
    key, old_key = new.row * wide + new.slot, old.row * wide + old.slot
    certain = np.isin(old_key, key[settled])
    empty = np.isin(old_key, key[nobodys])
    since = np.searchsorted(changes, asked.before.begun_ns - SETTLE)
    rows = writes.time_ns >= changes[since] if since < len(changes) else np.zeros(len(writes.time_ns), bool)
    first = np.append(writes.number[rows], np.iinfo(np.int64).max)[
        first_covers(covered[0][rows], covered[1][rows], slots)
    ]
    reads = ~WRITING[asked.accesses.op[old.row]]
    theirs = asked.before.nobodys(asked.said.object)[old.piece]
    since_then = asked.accesses.time_ns[old.row] >= asked.before.ended_ns
    known = (
        since_then
        & reads
        & _written(asked.before, asked.said)[old.piece]
        & (first[old.slot] >= asked.number[old.row])
    )
    keep = ~certain & (known | (empty & ~theirs))
    keep = np.isin(old_key, old_key[keep]) & ~certain
    return ~np.isin(key, old_key[keep]), keep, np.where(known, KNOWN, OLDER).astype(np.uint8)


def _merged(
    touched: Touched, atoms: _Atoms, state: np.ndarray, mark: np.ndarray, points: Int
) -> tuple[Touched, np.ndarray]:
    """Atoms as pieces again, neighbours of one piece, state and mark together; and the mark of each."""
    if not len(atoms.row):
        return NOTHING, EMPTY
    new = np.append(True, (np.diff(atoms.piece) != 0) | (np.diff(atoms.slot) != 1) | (np.diff(mark) != 0))
    new[1:] |= state[1:] != state[:-1]
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(new)) - 1
    piece = atoms.piece[first]
    start, end = points[atoms.slot[first]], points[atoms.slot[last] + 1]
    inside = touched.file_offset[piece]
    inside = np.where(inside >= 0, inside + start - touched.start[piece], -1)
    joined = Touched(
        atoms.row[first], touched.object[piece], start, end, inside, touched.inline[piece], state[first]
    )
    order = np.lexsort((joined.inline, joined.start, joined.access))
    return joined.take(order), mark[first][order].astype(np.int64)


def _joined(halves: list[Judged], count: int) -> Judged:
    shift = [0, count]
    after, before = (
        stack(
            Touched,
            [replace(touched, access=touched.access + by) for touched, by in zip(parts, shift, strict=True)],
        )
        for parts in ([half.after for half in halves], [half.before for half in halves])
    )
    return Judged(
        after,
        np.concatenate([half.waits for half in halves]),
        np.concatenate([half.agrees for half in halves]),
        before,
    )


def together(parts: list[Asked]) -> list[Asked]:
    """The same rows in as few parts as there are maps before them."""
    result = []
    for before in {id(asked.before): asked.before for asked in parts}.values():
        mine = [asked for asked in parts if asked.before is before]
        base = np.cumsum([0, *(len(asked) for asked in mine)])
        said = [
            replace(asked.said, access=asked.said.access + by) for asked, by in zip(mine, base, strict=False)
        ]
        result.append(
            Asked(
                np.concatenate([asked.number for asked in mine]),
                stack(Accesses, [asked.accesses for asked in mine]),
                np.concatenate([asked.guessed for asked in mine]),
                before,
                stack(Touched, said),
            )
        )
    return result
