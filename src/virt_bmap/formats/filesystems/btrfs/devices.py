"""btrfs devices: one or many become a pool, whose address space is btrfs's logical one.

Read are the superblock (with its mirrors) of every device, the system chunks that it holds, and the chunk
tree. Every chunk becomes strided rows: single, DUP and RAID1/1C3/1C4 (copies), RAID0 and RAID10 (stripes),
RAID5 and RAID6 (rotating stripes, with parity rows). A missing or damaged copy is replaced by another copy,
or computed from parity (`copies`); a device that missed transactions comes last. What lies in no chunk is
free, but for the first MiB, which no chunk may use, and the superblocks.

Sources: fs/btrfs/volumes.c (btrfs_map_block, btrfs_rmap_block), exclude_super_stripes() in
fs/btrfs/block-group.c, tree-checker.c (v6.12).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import Int, complement, covered_twice, ints, subtract, union
from virt_bmap.core.errors import FormatError
from virt_bmap.core.mapping import Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.duplicates import Copy, choose
from virt_bmap.formats.filesystems import btrfs
from virt_bmap.formats.filesystems.btrfs import ondisk, tree
from virt_bmap.formats.filesystems.btrfs.chunks import (
    TYPES,
    Chunk,
    DeviceItem,
    chunk_tree,
    end_of,
    ranges,
    system_chunks,
    without_overlaps,
)
from virt_bmap.formats.filesystems.btrfs.copies import Copies, Device, Devices, layout
from virt_bmap.formats.filesystems.btrfs.ondisk import STRIPE_LEN
from virt_bmap.formats.filesystems.btrfs.pool import LogicalRanges, Pool, PoolReader
from virt_bmap.model import tables
from virt_bmap.model.contract import About, Assembly, Checks, Child, Docs, Identity, Member, VolumeFormat
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE

NAME = "btrfs"
FEATURES = (
    "one or several devices", "single, DUP, RAID0, RAID1, RAID1C3, RAID1C4, RAID10, RAID5 and RAID6 chunks",
    "superblock mirrors", "missing devices, while a copy or parity is left",
    ("devices that missed transactions (what they hold "
        "comes last)"), "seed devices",
    "crc32c, xxhash64, sha256 and blake2b checksums of superblocks, tree blocks and data",
)  # fmt: skip
REFUSED = ("zoned devices", "RAID stripe tree", "extent tree v2", "remap tree")
ORACLES = (
    "btrfs inspect-internal dump-tree",
    "equal copies",
    "parity computed anew",
    "content through a loop mount",
)
CHECKS = Checks(
    checksums="superblocks",
    rules=(
        "superblock: geometry, features and flags known",
        "chunks: lengths, profiles, overlaps, places on devices",
    ),
    unchecked=("device extents",),
)


def probe(reader: Reader) -> bool:
    """The superblock's magic and its own address."""
    head = reader.read_clipped(ondisk.SUPER_OFFSETS[0] + 0x30, 24)
    return head[16:] == ondisk.MAGIC and int.from_bytes(head[:8], "little") == ondisk.SUPER_OFFSETS[0]


def identify(reader: Reader) -> Identity | None:
    """As `contract.VolumeFormat` asks it."""
    try:
        superblock, _ = ondisk.read_superblock(reader)
    except FormatError:
        return None
    device = Device(Member(0, reader.name, reader), superblock)
    group, member = bytes(superblock["fsid"]).hex(), device.uuid.hex()
    try:
        _, items, _ = _read_chunks(device, Devices({device.uuid: device}, frozenset()), Damage())
    except FormatError:  # the tree lies on other devices
        items = {}
    seeds = {item.fsid.hex() for item in items.values() if item.fsid != device.filesystem}
    return Identity(group, member, device.generation, frozenset(seeds))


def assemble(members: Sequence[Member]) -> Assembly:
    """A pool for each filesystem whose devices are among the members."""
    assembly = Assembly(members)
    devices: list[Device] = []
    for member in members:
        try:
            superblock, damage = ondisk.read_superblock(member.reader)
        except FormatError as error:
            _refuse(assembly, member, error)
            continue
        assembly.about(member).damage.take(damage)
        devices.append(Device(member, superblock))
    groups = _groups(assembly, devices)
    every = [device for group in groups for device in group]
    lies_on: dict[int, list[Made]] = {}
    for group in groups:
        if all(device.member.number in lies_on for device in group):
            continue  # the seed of a pool that has grown onto other devices
        try:
            made = _make_pool(assembly, group, every)
        except FormatError as error:
            for device in group:
                _refuse(assembly, device.member, error)
            continue
        for device in made.devices:
            lies_on.setdefault(device.member.number, []).append(made)
    for device in every:
        if pools := lies_on.get(device.member.number):
            _device_extents(assembly.about(device.member), device, pools)
    return assembly


