"""From the anchors to the partitions: where the volume descriptors lie, what they say, and where a block of a
partition is.

Sources: ECMA-167 (3rd edition) 2/8 and 2/9 (volume recognition), 3/7.2 (tags), 3/8.4 (anchors, sequences),
3/10 (volume descriptors), 4/14.1 (file set), 4/14.3 (partition header); OSTA UDF 2.60, 2.2.4 to 2.2.13
(partition maps).
"""

import binascii
from dataclasses import dataclass, field

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, complement, ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR

RECOGNITION = 32768
SECTOR = 2048
MAX_RECOGNITION = 64
"""Descriptors of the volume recognition sequence that are looked at; real discs have fewer than ten."""
ANCHOR_AT = 256
BLOCK_SIZES = (2048, 512, 4096, 1024, 8192, 16384)
"""In the order of how common they are; the anchor at block 256 tells which it is."""
MAX_DESCRIPTORS, MAX_PIECES, MAX_PARTITIONS = 256, 8, 64
"""Descriptors of a piece of a sequence, pieces that it goes on in, and partitions that are looked at; real
volumes have a tenth of that."""

PRIMARY, ANCHOR, POINTER, PARTITION, LOGICAL, UNALLOCATED, TERMINATING, INTEGRITY = 1, 2, 3, 5, 6, 7, 8, 9
FILE_SET, ALLOCATION, BITMAP = 256, 258, 264

TAG = struct(16, [
    (0, "TagIdentifier", "<u2"), (2, "DescriptorVersion", "<u2"), (4, "TagChecksum", "u1"),
    (8, "DescriptorCRC", "<u2"), (10, "DescriptorCRCLength", "<u2"), (12, "TagLocation", "<u4"),
])  # fmt: skip
ANCHOR_POINTER = struct(32, [
    (16, "MainLength", "<u4"), (20, "MainLocation", "<u4"), (24, "ReserveLength", "<u4"),
    (28, "ReserveLocation", "<u4"),
])  # fmt: skip
PRIMARY_VOLUME = struct(
    512, [(16, "SequenceNumber", "<u4"), (24, "VolumeIdentifier", "V32"), (72, "VolumeSetIdentifier", "V128")]
)
VOLUME_POINTER = struct(512, [(20, "NextLength", "<u4"), (24, "NextLocation", "<u4")])
PARTITION_DESCRIPTOR = struct(512, [
    (16, "SequenceNumber", "<u4"), (22, "PartitionNumber", "<u2"), (56, "UnallocatedSpaceTable", "<u4", (2,)),
    (64, "UnallocatedSpaceBitmap", "<u4", (2,)), (88, "FreedSpaceBitmap", "<u4", (2,)),
    (184, "AccessType", "<u4"), (188, "PartitionStartingLocation", "<u4"), (192, "PartitionLength", "<u4"),
])  # fmt: skip
LOGICAL_VOLUME = struct(440, [
    (16, "SequenceNumber", "<u4"), (84, "LogicalVolumeIdentifier", "V128"), (212, "LogicalBlockSize", "<u4"),
    (240, "UDFRevision", "<u2"), (248, "FileSetLength", "<u4"), (252, "FileSetBlock", "<u4"),
    (256, "FileSetPartition", "<u2"), (264, "MapTableLength", "<u4"), (268, "NumberOfPartitionMaps", "<u4"),
    (432, "IntegrityLength", "<u4"), (436, "IntegrityLocation", "<u4"),
])  # fmt: skip
SPARABLE_MAP = struct(64, [
    (38, "PartitionNumber", "<u2"), (40, "PacketLength", "<u2"), (42, "NumberOfSparingTables", "u1"),
    (44, "SizeOfEachSparingTable", "<u4"), (48, "LocationsOfSparingTables", "<u4", (4,)),
])  # fmt: skip
METADATA_MAP = struct(64, [
    (38, "PartitionNumber", "<u2"), (40, "MetadataFileLocation", "<u4"),
    (44, "MetadataMirrorFileLocation", "<u4"), (48, "MetadataBitmapFileLocation", "<u4"),
])  # fmt: skip
FILE_SET_DESCRIPTOR = struct(512, [
    (400, "RootLength", "<u4"), (404, "RootBlock", "<u4"), (408, "RootPartition", "<u2"),
    (448, "NextLength", "<u4"), (464, "StreamLength", "<u4"), (468, "StreamBlock", "<u4"),
    (472, "StreamPartition", "<u2"),
])  # fmt: skip
INTEGRITY_DESCRIPTOR = struct(80, [
    (28, "IntegrityType", "<u4"), (32, "NextLength", "<u4"), (36, "NextLocation", "<u4"),
])  # fmt: skip
BITMAP_HEADER = struct(24, [(0, "TagIdentifier", "<u2"), (20, "NumberOfBytes", "<u4")])
SPARING_TABLE = struct(56, [(48, "ReallocationTableLength", "<u2")])
SPARING = b"*UDF Sparing Table"
NOT_SPARED = 0xFFFFFFF0
"""Above it, entries of a sparing table have no original packet: the spare one is free, or defective."""
CLOSED = 1
REWRITABLE = (3, 4)
"""Access types (3/10.5.7) of partitions in which a block that is free may be written: rewritable,
overwritable."""
NONE = 0xFFFFFFFF


