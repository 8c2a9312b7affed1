"""BitLocker's boot sector and its FVE metadata, of which there are three copies: where things lie, which
cipher, and who holds the keys.

Sources: libbde documentation "BitLocker Drive Encryption (BDE) format"; cryptsetup lib/bitlk/bitlk.c;
dislocker include/dislocker/metadata.
"""

import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from virt_bmap.core.arrays import EMPTY, Int, intersect, ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.bitlocker.eow import Zone, read_conversion
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR

FVE_SIGNATURE, TO_GO_SIGNATURE = b"-FVE-FS-", b"MSWIN4.1"
IDENTIFIER, TO_GO_IDENTIFIER = 160, 424
"""Where the boot sector of a fixed disk and of BitLocker To Go have the identifier, with the offsets of the
metadata after it."""
BITLOCKER = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001")
ENCRYPT_ON_WRITE = uuid.UUID("92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8")
FVE_SIZE = 64 << 10
"""Bytes that each copy of the metadata takes."""
SECTORS = (512, 1024, 2048, 4096)
CIPHERS = {
    0x8000: ("aes-cbc-elephant", 16), 0x8001: ("aes-cbc-elephant", 32), 0x8002: ("aes-cbc-eboiv", 16),
    0x8003: ("aes-cbc-eboiv", 32), 0x8004: ("aes-xts-plain64", 32), 0x8005: ("aes-xts-plain64", 64),
}  # fmt: skip
"""Encryption method -> cipher in dm-crypt's words and bytes of its key (for Elephant, of each of its two
keys)."""
NO_CIPHER = 0
"""The encryption method of a volume that was decrypted, and kept its metadata."""
DECRYPTED, CONVERTING, PAUSED, ENCRYPTED, CONVERTING_SMALL = 1, 2, 3, 4, 5
"""What the metadata says of the volume. While it is converted, it is encrypted up to some byte."""
CLEAR_KEY, STARTUP_KEY, RECOVERY_PASSWORD, PASSWORD = 0x0000, 0x0200, 0x0800, 0x2000
PROTECTIONS = {
    CLEAR_KEY: "clear key", 0x0100: "TPM", STARTUP_KEY: "startup key", 0x0500: "TPM and PIN",
    RECOVERY_PASSWORD: "recovery password", 0x1000: "smart card", PASSWORD: "password",
}  # fmt: skip
TYPE_VMK, TYPE_FVEK, TYPE_VOLUME_HEADER = 0x0002, 0x0003, 0x000F
VALUE_KEY = 1
VALUE_STRETCH_KEY = 3
VALUE_AES_CCM_KEY = 5
VALUE_VMK = 8
VALUE_EXTERNAL_KEY = 9
VALUE_OFFSET_SIZE = 15

FVE_METADATA = struct(112, [
    (0, "signature", "S8"), (8, "size", "<u2"), (10, "version", "<u2"), (12, "current_state", "<u2"),
    (14, "next_state", "<u2"), (16, "encrypted_volume_size", "<u8"), (24, "state_size", "<u4"),
    (28, "volume_header_sectors", "<u4"),
    (32, "fve_offset", "<u8", (3,)), (56, "volume_header_offset", "<u8"), (64, "metadata_size", "<u4"),
    (72, "metadata_header_size", "<u4"), (80, "volume_guid", "V16"), (100, "encryption_method", "<u2"),
])  # fmt: skip
ENTRY = struct(8, [(0, "size", "<u2"), (2, "type", "<u2"), (4, "value", "<u2"), (6, "version", "<u2")])
VMK = struct(28, [(0, "guid", "V16"), (26, "protection", "<u2")])
VALIDATION = struct(8, [(0, "size", "<u2"), (2, "version", "<u2"), (4, "fve_crc32", "<u4")])


class FveEntry(NamedTuple):
    """An entry of the metadata: what it is for (`type`), what it holds (`value`), and its bytes after the
    header."""

    type: int
    value: int
    data: bytes


class MasterKey(NamedTuple):
    """A volume master key under one protection: what stretches a password, what is encrypted with it, or the
    key itself."""

    guid: str
    protection: int
    entries: tuple[FveEntry, ...]


