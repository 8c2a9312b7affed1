"""Where the bytes of chunks lie, as rows of the map, and in which ways they can be read: each copy, and what
parity gives.

The ways of a strip are put in order: copies on devices that took part in every transaction, what their parity
gives, then what lies on devices that missed writes (as md leaves out members whose count of events is
behind). Nobody has to guess which is right: tree blocks and data carry checksums.

Sources: fs/btrfs/volumes.c (btrfs_map_block), fs/btrfs/raid56.c (rmw_rbio, recover_vertical: P is the sum of
a row's strips, Q their sum weighted by powers of the generator).
"""

from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, scatter, union
from virt_bmap.core.lost import Lost
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import COPY, PARITY, Row, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.rebuild import POWERS, inverse, times
from virt_bmap.formats.filesystems.btrfs.chunks import Chunk, Lane, lanes_of
from virt_bmap.formats.filesystems.btrfs.ondisk import STRIPE_LEN
from virt_bmap.model.contract import Member


class Device(NamedTuple):
    """A member with its superblock."""

    member: Member
    superblock: np.void

    @property
    def uuid(self) -> bytes:
        return bytes(self.superblock["dev_item.uuid"])

    @property
    def generation(self) -> int:
        return int(self.superblock["generation"])

    @property
    def filesystem(self) -> bytes:
        """The filesystem that it belongs to, as its trees call it."""
        return bytes(self.superblock["dev_item.fsid"])


class Devices(NamedTuple):
    """The devices that are there, by uuid, and those of them that missed transactions."""

    known: dict[bytes, Device]
    stale: frozenset[bytes]


class Rebuild(NamedTuple):
    """A strip from parity: by P, by Q, or by both with the strip `without` (a data strip's number in its row)
    taken as lost, too; -1: not this."""

    p: bool
    q: bool
    without: int = -1


BY_P, BY_Q = Rebuild(True, False), Rebuild(False, True)
Way = int | Rebuild
"""A stripe of the chunk by its number, or parity."""


def ways(chunk: Chunk, lane: Lane, devices: Devices) -> list[Way]:
    """All ways to read the strips of a lane, the best first."""
    fresh = devices.known.keys() - devices.stale
    found = [*_ways(chunk, lane, fresh), *_ways(chunk, lane, devices.known.keys())]
    return list(dict.fromkeys(found))


def _ways(chunk: Chunk, lane: Lane, present: Set[bytes]) -> Iterator[Way]:
    there = [uuid in present for uuid, _ in chunk.stripes]
    yield from (stripe for stripe in lane.data if there[stripe])
    if not lane.parity:
        return
    own, count = lane.first % chunk.lanes, chunk.lanes
    absent = [(own + i) % count for i, stripe in enumerate(lane.others, 1) if not there[stripe]]
    p, q = (there[stripe] for stripe in (*lane.parity, lane.parity[0])[:2])
    q = q and len(lane.parity) == 2
    if not absent:
        yield from [BY_P] * p + [BY_Q] * q
    if p and q and len(absent) <= 1:
        yield from (
            Rebuild(True, True, other) for other in absent or [(own + i) % count for i in range(1, count)]
        )


# ---- rows of the map ---------------------------------------------------------------------------------------


def layout(chunks: list[Chunk], devices: Devices) -> tuple[list[Row], int]:
    """The rows of all chunks on the devices that are there, and how many lanes can be read in no way."""
    rows: list[Row] = []
    unreachable = 0
    for chunk in chunks:
        for lane in lanes_of(chunk):
            possible = ways(chunk, lane, devices)
            unreachable += not possible
            stripes = [way for way in possible if isinstance(way, int)]
            for nth, stripe in enumerate(stripes):
                rows += (
                    row._replace(role=COPY) if nth else row for row in strips(chunk, lane, stripe, devices)
                )
            for stripe in lane.parity:
                rows += (row._replace(role=PARITY) for row in strips(chunk, lane, stripe, devices))
    return rows, unreachable


