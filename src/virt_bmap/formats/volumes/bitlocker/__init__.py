"""BitLocker: an encrypted Windows volume, opened when a password, recovery password or startup key is given.

Without one the metadata is named and the rest is one piece, `encrypted`. With one the volume
/dev/mapper/bitlk-GUID appears and is looked into. A volume on which protection is suspended has its key in
clear, and opens by itself.

Sources: libbde documentation "BitLocker Drive Encryption (BDE) format"; cryptsetup lib/bitlk/bitlk.c (which
bytes read as zeroes).
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes.bitlocker.header import identifier, read_header
from virt_bmap.formats.volumes.bitlocker.opened import (
    add_metadata,
    add_volume,
    cipher_of,
    holders,
    name_ciphertext,
)
from virt_bmap.formats.volumes.bitlocker.unlock import volume_key
from virt_bmap.model.contract import Assembly, Checks, Docs, Member, VolumeFormat

NAME = "BitLocker"
FEATURES = (
    "Windows 7 and later, BitLocker To Go, sectors of 512 and 4096 bytes",
    "AES in XTS, CBC, and CBC with the Elephant diffuser",
    "passwords, recovery passwords, startup keys (.BEK), suspended protection (clear key)",
    "the volume header that lies elsewhere, three copies of the metadata",
    "volumes in the middle of being encrypted or decrypted, paused ones, decrypted ones that kept metadata",
    "encrypt-on-write (Windows 10 and later): bitmaps of what is encrypted",
)
REFUSED = (
    "Windows Vista's format",
    "keys in a TPM or on a smart card",
    "the logs of conversions that were interrupted (said)",
)
ORACLES = (
    "SHA-256 of the opened volumes of cryptsetup's test images",
    "cryptsetup bitlkDump",
    "libbde and dissect.fve on volumes that Windows left decrypted, paused, half encrypted on write",
)
CHECKS = Checks(
    checksums="CRC-32 of the copies of FVE metadata, of the encrypt-on-write information and its bitmaps",
    rules=("FVE metadata: sizes, versions, key protectors",),
    unchecked=("the content that is not opened",),
)


def probe(reader: Reader) -> bool:
    """A boot sector of BitLocker."""
    return identifier(reader.read_clipped(0, 512)) is not None


def assemble(members: Sequence[Member]) -> Assembly:
    """The opened volume, where one of the member's keys fits."""
    (member,) = members
    assembly = Assembly(members)
    about = assembly.about(member)
    header = read_header(member.reader)
    about.uuid, about.damage = header.guid, header.damage
    about.detail = f"{header.cipher}, {holders(header)}"
    add_metadata(about.extents, header)
    if header.is_plain:
        add_volume(assembly, member, header, None)
        return assembly
    secrets = member.keys.for_volume(member.name, header.guid)
    key = None if header.refused else volume_key(header, secrets)
    if key is None:
        if header.refused:
            header.damage.refuse(header.refused)
        elif secrets:
            header.damage.say(
                "no-key",
                f"none of the given keys opens it ({holders(header)}; FVE metadata at byte "
                f"{header.metadata[0]:#x})",
                header.metadata[0],
            )
        name_ciphertext(about.extents, header, member.reader.size)
    else:
        add_volume(assembly, member, header, cipher_of(header, key))
    return assembly


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS)