def _refuse(assembly: Assembly, member: Member, error: FormatError) -> None:
    about = assembly.about(member)
    about.damage.refuse(error)
    about.extents.add(tables.CONTENT, 0, member.reader.size, part=NAME)


def _groups(assembly: Assembly, devices: list[Device]) -> list[list[Device]]:
    """Devices by filesystem, each once, seeds last."""
    copies: dict[tuple[bytes, bytes], list[Device]] = {}
    for device in devices:
        copies.setdefault((bytes(device.superblock["fsid"]), device.uuid), []).append(device)
    groups: dict[bytes, list[Device]] = {}
    for (fsid, _), found in copies.items():
        groups.setdefault(fsid, []).append(_one_of(assembly, found))

    def seeding(group: list[Device]) -> bool:
        return bool(int(group[0].superblock["flags"]) & ondisk.SUPER_FLAG_SEEDING)

    return sorted(groups.values(), key=lambda group: (seeding(group), group[0].member.number))


def _one_of(assembly: Assembly, copies: list[Device]) -> Device:
    """The copy of a device that is used."""
    superblock = copies[0].superblock
    number, fsid = int(superblock["dev_item.devid"]), ondisk.uuid_text(superblock["fsid"])
    claims = [
        Copy(device.member, device.generation, assembly.about(device.member).damage) for device in copies
    ]
    used = copies[choose(claims, f"device {number} of the btrfs {fsid}", "generation")]
    for device in copies:
        if device is not used:
            about = assembly.about(device.member)
            about.extents.add(tables.CONTENT, 0, device.member.reader.size, part=NAME)
    return used


class Made(NamedTuple):
    """A pool, what it says of its devices by their uuid, and those that are there."""

    chunks: list[Chunk]
    items: dict[bytes, DeviceItem]
    devices: list[Device]


def _make_pool(assembly: Assembly, group: list[Device], devices: list[Device]) -> Made:
    """The pool of the devices of one filesystem, and of its seeds, which are among all `devices`.

    Several pools can have grown from one seed.
    """
    newest = max(group, key=lambda device: device.generation)
    superblock = newest.superblock
    # a device of this filesystem that is behind by more than the transaction in which all others may have
    # been cut off
    stale = frozenset(device.uuid for device in group if device.generation + 1 < newest.generation)
    damage = Damage()
    there = Devices({device.uuid: device for device in [*devices, *group]}, stale)
    system, items, chunks = _read_chunks(newest, there, damage)
    own = {device.member.number for device in group}
    seeds = [device for device in devices if _is_of(device, items)]
    known = {device.uuid: device for device in [*seeds, *group]}
    there = Devices(known, stale)
    chunks = without_overlaps(chunks or system, damage)
    rows, unreachable = layout(chunks, there)
    size = end_of(chunks)
    wanted = {uuid for chunk in chunks for uuid, _ in chunk.stripes} | set(items)
    if lost := len(wanted - set(known)):
        strips = counted(unreachable, "[strip has|strips have] no other copy")
        what = f"[device|devices] of the filesystem [is|are] missing; {strips}"
        damage.add("missing-member", what, count=lost, severity=ERROR if unreachable else NOTE)
    reserved = union(*_super_stripes(chunks))
    pool = Pool(
        superblock,
        ranges(chunks),
        LogicalRanges(*reserved),
        Copies(chunks, there, size, newest.member.name),
    )
    first = min(group, key=lambda device: device.member.number).member
    assembly.add(Child(
        "pool", first.name, size, Rows.of(rows), lambda base: PoolReader(base, pool),
        uuid=ondisk.uuid_text(superblock["fsid"]), detail=_detail(chunks), damage=damage,
        holds=btrfs.FORMAT,
    ))  # fmt: skip
    for device in known.values():
        about = assembly.about(device.member)
        about.detail = f"device {int(device.superblock['dev_item.devid'])} of {len(wanted)}"
        about.uuid = ondisk.uuid_text(device.superblock["dev_item.uuid"])
        if device.generation < newest.generation and device.member.number in own:
            text = (
                f"{device.member.name} was last written in transaction {device.generation}, the newest "
                f"in {newest.generation}"
            )
            about.damage.say("stale", text, ondisk.SUPER_OFFSETS[0])
    return Made(chunks, items, list(known.values()))


