"""LUKS headers, version 1 and 2, as one shape: key slots, segments of ciphertext, digests that tell the right
key.

Sources: cryptsetup docs/on-disk-format-luks1 (1.2.3) and on-disk-format-luks2 (1.1.3); lib/luks1/luks.h,
lib/luks2/luks2.h.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import INT64_MAX, record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE

SECTOR = 512
LUKS_MAGIC, SECONDARY_MAGIC = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
LUKS_KEY_ENABLED = 0x00AC71F3
MAX_STRIPES = 1 << 16
"""Of the anti-forensic split; every tool writes 4000."""
MAX_HEADER = 4 << 20
"""Bytes of one LUKS2 header, the largest of the sizes that the format allows."""
SECONDARY_OFFSETS = tuple(0x4000 << step for step in range(9))
MAX_KEY = 512
"""Bytes of a volume key, as cryptsetup limits them."""

LUKS1_SLOT = struct(48, [
    (0x00, "active", ">u4"), (0x04, "iterations", ">u4"), (0x08, "salt", "V32"),
    (0x28, "key_material_offset", ">u4"), (0x2C, "stripes", ">u4"),
])  # fmt: skip
LUKS1 = struct(592, [
    (0x00, "magic", "V6"), (0x06, "version", ">u2"), (0x08, "cipher_name", "S32"),
    (0x28, "cipher_mode", "S32"), (0x48, "hash_spec", "S32"), (0x68, "payload_offset", ">u4"),
    (0x6C, "key_bytes", ">u4"), (0x70, "mk_digest", "V20"), (0x84, "mk_digest_salt", "V32"),
    (0xA4, "mk_digest_iter", ">u4"), (0xA8, "uuid", "S40"), (0xD0, "slots", "V384"),
])  # fmt: skip
LUKS2 = struct(4096, [
    (0x000, "magic", "V6"), (0x006, "version", ">u2"), (0x008, "hdr_size", ">u8"), (0x010, "seqid", ">u8"),
    (0x018, "label", "S48"), (0x048, "csum_alg", "S32"), (0x0A8, "uuid", "S40"), (0x100, "hdr_offset", ">u8"),
    (0x1C0, "csum", "V64"),
])  # fmt: skip
DETACHED = (
    "a detached header: the encrypted bytes lie on another device (open that with --key DEVICE:header:FILE)"
)


class Kdf(NamedTuple):
    """How a passphrase becomes a key: pbkdf2 with `hash` and `iterations`, or argon2i/argon2id with time,
    memory (KiB) and lanes."""

    type: str
    salt: bytes
    hash: str = ""
    iterations: int = 0
    time: int = 0
    memory: int = 0
    cpus: int = 0


class Slot(NamedTuple):
    """A key slot: `stripes` times `key_size` bytes at `offset`, encrypted with `encryption` under a key of
    `area_key_size` bytes."""

    name: str
    kdf: Kdf
    key_size: int
    area_key_size: int
    offset: int
    size: int
    encryption: str
    stripes: int
    af_hash: str


class Segment(NamedTuple):
    """Bytes [offset, +size) of the device hold those of the volume from `start` on; `cipher` None: not
    encrypted."""

    name: str
    start: int
    offset: int
    size: int
    cipher: str | None
    sector: int
    tweak: int


class Digest(NamedTuple):
    """Tells the volume key of some segments: pbkdf2 of the key is `value`.

    `slots` lists the key slots that hold it.
    """

    slots: tuple[str, ...]
    segments: tuple[str, ...]
    kdf: Kdf
    value: bytes


@dataclass
class Header:
    """What a LUKS device says of itself.

    `areas` are (part, first byte, bytes) of metadata; `free` are parts of it that hold nothing.
    """

    version: int
    uuid: str
    label: str
    slots: list[Slot]
    segments: list[Segment]
    digests: list[Digest]
    areas: list[tuple[str, int, int]]
    free: list[tuple[int, int]] = field(default_factory=list)
    damage: Damage = field(default_factory=Damage)


def read_header(reader: Reader, device: int | None = None) -> Header:
    """The header; a detached one is for a `device` of so many bytes.

    Raises Corrupt where it can't be used, Unsupported for versions to come.
    """
    head = reader.read_clipped(0, 8)
    version = int.from_bytes(head[6:8], "big")
    if head[:6] == LUKS_MAGIC and version == 1:
        return _read_1(reader, device)
    if head[:6] == LUKS_MAGIC and version != 2:
        raise Unsupported(f"LUKS version {version} is not supported", 6)
    return _read_2(reader, device)


def _read_1(reader: Reader, device: int | None) -> Header:
    head = record(reader.read_clipped(0, LUKS1.itemsize), LUKS1)
    key_size, hash_spec = int(head["key_bytes"]), _text(head["hash_spec"])
    encryption = f"{_text(head['cipher_name'])}-{_text(head['cipher_mode'])}"
    if not 0 < key_size <= MAX_KEY:
        raise Corrupt(f"the LUKS header says the key has {key_size} bytes", 0x6C, "superblock")
    payload = int(head["payload_offset"]) * SECTOR
    header = Header(
        1, _text(head["uuid"]), "", [], [], [], [("LUKS header", 0, min(LUKS1.itemsize, reader.size))]
    )
    for number, slot in enumerate(np.frombuffer(head["slots"].tobytes(), LUKS1_SLOT)):
        offset, stripes = int(slot["key_material_offset"]) * SECTOR, int(slot["stripes"])
        size = -(-key_size * stripes // SECTOR) * SECTOR
        if not 0 < stripes <= MAX_STRIPES or offset + size > reader.size or offset < LUKS1.itemsize:
            if slot["active"] == LUKS_KEY_ENABLED:
                header.damage.say(
                    "unsupported",
                    f"key slot {number} at {offset:#x}+{size:#x} lies outside the device",
                    0xD0,
                    severity=ERROR,
                )
            continue
        if slot["active"] != LUKS_KEY_ENABLED:
            header.free.append((offset, size))
            continue
        header.areas.append((f"LUKS key slot {number}", offset, size))
        kdf = Kdf("pbkdf2", slot["salt"].tobytes(), hash_spec, int(slot["iterations"]))
        header.slots.append(
            Slot(str(number), kdf, key_size, key_size, offset, size, encryption, stripes, hash_spec)
        )
    if payload or device is not None:
        size = max(0, (reader.size if device is None else device) - payload) // SECTOR * SECTOR
        header.segments.append(Segment("0", 0, payload, size, encryption, SECTOR, 0))
    else:
        header.damage.say("elsewhere", DETACHED, 0)
    digest = Kdf("pbkdf2", head["mk_digest_salt"].tobytes(), hash_spec, int(head["mk_digest_iter"]))
    header.digests.append(
        Digest(tuple(slot.name for slot in header.slots), ("0",), digest, head["mk_digest"].tobytes())
    )
    return header


# ---- version 2 ---------------------------------------------------------------------------------------------


def _read_2(reader: Reader, device: int | None) -> Header:
    """The copy with the higher sequence number of those whose checksum is right."""
    found: list[tuple[int, int, int, np.void, dict[str, Any]]] = []
    damage = Damage()
    for at in (0, *SECONDARY_OFFSETS):
        if at and found and found[0][1] == 0 and at != found[0][2]:
            continue  # a good primary says where the secondary is
        magic = SECONDARY_MAGIC if at else LUKS_MAGIC
        if at + LUKS2.itemsize > reader.size or reader.read(at, 6) != magic:
            continue
        try:
            head, tree = _copy(reader, at)
            found.append((int(head["seqid"]), at, int(head["hdr_size"]), head, tree))
        except Corrupt as error:
            damage.say("copy-differs", str(error), at)
    if not found:
        raise Corrupt("neither copy of the LUKS2 header has a right checksum", 0, "superblock")
    _, _, size, head, tree = max(found, key=lambda copy: (copy[0], -copy[1]))
    if len(found) == 1 and not damage.problems():
        damage.say("copy-missing", "the second copy of the LUKS2 header is missing", size)
    header = Header(2, _text(head["uuid"]), _text(head["label"]), [], [], [], [], damage=damage)
    try:
        _fill(header, tree, size, reader.size)
        _add_segments(header, tree, reader.size if device is None else device)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(
            f"the LUKS2 metadata is incomplete or wrong: {error!r}", LUKS2.itemsize, "superblock"
        ) from error
    if device is None and any(segment.offset < 2 * size for segment in header.segments):
        header.segments.clear()
        header.damage.say("elsewhere", DETACHED, 0)
    return header


def _copy(reader: Reader, at: int) -> tuple[np.void, dict[str, Any]]:
    """One copy of the header: its binary part and its JSON. Raises Corrupt."""
    head = record(reader.read(at, LUKS2.itemsize), LUKS2)
    size = int(head["hdr_size"])
    if not LUKS2.itemsize < size <= MAX_HEADER or at + size > reader.size or int(head["hdr_offset"]) != at:
        raise Corrupt(
            f"the LUKS2 header at byte {at:#x} says it has {size} bytes at {int(head['hdr_offset']):#x}",
            at,
            "superblock",
        )
    data = reader.read(at, size)
    try:
        checksum = hashlib.new(_text(head["csum_alg"]), data[:0x1C0] + bytes(64) + data[0x200:]).digest()
    except (ValueError, TypeError) as error:
        raise Corrupt(
            f"the LUKS2 header at byte {at:#x} has a checksum of unknown kind", at, "superblock"
        ) from error
    if checksum != head["csum"].tobytes()[: len(checksum)]:
        raise Corrupt(f"the checksum of the LUKS2 header at byte {at:#x} is wrong", at, "superblock")
    try:
        tree = json.loads(data[LUKS2.itemsize :].split(b"\0", 1)[0])
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"the LUKS2 header at byte {at:#x} holds no JSON", at, "superblock") from error
    if not isinstance(tree, dict):
        raise Corrupt(f"the LUKS2 header at byte {at:#x} holds no JSON object", at, "superblock")
    return head, tree


def _fill(header: Header, tree: dict[str, Any], size: int, device: int) -> None:
    """Slots, digests and areas of the JSON.

    KeyError, TypeError or ValueError where it is not as it should be.
    """
    header.areas += [("LUKS2 header", 0, size), ("LUKS2 header copy", size, size)]
    reserved = 2 * size, 2 * size + _number(tree["config"]["keyslots_size"])
    for name, slot in sorted(tree.get("keyslots", {}).items()):
        area = slot["area"]
        offset, length = _number(area["offset"]), _number(area["size"])
        if offset < reserved[0] or offset + length > device:
            header.damage.say(
                "unsupported",
                f"key slot {name} at {offset:#x}+{length:#x} lies outside the key slots' area",
                severity=ERROR,
            )
            continue
        header.areas.append((f"LUKS2 key slot {name}", offset, length))
        if slot["type"] != "luks2":
            header.damage.say(
                "unsupported", f"slot {name} of type {slot['type']!r} holds no key", offset, severity=NOTE
            )
            continue
        header.slots.append(Slot(
            name, _kdf(slot["kdf"]), _number(slot["key_size"], MAX_KEY, 1),
            _number(area["key_size"], MAX_KEY, 1), offset, length, str(area["encryption"]),
            _number(slot["af"]["stripes"], MAX_STRIPES, 1), str(slot["af"]["hash"]),
        ))  # fmt: skip
    header.free.append((reserved[0], max(0, min(reserved[1], device) - reserved[0])))
    for digest in tree.get("digests", {}).values():
        kdf = Kdf(
            str(digest["type"]),
            base64.b64decode(digest["salt"]),
            str(digest["hash"]),
            _number(digest["iterations"]),
        )
        header.digests.append(
            Digest(
                _names(digest["keyslots"]),
                _names(digest["segments"]),
                kdf,
                base64.b64decode(digest["digest"]),
            )
        )
    if mandatory := [str(word) for word in tree["config"].get("requirements", {}).get("mandatory", [])]:
        words = ", ".join(mandatory)
        header.damage.say(
            "unsupported", f"the device requires features that are not supported: {words}", severity=NOTE
        )


def _add_segments(header: Header, tree: dict[str, Any], device: int) -> None:
    """Segments one after the other.

    Those with a `backup` flag describe a reencryption's start and end, not what is there now.
    """
    start = 0
    named = sorted(tree.get("segments", {}).items(), key=lambda item: int(item[0]))
    for name, segment in named:
        flags = [str(flag) for flag in segment.get("flags", [])]
        if any(flag.startswith("backup") for flag in flags):
            continue
        offset, dynamic = _number(segment["offset"]), segment["size"] == "dynamic"
        sector = _number(segment.get("sector_size", SECTOR), 4096)
        if (
            segment["type"] not in ("crypt", "linear")
            or sector not in (512, 1024, 2048, 4096)
            or "integrity" in segment
        ):
            raise Unsupported(
                f"LUKS2 segment {name} of type {segment['type']!r}, or with integrity, is not supported",
            )
        size = (max(0, device - offset) if dynamic else _number(segment["size"])) // sector * sector
        if offset + size > device:
            header.damage.say(
                "truncated", f"segment {name} ends at {offset + size:#x}, beyond the device's end"
            )
            size = max(0, device - offset) // sector * sector
        if "in-reencryption" in flags:
            detail = (
                "the device is being reencrypted; the zone that was being written when it stopped may be torn"
            )
            header.damage.say("half-done", detail, offset)
        cipher = str(segment["encryption"]) if segment["type"] == "crypt" else None
        header.segments.append(
            Segment(name, start, offset, size, cipher, sector, _number(segment.get("iv_tweak", 0)))
        )
        start += size


def _kdf(kdf: dict[str, Any]) -> Kdf:
    salt = base64.b64decode(kdf["salt"])
    if kdf["type"] == "pbkdf2":
        return Kdf("pbkdf2", salt, str(kdf["hash"]), _number(kdf["iterations"]))
    return Kdf(
        str(kdf["type"]),
        salt,
        time=_number(kdf["time"]),
        memory=_number(kdf["memory"]),
        cpus=_number(kdf["cpus"]),
    )


def _names(values: list[object]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _number(value: object, limit: int = INT64_MAX, least: int = 0) -> int:
    """A number of the JSON, which writes 64 bit ones as strings."""
    number = int(str(value))
    if not least <= number <= limit:
        raise ValueError(f"{number} is not between {least} and {limit}")
    return number


def _text(raw: bytes) -> str:
    return bytes(raw).split(b"\0", 1)[0].decode(errors="backslashreplace")
