"""GUID partition tables: both headers and entry arrays, their checksums, sectors of 512 and 4096 bytes.

Sources: UEFI specification 2.10, section 5.3; Linux block/partitions/efi.c (a GPT counts only behind a protective or hybrid MBR).
"""

import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Int
from virt_bmap.contract import Assembly, Docs, Member, Problem, Structure, Structures, VolumeFormat, extent_rows
from virt_bmap.errors import Corrupt
from virt_bmap.layout import record, records, struct, widen
from virt_bmap.reader import Reader
from virt_bmap.volumes import mbr
from virt_bmap.volumes.partitions import SECTOR, add_partition, overlaps

NAME = "gpt"
FEATURES = (
    "primary and backup header",
    "CRCs of headers and entries",
    "512- and 4096-byte sectors",
    "protective and hybrid MBR",
    "partition names",
)
REFUSED = ()
ORACLES = ("sfdisk --dump",)

SECTORS = (512, 4096)
MAX_ENTRIES = 16384
"""Entries that are read: 128 is usual, and 16,384 of 128 bytes are 2 MiB, more than the gap before any first partition."""
TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI System", "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux filesystem", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM", "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)", "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home", "ca7d7ccb-63ed-4c53-861c-1742536059cc": "LUKS",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery", "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "LDM metadata",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "LDM data", "48465300-0000-11aa-aa11-00306543ecac": "Apple HFS/HFS+",
    "7c3457ef-0000-11aa-aa11-00306543ecac": "Apple APFS", "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
}  # fmt: skip

HEADER = struct(92, [
    (0, "signature", "S8"),
    (8, "revision", "<u4"),
    (12, "header_size", "<u4"),
    (16, "header_crc32", "<u4"),
    (24, "my_lba", "<u8"),
    (32, "alternate_lba", "<u8"),
    (40, "first_usable_lba", "<u8"),
    (48, "last_usable_lba", "<u8"),
    (56, "disk_guid", "V16"),
    (72, "partition_entry_lba", "<u8"),
    (80, "number_of_partition_entries", "<u4"),
    (84, "size_of_partition_entry", "<u4"),
    (88, "partition_entry_array_crc32", "<u4"),
])  # fmt: skip
ENTRY = struct(128, [
    (0, "partition_type_guid", "V16"),
    (16, "unique_partition_guid", "V16"),
    (32, "starting_lba", "<u8"),
    (40, "ending_lba", "<u8"),
    (56, "partition_name", "V72"),
])  # fmt: skip


class Table(NamedTuple):
    """A valid header with its entries, and where both lie, in bytes."""

    sector: int
    at: int
    entries_at: int
    entries_size: int
    disk_guid: str
    alternate: int
    entries: np.ndarray


