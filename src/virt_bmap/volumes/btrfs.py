"""btrfs devices: one or many become a pool, whose address space is btrfs's logical one.

Read are the superblock (with its mirrors) of every device, the system chunks that it holds, and the chunk tree. Every chunk becomes strided
rows: single, DUP and RAID1/1C3/1C4 (copies), RAID0 and RAID10 (stripes), RAID5 and RAID6 (rotating stripes, with parity rows). A missing or
damaged copy of a tree block is replaced by another copy, or computed from P parity. What lies in no chunk is free, but for
the first MiB, which no chunk may use, and the superblocks.

Sources: fs/btrfs/volumes.c (btrfs_map_block, btrfs_rmap_block), exclude_super_stripes() in fs/btrfs/block-group.c, tree-checker.c (v6.12).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Int, complement, covered_twice, expand, ints, subtract, union
from virt_bmap.contract import Assembly, Checks, Child, Docs, Member, Problem, VolumeFormat, extent_rows
from virt_bmap.errors import Corrupt, FormatError
from virt_bmap.filesystems.btrfs import ondisk, tree
from virt_bmap.filesystems.btrfs.ondisk import STRIPE_LEN
from virt_bmap.filesystems.btrfs.pool import Damage, Pool, PoolReader, Ranges, XorReader
from virt_bmap.mapping import COPY, DATA, PARITY, Row, Rows
from virt_bmap.reader import MappedReader, Reader

NAME = "btrfs"
FEATURES = (
    "one or several devices", "single, DUP, RAID0, RAID1, RAID1C3, RAID1C4, RAID10, RAID5 and RAID6 chunks", "superblock mirrors",
    "missing devices, while a copy or P parity is left", "seed devices", "crc32c, xxhash64, sha256 and blake2b checksums of superblocks",
)  # fmt: skip
REFUSED = ("zoned devices", "RAID stripe tree", "extent tree v2", "remap tree")
ORACLES = ("btrfs inspect-internal dump-tree", "equal copies", "parity computed anew", "content through a loop mount")
CHECKS = Checks(
    checksums="superblocks",
    rules=(
        "superblock: geometry, features and flags known",
        "chunks: lengths, profiles, overlaps, places on devices",
    ),
    unchecked=("device extents",),
)


class Profile(NamedTuple):
    """How the stripes of a chunk relate: `copies` of each strip, `parity` strips in each row; `striped`: any number of them."""

    name: str
    copies: int = 1
    parity: int = 0
    striped: bool = False


PROFILES = {
    0: Profile("single"), 1 << 3: Profile("RAID0", striped=True), 1 << 4: Profile("RAID1", 2), 1 << 5: Profile("DUP", 2),
    1 << 6: Profile("RAID10", 2, striped=True), 1 << 7: Profile("RAID5", 1, 1, True), 1 << 8: Profile("RAID6", 1, 2, True),
    1 << 9: Profile("RAID1C3", 3), 1 << 10: Profile("RAID1C4", 4),
}  # fmt: skip
PROFILE_MASK = sum(PROFILES)
TYPES = {1: "data", 2: "system", 4: "metadata"}


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


class Chunk(NamedTuple):
    """Logical bytes [start, start + length) of one profile; `stripes` are (device uuid, physical offset)."""

    start: int
    length: int
    type: int
    stripes: list[tuple[bytes, int]]

    @property
    def profile(self) -> Profile:
        return PROFILES[self.type & PROFILE_MASK]

    @property
    def lanes(self) -> int:
        """Strips of data in a row."""
        return (len(self.stripes) - self.profile.parity) // self.profile.copies

    @property
    def device_length(self) -> int:
        """Bytes on each device (calc_stripe_length)."""
        return -(-self.length // (self.lanes * STRIPE_LEN)) * STRIPE_LEN if self.lanes > 1 else self.length


@dataclass
class Layout:
    """Where chunks lie: rows for the map, and rows to read each further copy through."""

    rows: list[Row] = field(default_factory=list)
    copies: dict[str, list[Row]] = field(default_factory=dict)
    unreachable: int = 0
    """Lanes of which no device is there."""

    def alternative(self, name: str, row: Row) -> None:
        self.copies.setdefault(name, []).append(replace(row, role=DATA))


def probe(reader: Reader) -> bool:
    """The superblock's magic and its own address; a pool is a filesystem, not a device again."""
    if isinstance(reader, PoolReader):
        return False
    head = reader.read_clipped(ondisk.SUPER_OFFSETS[0] + 0x30, 24)
    return head[16:] == ondisk.MAGIC and int.from_bytes(head[:8], "little") == ondisk.SUPER_OFFSETS[0]


