"""The rows of a LUKS device, and the volume that opens with a key."""

from functools import partial

from virt_bmap.core.arrays import complement, ints
from virt_bmap.core.errors import Unsupported
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.cipher import IV_SECTOR, DecryptedReader, Sectors, Window, WindowsReader
from virt_bmap.formats.volumes.luks.header import (
    Header,
    Segment,
)
from virt_bmap.model.contract import Assembly, Child, Member
from virt_bmap.model.tables import CONTENT, ENCRYPTED, FREE, METADATA, ExtentRows


def add_areas(rows: ExtentRows, member: Member, header: Header) -> None:
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


def open_volume(
    assembly: Assembly, member: Member, header: Header, keys: dict[str, bytes], failed: str
) -> None:
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