@dataclass
class Partition:
    """What a partition reference means: blocks [0, length) that begin at byte `start` of the volume, or
    (`runs`) lie inside another partition's file."""

    start: int
    length: int
    number: int
    runs: tuple[Int, Int, Int] | None = None
    """Of a partition that lies in pieces: (first block in it, first byte in the volume, blocks) of each run,
    by block."""
    metadata_map: np.void | None = None
    below: "Partition | None" = None
    """The partition in which the file of a metadata or virtual partition lies."""


@dataclass
class LogicalVolume:
    """A logical volume: its descriptors, and where they lie. Places and sizes in bytes."""

    block_size: int
    revision: int
    label: str
    uuid: str | None
    partitions: list[Partition]
    descriptors: list[np.void]
    """The partition descriptors, by the order in which they were met."""
    file_set: tuple[int, int]
    """(partition reference, block)."""
    areas: list[tuple[str, int, int]] = field(default_factory=list)
    """(what, start, end) of all descriptors outside the partitions."""
    held: list[tuple[str, Int, Int]] = field(default_factory=list)
    """(what, starts, ends) of files that others' blocks lie in: a metadata partition's."""
    closed: bool = True
    start: int = 0
    """Where the session begins whose descriptors these are."""
    virtual: int = 0
    """Where the file entry of the virtual allocation table lies that counts, if that is not the last one."""

    @property
    def end(self) -> int:
        """Where the last of its partitions ends."""
        ends = [part.start + part.length * self.block_size for part in self.partitions if not part.below]
        return max(ends, default=0)

    def places(self, partition: Int, block: Int) -> Int:
        """The byte of the volume at which a block of a partition begins; -1 where there is none."""
        result = np.full(len(block), -1, np.int64)
        for number, found in enumerate(self.partitions):
            mine = np.flatnonzero((partition == number) & (block >= 0) & (block < found.length))
            if found.runs is None:
                result[mine] = found.start + block[mine] * self.block_size
                continue
            first, start, count = found.runs
            at = np.searchsorted(first, block[mine], "right") - 1
            inside = block[mine] - np.append(first, 0)[at]
            fits = (at >= 0) & (inside < np.append(count, 0)[at])
            result[mine[fits]] = start[at[fits]] + inside[fits] * self.block_size
        return result


def recognised(reader: Reader, start: int = 0) -> tuple[bool, int, bool]:
    """(is it UDF?, end of the volume recognition sequence, does ISO 9660 share the volume?), of the session
    that begins at byte `start`."""
    first = start + RECOGNITION
    for step in (
        SECTOR,
        *(size for size in BLOCK_SIZES if size > SECTOR),
    ):  # a descriptor begins a sector, however large these are
        names = []
        for number in range(MAX_RECOGNITION):
            name = reader.read_clipped(first + number * step + 1, 5)
            if name not in (b"BEA01", b"NSR02", b"NSR03", b"TEA01", b"BOOT2", b"CD001", b"CDW02"):
                break
            names.append(name)
        if b"NSR02" in names or b"NSR03" in names:
            return True, first + len(names) * step, b"CD001" in names
    return False, first, False


def is_alone(reader: Reader, start: int = 0) -> bool:
    """Is this session UDF, and no ISO 9660 volume as well?"""
    is_udf, _, is_iso9660 = recognised(reader, start)
    return is_udf and not is_iso9660


def is_tag(data: bytes, identifier: int, location: int | None = None) -> bool:
    """Does a descriptor of this kind begin here, whole, and written for this place?"""
    if len(data) < TAG.itemsize:
        return False
    tag = record(data, TAG)
    if tag["TagIdentifier"] != identifier or (location is not None and tag["TagLocation"] != location):
        return False
    covered = data[TAG.itemsize : TAG.itemsize + int(tag["DescriptorCRCLength"])]
    return bool(
        (sum(data[:16]) - data[4]) & 0xFF == tag["TagChecksum"]
        and binascii.crc_hqx(covered, 0) == tag["DescriptorCRC"]
    )


