"""LUKS 1 and 2: an encrypted volume, opened when a key is given.

Without a key the header and the key slots are named and the rest is one piece, `encrypted`. With one, the
volume /dev/mapper/luks-UUID appears and is looked into.

Sources: cryptsetup docs/on-disk-format-luks1 and -luks2; kernel drivers/md/dm-crypt.c.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.reader import BytesReader, Reader
from virt_bmap.formats.volumes.luks.header import (
    LUKS_MAGIC,
    SECONDARY_MAGIC,
    SECONDARY_OFFSETS,
    read_header,
)
from virt_bmap.formats.volumes.luks.opened import add_areas, open_volume
from virt_bmap.formats.volumes.luks.unlock import volume_keys
from virt_bmap.model.contract import Assembly, Checks, Docs, Member, VolumeFormat

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
        add_areas(about.extents, member, header)
    else:
        about.detail += ", detached header"
    if header.segments:
        secrets = member.keys.for_volume(member.name, header.uuid)
        keys, refused = volume_keys(source, header, secrets) if secrets else ({}, [])
        open_volume(
            assembly,
            member,
            header,
            keys,
            ("; ".join(refused) or "none of the given keys opens it") if secrets else "",
        )
    return assembly


FORMAT = VolumeFormat(
    NAME,
    probe,
    assemble,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the header's list of key slot areas",
)
