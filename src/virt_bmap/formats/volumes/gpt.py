"""GUID partition tables: both headers and entry arrays, their checksums, sectors of 512 to 4096 bytes.

Sources: UEFI specification 2.10, section 5.3; Linux block/partitions/efi.c (a GPT counts only after a
protective or hybrid MBR).
"""

import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import boot_record
from virt_bmap.formats.common.boot_record import SECTOR
from virt_bmap.formats.common.partitions import DYNAMIC, add_partition, check_overlaps, is_disc, say_dynamic
from virt_bmap.formats.volumes import mbr
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Assembly,
    Checks,
    Docs,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import VERIFIED, VOUCHING

NAME = "gpt"
FEATURES = (
    "primary and backup header",
    "CRCs of headers and entries",
    "sectors of 512 to 4096 bytes",
    "protective and hybrid MBR",
    "partition names",
)
REFUSED = ("partitions of Windows dynamic disks (named only)",)
ORACLES = ("sfdisk --dump",)
CHECKS = Checks(
    checksums="CRC-32 of both headers and both entry arrays",
    rules=("headers and entries: places, that both list the same, overlaps of partitions",),
    unchecked=(),
)

SECTORS = (512, 4096, 2048, 1024)
MAX_ENTRIES = 16384
"""Entries that are read: 128 is usual, and 16,384 of 128 bytes are 2 MiB, more than the gap before any first
partition."""
BIOS_BOOT = "BIOS boot"
TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI System", "21686148-6449-6e6f-744e-656564454649": BIOS_BOOT,
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux filesystem",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap", "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home", "ca7d7ccb-63ed-4c53-861c-1742536059cc": "LUKS",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "LDM metadata",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "LDM data",
    "48465300-0000-11aa-aa11-00306543ecac": "Apple HFS/HFS+",
    "7c3457ef-0000-11aa-aa11-00306543ecac": "Apple APFS", "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
    "fe3a2a5d-4f32-41a7-b725-accc3285a309": "ChromeOS kernel",
    "3cb8e202-3b7e-47dd-8a3c-7ff2a13cfcec": "ChromeOS root",
}  # fmt: skip
LDM = ("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad")
"""Of Windows dynamic disks."""
VERITY = {
    "root verity": (
        "d13c5d3b-b5d1-422a-b29f-9454fdc89d76", "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5",
        "fc56d9e9-e6e5-4c06-be32-e74407ce09a5", "24b2d975-0f97-4521-afa1-cd531e421b8d",
        "7386cdf2-203c-47a9-a498-f2ecce45a2d6", "df3300ce-d69f-4c92-978c-9bfb0f38d820",
        "86ed10d5-b607-45bb-8957-d350f23d0571", "f3393b22-e9af-4613-a948-9d3bfbd0c535",
        "d7d150d2-2a04-4a33-8f12-16651205ff7b", "16b417f8-3e06-4f57-8dd2-9b5232f41aa6",
        "98cfe649-1588-46dc-b2f0-add147424925", "9225a9a3-3c19-4d89-b4f6-eeff88f17631",
        "906bd944-4589-4aae-a4e4-dd983917446a", "ae0253be-1167-4007-ac68-43926c14c5de",
        "b6ed5582-440b-4209-b8da-5ff7c419ea3d", "7ac63b47-b25c-463b-8df8-b4a94e6c90e1",
        "b325bfbe-c7be-4ab8-8357-139e652d2f6b", "966061ec-28e4-4b2e-b4a5-1f0a825a1d84",
    ),
    "/usr verity": (
        "8f461b0d-14ee-4e81-9aa9-049b6fb97abd", "77ff5f63-e7b6-4633-acf4-1565b864c0e6",
        "8cce0d25-c0d0-4a44-bd87-46331bf1df67", "fca0598c-d880-4591-8c16-4eda05c7347c",
        "c215d751-7bcd-4649-be90-6627490a4c05", "6e11a4e7-fbca-4ded-b9e9-e1a512bb664e",
        "6a491e03-3be7-4545-8e38-83320e0ea880", "f46b2c26-59ae-48f0-9106-c50ed47f673d",
        "46b98d8d-b55c-4e8f-aab3-37fca7f80752", "3c3d61fe-b5f3-414d-bb71-8739a694a4ef",
        "df765d00-270e-49e5-bc75-f47bb2118b09", "bdb528a5-a259-475f-a87d-da53fa736a07",
        "ee2b9983-21e8-4153-86d9-b6901a54d1ce", "cb1ee4e3-8cd0-4136-a0a4-aa61a32e8730",
        "8f1056be-9b05-47c4-81d6-be53128e5b54", "b663c618-e7bc-4d6d-90aa-11b756bb1797",
        "31741cc4-1a2a-4111-a581-e00b447d2d06", "2fb4bf56-07fa-42da-8132-6b139f2026ae",
    ),
    "root verity signature": (
        "5996fc05-109c-48de-808b-23fa0830b676", "41092b05-9fc8-4523-994f-2def0408b176",
        "d46495b7-a053-414f-80f7-700c99921ef8", "143a70ba-cbd3-4f06-919f-6c05683a78bc",
        "42b0455f-eb11-491d-98d3-56145ba9d037", "6db69de6-29f4-4758-a7a5-962190f00ce3",
        "e98b36ee-32ba-4882-9b12-0ce14655f46a", "5afb67eb-ecc8-4f85-ae8e-ac1e7c50e7d0",
        "c919cc1f-4456-4eff-918c-f75e94525ca5", "904e58ef-5c65-4a31-9c57-6af5fc7c5de7",
        "1b31b5aa-add9-463a-b2ed-bd467fc857e7", "f5e2c20c-45b2-4ffa-bce9-2a60737e1aaf",
        "d4a236e7-e873-4c07-bf1d-bf6cf7f1c3c6", "3a112a75-8729-4380-b4cf-764d79934448",
        "efe0f087-ea8d-4469-821a-4c2a96a8386a", "3482388e-4254-435a-a241-766a065f9960",
        "c80187a5-73a3-491a-901a-017c3fa953e9", "b3671439-97b0-4a53-90f7-2d5a8f3ad47b",
    ),
    "/usr verity signature": (
        "974a71c0-de41-43c3-be5d-5c5ccd1ad2c0", "e7bb33fb-06cf-4e81-8273-e543b413e2e2",
        "5c6e1c76-076a-457a-a0fe-f3b4cd21ce6e", "94f9a9a1-9971-427a-a400-50cb297f0f35",
        "d7ff812f-37d1-4902-a810-d76ba57b975a", "c23ce4ff-44bd-4b00-b2d4-b41b3419e02a",
        "8de58bc2-2a43-460d-b14e-a76e4a17b47f", "b024f315-d330-444c-8461-44bbde524e99",
        "3e23ca0b-a4bc-4b4e-8087-5ab6a26aa8a9", "f2c2c7ee-adcc-4351-b5c6-ee9816b66e16",
        "7007891d-d371-4a80-86a4-5cb875b9302e", "0b888863-d7f8-4d9e-9766-239fce4d58af",
        "c8bfbd1e-268e-4521-8bba-bf314c399557", "c3836a13-3137-45ba-b583-b16c50fe5eb4",
        "d2f9000a-7a18-453f-b5cd-4d32f77a7b32", "17440e4f-a8d0-467f-a46e-3912ae6ef2c5",
        "3f324816-667b-46ae-86ee-9b0c0c6c11b4", "4ede75e2-6ccc-4cc8-b9c7-70334b087510",
    ),
}  # fmt: skip
"""Partitions that hold the hashes of another one, or a signature of these, for each architecture: the
Discoverable Partitions Specification."""
CHROMEOS_ROOT = "3cb8e202-3b7e-47dd-8a3c-7ff2a13cfcec"
"""Its kernel's command line has the root of a hash tree that lies after the filesystem."""
TYPES |= {kind: f"Linux {words}" for words, kinds in VERITY.items() for kind in kinds}
TRAITS = {kind: VOUCHING for kinds in VERITY.values() for kind in kinds} | {CHROMEOS_ROOT: VERIFIED}
"""What partitions of a type mean for bytes, as in tables.TRAITS."""
VBMETA = "vbmeta"
"""How the names of the partitions begin that hold the hashes and signatures of Android's others."""

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