def tagged(data: Bytes) -> np.ndarray:
    """Which rows begin with a tag whose checksum is right."""
    head = data[:, :16].astype(np.int64)
    found: np.ndarray = (head.sum(axis=1) - head[:, 4]) & 0xFF == head[:, 4]
    return found


def read_volume(reader: Reader, damage: Damage, start: int = 0) -> LogicalVolume:
    """The logical volume of the session that begins at byte `start`. Raises Corrupt where no anchor or no
    whole sequence is found, Unsupported for what is not read."""
    size, anchors = anchors_of(reader, start)
    # those that say something else are of another session
    areas = [("anchor", at, at + size) for at, one in anchors if one == anchors[0][1]]
    found: dict[int, list[bytes]] = {}
    for words, length, location in (
        ("main", "MainLength", "MainLocation"),
        ("reserve", "ReserveLength", "ReserveLocation"),
    ):
        for _, anchor in anchors:
            place = int(anchor[location])
            sequence = _sequence(reader, size, place, int(anchor[length]), areas, words)
            if LOGICAL in sequence:
                break
        found = found or (sequence if LOGICAL in sequence else {})
        if LOGICAL not in sequence:
            damage.say(
                "copy-used",
                f"the {words} volume descriptor sequence holds no whole logical volume descriptor",
                place,
                severity=ERROR,
            )
    if LOGICAL not in found or PARTITION not in found:
        raise Corrupt(
            f"{reader.name}: no volume descriptor sequence holds a logical volume and a partition",
            anchors[0][0],
        )
    logical = max(
        (record(data, LOGICAL_VOLUME) for data in found[LOGICAL]), key=lambda one: int(one["SequenceNumber"])
    )
    tail = next(data for data in found[LOGICAL] if record(data, LOGICAL_VOLUME) == logical)
    if int(logical["LogicalBlockSize"]) != size:
        raise Unsupported(
            f"{reader.name}: logical blocks of {int(logical['LogicalBlockSize'])} "
            f"bytes in sectors of {size} are not supported"
        )
    newest: dict[int, np.void] = {}
    for one in sorted(
        (record(data, PARTITION_DESCRIPTOR) for data in found[PARTITION]),
        key=lambda one: int(one["SequenceNumber"]),
    ):
        newest[int(one["PartitionNumber"])] = one
    primary = [record(data, PRIMARY_VOLUME) for data in found.get(PRIMARY, [])]
    volume = LogicalVolume(
        block_size=size, revision=int(logical["UDFRevision"]),
        label=text(logical["LogicalVolumeIdentifier"].tobytes()),
        uuid=_uuid(primary[0]["VolumeSetIdentifier"].tobytes()) if primary else None,
        partitions=_partitions(reader, size, logical, tail[LOGICAL_VOLUME.itemsize :], newest, areas),
        descriptors=list(newest.values()),
        file_set=(int(logical["FileSetPartition"]), int(logical["FileSetBlock"])), areas=areas,
        start=start,
    )  # fmt: skip
    volume.closed = _integrity(reader, size, logical, areas)
    return volume


def anchors_of(reader: Reader, start: int = 0) -> tuple[int, list[tuple[int, np.void]]]:
    """(block size, (place, anchor) of each that is whole): that of the session which begins at byte `start`,
    or of one that is still open, and those at the end, which are the last one's."""
    for size in BLOCK_SIZES:
        blocks, first = reader.size // size, start // size
        found = []
        for at in dict.fromkeys((first + ANCHOR_AT, blocks - 1 - ANCHOR_AT, blocks - 1, first + 512)):
            data = reader.read_clipped(at * size, 512) if 0 < at < blocks else b""
            if is_tag(data, ANCHOR, at):
                found.append((at * size, record(data, ANCHOR_POINTER)))
        if found:
            return size, found
    raise Corrupt(
        f"{reader.name}: no anchor volume descriptor pointer is whole, at block 256 or at the end",
        ANCHOR_AT * SECTOR,
    )