@dataclass
class Header:
    """Everything that the metadata says.

    The first `header_size` bytes of the volume lie at `header_offset`; `encrypted` are the ranges of the
    device that are, all else is plain. `zones` are what it keeps for itself beside the copies of the
    metadata.

    `refused` says why the volume can't be read, whatever its key.
    """

    guid: str
    sector: int
    cipher: str
    key_size: int
    metadata: list[int]
    header_offset: int
    header_size: int
    encrypted: tuple[Int, Int]
    zones: list[Zone] = field(default_factory=list)
    keys: list[MasterKey] = field(default_factory=list)
    volume_key: bytes | None = None
    refused: Corrupt | None = None
    damage: Damage = field(default_factory=Damage)

    @property
    def is_plain(self) -> bool:
        """Is nothing of it encrypted?"""
        return not self.refused and not len(self.encrypted[0])


def identifier(sector: bytes) -> tuple[uuid.UUID, int] | None:
    """The boot sector's identifier and the byte at which the metadata's offsets stand; None where it is no
    BitLocker volume."""
    at = {FVE_SIGNATURE: IDENTIFIER, TO_GO_SIGNATURE: TO_GO_IDENTIFIER}.get(sector[3:11])
    if at is None:
        return None
    found = uuid.UUID(bytes_le=sector[at : at + 16])
    return (found, at + 16) if sector[3:11] == FVE_SIGNATURE or found == BITLOCKER else None


def read_header(reader: Reader) -> Header:
    """The header, from the first good copy of the metadata.

    Raises Corrupt where there is none, Unsupported for Windows Vista's format.
    """
    sector = reader.read_clipped(0, 512)
    found = identifier(sector)
    if sector[:3] == b"\xeb\x52\x90":
        raise Unsupported("BitLocker of Windows Vista is not supported", 0)
    if not found or found[0] not in (BITLOCKER, ENCRYPT_ON_WRITE):
        raise Unsupported("a BitLocker boot sector of unknown kind", IDENTIFIER)
    offsets = [int.from_bytes(sector[at : at + 8], "little") for at in range(found[1], found[1] + 24, 8)]
    size = int.from_bytes(sector[11:13], "little")
    if size not in SECTORS:
        raise Corrupt(f"the BitLocker boot sector says that sectors have {size} bytes", 11, "superblock")
    damage = Damage()
    data, at = _metadata(reader, offsets, damage)
    header = _header(reader, data, at, size, damage)
    header.metadata = sorted({at, *(offset for offset in offsets if offset <= reader.size - FVE_SIZE)})
    if found[0] == ENCRYPT_ON_WRITE:
        places = [int.from_bytes(sector[at : at + 8], "little") for at in (found[1] + 24, found[1] + 32)]
        try:
            conversion = read_conversion(reader, places, size, damage)
        except Corrupt as error:
            if header.is_plain:
                damage.refuse(error)
            else:
                header.refused = error
            return header
        header.zones = conversion.zones
        header.encrypted = intersect(*header.encrypted, *conversion.encrypted)
    return header


def _metadata(reader: Reader, offsets: list[int], damage: Damage) -> tuple[bytes, int]:
    """(one copy of the metadata, where it lies): the first whose checksum is right, else the first that is
    there at all."""
    usable: list[tuple[bytes, int]] = []
    for number, at in enumerate(offsets, 1):
        if at > reader.size - FVE_SIZE:
            damage.say(
                "copy-differs",
                f"copy {number} of the FVE metadata at byte {at:#x} lies outside the volume",
                0,
                severity=ERROR,
            )
            continue
        data = reader.read(at, FVE_SIZE)
        head = record(data, FVE_METADATA)
        end = int(head["size"]) << 4
        if (
            head["signature"] != FVE_SIGNATURE
            or head["version"] != 2
            or not FVE_METADATA.itemsize <= end <= FVE_SIZE - VALIDATION.itemsize
        ):
            damage.say("copy-differs", f"copy {number} of the FVE metadata at byte {at:#x} is damaged", at)
            continue
        if int(record(data, VALIDATION, end)["fve_crc32"]) == zlib.crc32(data[:end]):
            return data[:end], at
        damage.say(
            "copy-differs", f"the checksum of copy {number} of the FVE metadata at byte {at:#x} is wrong", at
        )
        usable.append((data[:end], at))
    if not usable:
        raise Corrupt(
            "no copy of the FVE metadata is good: the copies should lie at bytes "
            f"{', '.join(f'{at:#x}' for at in offsets)}",
            0,
            "superblock",
        )
    return usable[0]