def assemble(members: Sequence[Member]) -> Assembly:
    """A pool for each filesystem whose devices are among the members."""
    assembly = Assembly()
    devices: list[Device] = []
    for member in members:
        try:
            superblock, complaints = ondisk.read_superblock(member.reader)
        except FormatError as error:
            _refuse(assembly, member, error)
            continue
        for complaint in complaints:
            _problem(assembly, member, Problem("superblock", complaint, ondisk.SUPER_OFFSETS[0]))
        devices.append(Device(member, superblock))
    used: set[int] = set()
    for group in _groups(assembly, devices):
        if all(device.member.number in used for device in group):
            continue  # the seed of a pool that has grown onto other devices
        try:
            used |= _make_pool(assembly, group, devices)
        except FormatError as error:
            for device in group:
                _refuse(assembly, device.member, error)
    return assembly


def _problem(assembly: Assembly, member: Member, problem: Problem) -> None:
    assembly.problems.setdefault(member.number, []).append(problem)


def _refuse(assembly: Assembly, member: Member, error: FormatError) -> None:
    severity = "error" if isinstance(error, Corrupt) else "warning"
    offset = -1 if error.offset is None else error.offset
    _problem(assembly, member, Problem(error.code, str(error), offset, severity))
    extent_rows(assembly, member).add(tables.CONTENT, 0, member.reader.size, part=NAME)


def _groups(assembly: Assembly, devices: list[Device]) -> list[list[Device]]:
    """Devices by filesystem, seeds last; of two with one device uuid (a copied image) the newer counts."""
    newest: dict[tuple[bytes, bytes], Device] = {}
    for device in sorted(devices, key=lambda device: (-device.generation, device.member.number)):
        fsid = bytes(device.superblock["fsid"])
        first = newest.setdefault((fsid, device.uuid), device)
        if first is not device:
            text = f"{device.member.name} is a copy of {first.member.name}: same btrfs device uuid"
            _refuse(assembly, device.member, Corrupt(text, None, "duplicate-device"))
    groups: dict[bytes, list[Device]] = {}
    for (fsid, _), device in newest.items():
        groups.setdefault(fsid, []).append(device)

    def seeding(group: list[Device]) -> bool:
        return bool(int(group[0].superblock["flags"]) & ondisk.SUPER_FLAG_SEEDING)

    return sorted(groups.values(), key=lambda group: (seeding(group), group[0].member.number))


def _make_pool(assembly: Assembly, group: list[Device], devices: list[Device]) -> set[int]:
    """The pool of the devices of one filesystem, and of its seeds. Returns the numbers of the members it lies on."""
    newest = max(group, key=lambda device: device.generation)
    superblock = newest.superblock
    known = {device.uuid: device for device in [*devices, *group]}
    damage = Damage()
    system = list(_system_chunks(superblock))
    layout, size = _layout(system, known)
    reader, copies = _readers(layout, size, known, newest.member.name)
    source = tree.Source(
        reader, copies, _ranges(system), int(superblock["nodesize"]), int(superblock["sectorsize"]), ondisk.metadata_fsid(superblock),
    )  # fmt: skip
    chunks, sizes = _chunk_tree(source, superblock, damage)
    chunks = _without_overlaps(chunks or system, damage)
    layout, size = _layout(chunks, known)
    wanted = {uuid for chunk in chunks for uuid, _ in chunk.stripes} | set(sizes)
    present = {uuid: device for uuid, device in known.items() if device in group or uuid in wanted}
    if lost := len(wanted - set(known)):
        what = f"devices of the filesystem are missing; {layout.unreachable} strips have no other copy"
        damage.note("missing-device", what, np.full(lost, -1, np.int64), "error" if layout.unreachable else "note")
    _, copies = _readers(layout, size, known, newest.member.name)
    reserved = union(*_super_stripes(chunks))
    pool = Pool(superblock, _ranges(chunks), Ranges(*reserved), copies, damage.problems())
    first = min(group, key=lambda device: device.member.number).member
    assembly.children.append(Child(
        "pool", first.name, size, layout.rows, ondisk.uuid_text(superblock["fsid"]), None, _detail(chunks),
        lambda base: PoolReader(base, pool),
    ))  # fmt: skip
    for device in present.values():
        _device_extents(assembly, device, chunks, sizes.get(device.uuid, int(device.superblock["dev_item.total_bytes"])))
        assembly.details[device.member.number] = f"device {int(device.superblock['dev_item.devid'])} of {len(wanted)}"
        assembly.uuids[device.member.number] = ondisk.uuid_text(device.superblock["dev_item.uuid"])
        if device.generation < newest.generation and device in group:
            text = f"{device.member.name} was last written in transaction {device.generation}, the newest in {newest.generation}"
            _problem(assembly, device.member, Problem("stale-device", text, ondisk.SUPER_OFFSETS[0], "warning"))
    return {device.member.number for device in present.values()}


