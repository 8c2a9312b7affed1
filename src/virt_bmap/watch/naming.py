"""Which map names which access, while the guest changes its filesystems.

A map is good for an access when no metadata was written between its reading and the access: metadata writes are recognised as they pass, by what
the map in force says of the bytes, and a new map is asked for. Accesses behind such a write wait for the new map in their order, a short while at most. Writes to
bytes that are nobody's (filesystems write content before the metadata that says whose it is) don't hold up the others: they are held until a map
knows their owner, or until no journal commits that late.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import EMPTY, Bool, Int, Intervals, ints
from virt_bmap.blockmap import BlockMap
from virt_bmap.columns import stack
from virt_bmap.reader import HEAD, TAIL
from virt_bmap.watch.accesses import NONE, Accesses
from virt_bmap.watch.refresh import Refreshed, Refresher
from virt_bmap.watch.resolve import HELD, KNOWN, OLDER, Resolver, Touched
from virt_bmap.watch.sinks import Sinks

MS = 1_000_000
SETTLE = 150 * MS
"""ns that a write may be under way: it is logged before it is served. What was written less than this before a map was begun may not be in it."""
QUIET = 20 * MS
"""ns without metadata writes after which a new map is begun: they come in bursts."""
LATEST = 80 * MS
"""ns after which it is begun although they go on."""
PATIENCE = 2000 * MS
"""ns that accesses wait for a new map; then the map in force names them, and they are marked."""
CLAIM = 36_000 * MS
"""ns that writes to nobody's bytes wait for their owner. ext4 commits every 5 s; XFS flushes its log every 30 s (xfs_sync_work)."""
RETRY, LONGEST_RETRY = 1000 * MS, 30_000 * MS
"""ns until it is tried again where a map could not be read; doubled each time."""
MOST_WAITING = 1 << 18
"""Accesses that may wait, and pieces that may be held: some 100 MiB each."""
RESOLUTION = 10 * MS
"""Metadata writes are remembered this exactly, so that a guest that writes nothing else fills no memory."""

_WRITING = np.isin(np.arange(len(tables.OPS)), [tables.OPS.index(op) for op in ("write", "trim", "zero")])
_FILLING = np.isin(np.arange(len(tables.OPS)), [tables.OPS.index(op) for op in ("write", "zero")])
# by kind; the last element is for -1, a volume of which nothing is known
_KINDS = np.arange(len(tables.KINDS) + 1)
_METADATA = np.isin(_KINDS, (tables.DIRECTORY, tables.SYMLINK, tables.XATTR, tables.TREE, tables.METADATA, tables.BOOT))
_NAMELESS = np.isin(_KINDS, (tables.GAP, tables.CONTENT, tables.UNKNOWN, tables.UNREFERENCED, len(tables.KINDS)))
_NOBODYS = np.isin(_KINDS, (tables.FREE, tables.UNKNOWN, tables.UNREFERENCED))


@dataclass
class _Batch:
    """Accesses that wait, and what they touch by the map in force."""

    disk: int
    accesses: Accesses
    touched: Touched


@dataclass
class _Held:
    """Pieces of writes of one disk that nobody owns: as accesses of just these bytes, each with the number of its access."""

    number: Int
    pieces: Accesses