def probe(reader: Reader) -> bool:
    """A protective entry in the MBR and a header at one end of the disk; a CD image that is partitioned as well stays a CD image."""
    sector = reader.read_clipped(0, SECTOR)
    if sector[mbr.SIGNATURE :] != b"\x55\xaa" or mbr.PROTECTIVE not in mbr.entries(sector)["os_type"]:
        return False
    places = [(size, at) for size in SECTORS for at in (size, reader.size - size)]
    if not any(at > 0 and reader.read_clipped(at, 8) == b"EFI PART" for _, at in places):
        return False
    for size, at in places:
        table, _ = _read_table(reader, size, at)
        if table:
            used = table.entries[_used(table)]
            return not mbr.isohybrid(
                reader, used["starting_lba"] * np.uint64(size), (used["ending_lba"] + np.uint64(1)) * np.uint64(size)
            )
    return True


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk. Raises Corrupt where neither header is valid."""
    (disk,) = members
    assembly = Assembly()
    problems = assembly.problems.setdefault(disk.number, [])
    table, backup = _both(disk.reader, problems)
    own = extent_rows(assembly, disk)
    own.add(tables.BOOT, 0, mbr.ENTRIES, part="boot code")
    own.add(tables.METADATA, mbr.ENTRIES, SECTOR - mbr.ENTRIES, part="protective MBR")
    for found, words in ((table, "GPT"), (backup, "backup GPT")):
        if found:
            primary = "backup GPT" if found.at > found.sector else "GPT"
            words = primary if backup is None else words
            own.add(tables.METADATA, found.at, found.sector, part=f"{words} header")
            own.add(
                tables.METADATA,
                found.entries_at,
                min(found.entries_size, disk.reader.size - found.entries_at),
                part=f"{words} entries",
            )
    assembly.types[disk.number], assembly.uuids[disk.number] = NAME, table.disk_guid
    for index in _used(table).tolist():
        _add(assembly, disk, table, table.entries[index], index + 1, problems)
    problems += overlaps(assembly)
    return assembly


def _add(assembly: Assembly, disk: Member, table: Table, entry: np.void, number: int, problems: list[Problem]) -> None:
    first, last = int(entry["starting_lba"]), int(entry["ending_lba"])
    if last < first or last >= 1 << 54:
        at = table.entries_at + (number - 1) * 128
        problems.append(
            Problem("partition-range", f"GPT entry {number} at byte {at:#x} ends at sector {last}, before its start {first}", at)
        )
        return
    kind = _guid(entry["partition_type_guid"])
    name = entry["partition_name"].tobytes().decode("utf-16-le", "replace").split("\0")[0]
    add_partition(
        assembly, disk, number, first * table.sector, (last + 1 - first) * table.sector, uuid=_guid(entry["unique_partition_guid"]),
        label=name or None, detail=TYPES.get(kind, f"type {kind}"), unread="BIOS boot" if TYPES.get(kind) == "BIOS boot" else None,
    )  # fmt: skip


def _used(table: Table) -> Int:
    """Positions of the entries whose type is not zero."""
    kind = np.ascontiguousarray(table.entries["partition_type_guid"]).view(np.uint8).reshape(-1, 16)
    return np.flatnonzero(kind.any(axis=1))


def _guid(raw: np.void) -> str:
    return str(uuid.UUID(bytes_le=raw.tobytes()))


def _both(reader: Reader, problems: list[Problem]) -> tuple[Table, Table | None]:
    """The table to use and the valid backup beside it; what is wrong with the other one goes to `problems`."""
    primary, why = None, "no signature"
    for size in SECTORS:
        primary, why_here = _read_table(reader, size, size)
        if primary:
            break
        if "no signature" not in why_here:
            why = why_here
    sizes = (primary.sector,) if primary else SECTORS
    backup, why_backup = None, "no signature"
    for size in sizes:
        for at in dict.fromkeys([primary.alternate if primary else reader.size - size, reader.size - size]):
            backup, why_here = _read_table(reader, size, at)
            why_backup = why_here if "no signature" not in why_here else why_backup
            if backup:
                break
        if backup:
            break
    if primary:
        if not backup:
            problems.append(
                Problem(
                    "gpt-backup",
                    f"the backup GPT header at byte {primary.alternate:#x} is not valid: {why_backup}",
                    primary.alternate,
                    "warning",
                )
            )
        elif backup.entries.tobytes() != primary.entries.tobytes():
            problems.append(
                Problem(
                    "gpt-differ",
                    "the primary and the backup GPT list different partitions; the primary is used",
                    backup.at,
                    "warning",
                )
            )
        return primary, backup
    if backup:
        problems.append(
            Problem(
                "gpt-primary",
                f"the primary GPT header at byte {backup.sector:#x} is not valid ({why}); the backup is used",
                backup.sector,
                "warning",
            )
        )
        return backup, None
    raise Corrupt(f"{reader.name}: neither GPT header is valid: the primary: {why}; the backup: {why_backup}", 512, "gpt")


def _read_table(reader: Reader, sector: int, at: int) -> tuple[Table | None, str]:
    """The table whose header lies at byte `at`, or None and what is wrong with it."""
    if at < sector or at + sector > reader.size:
        return None, "it lies outside the disk"
    data = reader.read(at, sector)
    header = record(data, HEADER)
    if header["signature"] != b"EFI PART":
        return None, "no signature"
    size, count, each = (int(header[name]) for name in ("header_size", "number_of_partition_entries", "size_of_partition_entry"))
    if not HEADER.itemsize <= size <= sector:
        return None, f"its size is {size} bytes"
    if zlib.crc32(data[:16] + bytes(4) + data[20:size]) != header["header_crc32"]:
        return None, "its checksum is wrong"
    entries_at = int(header["partition_entry_lba"]) * sector
    if each < 128 or each % 8 or each > 4096 or count > MAX_ENTRIES or entries_at + count * each > reader.size:
        return None, f"its entry array ({count} entries of {each} bytes at byte {entries_at:#x}) does not fit"
    array = reader.read(entries_at, count * each)
    if zlib.crc32(array) != header["partition_entry_array_crc32"]:
        return None, "the checksum of its entries is wrong"
    rows = np.frombuffer(array, np.uint8).reshape(count, each)
    used = -(-count * each // sector) * sector
    alternate = int(widen(header["alternate_lba"], "alternate_lba") * sector) if int(header["alternate_lba"]) < 1 << 50 else -1
    return Table(sector, at, entries_at, used, _guid(header["disk_guid"]), alternate, records(rows, ENTRY)), ""


def _structures() -> Structures:
    return {
        "GPT header": Structure(HEADER),
        "GPT entries": Structure(ENTRY, many=True),
        "protective MBR": Structure(mbr.ENTRY, many=True),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), structures=_structures)
