"""The superblock of one member of an md array, versions 0.90, 1.0, 1.1 and 1.2, as one shape.

Sources: kernel include/uapi/linux/raid/md_p.h, drivers/md/md.c (super_90_load, super_1_load, calc_sb_1_csum),
md-bitmap.h.
"""

from dataclasses import dataclass, field

import numpy as np

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import Member
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

SECTOR = 512
MD_SB_MAGIC = 0xA92B4EFC
MD_SB_BYTES = 4096
MD_RESERVED_BYTES = 64 << 10
MAX_SECTORS = 1 << 43
"""Of one member: 4 PiB, so that the bytes of an array of all members there can be fit in 63 bits."""
MAX_ROLES = (MD_SB_BYTES - 256) // 2
MD_DISK_SYNC = 2
MD_SB_CLEAN, MD_SB_BITMAP_PRESENT = 0, 8
SPARE, FAULTY, JOURNAL = 0xFFFF, 0xFFFE, 0xFFFD
BITMAP_OFFSET, RECOVERY_OFFSET, RESHAPE_ACTIVE, BAD_BLOCKS, REPLACEMENT = 1, 2, 4, 8, 16
PPL, MULTIPLE_PPLS, RAID0_LAYOUT = 1024, 2048, 4096
BITMAP_MAGIC = 0x6D746962

SUPERBLOCK_1 = struct(256, [
    (0x00, "magic", "<u4"), (0x04, "major_version", "<u4"), (0x08, "feature_map", "<u4"),
    (0x10, "set_uuid", "V16"), (0x20, "set_name", "V32"), (0x48, "level", "<i4"), (0x4C, "layout", "<u4"),
    (0x50, "size", "<u8"), (0x58, "chunksize", "<u4"), (0x5C, "raid_disks", "<u4"),
    (0x60, "bitmap_offset", "<i4"), (0x60, "ppl_offset", "<i2"), (0x62, "ppl_size", "<u2"),
    (0x64, "new_level", "<i4"), (0x68, "reshape_position", "<u8"), (0x80, "data_offset", "<u8"),
    (0x88, "data_size", "<u8"), (0x90, "super_offset", "<u8"), (0x98, "recovery_offset", "<u8"),
    (0xA0, "dev_number", "<u4"), (0xBA, "bblog_size", "<u2"), (0xBC, "bblog_offset", "<i4"),
    (0xC8, "events", "<u8"), (0xD0, "resync_offset", "<u8"), (0xD8, "sb_csum", "<u4"),
    (0xDC, "max_dev", "<u4"),
])  # fmt: skip


def _superblock_0(order: str) -> np.dtype[np.void]:
    word = f"{order}u4"
    events = ("events_lo", "events_hi") if order == "<" else ("events_hi", "events_lo")
    return struct(MD_SB_BYTES, [
        (0x00, "md_magic", word), (0x04, "major_version", word), (0x08, "minor_version", word),
        (0x14, "set_uuid0", word), (0x1C, "level", f"{order}i4"), (0x20, "size", word),
        (0x28, "raid_disks", word), (0x2C, "md_minor", word), (0x34, "set_uuid1", word),
        (0x38, "set_uuid2", word), (0x3C, "set_uuid3", word), (0x84, "state", word), (0x98, "sb_csum", word),
        (0x9C, events[0], word), (0xA0, events[1], word), (0xB0, "reshape_position", f"{order}u8"),
        (0x100, "layout", word), (0x104, "chunk_size", word), (0x200, "disks", word, (27, 32)),
        (0xF80, "this_disk", word, (32,)),
    ])  # fmt: skip


SUPERBLOCK_0 = {order: _superblock_0(order) for order in "<>"}
BITMAP = struct(256, [
    (0x00, "magic", "<u4"), (0x28, "sync_size", "<u8"), (0x34, "chunksize", "<u4"),
    (0x40, "sectors_reserved", "<u4"), (0x44, "nodes", "<u4"),
])  # fmt: skip


@dataclass
class Superblock:
    """What one member says.

    Bytes, but `events`; `role` is the member's slot in the array, or SPARE, FAULTY, JOURNAL.

    `size` is what the array uses of each member, `data_size` what the member has; `metadata` are (part, first
    byte, bytes).
    """

    member: Member
    version: str
    offset: int
    uuid: str
    name: str
    level: int
    layout: int
    chunk: int
    raid_disks: int
    size: int
    data_offset: int
    data_size: int
    events: int
    role: int
    number: int
    roles: list[int]
    clean: bool
    reshaping: bool
    recovered: int | None = None
    replacement: bool = False
    minor: int | None = None
    raid0_layout: bool = True
    metadata: list[tuple[str, int, int]] = field(default_factory=list)
    damage: Damage = field(default_factory=Damage)