def _detail(chunks: list[Chunk]) -> str:
    """The profiles in use, as in "data RAID0, metadata RAID1"."""
    found = dict.fromkeys(
        f"{'+'.join(name for bit, name in TYPES.items() if chunk.type & bit)} {chunk.profile.name}" for chunk in chunks
    )
    return ", ".join(sorted(found))


# ---- chunks ---------------------------------------------------------------------------------------------------------


def _system_chunks(superblock: np.void) -> Iterator[Chunk]:
    """The chunks of sys_chunk_array: pairs of key and chunk item, enough to read the chunk tree. Raises Corrupt."""
    raw = superblock["sys_chunk_array"]
    end, at = min(int(superblock["sys_chunk_array_size"]), len(raw)), 0
    while at + ondisk.DISK_KEY.itemsize + ondisk.CHUNK_HEAD + ondisk.STRIPE_SIZE <= end:
        key = ondisk.records_at(raw, ints(at), ondisk.DISK_KEY)
        at += ondisk.DISK_KEY.itemsize
        head = ondisk.records_at(raw, ints(at), ondisk.CHUNK)
        size = ondisk.CHUNK_HEAD + int(head["num_stripes"][0]) * ondisk.STRIPE_SIZE
        if key["type"][0] != ondisk.CHUNK_ITEM_KEY or at + size > end:
            break
        damage = Damage()
        yield from _chunks(raw, key["offset"], ints(at), ints(size), damage)
        if damage:
            raise Corrupt(f"btrfs superblock: sys_chunk_array: {damage.problems()[0].detail}", None, "chunk")
        at += size
    if at < end or at == 0:
        raise Corrupt(f"btrfs superblock: sys_chunk_array holds no chunk at byte {at:#x} of {end:#x}", None, "chunk")


def _chunk_tree(source: tree.Source, superblock: np.void, damage: Damage) -> tuple[list[Chunk], dict[bytes, int]]:
    """All chunks by logical address, and the size of each device by its uuid."""
    level, generation = int(superblock["chunk_root_level"]), int(superblock["chunk_root_generation"])
    roots = tree.Roots.single(ondisk.CHUNK_TREE, int(superblock["chunk_root"]), level, generation)
    forest = tree.walk(source, roots, damage)
    chunks: list[Chunk] = []
    sizes: dict[bytes, int] = {}
    for leaves in tree.read_leaves(source, forest, damage):
        items = leaves.of(ondisk.CHUNK_ITEM_KEY, ondisk.CHUNK_HEAD + ondisk.STRIPE_SIZE)
        chunks += _chunks(items.data, items.offset, items.start, items.size, damage)
        devices = leaves.of(ondisk.DEV_ITEM_KEY, ondisk.DEV_ITEM.itemsize).records(ondisk.DEV_ITEM)
        sizes |= {bytes(device["uuid"]): int(device["total_bytes"]) for device in devices}
    return sorted(chunks, key=lambda chunk: chunk.start), sizes


