"""Which map names which access, while the guest changes its filesystems.

A map is good for an access when no metadata was written between its reading and the access: metadata writes
are recognised as they pass, by what the map in force says of the bytes, and a new map is asked for. Accesses
after such a write wait for the new map in their order, a short while at most; then they get the name that is
known, marked, and come again when a map is there that judges them (`verdict.py`). Writes to bytes that are
nobody's (filesystems write content before the metadata that says whose it is), and reads of them, don't hold
up the others: they are held until a map knows their owner, or until no journal commits that late.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import CONFIRMED, GUESSED, HELD, KNOWN, OLDER, UNCONFIRMED, Resolver, Touched
from virt_bmap.accesses.trace import CLAIM
from virt_bmap.core.arrays import EMPTY, Bool, Int, Intervals, ints, touching, union_by
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import HEAD, TAIL
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.problems import CODES, ERROR
from virt_bmap.watch.refresh import Refreshed, Refresher
from virt_bmap.watch.sinks import Sinks
from virt_bmap.watch.verdict import (
    FILLING,
    MS,
    NO_WRITES,
    NOTHING,
    SETTLE,
    WRITING,
    Asked,
    Writes,
    clean,
    judge,
    together,
)

QUIET = 20 * MS
"""ns without metadata writes after which a new map is begun: they come in bursts."""
LATEST = 80 * MS
"""ns after which it is begun although they go on."""
LATE = 20 * MS
"""ns that a line of the log may take to be written."""
PATIENCE = 2000 * MS
"""ns that accesses wait for a new map; then the map in force names them, and they are marked."""
RETRY, LONGEST_RETRY = 1000 * MS, 30_000 * MS
"""ns until it is tried again where a map could not be read; doubled each time."""
MOST_WAITING = 1 << 18
"""Accesses that may wait, and pieces that may be open: some 100 MiB each."""
MOST_WRITES = 1 << 20
"""Writes of a disk that are remembered: 32 MiB."""
MOST_CHANGES = 1 << 20
RESOLUTION = 10 * MS
"""Where there are more metadata writes than MOST_CHANGES, they are remembered this exactly: a guest that
writes nothing else fills no memory."""

NOT_REPLAYED = ("journal", "journal-missing", "not-replayed")
"""Codes of problems with which a map lacks what a journal holds."""

# by kind; the last element is for -1, a volume of which nothing is known
_NAMELESS = np.isin(
    np.arange(len(tables.KINDS) + 1),
    (tables.GAP, tables.CONTENT, tables.UNKNOWN, tables.UNREFERENCED, len(tables.KINDS)),
)


class Naming:
    """Names accesses and hands them to the sinks, with the
    newest map that can be had without keeping anyone waiting."""

    def __init__(self, resolver: Resolver, sinks: Sinks, refresher: Refresher | None = None) -> None:
        self.resolver = resolver
        self.sinks = sinks
        self.failures = 0
        """Maps that could not be read, and the last reason."""
        self.failure = ""
        self._refresher = refresher
        self._changes = EMPTY
        """Times of metadata writes, in order: those that the map in force may not know, and as far back as
        anyone waits."""
        self._asked_ns = 0
        self._rest_until = 0
        self._retry = RETRY
        self._found: Refreshed | None = None
        """A map that is there before the log is read as far as the map was."""
        self._seen: dict[int, int] = {}
        self._waiting: deque[tuple[int, Asked]] = deque()
        """Accesses in their order, by disk, that nobody was told of yet."""
        self._open: dict[int, list[Asked]] = {}
        """Pieces of each disk that were handed on as held or guessed."""
        self._added = dict(sinks.added)
        self._writes: dict[int, list[Writes]] = {}
        self._signatures: dict[int, Intervals] = {}

    def again(self) -> "Naming":
        """One that starts anew after this one failed.

        What waited is lost; and what was written meanwhile nobody knows, so a new map is due.
        """
        other = Naming(self.resolver, self.sinks, self._refresher)
        other.failures, other.failure = self.failures, self.failure
        other._seen = dict(self._seen)
        other._changes = ints(max(time.time_ns(), self.resolver.ended_ns + 1))
        self.sinks.renew(self.resolver)
        return other

    @property
    def is_settled(self) -> bool:
        """Is the map in force up to date, as far as the accesses seen tell?"""
        if not self._refresher or self._refresher.ended:
            return True
        return not (len(self._unknown()) or self._refresher.busy or self._found)

    def add(self, disk: int, accesses: Accesses) -> None:
        """Name these, or let them wait."""
        if not len(accesses):
            return
        number = self._added.get(disk, 0) + np.arange(len(accesses))
        self._added[disk] = int(number[-1]) + 1
        asked = self._resolved(disk, number, accesses)
        self._note(disk, asked)
        self._waiting.append((disk, asked))
        self._release(time.time_ns())

    def ended(self, disk: int, writes: Accesses) -> None:
        """Writes that were added before, at the times of their ends: a map begun before may lack them."""
        touched = self.resolver.touched(disk, writes.offset, writes.length)
        self._changed(writes.time_ns[touched.access[self._changing(disk, WRITING[writes.op], touched)]])

    def seen(self, disk: int, time_ns: int) -> None:
        """All that was begun on this disk before `time_ns` was added, and its writes have ended. Who says so
        once, says it always: maps wait until they can be judged."""
        self._seen[disk] = time_ns

    def wake(self) -> list[int]:
        """File descriptors that select should wait for beside the clock: a map that is being read."""
        return (
            [self._refresher.fileno()] if self._refresher and self._refresher.busy and not self._found else []
        )

    def tick(self) -> None:
        """Take a map that is done, let go what has waited long enough, ask for a map that is due.

        To be called often.
        """
        now = time.time_ns()
        if not self._refresher:
            return
        self._found = self._found or self._refresher.result()
        if (
            self._found
            and min(self._seen.values(), default=self._found.ended_ns + LATE) >= self._found.ended_ns + LATE
        ):
            found, self._found = self._found, None
            self._take(found, now)
        self._release(now)
        self._expire(now - CLAIM)
        self._forget()
        if not self._refresher.busy and not self._found and not self._refresher.ended and self._is_due(now):
            self._asked_ns = now
            self._refresher.begin()

    def finish(self) -> None:
        """Name all that still waits: there will be no newer map."""
        self._release(np.iinfo(np.int64).max)
        self._expire(np.iinfo(np.int64).max)

    # ---- metadata writes -----------------------------------------------------------------------------------

    def _resolved(self, disk: int, number: Int, accesses: Accesses) -> Asked:
        """The accesses under the map in force."""
        touched = self.resolver.touched(disk, accesses.offset, accesses.length)
        return Asked(number, accesses, np.zeros(len(number), bool), self.resolver, touched)

    def _note(self, disk: int, asked: Asked) -> None:
        """Remember what was written, and when that changed the map."""
        accesses, writing = asked.accesses, WRITING[asked.accesses.op]
        if not writing.any():
            return
        end = accesses.offset + accesses.length
        columns = (asked.number, accesses.time_ns, accesses.offset, end)
        self._writes.setdefault(disk, []).append(Writes(*(column[writing] for column in columns)))
        self._changed(accesses.time_ns[asked.said.access[self._changing(disk, writing, asked.said)]])

    def _note_again(self, disk: int, since: int) -> None:
        """Look at the writes since then once more, by the map that was just read: it may know places of
        metadata that the one before it did not."""
        writes = self._written(disk)
        for first in range(int(np.searchsorted(writes.time_ns, since)), len(writes.number), MOST_WAITING):
            some = take(writes, slice(first, first + MOST_WAITING))
            touched = self.resolver.touched(disk, some.start, some.end - some.start)
            self._changed(
                some.time_ns[touched.access[self._changing(disk, np.ones(len(some.number), bool), touched)]]
            )

    def _changed(self, time_ns: Int) -> None:
        """At these times metadata was written."""
        if len(time_ns):
            self._changes = np.union1d(self._changes, time_ns)
        if len(self._changes) > MOST_CHANGES:
            first = np.unique(self._changes // RESOLUTION) * RESOLUTION
            self._changes = np.sort(np.concatenate([first, first + RESOLUTION - 1]))

    def _changing(self, disk: int, writes: Bool, touched: Touched) -> Bool:
        """Which pieces are of `writes` that may change the map: to metadata, or where a disk or volume that
        nobody knows yet would have its signature."""
        writing = writes[touched.access]
        if not writing.any():
            return writing
        changing: Bool = writing & self.resolver.metadata(touched.object)
        unknown = np.flatnonzero(writing & _NAMELESS[self.resolver.kind_of(touched.object)])
        if len(unknown):
            if disk not in self._signatures:
                self._signatures[disk] = signatures(self.resolver.bmap, disk)
            hit, _ = self._signatures[disk].overlaps(touched.start[unknown], touched.end[unknown])
            changing[unknown[hit]] = True
        return changing

    def _unknown(self) -> Int:
        """The changes that the map in force may not know."""
        return self._changes[np.searchsorted(self._changes, self.resolver.begun_ns - SETTLE, "right") :]

    def _is_due(self, now: int) -> bool:
        changes = self._unknown()
        if not len(changes) or now < self._rest_until:
            return False
        unseen = changes[changes > self._asked_ns]
        if not len(unseen):
            return bool(now > changes[-1] + SETTLE)
        return bool(now > unseen[-1] + QUIET or now > unseen[0] + LATEST)

    def _forget(self) -> None:
        """Let go of writes and changes that no map to come is asked about."""
        changes = self._unknown()
        since = int(changes[0]) if len(changes) else np.iinfo(np.int64).max
        for asked in (
            *(asked for _, asked in self._waiting),
            *(asked for parts in self._open.values() for asked in parts),
        ):
            since = min(since, int(asked.accesses.time_ns.min()))
            if asked.before is not None and asked.before is not self.resolver:
                since = min(since, asked.before.begun_ns)
        self._changes = self._changes[
            np.searchsorted(self._changes, min(since, self.resolver.begun_ns) - SETTLE) :
        ]
        for disk, parts in self._writes.items():
            kept = [part for part in parts if int(part.time_ns[-1]) >= since]
            while sum(len(part.number) for part in kept) > MOST_WRITES:
                kept = kept[1:]
            self._writes[disk] = kept

    # ---- a new map -----------------------------------------------------------------------------------------

    def _take(self, found: Refreshed, now: int) -> None:
        """Put a new map in force, unless there is none or it lost what is still being written."""
        # half of the time at most: the guest needs the machine, too
        self._rest_until = now + int(found.seconds * 1e9)
        error = found.error
        if found.resolver and (self._changes > found.begun_ns - SETTLE).any():
            older, newer = self.resolver.bmap, found.resolver.bmap
            error = lost(older, newer) or torn(older, newer)
        if found.resolver:
            error = error or behind(found.resolver.bmap)
        if error or not found.resolver:
            self.failures += 1
            self.failure = error
            self._rest_until, self._retry = now + self._retry, min(2 * self._retry, LONGEST_RETRY)
            return
        self._retry = RETRY
        since = self.resolver.begun_ns - SETTLE
        self.resolver = found.resolver
        self._signatures = {}
        for disk in self._writes:
            self._note_again(disk, since)
        self.sinks.renew(self.resolver)
        self._judge_waiting()
        self._judge_open()
        self._forget()

    def _judge_waiting(self) -> None:
        """Hand on, in order, what happened before the new map was read; what happened later has it as the map
        in force, or is still to be judged."""
        while self._waiting:
            disk, asked = self._waiting[0]
            later = np.flatnonzero(asked.accesses.time_ns > self.resolver.begun_ns)
            count = int(later[0]) if len(later) else len(asked)
            if count:
                self._judged(disk, asked.take(np.arange(count)), self._give)
            if count < len(asked):
                self._waiting[0] = disk, asked.take(np.arange(count, len(asked)))
                break
            self._waiting.popleft()
        self._waiting = deque(
            (disk, part) for disk, asked in self._waiting for part in self._renewed(disk, asked)
        )

    def _renewed(self, disk: int, asked: Asked) -> list[Asked]:
        """What happened after the reading of the new map has that as the map before; what happened meanwhile
        keeps its own."""
        meanwhile = np.flatnonzero(asked.accesses.time_ns < self.resolver.ended_ns)
        count = int(meanwhile[-1]) + 1 if len(meanwhile) else 0
        rest = asked.take(np.arange(count, len(asked)))
        return [
            part
            for part in (asked.take(np.arange(count)), self._resolved(disk, rest.number, rest.accesses))
            if len(part)
        ]

    def _judge_open(self) -> None:
        """Tell whose the open pieces are that happened before the new map was read; some have to wait for
        another one."""
        for disk, parts in self._open.items():
            self._open[disk] = []
            for asked in together(parts):
                due = asked.accesses.time_ns <= self.resolver.begun_ns
                self._judged(disk, asked.take(due), self._late)
                self._leave(disk, asked.take(~due))

    def _judged(self, disk: int, asked: Asked, hand_on: Callable[[int, Asked, Touched], None]) -> None:
        """Hand on what the new map says of these, keep what has to wait, and tell, after it, what only the
        map before knows."""
        if not len(asked):
            return
        verdict = judge(asked, disk, self.resolver, self._changes, self._written(disk))
        after, before = verdict.after, verdict.before
        state = np.where(
            asked.guessed[after.access] & verdict.agrees,
            np.where(after.state == KNOWN, CONFIRMED, UNCONFIRMED),
            after.state,
        )
        state[verdict.waits] = HELD
        # of the objects of the map before the new one knows
        # nothing: what they own is, for the moment, of the disk
        whole = np.full(len(before), self.resolver.named + self.resolver.bmap.disk(disk))
        early = replace(
            before,
            object=whole,
            file_offset=np.full(len(before), -1),
            state=np.full(len(before), HELD, np.uint8),
        )
        given = stack(Touched, [replace(after, state=state.astype(np.uint8)), early])
        hand_on(disk, asked, given.take(np.lexsort((given.inline, given.start, given.access))))
        if verdict.waits.any():
            self._keep(disk, asked, after.take(verdict.waits), guessed=False)
        if len(before) and asked.before:
            told = np.where(before.state == KNOWN, CONFIRMED, UNCONFIRMED)
            state = np.where(asked.guessed[before.access], told, before.state)
            self.sinks.renew(asked.before)
            self._late(disk, asked, replace(before, state=state.astype(np.uint8)))
            self.sinks.renew(self.resolver)

    def _written(self, disk: int) -> Writes:
        parts = self._writes.get(disk, [])
        if len(parts) > 1:
            self._writes[disk] = parts = [stack(Writes, parts)]
        return parts[0] if parts else NO_WRITES

    # ---- accesses in their order ---------------------------------------------------------------------------

    def _release(self, now: int) -> None:
        """Hand on, in order, what the map in force is good for and what has waited long enough."""
        waiting = sum(len(asked) for _, asked in self._waiting)
        alive = self._refresher is not None and not self._refresher.ended
        while self._waiting:
            disk, asked = self._waiting[0]
            time_ns = asked.accesses.time_ns
            good = clean(self._changes, self.resolver, time_ns)
            overdue = np.full(len(asked), waiting > MOST_WAITING or not alive) | (time_ns < now - PATIENCE)
            stop = np.flatnonzero(~good & ~overdue)
            count = int(stop[0]) if len(stop) else len(asked)
            if count:
                self._let_go(disk, asked.take(np.arange(count)), good[:count], alive)
                waiting -= count
            if count < len(asked):
                self._waiting[0] = disk, asked.take(np.arange(count, len(asked)))
                return
            self._waiting.popleft()

    def _let_go(self, disk: int, asked: Asked, good: Bool, alive: bool) -> None:
        """Give accesses to the sinks by the map in force; where it is not good, as guesses.

        Hold what nobody owns.
        """
        touched = asked.said
        if asked.before is not self.resolver:
            touched = self.resolver.touched(disk, asked.accesses.offset, asked.accesses.length)
        state = np.where(good, KNOWN, GUESSED if alive else OLDER)[touched.access]
        nobodys = np.flatnonzero(self.resolver.nobodys(touched.object))
        filled = FILLING[asked.accesses.op[touched.access[nobodys]]]
        if not filled.all():  # what was written just now is read
            writes = self._written(disk)
            filled |= touching(touched.start[nobodys], touched.end[nobodys], writes.start, writes.end)
        state[nobodys[filled]] = HELD if alive else OLDER
        touched = replace(touched, state=state.astype(np.uint8))
        self._give(disk, asked, touched)
        for which, guessed in ((HELD, False), (GUESSED, True)):
            if (touched.state == which).any():
                self._keep(disk, asked, touched.take(touched.state == which), guessed)

    def _give(self, disk: int, asked: Asked, touched: Touched) -> None:
        self.sinks.add(disk, asked.accesses, touched)

    # ---- pieces that come again ----------------------------------------------------------------------------

    def _keep(self, disk: int, asked: Asked, touched: Touched, guessed: bool) -> None:
        """These come again; guesses are to be compared with what the map before them said."""
        row, pieces, _ = _pieces(asked, touched)
        before = asked.before if guessed else None
        said = before.touched(disk, pieces.offset, pieces.length) if before else NOTHING
        self._leave(disk, Asked(asked.number[row], pieces, np.full(len(row), guessed), before, said))

    def _leave(self, disk: int, asked: Asked) -> None:
        if len(asked):
            self._open.setdefault(disk, []).append(asked)

    def _late(self, disk: int, asked: Asked, touched: Touched) -> None:
        """Tell the sinks what became of open pieces."""
        touched = touched.take(touched.state != HELD)
        if len(touched):
            row, pieces, touched = _pieces(asked, touched)
            self.sinks.late(disk, asked.number[row], pieces, touched)

    def _expire(self, before: int) -> None:
        """Hand on open pieces that are older than `before`, and the oldest where there are too many: no map
        to come is asked about them."""
        for disk, parts in self._open.items():
            self._open[disk] = []
            count = sum(len(asked) for asked in parts)
            for asked in parts:
                old = asked.accesses.time_ns < before
                old[: max(0, min(len(asked), count - MOST_WAITING))] = True
                count -= len(asked)
                self._leave(disk, asked.take(~old) if old.any() else asked)
                if old.any():
                    self._give_up(disk, asked.take(old))

    def _give_up(self, disk: int, asked: Asked) -> None:
        touched = self.resolver.touched(disk, asked.accesses.offset, asked.accesses.length)
        good = clean(self._changes, self.resolver, asked.accesses.time_ns)
        told = asked.guessed & (asked.before is self.resolver)
        # nobody's where no owner can come any more: all that was in memory then has been written since, and
        # nothing was
        long_ago = asked.accesses.time_ns < time.time_ns() - CLAIM
        quiet = np.searchsorted(self._changes, asked.accesses.time_ns, "right") == len(self._changes)
        open = (
            self.resolver.nobodys(touched.object)
            & (FILLING[asked.accesses.op] | ~asked.guessed)[touched.access]
        )
        sure = good[touched.access] & (~open | (long_ago & quiet)[touched.access])
        state = np.where(told[touched.access], UNCONFIRMED, np.where(sure, KNOWN, OLDER)).astype(np.uint8)
        self._late(disk, asked, replace(touched, state=state))


def _pieces(asked: Asked, touched: Touched) -> tuple[Int, Accesses, Touched]:
    """The bytes touched, as accesses of just these bytes: (the row of each, they, what they touched)."""
    origin = asked.accesses.offset  # a request has less than 2**32 bytes
    row, start, end = union_by(
        touched.access, touched.start - origin[touched.access], touched.end - origin[touched.access]
    )
    key = touched.access * (1 << 33) + touched.start - origin[touched.access]
    piece = np.searchsorted(row * (1 << 33) + start, key, "right") - 1
    pieces = replace(asked.accesses.take(row), offset=start + origin[row], length=end - start)
    order = np.lexsort((touched.inline, touched.start, piece))
    return row, pieces, replace(touched, access=piece).take(order)


def signatures(bmap: BlockMap, disk: int) -> Intervals:
    """Where on a disk the signatures of all its volumes lie, or would lie: their heads and tails."""
    starts, ends = [EMPTY], [EMPTY]
    for volume, size in enumerate(bmap.volumes.column("size").to_pylist()):
        found = bmap.descend(volume, ints([0, max(0, size - TAIL)]), ints([min(HEAD, size), size]))
        found = found.take(found.volume == bmap.disk(disk))
        starts.append(found.start)
        ends.append(found.end)
    return Intervals(np.concatenate(starts), np.concatenate(ends))


def behind(bmap: BlockMap) -> str:
    """In words, why a map does not show what was written last: a journal that could not be replayed; empty
    where it does."""
    problems = bmap.problems
    found = pc.and_(
        pc.is_in(problems.column("code"), pa.array(NOT_REPLAYED)),
        pc.not_equal(problems.column("severity").cast(pa.string()), "note"),
    )
    return next(iter(problems.filter(found).column("detail").to_pylist()), "")


def lost(older: BlockMap, newer: BlockMap) -> str:
    """What a newer map lacks of the filesystems of an older one, in words; empty where it lacks none."""
    before, after = (
        {
            bmap.volumes.column("name")[number].as_py()
            for number in tables.integers(bmap.filesystems, "volume").tolist()
        }
        for bmap in (older, newer)
    )
    missing = sorted(before - after)
    return f"no filesystem was found on {', '.join(missing)}, which is being written" if missing else ""


def torn(older: BlockMap, newer: BlockMap) -> str:
    """What could not be read for a newer map, and was no trouble for an older one, in words; empty where
    there is nothing.

    Trees of which parts are given back and written over while they are read look damaged. Of what they held,
    the map has bytes without names, or nothing. (Two accounts of the same that were read at different moments
    differ in good maps, too.)
    """
    before, after = (
        {
            (row["volume"], row["detail"])
            for row in bmap.problems.to_pylist()
            if row["severity"] == ERROR and CODES[row["code"]].torn
        }
        for bmap in (older, newer)
    )
    found = next(iter(sorted(after - before)), None)
    if found is None:
        return ""
    volume, detail = found
    name = newer.volumes.column("name")[volume].as_py()
    return f"{name} was written while it was read: {detail}"