class GptTable(NamedTuple):
    """A valid header with its entries, and where both lie, in bytes."""

    sector: int
    at: int
    entries_at: int
    entries_size: int
    disk_guid: str
    alternate: int
    entries: np.ndarray


def labelled(reader: Reader) -> bool:
    """A protective entry in the MBR and a header at one end of the disk."""
    sector = reader.read_clipped(0, SECTOR)
    if (
        sector[boot_record.SIGNATURE :] != b"\x55\xaa"
        or mbr.PROTECTIVE not in boot_record.raw_entries(sector)["os_type"]
    ):
        return False
    return any(at > 0 and reader.read_clipped(at, 8) == b"EFI PART" for _, at in _places(reader))


def _places(reader: Reader) -> list[tuple[int, int]]:
    """(size of a sector, where a header lies then)."""
    return [(size, at) for size in SECTORS for at in (size, reader.size - size)]


def probe(reader: Reader) -> bool:
    """A table, on what is no CD image."""
    if not labelled(reader):
        return False
    for size, at in _places(reader):
        table, _ = _read_table(reader, size, at)
        if table:
            used = table.entries[_used(table)]
            return not is_disc(
                reader,
                used["starting_lba"] * np.uint64(size),
                (used["ending_lba"] + np.uint64(1)) * np.uint64(size),
            )
    return True


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk. Raises Corrupt where neither header is valid."""
    (disk,) = members
    assembly = Assembly(members)
    about = assembly.about(disk)
    own, damage = about.extents, about.damage
    table, backup = _both(disk.reader, damage)
    own.add(tables.BOOT, 0, boot_record.ENTRIES, part="boot code")
    own.add(tables.METADATA, boot_record.ENTRIES, SECTOR - boot_record.ENTRIES, part="protective MBR")
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
    about.uuid = table.disk_guid
    for index in _used(table).tolist():
        _add(assembly, disk, table, table.entries[index], index + 1, damage)
    check_overlaps(assembly.children, damage)
    say_dynamic(assembly.children, damage)
    return assembly


def _add(
    assembly: Assembly, disk: Member, table: GptTable, entry: np.void, number: int, damage: Damage
) -> None:
    first, last = int(entry["starting_lba"]), int(entry["ending_lba"])
    if last < first or last >= 1 << 54:
        at = table.entries_at + (number - 1) * 128
        damage.say(
            "mapping",
            f"GPT entry {number} at byte {at:#x} ends at sector {last}, before its start {first}",
            at,
        )
        return
    kind = _guid(entry["partition_type_guid"])
    name = entry["partition_name"].tobytes().decode("utf-16-le", "replace").split("\0")[0]
    add_partition(
        assembly, disk, number, first * table.sector, (last + 1 - first) * table.sector,
        uuid=_guid(entry["unique_partition_guid"]), label=name or None,
        detail=TYPES.get(kind, f"type {kind}"),
        traits=TRAITS.get(kind, VOUCHING if name.startswith(VBMETA) else 0),
        **(DYNAMIC if kind in LDM else {"unread": BIOS_BOOT if TYPES.get(kind) == BIOS_BOOT else None}),
    )  # fmt: skip


def _used(table: GptTable) -> Int:
    """Positions of the entries whose type is not zero."""
    kind = np.ascontiguousarray(table.entries["partition_type_guid"]).view(np.uint8).reshape(-1, 16)
    return np.flatnonzero(kind.any(axis=1))


def _guid(raw: np.void) -> str:
    return str(uuid.UUID(bytes_le=raw.tobytes()))


def _both(reader: Reader, damage: Damage) -> tuple[GptTable, GptTable | None]:
    """The table to use and the valid backup beside it; what is wrong with the other one goes to
    `damage`."""
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
            damage.say(
                "copy-missing",
                f"the backup GPT header at byte {primary.alternate:#x} is not valid: {why_backup}",
                primary.alternate,
            )
        elif backup.entries.tobytes() != primary.entries.tobytes():
            damage.say(
                "copy-differs",
                "the primary and the backup GPT list different partitions; the primary is used",
                backup.at,
            )
        return primary, backup
    if backup:
        damage.say(
            "copy-used",
            f"the primary GPT header at byte {backup.sector:#x} is not valid ({why}); the backup is used",
            backup.sector,
        )
        return backup, None
    raise Corrupt(
        f"{reader.name}: neither GPT header is valid: the primary: {why}; the backup: {why_backup}",
        512,
        "superblock",
    )


def _read_table(reader: Reader, sector: int, at: int) -> tuple[GptTable | None, str]:
    """The table whose header lies at byte `at`, or None and what is wrong with it."""
    if at < sector or at + sector > reader.size:
        return None, "it lies outside the disk"
    data = reader.read(at, sector)
    header = record(data, HEADER)
    if header["signature"] != b"EFI PART":
        return None, "no signature"
    size, count, each = (
        int(header[name])
        for name in ("header_size", "number_of_partition_entries", "size_of_partition_entry")
    )
    if not HEADER.itemsize <= size <= sector:
        return None, f"its size is {size} bytes"
    if zlib.crc32(data[:16] + bytes(4) + data[20:size]) != header["header_crc32"]:
        return None, "its checksum is wrong"
    entries_at = int(header["partition_entry_lba"]) * sector
    if (
        each < 128
        or each % 8
        or each > 4096
        or count > MAX_ENTRIES
        or entries_at + count * each > reader.size
    ):
        return (
            None,
            f"its entry array ({count:,} x {each} bytes at byte {entries_at:#x}) does not fit",
        )
    array = reader.read(entries_at, count * each)
    if zlib.crc32(array) != header["partition_entry_array_crc32"]:
        return None, "the checksum of its entries is wrong"
    rows = np.frombuffer(array, np.uint8).reshape(count, each)
    used = -(-count * each // sector) * sector
    alternate = (
        int(widen(header["alternate_lba"], "alternate_lba") * sector)
        if int(header["alternate_lba"]) < 1 << 50
        else -1
    )
    return GptTable(
        sector, at, entries_at, used, _guid(header["disk_guid"]), alternate, records(rows, ENTRY)
    ), ""


def _structures() -> Structures:
    return {
        "GPT header": Structure(HEADER),
        "GPT entries": Structure(ENTRY, many=True),
        "protective MBR": Structure(boot_record.ENTRY, many=True),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