def _chunks(data: np.ndarray, start: Int, at: Int, size: Int, damage: Damage) -> Iterator[Chunk]:
    """Chunk items at `at` of `data`, logical addresses in `start`; those that make no sense are damage (btrfs_check_chunk_valid)."""
    head = ondisk.records_at(data, at, ondisk.CHUNK)
    count, length = head["num_stripes"].astype(np.int64), head["length"]
    fits = (count > 0) & (size >= ondisk.CHUNK_HEAD + count * ondisk.STRIPE_SIZE)
    fits &= (
        (start >= 0) & (length > 0) & (start < ondisk.MAX_END) & (length < ondisk.MAX_END) & (head["stripe_len"] == STRIPE_LEN)
    )
    damage.note("chunk", "chunk items have an impossible length, stripe_len or num_stripes", start[~fits])
    start, at, head, count, length = start[fits], at[fits], head[fits], count[fits], length[fits]
    row, step = expand(count)
    stripes = ondisk.records_at(data, at[row] + ondisk.CHUNK_HEAD + step * ondisk.STRIPE_SIZE, ondisk.STRIPE)
    places = list(zip((bytes(uuid) for uuid in stripes["dev_uuid"]), stripes["offset"].tolist(), strict=True))
    first = np.cumsum(count) - count
    columns = (start.tolist(), length.tolist(), head["type"].tolist(), first.tolist(), count.tolist())
    for begin, span, kind, low, n in zip(*columns, strict=True):
        chunk = Chunk(begin, span, kind, places[low : low + n])
        if _possible(chunk):
            yield chunk
        else:
            damage.note("chunk", "chunk items have an impossible profile or number of stripes", ints(begin))


def _possible(chunk: Chunk) -> bool:
    profile = PROFILES.get(chunk.type & PROFILE_MASK)
    n = len(chunk.stripes)
    if (
        profile is None
        or min(offset for _, offset in chunk.stripes) < 0
        or max(offset for _, offset in chunk.stripes) >= ondisk.MAX_END
    ):
        return False
    if not profile.striped:
        return n == profile.copies
    # strips of one row lie on different devices: this bounds the rows of a hostile chunk, too
    alone = len({uuid for uuid, _ in chunk.stripes}) == n
    return alone and n > profile.parity and (n - profile.parity) % profile.copies == 0


def _without_overlaps(chunks: list[Chunk], damage: Damage) -> list[Chunk]:
    kept: list[Chunk] = []
    for chunk in chunks:
        if kept and chunk.start < kept[-1].start + kept[-1].length:
            damage.note("chunk-overlap", "chunks begin inside another chunk", ints(chunk.start))
        else:
            kept.append(chunk)
    return kept


def _ranges(chunks: list[Chunk]) -> Ranges:
    chunks = sorted(chunks, key=lambda chunk: chunk.start)
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    return Ranges(starts, starts + np.fromiter((chunk.length for chunk in chunks), np.int64, len(chunks)))


# ---- rows -----------------------------------------------------------------------------------------------------------


def _layout(chunks: list[Chunk], known: dict[bytes, Device]) -> tuple[Layout, int]:
    """The rows of all chunks on the devices that are there, and the size of the logical address space."""
    layout = Layout()
    for chunk in chunks:
        for lane in _lanes(chunk):
            _lane_rows(layout, chunk, lane, known)
    return layout, max((chunk.start + chunk.length for chunk in chunks), default=0)


class Lane(NamedTuple):
    """Strips that lie together on a device: every `period`th strip of the chunk from `first` on, every `rows`th row from `row` on.

    `data` are the stripes (by number) that hold them, `parity` those that hold their rows' P and Q; `others` hold the rows' other strips.
    """

    first: int
    period: int
    row: int
    rows: int
    data: list[int]
    parity: list[int]
    others: list[int]


def _lanes(chunk: Chunk) -> Iterator[Lane]:
    """The repeating pattern of a chunk (btrfs_map_block: map_blocks_raid0, raid1, dup, raid10, raid56_read, single)."""
    n, lanes, copies = len(chunk.stripes), chunk.lanes, chunk.profile.copies
    if not chunk.profile.parity:
        for k in range(lanes):
            yield Lane(k, lanes, 0, 1, list(range(k * copies, (k + 1) * copies)), [], [])
        return
    for row in range(n):
        parity = [(row + lanes + i) % n for i in range(chunk.profile.parity)]
        for k in range(lanes):
            others = [(row + (k + i) % lanes) % n for i in range(1, lanes)]
            yield Lane(row * lanes + k, n * lanes, row, n, [(row + k) % n], parity, others)


def _lane_rows(layout: Layout, chunk: Chunk, lane: Lane, known: dict[bytes, Device]) -> None:
    """The rows of one lane: data from the first device that is there, copies from the others, parity."""
    found = [pieces for stripe in lane.data if (pieces := list(_strips(chunk, lane, stripe, known)))]
    layout.unreachable += not found
    for number, pieces in enumerate(found):
        for row in pieces:
            layout.rows.append(row if number == 0 else replace(row, role=COPY))
            if number:
                layout.alternative(f"copy {number}", row)
    for number, stripe in enumerate(lane.parity):
        for row in _strips(chunk, lane, stripe, known):
            layout.rows.append(replace(row, role=PARITY))
            if number == 0:
                layout.alternative("parity 0", row)
    for number, stripe in enumerate(lane.others, 1):
        for row in _strips(chunk, lane, stripe, known):
            layout.alternative(f"parity {number}", row)