def _header(reader: Reader, data: bytes, at: int, sector: int, damage: Damage) -> Header:
    head = record(data, FVE_METADATA)
    method, state = int(head["encryption_method"]), int(head["current_state"])
    if method != NO_CIPHER and method not in CIPHERS:
        raise Unsupported(f"the BitLocker encryption method {method:#x} is not supported", at + 100)
    if state not in (DECRYPTED, CONVERTING, PAUSED, ENCRYPTED, CONVERTING_SMALL):
        raise Unsupported(f"a BitLocker volume in state {state} is not supported", at + 12)
    volume = reader.size // sector * sector
    done = min(int(head["encrypted_volume_size"]) // sector * sector, volume)
    if method == NO_CIPHER or state == DECRYPTED:
        done = 0
    elif state == ENCRYPTED:
        done = done or volume
    elif state == CONVERTING and head["state_size"]:
        words = (
            f"a conversion was interrupted at byte {done:#x}: {int(head['state_size']):,} bytes from there "
            "on may lie in its log, which is not read"
        )
        damage.say("half-done", words, at)
    cipher, key_size = CIPHERS.get(method, ("not encrypted", 0))
    guid = str(uuid.UUID(bytes_le=head["volume_guid"].tobytes()))
    offset, size = int(head["volume_header_offset"]), int(head["volume_header_sectors"]) * 512
    encrypted = (ints(0), ints(done)) if done else (EMPTY, EMPTY)
    header = Header(guid, sector, cipher, key_size, [], offset, size, encrypted, damage=damage)
    for entry in entries(
        data[FVE_METADATA.itemsize : 64 + int(head["metadata_size"])], at + FVE_METADATA.itemsize
    ):
        if entry.type == TYPE_VMK and entry.value == VALUE_VMK and len(entry.data) >= VMK.itemsize:
            about = record(entry.data, VMK)
            inner = tuple(entries(entry.data[VMK.itemsize :], at))
            header.keys.append(
                MasterKey(str(uuid.UUID(bytes_le=about["guid"].tobytes())), int(about["protection"]), inner)
            )
        elif entry.type == TYPE_FVEK and entry.value == VALUE_AES_CCM_KEY:
            header.volume_key = entry.data
        elif entry.type == TYPE_VOLUME_HEADER and entry.value == VALUE_OFFSET_SIZE and len(entry.data) >= 16:
            header.header_offset, header.header_size = (
                int.from_bytes(entry.data[low : low + 8], "little") for low in (0, 8)
            )
    if header.header_size <= 0 or header.header_size % sector or header.header_offset % sector or (
        not header.header_size <= header.header_offset <= reader.size - header.header_size
    ):  # fmt: skip
        detail = (
            f"the FVE metadata at byte {at:#x} says that {header.header_size:#x} "
            f"bytes of volume header lie at {header.header_offset:#x}"
        )
        raise Corrupt(detail, at, "superblock")
    return header


def entries(data: bytes, at: int) -> Iterator[FveEntry]:
    """The entries one after the other, up to the first of size 0.

    `at` is for messages: the byte where they, or what holds them, begin.
    """
    done = 0
    while done + ENTRY.itemsize <= len(data):
        head = record(data, ENTRY, done)
        size = int(head["size"])
        if size == 0:
            return
        if size < ENTRY.itemsize or done + size > len(data):
            raise Corrupt(
                f"an entry of the FVE metadata at byte {at:#x} says it has {size} bytes", at, "superblock"
            )
        yield FveEntry(int(head["type"]), int(head["value"]), data[done + ENTRY.itemsize : done + size])
        done += size