def strips(chunk: Chunk, lane: Lane, stripe: int, devices: Devices) -> Iterator[Row]:
    """Rows that place a lane's strips on one stripe, as far as the device reaches; none where it is
    missing."""
    uuid, offset = chunk.stripes[stripe]
    if uuid not in devices.known:
        return
    member = devices.known[uuid].member
    size = member.reader.size
    if lane.period == 1:
        if (run := min(chunk.length, size - offset)) > 0:
            yield Row(chunk.start, member.number, offset, run)
        return
    full, tail = divmod(chunk.length, STRIPE_LEN)
    place, step = offset + lane.row * STRIPE_LEN, lane.rows * STRIPE_LEN
    count = min(-(-(full - lane.first) // lane.period), (size - place - STRIPE_LEN) // step + 1)
    start = chunk.start + lane.first * STRIPE_LEN
    if count > 1:
        yield Row(start, member.number, place, STRIPE_LEN, count, lane.period * STRIPE_LEN, step)
    elif count == 1:
        yield Row(start, member.number, place, STRIPE_LEN)
    nth, rest = divmod(full - lane.first, lane.period)
    if tail and rest == 0 and nth >= 0 and (run := min(tail, size - place - nth * step)) > 0:
        yield Row(chunk.start + full * STRIPE_LEN, member.number, place + nth * step, run)


# ---- readers -----------------------------------------------------------------------------------------------


class Copies:
    """The logical address space as its best ways give it (`first`), and as each further way gives it, made
    when they are asked for."""

    def __init__(self, chunks: list[Chunk], devices: Devices, size: int, name: str) -> None:
        self._chunks, self._devices, self.size, self.name = chunks, devices, size, name
        self._made: list[Reader] = []
        self.first = self._reader(0)

    def others(self) -> Iterator[Reader]:
        """The second way of all bytes that have one, the third, ..."""
        count = max((len(possible) for _, _, possible in self._ways), default=0)
        for nth in range(1, count):
            if len(self._made) < nth:
                self._made.append(self._reader(nth))
            yield self._made[nth - 1]

    @cached_property
    def _ways(self) -> list[tuple[Chunk, Lane, list[Way]]]:
        return [
            (chunk, lane, ways(chunk, lane, self._devices))
            for chunk in self._chunks
            for lane in lanes_of(chunk)
        ]

    def _reader(self, nth: int) -> Reader:
        plain: list[Row] = []
        computed: list[Row] = []
        recipes: list[tuple[int, ...]] = []
        for chunk, lane, possible in self._ways:
            if len(possible) <= nth:
                continue
            way = possible[nth]
            if isinstance(way, int):
                plain += strips(chunk, lane, way, self._devices)
                continue
            own = lane.first % chunk.lanes
            rows = list(_places(chunk, lane))
            computed += rows
            recipes += [(way.p, way.q, way.without, own, chunk.lanes)] * len(rows)
        reader = self._mapped(plain)
        return (
            RebuildingReader(reader, Rows.of(computed), np.array(recipes, np.int64), self._row)
            if computed
            else reader
        )

    def _mapped(self, rows: list[Row]) -> Reader:
        columns = Rows.of(rows)
        readers = {device.member.number: device.member.reader for device in self._devices.known.values()}
        return MappedReader(
            self.size,
            self.name,
            {number: readers[number] for number in np.unique(columns.parent).tolist()},
            columns,
        )

    @cached_property
    def _row(self) -> "StripesOfRow":
        """For every strip the others of its row, at the strip's own logical address."""
        parity: list[list[Row]] = [[], []]
        data: list[list[Row]] = []
        for chunk in self._chunks:
            for lane in lanes_of(chunk) if chunk.profile.parity else ():
                own, count = lane.first % chunk.lanes, chunk.lanes
                data += [[] for _ in range(count - len(data))]
                for number, stripe in enumerate(lane.parity):
                    parity[number] += strips(chunk, lane, stripe, self._devices)
                for i, stripe in enumerate(lane.others, 1):
                    data[(own + i) % count] += strips(chunk, lane, stripe, self._devices)
        return StripesOfRow(
            self._mapped(parity[0]), self._mapped(parity[1]), [self._mapped(rows) for rows in data]
        )


def _places(chunk: Chunk, lane: Lane) -> Iterator[Row]:
    """The logical ranges of a lane's strips."""
    full, tail = divmod(chunk.length, STRIPE_LEN)
    start, count = chunk.start + lane.first * STRIPE_LEN, -(-(full - lane.first) // lane.period)
    if count > 0:
        yield Row(start, 0, 0, STRIPE_LEN, count, lane.period * STRIPE_LEN if count > 1 else 0)
    nth, rest = divmod(full - lane.first, lane.period)
    if tail and rest == 0 and nth >= 0:
        yield Row(chunk.start + full * STRIPE_LEN, 0, 0, tail)


class StripesOfRow(NamedTuple):
    """At the address of a strip: P and Q of its row, and its data strips by their number, but for the strip
    itself."""

    p: Reader
    q: Reader
    data: Sequence[Reader]


class RebuildingReader(Reader):
    """`plain`, but for the places of `where`, whose bytes are computed as the rows of `recipes` say: (by P,
    by Q, without, own number, data strips of the row)."""

    def __init__(self, plain: Reader, where: Rows, recipes: Int, row: StripesOfRow) -> None:
        super().__init__(plain.size, plain.name)
        self._plain, self._where, self._recipes, self._row = plain, where, recipes, row
        self.below = [plain, row.p, row.q, *row.data]

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = np.array(self._plain.read_ranges(offsets, lengths))
        pieces = self._where.down(offsets, offsets + lengths)
        place = (np.cumsum(lengths) - lengths)[pieces.query] + pieces.source - offsets[pieces.query]
        for recipe, mine in self._by_recipe(pieces.row):
            found = self._compute(recipe, pieces.source[mine], pieces.length[mine])
            scatter(data, place[mine], pieces.length[mine], found)
        return data

    def _by_recipe(self, rows: Int) -> Iterator[tuple[list[int], Int]]:
        if len(rows):
            kinds, which = np.unique(self._recipes[rows], axis=0, return_inverse=True)
            for number, recipe in enumerate(kinds.tolist()):
                yield recipe, np.flatnonzero(which.reshape(-1) == number)

    def _compute(self, recipe: list[int], starts: Int, lengths: Int) -> Bytes:
        p, q, without, own, count = recipe
        nothing = np.zeros(int(lengths.sum()), np.uint8)
        sum_p = self._row.p.read_ranges(starts, lengths).copy() if p else nothing.copy()
        sum_q = self._row.q.read_ranges(starts, lengths).copy() if q else nothing
        for number in range(count):
            if number in (own, without):
                continue
            strip = self._row.data[number].read_ranges(starts, lengths)
            if p:
                sum_p ^= strip
            if q:
                sum_q ^= times(int(POWERS[number]), strip)
        if not q:
            return sum_p
        if not p:
            return times(inverse(int(POWERS[own])), sum_q)
        mine, other = int(POWERS[own]), int(POWERS[without])
        return times(inverse(mine ^ other), sum_q ^ times(other, sum_p))

    @property
    def whole(self) -> bool:
        return False

    def lost(self, starts: Int, ends: Int) -> Lost:
        pieces = self._where.down(starts, ends)
        end = pieces.source + pieces.length
        parts = [self._plain.lost(starts, ends).without(pieces.source, end)]
        for (p, q, without, own, count), mine in self._by_recipe(pieces.row):
            others = [self._row.data[number] for number in range(count) if number not in (own, without)]
            inputs = [self._row.p] * p + [self._row.q] * q + others
            parts += [reader.lost(*union(pieces.source[mine], end[mine])) for reader in inputs]
        return Lost.join(parts)