def _strips(chunk: Chunk, lane: Lane, stripe: int, known: dict[bytes, Device]) -> Iterator[Row]:
    """Rows that place a lane's strips on one stripe, as far as the device reaches; none where it is missing."""
    uuid, offset = chunk.stripes[stripe]
    if uuid not in known:
        return
    member = known[uuid].member
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


def _readers(layout: Layout, size: int, known: dict[bytes, Device], name: str) -> tuple[Reader, list[Reader]]:
    """The logical address space, and again from each further copy and from parity."""
    parents = {device.member.number: device.member.reader for device in known.values()}

    def reader(rows: list[Row]) -> Reader:
        columns = Rows.of(0, rows)
        return MappedReader(size, name, {number: parents[number] for number in np.unique(columns.parent).tolist()}, columns)

    copies = [reader(rows) for what, rows in sorted(layout.copies.items()) if what.startswith("copy")]
    parity = [reader(rows) for what, rows in sorted(layout.copies.items()) if what.startswith("parity")]
    if parity:
        copies.append(XorReader(parity))
    return reader(layout.rows), copies


# ---- what is no chunk -----------------------------------------------------------------------------------------------


def _super_stripes(chunks: list[Chunk]) -> tuple[Int, Int]:
    """The logical ranges that no extent may use since a superblock shows through there (exclude_super_stripes, btrfs_rmap_block)."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        end = chunk.start + chunk.length
        if chunk.start < ondisk.SUPER_OFFSETS[0]:
            found.append((chunk.start, min(end, ondisk.SUPER_OFFSETS[0])))
        for number, (_, offset) in enumerate(chunk.stripes):
            for place in ondisk.SUPER_OFFSETS:
                if offset <= place < offset + chunk.device_length:
                    row, inside = divmod(place - offset, STRIPE_LEN)
                    strip = row if chunk.profile.parity else row * chunk.lanes + number // chunk.profile.copies
                    span = STRIPE_LEN * (chunk.lanes if chunk.profile.parity else 1)
                    start = chunk.start + strip * span + inside
                    found.append((start, min(end, start + span)))
    return ints([start for start, _ in found] or np.zeros(0)), ints([end for _, end in found] or np.zeros(0))


def _device_extents(assembly: Assembly, device: Device, chunks: list[Chunk], total: int) -> None:
    """Name what of a device lies in no chunk, and its superblocks."""
    size = min(max(total, 0), device.member.reader.size)
    stripes = [
        (offset, offset + chunk.device_length) for chunk in chunks for uuid, offset in chunk.stripes if uuid == device.uuid
    ]
    taken = np.array(stripes, np.int64).reshape(-1, 2)
    twice = covered_twice(taken[:, 0], taken[:, 1])
    if (beyond := int((taken[:, 1] > device.member.reader.size).sum())) > 0:
        text = f"{beyond} chunks reach beyond the end of {device.member.name} ({device.member.reader.size:#x}): it is truncated"
        _problem(assembly, device.member, Problem("truncated", text, device.member.reader.size))
    if len(twice[0]):
        text = f"{len(twice[0])} ranges belong to more than one chunk"
        _problem(assembly, device.member, Problem("chunk-overlap", text, int(twice[0][0])))
    supers = ints([offset for offset in ondisk.SUPER_OFFSETS if offset + ondisk.SUPER_SIZE <= size])
    super_ends = supers + ondisk.SUPER_SIZE
    out = extent_rows(assembly, device.member)
    out.add(tables.METADATA, supers, super_ends - supers, part="superblock")
    known = np.append(taken[:, 0], supers), np.append(taken[:, 1], super_ends)
    boot = subtract(ints(0), ints(min(ondisk.RESERVED, size)), *known)
    out.add(tables.BOOT, boot[0], boot[1] - boot[0], part="reserved for boot loaders")
    free = complement(np.append(known[0], 0), np.append(known[1], ondisk.RESERVED), 0, max(size, ondisk.RESERVED))
    out.add(tables.FREE, free[0], np.minimum(free[1], size) - free[0])


FORMAT = VolumeFormat(
    NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, allocator="the device extents of the chunks", spans=True
)