class Naming:
    """Names accesses and hands them to the sinks, with the newest map that can be had without keeping anyone waiting."""

    def __init__(self, resolver: Resolver, sinks: Sinks, refresher: Refresher | None = None) -> None:
        self.resolver = resolver
        self.sinks = sinks
        self.failures = 0
        """Maps that could not be read, and the last reason."""
        self.failure = ""
        self._refresher = refresher
        self._changes = EMPTY
        """Times of metadata writes that the map in force may not know, in order."""
        self._asked_ns = 0
        self._rest_until = 0
        self._retry = RETRY
        self._waiting: deque[_Batch] = deque()
        self._held: dict[int, _Held] = {}
        self._added: dict[int, int] = {}
        self._signatures: dict[int, Intervals] = {}

    @property
    def is_settled(self) -> bool:
        """Is the map in force up to date, as far as the accesses seen tell?"""
        alive = self._refresher and not self._refresher.ended
        return not alive or not (len(self._changes) or (self._refresher and self._refresher.busy))

    def add(self, disk: int, accesses: Accesses) -> None:
        """Name these, or let them wait."""
        if not len(accesses):
            return
        self._waiting.append(self._resolved(disk, accesses))
        self._release(time.time_ns())

    def wake(self) -> list[int]:
        """File descriptors that select should wait for beside the clock: a map that is being read."""
        return [self._refresher.fileno()] if self._refresher and self._refresher.busy else []

    def tick(self) -> None:
        """Take a map that is done, let go what has waited long enough, ask for a map that is due. To be called often."""
        now = time.time_ns()
        if not self._refresher:
            return
        if found := self._refresher.result():
            self._take(found, now)
        self._release(now)
        self._settle(now - CLAIM)
        if not self._refresher.busy and not self._refresher.ended and self._is_due(now):
            self._asked_ns = now
            self._refresher.begin()

    def finish(self) -> None:
        """Name all that still waits: there will be no newer map."""
        self._release(np.iinfo(np.int64).max)
        self._settle(np.iinfo(np.int64).max)

    # ---- metadata writes ----------------------------------------------------------------------------------------------

    def _resolved(self, disk: int, accesses: Accesses) -> _Batch:
        """The batch under the map in force; its metadata writes are noted."""
        touched = self.resolver.touched(disk, accesses.offset, accesses.length)
        if self._refresher:
            times = np.unique(accesses.time_ns[touched.access[self._changing(disk, accesses, touched)]])
            times = times[times > self.resolver.begun_ns - SETTLE]
            if len(times):
                times = times[np.append(True, np.diff(times // RESOLUTION) > 0)]
                self._changes = np.union1d(self._changes, times)
        return _Batch(disk, accesses, touched)

    def _changing(self, disk: int, accesses: Accesses, touched: Touched) -> Bool:
        """Which pieces are writes that may change the map: to metadata, or where a disk or volume that nobody knows yet would have its signature."""
        writing = _WRITING[accesses.op[touched.access]]
        if not writing.any():
            return writing
        kind = self.resolver.kind_of(touched.object)
        changing: Bool = writing & _METADATA[kind]
        unknown = np.flatnonzero(writing & _NAMELESS[kind])
        if len(unknown):
            if disk not in self._signatures:
                self._signatures[disk] = signatures(self.resolver.bmap, disk)
            hit, _ = self._signatures[disk].overlaps(touched.start[unknown], touched.end[unknown])
            changing[unknown[hit]] = True
        return changing

    def _is_due(self, now: int) -> bool:
        if not len(self._changes) or now < self._rest_until:
            return False
        unseen = self._changes[self._changes > self._asked_ns]
        if not len(unseen):
            return bool(now > self._changes[-1] + SETTLE)
        return bool(now > unseen[-1] + QUIET or now > unseen[0] + LATEST)

    # ---- a new map ----------------------------------------------------------------------------------------------------

    def _take(self, found: Refreshed, now: int) -> None:
        """Put a new map in force, unless it is none or lost what is still being written."""
        self._rest_until = now + int(found.seconds * 1e9)  # half of the time at most: the guest needs the machine, too
        error = found.error
        if found.resolver and (self._changes > found.begun_ns).any():
            error = lost(self.resolver.bmap, found.resolver.bmap)
        if error or not found.resolver:
            self.failures += 1
            self.failure = error
            self._rest_until, self._retry = now + self._retry, min(2 * self._retry, LONGEST_RETRY)
            return
        self._retry = RETRY
        self.resolver = found.resolver
        self._signatures = {}
        self._changes = self._changes[self._changes > found.begun_ns - SETTLE]
        self.sinks.renew(self.resolver)
        self._settle(now - CLAIM)
        self._waiting = deque(self._resolved(batch.disk, batch.accesses) for batch in self._waiting)

    # ---- accesses in their order ----------------------------------------------------------------------------------------

    def _release(self, now: int) -> None:
        """Hand on, in order, what the map in force is good for and what has waited long enough."""
        waiting = sum(len(batch.accesses) for batch in self._waiting)
        alive = self._refresher is not None and not self._refresher.ended
        while self._waiting:
            batch = self._waiting[0]
            time_ns = batch.accesses.time_ns
            older = time_ns > self._changes[0] if len(self._changes) else np.zeros(len(time_ns), bool)
            older &= time_ns > self.resolver.begun_ns
            overdue = np.full(len(time_ns), waiting > MOST_WAITING or not alive) | (time_ns < now - PATIENCE)
            stop = np.flatnonzero(older & ~overdue)
            count = int(stop[0]) if len(stop) else len(time_ns)
            if count:
                self._deliver(batch, count, older)
                waiting -= count
            if count < len(time_ns):
                self._waiting[0] = _rest(batch, count)
                return
            self._waiting.popleft()

    def _deliver(self, batch: _Batch, count: int, older: Bool) -> None:
        """Give the first `count` accesses of the batch to the sinks, and hold what nobody owns."""
        accesses = batch.accesses.take(np.arange(count))
        touched = batch.touched.take(np.arange(np.searchsorted(batch.touched.access, count)))
        state = np.where(older[touched.access], OLDER, KNOWN).astype(np.uint8)
        number = self._added.get(batch.disk, 0) + touched.access
        if self._refresher and not self._refresher.ended:
            held = _FILLING[accesses.op[touched.access]] & _NOBODYS[self.resolver.kind_of(touched.object)]
            if held.any():
                state[held] = HELD
                self._hold(batch.disk, number[held], _pieces(accesses, touched.take(held)))
        self.sinks.add(batch.disk, accesses, replace(touched, state=state))
        self._added[batch.disk] = self._added.get(batch.disk, 0) + count

    # ---- writes to nobody's bytes -----------------------------------------------------------------------------------------

    def _hold(self, disk: int, number: Int, pieces: Accesses) -> None:
        known = self._held.get(disk, _Held(EMPTY, NONE))
        self._held[disk] = _Held(np.concatenate([known.number, number]), stack(Accesses, [known.pieces, pieces]))

    def _settle(self, before: int) -> None:
        """Hand on held pieces that have an owner now, those that are older than `before`, and the oldest where there are too many."""
        for disk, held in self._held.items():
            pieces = held.pieces
            if not len(pieces):
                continue
            touched = self.resolver.touched(disk, pieces.offset, pieces.length)
            done = np.ones(len(pieces), bool)
            done[touched.access[_NOBODYS[self.resolver.kind_of(touched.object)]]] = False
            done |= pieces.time_ns < before
            done[: max(0, len(pieces) - MOST_WAITING)] = True
            if not done.any():
                continue
            touched = touched.take(done[touched.access])
            touched = replace(touched, access=(np.cumsum(done) - 1)[touched.access])
            self.sinks.late(disk, held.number[done], pieces.take(done), touched)
            self._held[disk] = _Held(held.number[~done], pieces.take(~done))


def signatures(bmap: BlockMap, disk: int) -> Intervals:
    """Where on a disk the signatures of all its volumes lie, or would lie: their heads and tails."""
    starts, ends = [EMPTY], [EMPTY]
    for volume, size in enumerate(bmap.volumes.column("size").to_pylist()):
        found = bmap.descend(volume, ints([0, max(0, size - TAIL)]), ints([min(HEAD, size), size]))
        found = found.take(found.volume == bmap.disks[disk - 1])
        starts.append(found.start)
        ends.append(found.end)
    return Intervals(np.concatenate(starts), np.concatenate(ends))


def lost(older: BlockMap, newer: BlockMap) -> str:
    """What a newer map lacks of the filesystems of an older one, in words; empty where it lacks none."""
    before, after = ({bmap.volumes.column("name")[number].as_py() for number in tables.integers(bmap.filesystems, "volume").tolist()}
                     for bmap in (older, newer))  # fmt: skip
    missing = sorted(before - after)
    return f"no filesystem was found on {', '.join(missing)}, which is being written" if missing else ""


def _rest(batch: _Batch, count: int) -> _Batch:
    """The batch without its first `count` accesses."""
    accesses = batch.accesses.take(np.arange(count, len(batch.accesses)))
    touched = batch.touched.take(np.arange(np.searchsorted(batch.touched.access, count), len(batch.touched)))
    return _Batch(batch.disk, accesses, replace(touched, access=touched.access - count))


def _pieces(accesses: Accesses, touched: Touched) -> Accesses:
    """The touched pieces as accesses of just these bytes."""
    each = accesses.take(touched.access)
    return replace(each, offset=touched.start, length=touched.end - touched.start)
