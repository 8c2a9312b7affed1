"""LUKS 1 and 2: an encrypted volume, opened when a key is given.

Without a key the header and the key slots are named and the rest is one piece, `encrypted`. With one, the
volume /dev/mapper/luks-UUID appears and is looked into.

Sources: cryptsetup docs/on-disk-format-luks1 and -luks2; kernel drivers/md/dm-crypt.c.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from virt_bmap.core.arrays import complement, ints
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import BytesReader, Reader
from virt_bmap.formats.common.cipher import IV_SECTOR, DecryptedReader, Sectors, Window, WindowsReader
from virt_bmap.formats.volumes.luks.header import (
    LUKS_MAGIC,
    SECONDARY_MAGIC,
    SECONDARY_OFFSETS,
    Header,
    Segment,
    read_header,
)
from virt_bmap.formats.volumes.luks.unlock import volume_keys
from virt_bmap.model.contract import Assembly, Checks, Child, Docs, Member, VolumeFormat
from virt_bmap.model.tables import CONTENT, ENCRYPTED, FREE, METADATA, ExtentRows

NAME = "crypto_LUKS"
FEATURES = (
    "LUKS1 and LUKS2, both header copies",
    "AES in ECB, CBC (plain, plain64, ESSIV) and XTS with sectors of 512 to 4096 bytes",
    "PBKDF2 with any hash of OpenSSL, Argon2i and Argon2id",
    "segments of a reencryption, of which parts may be plain",
    "detached headers, given beside the disk",
)
REFUSED = (
    "other ciphers (Serpent, Twofish, Adiantum)",
    "authenticated encryption",
    "hardware encryption (OPAL)",
)
ORACLES = (
    "images that cryptsetup encrypted itself, in place",
    (
        "payloads encrypted a sector at a time by the modes of the package cryptography, with the key "
        "that cryptsetup tells"
    ),
    "cryptsetup luksDump",
)
CHECKS = Checks(
    checksums="both headers of LUKS2 (LUKS1 has none)",
    rules=("header: sizes, places of key slots and segments, both copies",),
    unchecked=("key slots that no key was given for",),
)


def probe(reader: Reader) -> bool:
    """The magic of the first header, or of a second one where the first is overwritten."""
    return reader.read_clipped(0, 6) == LUKS_MAGIC or (
        not any(reader.read_clipped(0, 6))
        and any(reader.read_clipped(at, 6) == SECONDARY_MAGIC for at in SECONDARY_OFFSETS[:4])
    )


def assemble(members: Sequence[Member]) -> Assembly:
    """The opened volume, where one of the member's keys fits."""
    (member,) = members
    assembly = Assembly(members)
    about = assembly.about(member)
    detached = member.keys.header_of(member.name)
    if detached is None:
        source, header = member.reader, read_header(member.reader)
    else:
        source = BytesReader(np.frombuffer(detached, np.uint8), f"the detached header of {member.name}")
        header = read_header(source, member.reader.size)
    about.uuid, about.label, about.damage = header.uuid, header.label or None, header.damage
    ciphers = dict.fromkeys(segment.cipher or "not encrypted" for segment in header.segments)
    about.detail = f"LUKS{header.version}, {', '.join(ciphers)}, {len(header.slots)} key slots"
    if detached is None:
        _add_areas(about.extents, member, header)
    else:
        about.detail += ", detached header"
    if header.segments:
        secrets = member.keys.for_volume(member.name, header.uuid)
        keys, refused = volume_keys(source, header, secrets) if secrets else ({}, [])
        _open(
            assembly,
            member,
            header,
            keys,
            ("; ".join(refused) or "none of the given keys opens it") if secrets else "",
        )
    return assembly


def _add_areas(rows: ExtentRows, member: Member, header: Header) -> None:
    """Rows of the headers and key slots; what is reserved for slots and not in use is free."""
    size = member.reader.size
    starts = ints([start for _, start, _ in header.areas])
    ends = ints([start + length for _, start, length in header.areas])
    for part, start, length in header.areas:
        rows.add(METADATA, start, max(0, min(length, size - start)), part=part)
    payload = min((segment.offset for segment in header.segments), default=size)
    for start, length in header.free:
        low, high = complement(starts, ends, start, min(start + length, payload, size))
        rows.add(FREE, low, high - low)


def _open(assembly: Assembly, member: Member, header: Header, keys: dict[str, bytes], failed: str) -> None:
    """Add the opened volume; without its keys the ciphertext is one piece, and `failed` says why none of
    those tried fits."""
    about = assembly.about(member)
    try:
        parts = [(segment, _cipher(segment, keys)) for segment in header.segments]
    except Unsupported as error:
        about.damage.refuse(error)
        parts = []
    if not parts or any(segment.cipher and cipher is None for segment, cipher in parts):
        if failed:
            slot = min((slot.offset for slot in header.slots), default=-1)
            where = (
                f" ({len(header.slots)} key slots, the first at byte {slot:#x})"
                if header.slots
                else " (there is no key slot)"
            )
            about.damage.say("no-key", failed + where, slot)
        for segment in header.segments:
            flags = ENCRYPTED if segment.cipher else 0
            about.extents.add(CONTENT, segment.offset, segment.size, part="encrypted", flags=flags)
        return
    rows = Rows.of([
        Row(segment.start, member.number, segment.offset, segment.size)
        for segment in header.segments
        if segment.size
    ])  # fmt: skip
    size = sum(segment.size for segment in header.segments)
    assembly.add(Child(
        "crypt", f"/dev/mapper/luks-{header.uuid}", size, rows, uuid=header.uuid, label=header.label or None,
        detail=", ".join(dict.fromkeys(segment.cipher or "not encrypted" for segment in header.segments)),
        open=partial(_reader, parts=parts),
    ))  # fmt: skip


def _cipher(segment: Segment, keys: dict[str, bytes]) -> Sectors | None:
    """What decrypts a segment; None where it is plain, or where its key is not known."""
    if segment.cipher is None or segment.name not in keys:
        return None
    return Sectors(segment.cipher, keys[segment.name], segment.sector)


def _reader(base: Reader, parts: list[tuple[Segment, Sectors | None]]) -> Reader:
    """One cipher over all, or, in the middle of a reencryption, several segments, each with a cipher of its
    own or none."""
    (segment, cipher), *more = parts
    if not more and cipher:
        return DecryptedReader(base, cipher, segment.tweak)
    # a cipher numbers sectors from its segment's start: with the start taken off the tweak, one reader over
    # all serves it
    return WindowsReader(base, [
        Window(segment.start, segment.start + segment.size,
               DecryptedReader(base, cipher, segment.tweak - segment.start // IV_SECTOR) if cipher else base)
        for segment, cipher in parts
    ])  # fmt: skip


FORMAT = VolumeFormat(
    NAME,
    probe,
    assemble,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the header's list of key slot areas",
)