def places(size: int) -> list[tuple[str, int]]:
    """(version, byte) of every place where a superblock can lie."""
    found = [("1.1", 0), ("1.2", 4096)]
    if size >= 8 * SECTOR * 3:
        found.append(("1.0", (size // SECTOR - 16) // 8 * 8 * SECTOR))
    if size >= 2 * MD_RESERVED_BYTES:
        found.append(("0.90", size // MD_RESERVED_BYTES * MD_RESERVED_BYTES - MD_RESERVED_BYTES))
    return found


def find(reader: Reader) -> tuple[str, int] | None:
    """(version, byte) of the superblock; None where there is none."""
    for version, offset in places(reader.size):
        head = reader.read_clipped(offset, SUPERBLOCK_1.itemsize)
        if version == "0.90":
            if any(
                record(head + bytes(MD_SB_BYTES), kind)["md_magic"] == MD_SB_MAGIC
                for kind in SUPERBLOCK_0.values()
            ):
                return version, offset
            continue
        found = record(head, SUPERBLOCK_1)
        if (
            found["magic"] == MD_SB_MAGIC
            and found["major_version"] == 1
            and int(found["super_offset"]) * SECTOR == offset
        ):
            return version, offset
    return None


def read(member: Member) -> Superblock:
    """The member's superblock. Raises Corrupt where its numbers make no sense."""
    found = find(member.reader)
    if found is None:
        raise Corrupt("the md superblock is gone", code="superblock")
    version, offset = found
    result = _read_0(member, offset) if version == "0.90" else _read_1(member, version, offset)
    for part, start, length in list(result.metadata):
        if start < 0 or start + length > member.reader.size:
            result.metadata.remove((part, start, length))
            result.damage.say(
                "outside", f"the {part} at {start:#x}+{length:#x} lies outside the member", severity=WARNING
            )
    if not 1 <= result.raid_disks <= MAX_ROLES:
        raise Corrupt(
            f"the md superblock at byte {offset:#x} says raid_disks {result.raid_disks}", offset, "superblock"
        )
    return result


def _read_1(member: Member, version: str, offset: int) -> Superblock:
    head = record(member.reader.read(offset, SUPERBLOCK_1.itemsize), SUPERBLOCK_1)
    roles = int(head["max_dev"])
    if roles > MAX_ROLES:
        raise Corrupt(
            f"the md superblock at byte {offset:#x} has max_dev {roles}, more than {MAX_ROLES}",
            offset,
            "superblock",
        )
    data = member.reader.read(offset, SUPERBLOCK_1.itemsize + 2 * roles)
    role_of = np.frombuffer(data, "<u2", offset=SUPERBLOCK_1.itemsize).tolist()
    features, number = int(head["feature_map"]), int(head["dev_number"])
    for name in ("size", "data_offset", "data_size", "resync_offset"):
        value = int(head[name])
        if name != "resync_offset" and value > MAX_SECTORS:
            raise Corrupt(
                f"the md superblock at byte {offset:#x} says {name} {value:#x}, more than any disk has",
                offset,
                "superblock",
            )
    result = Superblock(
        member, version, offset, _uuid(head["set_uuid"].tobytes()),
        head["set_name"].tobytes().rstrip(b"\0").decode(errors="backslashreplace"),
        int(head["level"]), int(head["layout"]), int(head["chunksize"]) * SECTOR, int(head["raid_disks"]),
        int(head["size"]) * SECTOR, int(head["data_offset"]) * SECTOR, int(head["data_size"]) * SECTOR,
        int(head["events"]), role_of[number] if number < roles else SPARE, number, role_of,
        int(head["resync_offset"]) >= int(head["size"]), bool(features & RESHAPE_ACTIVE),
        int(head["recovery_offset"]) * SECTOR if features & RECOVERY_OFFSET else None,
        bool(features & REPLACEMENT), raid0_layout=bool(features & RAID0_LAYOUT),
        metadata=[("md superblock", offset, -(-len(data) // SECTOR) * SECTOR)],
    )  # fmt: skip
    if _checksum_1(data) != int(head["sb_csum"]):
        result.damage.say(
            "checksum",
            f"the checksum of the md superblock at byte {offset:#x} is wrong",
            offset,
            severity=WARNING,
        )
    if features & BITMAP_OFFSET:
        start = offset + int(head["bitmap_offset"]) * SECTOR
        result.metadata.append(("md bitmap", start, _bitmap_bytes(member.reader, start)))
    if features & (PPL | MULTIPLE_PPLS):
        result.metadata.append(
            (
                "md partial parity log",
                offset + int(head["ppl_offset"]) * SECTOR,
                int(head["ppl_size"]) * SECTOR,
            )
        )
    if features & BAD_BLOCKS or head["bblog_size"]:
        start, length = offset + int(head["bblog_offset"]) * SECTOR, int(head["bblog_size"]) * SECTOR
        result.metadata.append(("md bad block log", start, length))
        _bad_blocks(result, start, length)
    return result


def _read_0(member: Member, offset: int) -> Superblock:
    data = member.reader.read(offset, MD_SB_BYTES)
    order = next(
        order for order, kind in SUPERBLOCK_0.items() if record(data, kind)["md_magic"] == MD_SB_MAGIC
    )
    head = record(data, SUPERBLOCK_0[order])
    disks = head["disks"]
    roles = [
        int(disk[3]) if int(disk[4]) >> MD_DISK_SYNC & 1 and not int(disk[4]) & 1 else SPARE for disk in disks
    ]
    number = int(head["this_disk"][0])
    words = b"".join(
        int(head[name]).to_bytes(4, "big") for name in ("set_uuid0", "set_uuid1", "set_uuid2", "set_uuid3")
    )
    state = int(head["state"])
    result = Superblock(
        member, "0.90", offset, _uuid(words), "", int(head["level"]), int(head["layout"]),
        int(head["chunk_size"]), int(head["raid_disks"]), int(head["size"]) * 1024, 0, offset,
        (int(head["events_hi"]) << 32) + int(head["events_lo"]),
        roles[number] if number < len(roles) else SPARE, number, roles, bool(state >> MD_SB_CLEAN & 1),
        int(head["minor_version"]) > 90 and int(head["reshape_position"]) != 0xFFFFFFFFFFFFFFFF,
        minor=int(head["md_minor"]), metadata=[("md superblock", offset, MD_SB_BYTES)],
    )  # fmt: skip
    if state >> MD_SB_BITMAP_PRESENT & 1:
        start = offset + MD_SB_BYTES
        result.metadata.append(
            ("md bitmap", start, min(_bitmap_bytes(member.reader, start), MD_RESERVED_BYTES - MD_SB_BYTES))
        )
    words_of = np.frombuffer(data, f"{order}u4").astype(np.uint64)
    total = int(words_of.sum()) - int(head["sb_csum"])
    if (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF != int(head["sb_csum"]):
        result.damage.say(
            "checksum",
            f"the checksum of the md superblock at byte {offset:#x} is wrong",
            offset,
            severity=WARNING,
        )
    return result


def _checksum_1(data: bytes) -> int:
    """calc_sb_1_csum: the sum of all words, carries added, with the checksum itself as zero."""
    blank = data[:0xD8] + bytes(4) + data[0xDC:]
    total = int(np.frombuffer(blank, "<u4", len(blank) // 4).astype(np.uint64).sum())
    if len(blank) % 4:
        total += int.from_bytes(blank[-2:], "little")
    return (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF


def _bitmap_bytes(reader: Reader, start: int) -> int:
    """What a bitmap takes: its own superblock and a bit for each chunk; 4096 where it can't be read."""
    if not 0 <= start <= reader.size - BITMAP.itemsize:
        return BITMAP.itemsize
    head = record(reader.read(start, BITMAP.itemsize), BITMAP)
    if head["magic"] != BITMAP_MAGIC or not head["chunksize"]:
        return min(MD_SB_BYTES, reader.size - start)
    bits = -(-int(head["sync_size"]) * SECTOR // int(head["chunksize"]))
    used = BITMAP.itemsize + -(-bits // 8)
    # a cluster keeps one bitmap a node, each from a block of its own
    used = max(1, int(head["nodes"])) * (
        -(-used // MD_SB_BYTES) * MD_SB_BYTES if head["nodes"] else -(-used // SECTOR) * SECTOR
    )
    return max(used, int(head["sectors_reserved"]) * SECTOR)


def _bad_blocks(found: Superblock, start: int, length: int) -> None:
    if 0 <= start <= found.member.reader.size - length:
        entries = np.frombuffer(found.member.reader.read(start, length), "<u8")
        used = int(((entries != 0xFFFFFFFFFFFFFFFF) & (entries != 0)).sum())
        what = "[range is|ranges are] listed as unreadable in its bad block log"
        found.damage.add("bad-blocks", what, start, used)


def _uuid(raw: bytes) -> str:
    """As mdadm prints it: four groups of eight digits."""
    text = raw.hex()
    return ":".join(text[at : at + 8] for at in range(0, 32, 8))
