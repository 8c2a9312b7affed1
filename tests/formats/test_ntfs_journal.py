"""What $LogFile still has to do, counted: against a log made by hand, and against ntfsrecover on one of
Windows."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np

from support import need, run
from virt_bmap.formats.filesystems.ntfs import journal, ondisk
from virt_bmap.formats.filesystems.ntfs.contents import read_contents
from virt_bmap.formats.filesystems.ntfs.mft import read_mft
from virt_bmap.formats.filesystems.ntfs.superblock import Geometry, read_boot
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader

PAGE, FIRST, SEQUENCE_BITS = 4096, 0x40, 45
GEOMETRY = Geometry(512, 4096, 1024, 0, 0, 0, 0, 0)


def lsn(place: int, turn: int = 1) -> int:
    """Of a record at this byte of the log, in this round of it."""
    return turn << (64 - SEQUENCE_BITS) | place // 8


def restart(oldest: int, page: int = PAGE) -> bytes:
    found = bytearray(PAGE)
    found[:4], found[0x10:0x1A] = b"RSTR", struct.pack("<IIH", page, page, 0x30)
    found[0x30:0x60] = struct.pack(
        "<QHHHHIHHQIHH8x", 9, 1, 0, 0, 0, SEQUENCE_BITS, 0xE0, 0x40, 0, 0, 0x30, FIRST
    )
    found[0x70:0x80] = struct.pack("<QQ", oldest, oldest + 100)
    return bytes(found)


def entry(at: int, redo: int, inode: int, turn: int = 1, kind: int = journal.UPDATE) -> bytes:
    """A record for the byte `at` of the log, of 0x60 bytes."""
    head = struct.pack("<QQQIHHIIH6x", lsn(at, turn), 0, 0, 0x30, 0, 0, kind, 0, 0)
    place = inode * 1024
    body = struct.pack("<8H", redo, 0, 0, 0, 0, 0, 0, 0) + struct.pack(
        "<HHHHI", 0, 0, place % 4096 // 512, 0, place // 4096
    )
    return (head + body).ljust(0x60, b"\0")


def paged(content: bytes) -> bytes:
    """The records of two pages, which lie behind four others, with their fixups."""
    room, pages = PAGE - FIRST, b""
    for number in range(2):
        page = bytearray(PAGE)
        page[:8] = b"RCRD" + struct.pack("<HH", 0x28, 9)
        part = content[number * room : (number + 1) * room]
        page[FIRST : FIRST + len(part)] = part
        page[0x28:0x2A] = b"\x07\x07"
        for stride in range(1, 9):
            end = stride * 512
            page[0x28 + 2 * stride : 0x2A + 2 * stride] = page[end - 2 : end]
            page[end - 2 : end] = b"\x07\x07"
        pages += page
    return pages


def test_changes_since_the_oldest_record_that_counts() -> None:
    room, start = PAGE - FIRST, 4 * PAGE

    def at(offset: int) -> int:
        return start + offset // room * PAGE + FIRST + offset % room

    content = bytearray(2 * room)
    wanted = 0
    redo = [0x05, 0x07, 0x15, 0x1B, 0x09, 0x02]
    for number, offset in enumerate(range(0, room + 0x600, 0x60)):
        if room - 0x30 < offset < room:  # a header lies in one page
            continue
        operation = redo[number % len(redo)]
        content[offset : offset + 0x60] = entry(at(offset), operation, 40 + number % 7)
        wanted += operation != 0x1B
    head = restart(lsn(at(0)))
    log = head + head + bytes(2 * PAGE) + paged(bytes(content))
    assert journal.pending(log, GEOMETRY) == journal.Pending(wanted, 7)
    assert journal.pending(restart(lsn(at(room))) * 2 + log[2 * PAGE :], GEOMETRY) != journal.Pending(
        wanted, 7
    )
    # of an older round, or of another place
    stale = entry(at(0), 0x05, 90, turn=0) + entry(at(0x200), 0x05, 91)
    assert journal.pending(head + head + bytes(2 * PAGE) + paged(stale), GEOMETRY) == journal.Pending(0, 0)


def test_a_log_that_says_nothing() -> None:
    assert journal.pending(b"", GEOMETRY) is None
    assert journal.pending(b"\xff" * 4 * PAGE, GEOMETRY) is None
    assert journal.pending(restart(5, page=12345) * 2, GEOMETRY) is None
    assert journal.pending(restart(5) * 2, GEOMETRY) == journal.Pending(0, 0)
    noise = np.random.default_rng(1).integers(0, 256, 16 * PAGE, np.uint8).tobytes()
    assert journal.pending(restart(0) * 2 + b"RCRD" + noise[4:], GEOMETRY) is not None


def test_a_log_of_windows_as_ntfsrecover_shows_it(corpus: Path, tmp_path: Path) -> None:
    need("ntfsrecover", "ntfs-3g")
    with gzip.open(corpus / "images/msuhanov+ntfs-samples/ntfs-2m.raw.gz") as file:
        file.seek(65536)
        (tmp_path / "part.img").write_bytes(file.read())
    said = run("ntfsrecover", "-n", "-f", "-v", tmp_path / "part.img", ok=(0, 1)).decode(errors="replace")
    records = {}
    for words in re.split(r"(?=this_lsn)", said)[1:]:
        fields = dict(re.findall(r"^(\w+)\s+([0-9a-f]+)", words, re.MULTILINE))
        if {"record_type", "redo_operation"} <= fields.keys():
            records[fields["this_lsn"]] = int(fields["record_type"], 16), int(fields["redo_operation"], 16)
    changes = sum(kind == journal.UPDATE and redo in journal.CHANGES for kind, redo in records.values())
    reader, damage = RawReader(str(tmp_path / "part.img")), Damage()
    geometry = read_boot(reader, damage)
    contents = read_contents(read_mft(reader, geometry, damage), geometry, damage)
    log = bytearray(contents.read(reader, ondisk.LOGFILE, ondisk.DATA, journal.MOST))
    reader.close()
    for page in (0, PAGE):  # as if nothing of it were in place
        log[page + 0x70 : page + 0x80] = struct.pack("<QQ", 1, 1)
    found = journal.pending(bytes(log), geometry)
    assert found
    assert found.changes == changes > 200
