"""BitLocker: an encrypted Windows volume, opened when a password, recovery password or startup key is given.

Without one the metadata is named and the rest is one piece, `encrypted`. With one the volume
/dev/mapper/bitlk-GUID appears and is looked into. A volume on which protection is suspended has its key in
clear, and opens by itself.

Sources: libbde documentation "BitLocker Drive Encryption (BDE) format"; cryptsetup lib/bitlk/bitlk.c (which
bytes read as zeroes).
"""

from collections.abc import Sequence
from functools import partial

from virt_bmap.core.arrays import complement, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.cipher import (
    IV_SECTOR,
    DecryptedReader,
    Decrypts,
    Sectors,
    Window,
    WindowsReader,
)
from virt_bmap.formats.volumes.bitlocker.elephant import Elephant
from virt_bmap.formats.volumes.bitlocker.header import FVE_SIZE, PROTECTIONS, Header, identifier, read_header
from virt_bmap.formats.volumes.bitlocker.unlock import volume_key
from virt_bmap.model.contract import Assembly, Checks, Child, Docs, Member, VolumeFormat
from virt_bmap.model.problems import NOTE
from virt_bmap.model.tables import CONTENT, ENCRYPTED, METADATA, ExtentRows

NAME = "BitLocker"
FEATURES = (
    "Windows 7 and later, BitLocker To Go, sectors of 512 and 4096 bytes",
    "AES in XTS, CBC, and CBC with the Elephant diffuser",
    "passwords, recovery passwords, startup keys (.BEK), suspended protection (clear key)",
    "the volume header that lies elsewhere, three copies of the metadata",
    "volumes in the middle of being encrypted or decrypted",
)
REFUSED = ("Windows Vista's format", "encrypt-on-write conversions", "keys in a TPM or on a smart card")
ORACLES = ("SHA-256 of the opened volumes of cryptsetup's test images", "cryptsetup bitlkDump")
CHECKS = Checks(
    checksums="CRC-32 of the copies of FVE metadata",
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
    about.detail = f"{header.cipher}, {_holders(header)}"
    _add_metadata(about.extents, header)
    secrets = member.keys.for_volume(member.name, header.guid)
    key = None if header.refused else volume_key(header, secrets)
    if key is None:
        if header.refused:
            header.damage.say("unsupported", header.refused, 0, severity=NOTE)
        elif secrets:
            header.damage.say(
                "no-key",
                f"none of the given keys opens it ({_holders(header)}; FVE metadata at byte "
                f"{header.metadata[0]:#x})",
                header.metadata[0],
            )
        _name_ciphertext(about.extents, header, member.reader.size)
    else:
        _add_volume(assembly, member, header, _cipher(header, key))
    return assembly


def _holders(header: Header) -> str:
    holders = ", ".join(
        PROTECTIONS.get(key.protection, f"protection {key.protection:#x}") for key in header.keys
    )
    return f"key held by {holders or 'nobody'}"


def _zones(header: Header) -> list[tuple[int, int]]:
    """[start, end) of what the volume does not show: the copies of the metadata and the place where its
    header is kept."""
    return [(at, at + FVE_SIZE) for at in header.metadata] + [
        (header.header_offset, header.header_offset + header.header_size)
    ]


def _add_metadata(rows: ExtentRows, header: Header) -> None:
    rows.add(METADATA, 0, header.header_size, part="BitLocker volume header")
    for number, at in enumerate(header.metadata, 1):
        rows.add(METADATA, at, FVE_SIZE, part=f"FVE metadata {number}")


def _rest(header: Header, end: int) -> list[tuple[int, int]]:
    """[start, end) of the bytes that lie at their own places."""
    starts, ends = zip(*_zones(header), strict=True)
    found = complement(ints(starts), ints(ends), header.header_size, end)
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


def _name_ciphertext(rows: ExtentRows, header: Header, size: int) -> None:
    rows.add(
        CONTENT, header.header_offset, header.header_size, part="encrypted volume header", flags=ENCRYPTED
    )
    for start, end in _rest(header, size):
        if start < header.encrypted:
            rows.add(CONTENT, start, min(end, header.encrypted) - start, part="encrypted", flags=ENCRYPTED)
        if end > header.encrypted:
            rows.add(
                CONTENT,
                max(start, header.encrypted),
                end - max(start, header.encrypted),
                part="not encrypted yet",
            )


def _cipher(header: Header, key: bytes) -> Decrypts:
    """What decrypts the volume. Raises Corrupt where the key is shorter than its cipher needs."""
    if len(key) < (64 if header.cipher == "aes-cbc-elephant" else header.key_size):
        raise Corrupt(
            f"the volume key has {len(key)} bytes, too few for {header.cipher}",
            header.metadata[0],
            "superblock",
        )
    if header.cipher == "aes-cbc-elephant":
        return Elephant(key, header.key_size, header.sector)
    return Sectors(header.cipher, key[: header.key_size], header.sector, large_iv=True)


def _add_volume(assembly: Assembly, member: Member, header: Header, cipher: Decrypts) -> None:
    """The opened volume: its header lies elsewhere, its metadata nowhere, all else at its own place."""
    size = member.reader.size // header.sector * header.sector
    rows = [Row(0, member.number, header.header_offset, header.header_size)]
    rows += [Row(start, member.number, start, end - start) for start, end in _rest(header, size)]
    detail = (
        header.cipher
        if header.encrypted == size
        else f"{header.cipher}, encrypted up to byte {header.encrypted:#x}"
    )
    assembly.add(Child(
        "crypt", f"/dev/mapper/bitlk-{header.guid}", size, Rows.of(rows), uuid=header.guid, detail=detail,
        open=partial(_reader, header=header, cipher=cipher), holes=[(0, size)],
    ))  # fmt: skip


def _reader(base: Reader, header: Header, cipher: Decrypts) -> Reader:
    """Sectors are numbered by where they lie: those of the header by where it is kept."""
    kept = DecryptedReader(base, cipher, header.header_offset // IV_SECTOR)
    own = DecryptedReader(base, cipher, 0)
    windows = [Window(0, header.header_size, kept)]
    for start, end in _rest(header, base.size):
        windows.append(Window(start, min(end, header.encrypted), own))
        windows.append(Window(max(start, header.encrypted), end, base))
    return WindowsReader(base, windows)


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS)
