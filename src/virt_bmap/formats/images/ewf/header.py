"""What an image says of its disk, and of the case: sizes, who made it and when, hashes, sectors that could
not be read.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "Volume section", "Header section",
"Header2 section", "Hash section", "Digest section", "Error2 section", "Session section".
"""

import re
import uuid
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import EMPTY, Int, union
from virt_bmap.core.codecs import zlibbed
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, records, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.ondisk import (
    AUDIO,
    CHECKSUM,
    DIGEST,
    ERROR,
    ERRORS,
    FASTBLOC,
    HASH,
    LEVELS,
    LOGICAL,
    LONG_VOLUME,
    MAX_CHUNK,
    MAX_SIZE,
    MAX_TEXT,
    MEDIA,
    PHYSICAL,
    SESSION,
    SESSIONS,
    SHORT_VOLUME,
    TABLEAU,
    VOLUME,
)
from virt_bmap.formats.images.ewf.sections import FileSection, SegmentFile
from virt_bmap.model.damage import Damage

VALUES = {
    "a": "description", "c": "case_number", "n": "evidence_number", "e": "examiner", "t": "notes",
    "md": "model", "sn": "serial_number", "l": "device_label", "av": "software_version",
    "ov": "operating_system", "m": "acquired", "u": "system_date",
}  # fmt: skip
"""Identifiers of values about the case, in words; of a password there is only a hash."""
HASHES = ("md5", "sha1")
TIMES = ("acquired", "system_date")
DATE = re.compile(r"\d{1,4}( \d{1,2}){5}")


class Volume(NamedTuple):
    """What the volume section says of the disk: `size` and `chunk` in bytes; 0 sectors where it was never
    filled in."""

    chunk: int
    sector: int
    size: int
    chunks: int
    identifier: bytes
    media: int
    flags: int
    level: int

    def facts(self) -> dict[str, Any]:
        """For people and JSON."""
        blockers = ((FASTBLOC, "FastBloc"), (TABLEAU, "Tableau"))
        return {
            "sector_size": self.sector,
            "set_identifier": str(uuid.UUID(bytes_le=self.identifier)) if any(self.identifier) else None,
            "media": MEDIA.get(self.media, f"type {self.media}"),
            "physical": bool(self.flags & PHYSICAL),
            "write_blocker": next((name for bit, name in blockers if self.flags & bit), None),
            "compression": LEVELS.get(self.level, f"level {self.level}"),
        }


class Kept(NamedTuple):
    """What the image remembers of its making: hashes of the disk by their names, sectors that could not be
    read, as ranges of bytes, and an optical disc's sessions."""

    hashes: dict[str, bytes]
    unread: tuple[Int, Int]
    sessions: list[dict[str, Any]]


def read_volume(image: Reader, segment: SegmentFile, damage: Damage) -> Volume:
    """The volume section of the first segment, or else its copy. Raises Corrupt or Unsupported."""
    found = segment.of("volume", "disk", "data")
    if not found:
        why = segment.problems[0].detail if segment.problems else "it was never finished"
        raise Corrupt(f"{image.name}: has no volume section, which says how large the disk is: {why}")
    good = [section for section in found if _is_sealed(image, section)]
    if found[0] not in good:
        damage.add("checksum", "volume section [has|have] a wrong checksum", found[0].start)
    section = (good or found)[0]
    head = record(image.read_clipped(section.start, VOLUME.itemsize), VOLUME)
    sectors, sector = int(head["sectors_per_chunk"]), int(head["bytes_per_sector"])
    count, chunk = int(head["sector_count"]), sectors * sector
    if int(head["media_type"]) == LOGICAL:
        raise Unsupported(f"{image.name}: holds single files (logical evidence), and no disk", section.start)
    if not 0 < chunk <= MAX_CHUNK or sector % 512 or count > MAX_SIZE // sector:
        raise Corrupt(
            f"{image.name}: its volume section at byte {section.start:#x} says "
            f"{plural(count, 'sector')} of {sector:,} bytes, {sectors:,} a chunk",
            section.start,
        )
    return Volume(
        chunk, sector, count * sector, int(head["chunk_count"]), head["set_identifier"].tobytes(),
        int(head["media_type"]), int(head["media_flags"]), int(head["compression_level"]),
    )  # fmt: skip


def identifier_of(image: Reader, segment: SegmentFile) -> bytes:
    """To which set a segment belongs, as its volume section or the copy of it says; zeroes: nothing does."""
    sections = [section for section in segment.of("volume", "disk", "data") if _is_sealed(image, section)]
    raw = image.read_clipped(sections[0].start, VOLUME.itemsize) if sections else bytes(VOLUME.itemsize)
    found: bytes = record(raw, VOLUME)["set_identifier"].tobytes()
    return found


