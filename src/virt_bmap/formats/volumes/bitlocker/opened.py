"""The rows of a BitLocker device, and the volume that opens with a key."""

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
from virt_bmap.formats.volumes.bitlocker.header import FVE_SIZE, PROTECTIONS, Header
from virt_bmap.model.contract import Assembly, Child, Member
from virt_bmap.model.tables import CONTENT, ENCRYPTED, METADATA, ExtentRows


def holders(header: Header) -> str:
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


def add_metadata(rows: ExtentRows, header: Header) -> None:
    rows.add(METADATA, 0, header.header_size, part="BitLocker volume header")
    for number, at in enumerate(header.metadata, 1):
        rows.add(METADATA, at, FVE_SIZE, part=f"FVE metadata {number}")


def _rest(header: Header, end: int) -> list[tuple[int, int]]:
    """[start, end) of the bytes that lie at their own places."""
    starts, ends = zip(*_zones(header), strict=True)
    found = complement(ints(starts), ints(ends), header.header_size, end)
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


def name_ciphertext(rows: ExtentRows, header: Header, size: int) -> None:
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


def add_volume(assembly: Assembly, member: Member, header: Header, cipher: Decrypts) -> None:
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
