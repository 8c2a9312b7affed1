"""The $MFT: found, read in batches, and followed wherever its own run list leads.

Its later pieces lie in extension records that the pieces before them reach (or Windows could not start
either), so the table is read from its start while what was read says where it goes on. Its attribute list
says nothing else and is not needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from virt_bmap.core.arrays import Bytes, ints, scatter
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.core.threads import ahead
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.extents import AttributeStream, RunLists, decode
from virt_bmap.formats.filesystems.ntfs.records import (  # fmt: skip
    Attributes,
    Batch,
    Buffer,
    FileNames,
    Records,
    attributes,
    concat,
    parse,
    undo_update_sequence,
)
from virt_bmap.formats.filesystems.ntfs.superblock import Geometry
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR

BATCH = 16 << 20
"""Bytes of the $MFT read at a time: few round trips, in bounded memory."""
PIECE = 4 << 20
"""Bytes of a batch that are looked into together: what is made of them stays in the processor's cache."""


@dataclass
class Mft:
    """All records, what they hold, and where in the volume the table itself lies.

    `system` are the first records, made whole.
    """

    stream: AttributeStream
    records: Records
    attributes: Attributes
    names: FileNames
    system: Buffer

    def __len__(self) -> int:
        return len(self.records.usable)


def read_mft(reader: Reader, geometry: Geometry, damage: Damage) -> Mft:
    """Read the whole $MFT. Corrupt where neither its first record nor the mirror's says where it lies."""
    size = geometry.record_size
    first, mirror = first_records(reader, geometry, damage)
    own, replaced = own_list(parse(first[:size], 0, size)), None
    if mirror is not None and not begins(own) and begins(copy := own_list(parse(mirror[:size], 0, size))):
        replaced, own = mirror[:size], copy  # whole as a record, but its run list is lost
        damage.say(
            "copy-used",
            "record 0 of the $MFT does not say where the $MFT lies; its copy in $MFTMirr was read",
            geometry.mft,
            ERROR,
        )
    pieces = [decoded(own, geometry)]
    length = int(own.initialized_size[own.lowest_vcn == 0].max(initial=0))
    afford(reader, length, "the $MFT")
    batches: list[Batch] = []
    held = np.empty(PIECE + 128, np.uint8)
    at, before = 0, -1
    while at != before:  # what was read may say where the table goes on
        stream, before = stream_of(pieces, geometry, reader.size), at
        for start, data in ahead(partial(_read, reader, stream), _spans(stream, at, length, size)):
            if start == 0:
                data = data if replaced is None else np.concatenate([replaced, data[size:]])
                data = repair(data, mirror, geometry, damage)
                system = prepared(data[: ntfs.FIRST_USER * size], size)
            for piece in range(0, len(data), PIECE):
                batches.append(parse(data[piece : piece + PIECE], (start + piece) // size, size, held))
                if len(own := own_list(batches[-1])):
                    pieces.append(decoded(own, geometry))
            at = start + len(data)
    if not batches:
        raise Corrupt(
            f"record 0 of the $MFT at byte {geometry.mft:#x} has "
            "no $DATA that begins at VCN 0 and holds a record",
            geometry.mft,
        )
    if at < length - size:
        damage.say(
            "inode",
            f"only {at:,} of the {length:,} bytes of the $MFT could be found: the rest is not read",
            geometry.mft,
        )
    return Mft(
        stream, concat([b.records for b in batches]), concat([b.attributes for b in batches]),
        concat([b.names for b in batches]), system,
    )  # fmt: skip


def _spans(stream: AttributeStream, at: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """What is known of the $MFT from `at` on, in pieces of whole records."""
    known = min(stream.contiguous(at), length)
    while at + size <= known:
        end = min(known, at + (BATCH if stream.ascends(at, BATCH) else PIECE))
        end -= (end - at) % size
        yield at, end
        at = end


def _read(reader: Reader, stream: AttributeStream, span: tuple[int, int]) -> tuple[int, Bytes]:
    return span[0], read_stream(reader, stream, *span)


def read_stream(reader: Reader, stream: AttributeStream, start: int, end: int) -> Bytes:
    """Bytes [start, end) of a stream; zeroes where it has holes.

    Pieces are asked for in the order in which they lie in the volume.
    """
    _, at, places, lengths = stream.place(ints(start), ints(end - start))
    order = np.argsort(places, kind="stable")
    data = reader.read_ranges(places[order], lengths[order])
    if len(data) == end - start and (np.diff(order) > 0).all():
        return data
    result = np.empty(end - start, np.uint8)
    if len(data) < len(result):
        result[:] = 0
    scatter(result, (at - start)[order], lengths[order], data)
    return result


def first_records(reader: Reader, geometry: Geometry, damage: Damage) -> tuple[Bytes, Bytes | None]:
    """(the first four records, their copies in $MFTMirr or None where these lie outside)."""
    size = ntfs.MIRRORED * geometry.record_size
    inside = 0 < geometry.mirror <= reader.size - size
    places = ints([geometry.mft, geometry.mirror] if inside else [geometry.mft])
    data = reader.read_blocks(places, size)
    if not inside:
        damage.say(
            "copy-differs", f"mftmirr_lcn leads to byte {geometry.mirror:#x}, outside the volume", 0x38
        )
    first = repair(data[0], data[1] if inside else None, geometry, Damage())
    if not whole(first, geometry.record_size)[0]:
        raise Corrupt(
            f"the first record of the $MFT at byte {geometry.mft:#x} has the signature "
            f"{first[:4].tobytes()!r} or a wrong update sequence, and so has its copy in $MFTMirr",
            geometry.mft,
        )
    return first, data[1] if inside else None


def repair(data: Bytes, mirror: Bytes | None, geometry: Geometry, damage: Damage) -> Bytes:
    """The records of `data`, the first four taken from the mirror where only that one is whole."""
    size = geometry.record_size
    if mirror is None:
        return data
    count = min(len(data), len(mirror)) // size
    here, there = whole(data[: count * size], size), whole(mirror[: count * size], size)
    rows, copies = data[: count * size].reshape(count, size), mirror[: count * size].reshape(count, size)
    lost = np.flatnonzero(~here & there)
    differs = np.flatnonzero(here & (~there | (rows != copies).any(axis=1)))
    if len(lost):
        data = data.copy()
        data[: count * size].reshape(count, size)[lost] = copies[lost]
        words = ", ".join(map(str, lost.tolist()))
        damage.say(
            "copy-used",
            f"records {words} of the $MFT are damaged; their copies in $MFTMirr were read",
            geometry.mft,
            ERROR,
        )
    if len(differs):
        words = ", ".join(map(str, differs.tolist()))
        damage.say("copy-differs", f"$MFTMirr differs from the $MFT in records {words}", geometry.mirror)
    return data


def whole(data: Bytes, size: int) -> np.ndarray:
    """Which of these records are good."""
    buffer = Buffer(data, size)
    return undo_update_sequence(buffer, records(buffer.records, ntfs.MFT_RECORD))[0]


def prepared(data: Bytes, size: int) -> Buffer:
    """Records with their update sequences undone, to look into."""
    buffer = Buffer(data, size)
    undo_update_sequence(buffer, records(buffer.records, ntfs.MFT_RECORD))
    return buffer


def resident_value(buffer: Buffer, number: int, kind: int) -> bytes:
    """The value of a record's first resident attribute of a type; nothing where there is none."""
    if number >= buffer.count:
        return b""
    heads = records(buffer.records, ntfs.MFT_RECORD)
    _, at, _ = attributes(buffer, heads, ints(number)[heads["magic"][[number]] == ntfs.MAGIC_FILE])
    header = buffer.window(at, ntfs.ATTR_HEADER)
    for place in np.flatnonzero((header["type"] == kind) & (header["non_resident"] == 0))[:1]:
        start = int(at[place]) + int(header["value_offset"][place])
        return buffer.bytes[
            start : min(start + int(header["value_length"][place]), (number + 1) * buffer.size)
        ].tobytes()
    return b""


def own_list(batch: Batch) -> Attributes:
    """The pieces of the $MFT's own unnamed $DATA that this batch holds, in record 0 or in its extension
    records."""
    found, record = batch.attributes, batch.records
    rows = np.flatnonzero((found.type == ntfs.DATA) & (found.value < 0) & (found.name.lengths == 0))
    number = found.record[rows]
    base = record.base[number - batch.first]
    own = (number == ntfs.MFT) | ((base != 0) & (base & ntfs.REFERENCE == ntfs.MFT))
    return found.take(rows[own & record.in_use[number - batch.first]])


def begins(own: Attributes) -> bool:
    """Is the first piece of the $MFT among these?"""
    return bool(((own.lowest_vcn == 0) & (own.initialized_size > 0)).any())


def decoded(found: Attributes, geometry: Geometry) -> RunLists:
    """The runs of these attributes, up to the first fault of each."""
    return decode(
        found.pairs.data, found.pairs.lengths, found.lowest_vcn, geometry.clusters, geometry.cluster_size
    ).runs


def stream_of(pieces: list[RunLists], geometry: Geometry, size: int) -> AttributeStream:
    """All pieces as one stream."""
    joined = RunLists(
        *(
            np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("row", "vcn", "lcn", "count")
        )
    )
    return AttributeStream.of(joined, geometry.cluster_size, size)