def _is_sealed(image: Reader, section: FileSection) -> bool:
    """Has the volume section one of its two lengths, and its checksum? Some devices write none in copies."""
    length = section.end - section.start
    if length not in (LONG_VOLUME, SHORT_VOLUME):
        return False
    raw = image.read(section.start, length)
    return sealed(raw)


def sealed(raw: bytes) -> bool:
    """Do these bytes end with their Adler-32?"""
    body = raw[:-CHECKSUM]
    return len(raw) > CHECKSUM and zlib.adler32(body) == int.from_bytes(raw[-CHECKSUM:], "little")


def read_case(image: Reader, segment: SegmentFile, damage: Damage) -> dict[str, str]:
    """Who made the image of what, and when: the newest kind of header tells most."""
    for kind in ("header2", "header"):
        for section in segment.of(kind):
            data = image.read(section.start, min(section.end - section.start, MAX_TEXT))
            try:
                text = zlibbed(data, MAX_TEXT)
            except ValueError:
                damage.add(
                    "checksum", f"section {kind!r} can't be inflated", section.start, severity="warning"
                )
                continue
            if found := values(text):
                return found
    return {}


def values(text: bytes) -> dict[str, str]:
    """The values of the category `main`: a line of identifiers, then one of values, parted by tabs."""
    encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
    lines = text.decode(encoding, "replace").rstrip("\0").splitlines()
    if len(lines) < 4 or lines[1] != "main":
        return {}
    said = dict(zip(lines[2].split("\t"), lines[3].split("\t"), strict=False))
    found = {word: said[key].strip() for key, word in VALUES.items() if said.get(key, "").strip()}
    return {word: _time(value) if word in TIMES else value for word, value in found.items()}


def _time(value: str) -> str:
    """A date as numbers, in the time of an unknown place; or seconds since 1970."""
    try:
        if DATE.fullmatch(value):
            return datetime(*map(int, value.split())).isoformat(" ")  # type: ignore[arg-type]
        return datetime.fromtimestamp(int(value), UTC).isoformat(" ")
    except (ValueError, OverflowError, OSError):
        return value


def read_kept(image: Reader, segment: SegmentFile, volume: Volume, damage: Damage) -> Kept:
    """What the last segment has behind the tables."""
    hashes: dict[str, bytes] = {}
    for kind, record_type in (("hash", HASH), ("digest", DIGEST)):
        for section in segment.of(kind):
            raw = image.read_clipped(section.start, record_type.itemsize)
            if not sealed(raw):
                damage.add("checksum", f"section {kind!r} [has|have] a wrong checksum", section.start)
                continue
            head = record(raw, record_type)
            for name in HASHES:
                if name in (record_type.names or ()) and any(head[name].tobytes()):
                    hashes[name] = head[name].tobytes()
    errors = _listed(image, segment.of("error2"), ERRORS, ERROR, "entry_count", damage)
    start = widen(errors["first_sector"], "first sector") * volume.sector
    length = widen(errors["sector_count"], "number of sectors") * volume.sector
    unread = union(start, np.minimum(start + length, volume.size)) if len(start) else (EMPTY, EMPTY)
    sessions = _listed(image, segment.of("session"), SESSIONS, SESSION, "session_count", damage)
    return Kept(hashes, unread, [
        {"first_sector": int(one["first_sector"]), "audio": bool(one["flags"] & AUDIO)} for one in sessions
    ])  # fmt: skip


def _listed(
    image: Reader,
    sections: Sequence[FileSection],
    header: np.dtype[np.void],
    entry: np.dtype[np.void],
    count: str,
    damage: Damage,
) -> np.ndarray:
    """The entries of such sections, each a header, so many entries, and their checksum."""
    found = [np.zeros(0, entry)]
    for section in sections:
        head = image.read_clipped(section.start, header.itemsize)
        length = int(record(head, header)[count]) * entry.itemsize
        start = section.start + header.itemsize
        if not sealed(head) or start + length + CHECKSUM > section.end:
            damage.add("checksum", "[list|lists] of sectors [has|have] a damaged header", section.start)
            continue
        raw = image.read(start, length + CHECKSUM)
        if length and not sealed(raw):
            damage.add("checksum", "[list|lists] of sectors [has|have] a wrong checksum", section.start)
            continue
        found.append(records(raw[:length], entry))
    return np.concatenate(found)


def facts(
    files: Sequence[Reader], segments: Sequence[SegmentFile], volume: Volume, kept: Kept, damage: Damage
) -> dict[str, Any]:
    """What the image says, for people and JSON."""
    return {
        "version": 1,
        "segments": len(segments),
        **volume.facts(),
        "case": read_case(files[0], segments[0], damage),
        "hashes": {name: value.hex() for name, value in kept.hashes.items()},
        "sessions": kept.sessions,
    }
