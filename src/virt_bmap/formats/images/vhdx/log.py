"""The log of a VHDX file: changes of its metadata that may not be in place yet, carried out in memory.

The log is a ring of entries. What counts is the active sequence: entries that follow each other in place and
number, from the one that the last of them names as the tail.

Sources: Microsoft [MS-VHDX] v7.0 section 2.3 "Log"; QEMU block/vhdx-log.c.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.arrays import Bytes, Int, expand, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import records
from virt_bmap.core.mapped import Patch, PatchedReader
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.images.vhdx.header import Header, is_sound, read_header
from virt_bmap.formats.images.vhdx.ondisk import (
    DATA_SECTOR,
    DESCRIPTOR,
    ENTRY,
    LEADING,
    LOG_SECTOR,
    MAX_FILE,
    TRAILING,
)
from virt_bmap.model.damage import Damage

TOO_FAR = np.uint64(MAX_FILE + LOG_SECTOR)
"""For numbers that no file has: what is made of them stays in 64 bits, and is refused."""


class LogEntry(NamedTuple):
    """A valid entry: its `sectors` in the ring from sector `at` on, and what it writes, in order: `length`
    bytes at `offset`, of `blocks`[`block`], or zeroes where that is -1."""

    at: int
    sectors: int
    number: int
    tail: int
    flushed: int
    end: int
    offset: Int
    length: Int
    block: Int
    blocks: Bytes


class Replayed(PatchedReader):
    """A file whose log is carried out; it had so many `entries`."""

    def __init__(self, image: Reader, patch: Patch, size: int, entries: int) -> None:
        super().__init__(image, patch, size)
        self.sectors, self.entries = len(patch.offsets), entries


def replayed(image: Reader) -> Reader:
    """The file as it is when its log is carried out; the same reader where there is nothing to do.

    Raises Corrupt where that can't be done.
    """
    head = read_header(image)
    if not head.log_in_use:
        return image
    offset, length = head.log
    if length % LOG_SECTOR or head.log_version:
        raise Corrupt(
            f"{image.name}: its VHDX log has {length:,} bytes and is of version {head.log_version}; there "
            f"are whole sectors of {LOG_SECTOR:,} bytes and version 0",
            offset,
        )
    ring = image.read_ranges(ints(offset), ints(length)).reshape(-1, LOG_SECTOR)
    sequence = active_sequence(valid_entries(ring, head.log_guid), len(ring))
    if not sequence:
        return image
    flushed = max(entry.flushed for entry in sequence)
    if flushed > image.size:
        raise Corrupt(
            f"{image.name}: has {image.size:,} bytes, but had {flushed:,} when its log was written: its end "
            "is missing",
            offset,
            "truncated",
        )
    patch, end = _patch(image, sequence, offset)
    return Replayed(image, patch, max(image.size, end), len(sequence))


def say_replayed(image: Reader, head: Header, damage: Damage) -> None:
    """What became of the log."""
    if isinstance(image, Replayed):
        words = (
            f"the log has changes that are not in place yet: {plural(image.sectors, 'sector')} of "
            f"{LOG_SECTOR:,} bytes from {counted(image.entries, '[entry|entries]')}, replayed in memory"
        )
        damage.say("journal-replayed", words, head.log[0])
    elif head.log_in_use:
        damage.say(
            "not-replayed",
            "the log is said to be in use, but holds no whole sequence of entries: the file is shown as it "
            "lies there",
            head.log[0],
        )


def valid_entries(ring: Bytes, guid: bytes) -> list[LogEntry]:
    """The entries of this log, in the order of the ring, whose checksum and sequence numbers hold.

    No sector within an entry begins like one, so that entries share no sectors.
    """
    starts = np.flatnonzero((ring[:, :4] == np.frombuffer(b"loge", np.uint8)).all(axis=1))
    heads = records(ring[starts, : ENTRY.itemsize], ENTRY)
    room = np.diff(np.append(starts, starts[:1] + len(ring)))
    length = heads["EntryLength"].astype(np.int64)
    good = (length % LOG_SECTOR == 0) & (length > 0) & (length <= room * LOG_SECTOR)
    good &= ENTRY.itemsize + DESCRIPTOR.itemsize * heads["DescriptorCount"].astype(np.int64) <= length
    good &= (heads["LogGuid"] == np.void(guid)) & (heads["SequenceNumber"] > 0)
    found = []
    for row in np.flatnonzero(good).tolist():
        at, sectors = int(starts[row]), int(length[row]) // LOG_SECTOR
        entry = _entry(heads[row], at, ring[(at + np.arange(sectors)) % len(ring)])
        found += [entry] if entry else []
    return found


def _entry(head: np.void, at: int, raw: Bytes) -> LogEntry | None:
    """The entry in these sectors, if it is valid."""
    flat, count = raw.reshape(-1), int(head["DescriptorCount"])
    if not is_sound(flat.tobytes()):
        return None
    end = ENTRY.itemsize + DESCRIPTOR.itemsize * count
    descriptors = records(flat[ENTRY.itemsize : end], DESCRIPTOR)
    is_data, is_zero = descriptors["Signature"] == b"desc", descriptors["Signature"] == b"zero"
    first = -(-end // LOG_SECTOR)
    blocks = raw[first : first + int(is_data.sum())]
    data, number = records(blocks, DATA_SECTOR), int(head["SequenceNumber"])
    offset, zeroes = (
        np.minimum(descriptors[name], TOO_FAR).astype(np.int64) for name in ("FileOffset", "ZeroLength")
    )
    length = np.where(is_data, LOG_SECTOR, zeroes)
    valid = (
        (is_data | is_zero).all()
        and (descriptors["SequenceNumber"] == number).all()
        and not ((offset | length) % LOG_SECTOR).any()
        and len(blocks) == is_data.sum()
        and (data["Signature"] == b"data").all()
        and (data["SequenceHigh"] == number >> 32).all()
        and (data["SequenceLow"] == number & 0xFFFFFFFF).all()
    )
    if not valid:
        return None
    held = flat[ENTRY.itemsize : end].reshape(-1, DESCRIPTOR.itemsize)[is_data]
    blocks = np.concatenate([held[:, LEADING], blocks[:, 8:-4], held[:, TRAILING]], axis=1)
    tail, rest = divmod(int(head["Tail"]), LOG_SECTOR)
    return LogEntry(
        at, len(raw), number, -1 if rest else tail, int(head["FlushedFileOffset"]),
        int(head["LastFileOffset"]), offset, length, np.where(is_data, np.cumsum(is_data) - 1, -1), blocks,
    )  # fmt: skip


def active_sequence(entries: Sequence[LogEntry], ring: int) -> list[LogEntry]:
    """Of the sequences in a ring of so many sectors the one that ends with the greatest number, from its tail
    on; those without their tail do not count. `entries` are in the order of the ring."""

    def follows(at: int) -> bool:
        before, this = entries[at - 1], entries[at % len(entries)]
        return this.at == (before.at + before.sectors) % ring and this.number == before.number + 1

    last = [at for at in range(len(entries)) if not follows(at + 1)]
    for at in sorted(last, key=lambda at: entries[at].number, reverse=True):
        tail, found = entries[at].tail, [entries[at]]
        while found[-1].at != tail and follows(at):
            at = (at - 1) % len(entries)
            found.append(entries[at])
        if found[-1].at == tail:
            return found[::-1]
    return []


def _patch(image: Reader, sequence: Sequence[LogEntry], at: int) -> tuple[Patch, int]:
    """What the sequence writes, the last word on each sector, and the file's end when that is done."""
    offset, length = (
        np.concatenate([getattr(entry, name) for entry in sequence]) for name in ("offset", "length")
    )
    end = max(sequence[-1].end, int((offset + length).max(initial=0)))
    if end > MAX_FILE:
        raise Corrupt(f"{image.name}: its VHDX log writes up to byte {end:#x}, more than any file has", at)
    afford(image, int(np.minimum(length, 1 << 40).sum()), "what its log writes")
    before = np.cumsum([0, *(len(entry.blocks) for entry in sequence)])
    block = np.concatenate(
        [np.where(entry.block < 0, 0, entry.block + 1 + first)
         for entry, first in zip(sequence, before.tolist(), strict=False)]
    )  # fmt: skip
    row, nth = expand(length // LOG_SECTOR)
    sector = offset[row] + nth * LOG_SECTOR
    order = np.argsort(sector, kind="stable")
    order = order[np.append(np.diff(sector[order]) > 0, [True] * bool(len(order)))]
    zeroes = np.zeros((1, LOG_SECTOR), np.uint8)
    blocks = np.concatenate([zeroes, *(entry.blocks for entry in sequence)])
    return Patch(sector[order], blocks[block[row[order]]]), end