def _extent(reader: Reader, size: int, location: int, length: int) -> list[tuple[int, bytes]]:
    """(block number, block) of an extent of descriptors, read at once; what lies beyond the end of the
    volume, or is too much, is left out."""
    count = max(0, min(-(-length // size), MAX_DESCRIPTORS, reader.size // size - location))
    data = reader.read(location * size, count * size) if count else b""
    return [(location + at, data[at * size : (at + 1) * size]) for at in range(count)]


def _sequence(
    reader: Reader, size: int, location: int, length: int, areas: list[tuple[str, int, int]], words: str
) -> dict[int, list[bytes]]:
    """Descriptors by their kind, of a sequence and what it goes on in."""
    found: dict[int, list[bytes]] = {}
    for _ in range(MAX_PIECES):
        blocks = _extent(reader, size, location, length)
        areas.append(
            (f"{words} volume descriptor sequence", location * size, (location + len(blocks)) * size)
        )
        following = None
        for at, data in blocks:
            kind = int(record(data, TAG)["TagIdentifier"])
            if kind == TERMINATING or not is_tag(data, kind, at):
                break
            if kind == POINTER:
                following = record(data, VOLUME_POINTER)
            found.setdefault(kind, []).append(data)
        if following is None:
            break
        location, length = int(following["NextLocation"]), int(following["NextLength"])
    return found


def _partitions(
    reader: Reader,
    size: int,
    logical: np.void,
    maps: bytes,
    known: dict[int, np.void],
    areas: list[tuple[str, int, int]],
) -> list[Partition]:
    """The partition maps, in the order in which references count them."""
    result, at = [], 0
    maps = maps[: int(logical["MapTableLength"])]
    for number in range(min(int(logical["NumberOfPartitionMaps"]), MAX_PARTITIONS)):
        if at + 6 > len(maps) or maps[at + 1] < 6 or at + maps[at + 1] > len(maps):
            raise Corrupt(f"{reader.name}: partition map {number} does not fit into its table")
        kind, one = maps[at], maps[at : at + maps[at + 1]]
        at += maps[at + 1]
        if kind == 1:
            result.append(_plain(reader, size, int.from_bytes(one[4:6], "little"), known))
            continue
        name = (
            one[5:28].rstrip(b"\0").decode("ascii", "replace")
            if kind == 2 and len(one) == 64
            else f"type {kind}"
        )
        if name == "*UDF Sparable Partition":
            spared = record(one, SPARABLE_MAP)
            whole = _plain(reader, size, int(spared["PartitionNumber"]), known)
            whole.runs = _spared(reader, size, spared, whole, areas)
            result.append(whole)
        elif name == "*UDF Virtual Partition":
            below = _plain(reader, size, int.from_bytes(one[38:40], "little"), known)
            result.append(Partition(below.start, 0, below.number, (EMPTY, EMPTY, EMPTY), below=below))
        elif name == "*UDF Metadata Partition":
            about = record(one, METADATA_MAP)
            below = _plain(reader, size, int(about["PartitionNumber"]), known)
            result.append(Partition(below.start, 0, below.number, (EMPTY, EMPTY, EMPTY), about, below=below))
        else:
            raise Unsupported(f"{reader.name}: a partition map of the kind {name} is not supported")
    if not result:
        raise Corrupt(f"{reader.name}: the logical volume has no partition")
    return result


def _plain(reader: Reader, size: int, number: int, known: dict[int, np.void]) -> Partition:
    if number not in known:
        raise Corrupt(
            f"{reader.name}: no partition descriptor has number {number}, which the logical volume refers to"
        )
    start = int(known[number]["PartitionStartingLocation"]) * size
    length = int(known[number]["PartitionLength"])
    if start > reader.size:
        raise Corrupt(
            f"{reader.name}: partition {number} begins at byte "
            f"{start:#x}, beyond the end at {reader.size:#x}",
            start,
        )
    return Partition(start, min(length, (reader.size - start) // size), number)


def _spared(
    reader: Reader, size: int, spared: np.void, whole: Partition, areas: list[tuple[str, int, int]]
) -> tuple[Int, Int, Int] | None:
    """Where the blocks of a sparable partition lie, as `Partition.runs`; None where no packet was moved. The
    first table that is whole counts, as in Linux' fs/udf/super.c, and all are noted.

    Packets of 32 blocks; the table says that the one at block 64 was moved to block 9000 of the volume:

        first block in the partition     0     64     96
        where it lies                    0   9000     96     the last two counted from where they begin
        blocks                          64     32    ...
    """
    found: list[Int] = []
    packet = int(spared["PacketLength"])
    for location in spared["LocationsOfSparingTables"][: int(spared["NumberOfSparingTables"])].tolist():
        start = location * size
        length = min(int(spared["SizeOfEachSparingTable"]), 1 << 20, max(0, reader.size - start))
        data = reader.read_clipped(start, length)
        areas.append(("sparing table", start, start + -(-length // size) * size))
        if is_tag(data, 0) and data[17 : 17 + len(SPARING)] == SPARING:
            said = int(record(data, SPARING_TABLE)["ReallocationTableLength"])
            count = min(said, (len(data) - SPARING_TABLE.itemsize) // 8)
            raw = data[SPARING_TABLE.itemsize :][: count * 8]
            found.append(np.frombuffer(raw, "<u4").astype(np.int64).reshape(-1, 2))
    moved = found[0][found[0][:, 0] < NOT_SPARED] if found else np.zeros((0, 2), np.int64)
    moved = moved[(moved[:, 0] < whole.length) & (moved[:, 0] % max(1, packet) == 0)]
    if not len(moved) or not packet:
        return None
    _, once = np.unique(moved[:, 0], return_index=True)
    first, to = moved[once].T
    count = np.minimum(packet, whole.length - first)
    for at, blocks in zip((whole.start + first * size).tolist(), count.tolist(), strict=True):
        areas.append(("packet that sparing has moved", at, at + blocks * size))
    low, high = complement(first, first + count, 0, whole.length)
    begin = np.concatenate([first, low])
    order = np.argsort(begin)
    place = np.concatenate([to * size, whole.start + low * size])
    return begin[order], place[order], np.concatenate([count, high - low])[order]


def _integrity(reader: Reader, size: int, logical: np.void, areas: list[tuple[str, int, int]]) -> bool:
    """Was the volume closed, as far as the last logical volume integrity descriptor says?"""
    location, length, closed = int(logical["IntegrityLocation"]), int(logical["IntegrityLength"]), True
    for _ in range(MAX_PIECES):
        blocks = _extent(reader, size, location, length)
        areas.append(("integrity sequence", location * size, (location + len(blocks)) * size))
        following = None
        for at, data in blocks:
            if not is_tag(data, INTEGRITY, at):
                break
            following = record(data, INTEGRITY_DESCRIPTOR)
            closed = int(following["IntegrityType"]) == CLOSED
        if following is None:
            break
        location, length = int(following["NextLocation"]), int(following["NextLength"])
    return closed


def text(dstring: bytes) -> str:
    """A dstring: compression id, characters, and its length in the last byte."""
    return characters(dstring[: min(dstring[-1], len(dstring) - 1)])


def characters(data: bytes) -> str:
    """OSTA compressed Unicode: 8 or 16 bits a character, as the first byte says."""
    return (
        data[1:].decode("utf-16-be" if data[:1] == b"\x10" else "latin-1", "replace").rstrip("\0")
        if data[:1] in (b"\x08", b"\x10")
        else ""
    )


def _uuid(dstring: bytes) -> str | None:
    """As libblkid makes it of the volume set identifier: sixteen hexadecimal digits, or as many as there are
    in place of its first characters (superblocks/udf.c)."""
    word = text(dstring).encode()[:16]
    if len(word) < 8:
        return None
    digits = len(word) - len(word.lstrip(b"0123456789abcdefABCDEF"))
    if digits < 8:
        return word[:8].hex()
    return (
        word.lower().decode()
        if digits == 16
        else word[:8].lower().decode() + word[8:12].ljust(4, b"\0").hex()
    )


def free_blocks(reader: Reader, start: int, length: int, blocks: int) -> tuple[Int, Int] | None:
    """(starts, ends) in blocks of what a space bitmap descriptor of `length` bytes at `start` calls free
    among the first `blocks`; None where there is none."""
    head = reader.read_clipped(start, BITMAP_HEADER.itemsize)
    found = record(head, BITMAP_HEADER)
    if length < BITMAP_HEADER.itemsize or found["TagIdentifier"] != BITMAP:
        return None
    start += BITMAP_HEADER.itemsize
    count = min(
        int(found["NumberOfBytes"]),
        length - BITMAP_HEADER.itemsize,
        -(-blocks // 8),
        max(0, reader.size - start),
    )
    return bitmap_runs(reader, ints(start), ints(count), blocks, True)


def read_file_set(reader: Reader, volume: LogicalVolume) -> tuple[int, np.void]:
    """(its place, the file set descriptor, which names the root directory and the system's streams).

    Raises Corrupt.
    """
    place = int(volume.places(ints(volume.file_set[0]), ints(volume.file_set[1]))[0])
    data = reader.read_clipped(place, volume.block_size) if place >= 0 else b""
    if not is_tag(data, FILE_SET, volume.file_set[1]):
        raise Corrupt(
            f"{reader.name}: no whole file set descriptor at block "
            f"{volume.file_set[1]} of partition {volume.file_set[0]}",
            place,
        )
    return place, record(data, FILE_SET_DESCRIPTOR)