def _read_chunks(
    device: Device, there: Devices, damage: Damage
) -> tuple[list[Chunk], dict[bytes, DeviceItem], list[Chunk]]:
    """The chunks by which the chunk tree is read, as a device has them, and what that tree says of devices
    and of all chunks."""
    system = list(system_chunks(device.superblock))
    copies = Copies(system, there, end_of(system), device.member.name)
    source = tree.TreeSource.of(device.superblock, copies.first, copies, ranges(system))
    chunks, items = chunk_tree(source, device.superblock, damage)
    return system, items, chunks


def _is_of(device: Device, items: dict[bytes, DeviceItem]) -> bool:
    """Is it one of these? A copy whose filesystem got another id kept its own."""
    return device.uuid in items and items[device.uuid].fsid == device.filesystem


def _detail(chunks: list[Chunk]) -> str:
    """The profiles in use, as in "data RAID0, metadata RAID1"."""
    found = dict.fromkeys(
        f"{'+'.join(name for bit, name in TYPES.items() if chunk.type & bit)} {chunk.profile.name}"
        for chunk in chunks
    )
    return ", ".join(sorted(found))


# ---- outside all chunks ------------------------------------------------------------------------------------


def _super_stripes(chunks: list[Chunk]) -> tuple[Int, Int]:
    """The logical ranges that no extent may use since a superblock shows through there
    (exclude_super_stripes, btrfs_rmap_block)."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        end = chunk.start + chunk.length
        if chunk.start < ondisk.SUPER_OFFSETS[0]:
            found.append((chunk.start, min(end, ondisk.SUPER_OFFSETS[0])))
        for number, (_, offset) in enumerate(chunk.stripes):
            for place in ondisk.SUPER_OFFSETS:
                if offset <= place < offset + chunk.device_length:
                    row, inside = divmod(place - offset, STRIPE_LEN)
                    strip = (
                        row if chunk.profile.parity else row * chunk.lanes + number // chunk.profile.copies
                    )
                    span = STRIPE_LEN * (chunk.lanes if chunk.profile.parity else 1)
                    start = chunk.start + strip * span + inside
                    found.append((start, min(end, start + span)))
    return ints([start for start, _ in found] or np.zeros(0)), ints([end for _, end in found] or np.zeros(0))


def _device_extents(about: About, device: Device, pools: list[Made]) -> None:
    """Name what of a device lies in no chunk of the pools on it, and its superblocks."""
    item = pools[0].items.get(device.uuid)
    total = item.size if item else int(device.superblock["dev_item.total_bytes"])
    size = min(max(total, 0), device.member.reader.size)
    each = [_stripes_on(device, made.chunks) for made in pools]
    for stripes in each:
        twice = covered_twice(stripes[:, 0], stripes[:, 1])
        about.damage.add("two-owners", "[range belongs|ranges belong] to more than one chunk", twice[0])
    taken = np.unique(np.concatenate(each), axis=0)  # a seed's chunks are those of all that grew from it
    end = device.member.reader.size
    beyond = int((taken[:, 1] > end).sum())
    text = f"[chunk reaches|chunks reach] beyond the end of {device.member.name}: it is truncated"
    about.damage.add("truncated", text, end, beyond)
    supers = ints([offset for offset in ondisk.SUPER_OFFSETS if offset + ondisk.SUPER_SIZE <= size])
    super_ends = supers + ondisk.SUPER_SIZE
    out = about.extents
    out.add(tables.METADATA, supers, super_ends - supers, part="superblock")
    known = np.append(taken[:, 0], supers), np.append(taken[:, 1], super_ends)
    boot = subtract(ints(0), ints(min(ondisk.RESERVED, size)), *known)
    out.add(tables.BOOT, boot[0], boot[1] - boot[0], part="reserved for boot loaders")
    free = complement(
        np.append(known[0], 0), np.append(known[1], ondisk.RESERVED), 0, max(size, ondisk.RESERVED)
    )
    out.add(tables.FREE, free[0], np.minimum(free[1], size) - free[0])


def _stripes_on(device: Device, chunks: list[Chunk]) -> Int:
    """(stripes, 2): [start, end) on the device of each of its stripes."""
    stripes = [
        (offset, offset + chunk.device_length)
        for chunk in chunks
        for uuid, offset in chunk.stripes
        if uuid == device.uuid
    ]
    return np.array(stripes, np.int64).reshape(-1, 2)


FORMAT = VolumeFormat(
    NAME,
    probe,
    assemble,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the device extents of the chunks",
    spans=True,
    holds=btrfs.FORMAT,
    identify=identify,
)
