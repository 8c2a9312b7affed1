"""The rows of a BitLocker device, and the volume that opens with a key."""

from functools import partial

from virt_bmap.core.amounts import human
from virt_bmap.core.arrays import Int, complement, intersect, ints, subtract, total
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapping import Rows
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
from virt_bmap.formats.volumes.bitlocker.header import FVE_SIZE, PROTECTIONS, Header
from virt_bmap.model.contract import Assembly, Child, Member
from virt_bmap.model.tables import CONTENT, ENCRYPTED, METADATA, ExtentRows


def holders(header: Header) -> str:
    holders = ", ".join(
        PROTECTIONS.get(key.protection, f"protection {key.protection:#x}") for key in header.keys
    )
    return f"key held by {holders or 'nobody'}"


def _zones(header: Header) -> list[tuple[int, int]]:
    """[start, end) of what the volume does not show: the copies of the metadata, the place where its header
    is kept, and what a conversion keeps."""
    return [
        *((at, at + FVE_SIZE) for at in header.metadata),
        (header.header_offset, header.header_offset + header.header_size),
        *((zone.start, zone.start + zone.length) for zone in header.zones),
    ]


def add_metadata(rows: ExtentRows, header: Header) -> None:
    rows.add(METADATA, 0, header.header_size, part="BitLocker volume header")
    for number, at in enumerate(header.metadata, 1):
        rows.add(METADATA, at, FVE_SIZE, part=f"FVE metadata {number}")
    for part, start, length in header.zones:
        rows.add(METADATA, start, length, part=part)


def _rest(header: Header, end: int) -> tuple[Int, Int]:
    """The bytes that lie at their own places."""
    starts, ends = zip(*_zones(header), strict=True)
    return complement(ints(starts), ints(ends), header.header_size, end)


def name_ciphertext(rows: ExtentRows, header: Header, size: int) -> None:
    kept = ints(header.header_offset), ints(header.header_offset + header.header_size)
    for (low, high), what in ((kept, "volume header"), (_rest(header, size), "")):
        for (starts, ends), part, flags in (
            (intersect(low, high, *header.encrypted), f"encrypted {what}".rstrip(), ENCRYPTED),
            (subtract(low, high, *header.encrypted), what or "not encrypted yet", 0),
        ):
            rows.add(CONTENT, starts, ends - starts, part=part, flags=flags)


def cipher_of(header: Header, key: bytes) -> Decrypts:
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


def add_volume(assembly: Assembly, member: Member, header: Header, cipher: Decrypts | None) -> None:
    """The opened volume: its header lies elsewhere, its metadata nowhere, all else at its own place.

    None deciphers what is not encrypted.
    """
    size = member.reader.size // header.sector * header.sector
    low, high = _rest(header, size)
    rows = Rows.concat([
        Rows.make(0, member.number, header.header_offset, header.header_size),
        Rows.make(low, member.number, low, high - low),
    ])  # fmt: skip
    done = total(*header.encrypted)
    detail = header.cipher if done >= size else f"{header.cipher}, {human(done)} encrypted"
    assembly.add(Child(
        "crypt", f"/dev/mapper/bitlk-{header.guid}", size, rows, uuid=header.guid,
        detail=detail if cipher else "not encrypted",
        open=partial(_reader, header=header, cipher=cipher) if cipher else None, holes=[(0, size)],
    ))  # fmt: skip


def _reader(base: Reader, header: Header, cipher: Decrypts) -> Reader:
    """Sectors are numbered by where they lie: those of the header by where it is kept."""
    kept = DecryptedReader(base, cipher, header.header_offset // IV_SECTOR, header.encrypted)
    own = DecryptedReader(base, cipher, 0, header.encrypted)
    windows = [Window(0, header.header_size, kept)]
    windows += [
        Window(start, end, own)
        for start, end in zip(*(side.tolist() for side in _rest(header, base.size)), strict=True)
    ]
    return WindowsReader(base, windows)
