"""VHDX logs that are not carried out yet: read as QEMU reads the file after it has carried them out."""

import contextlib
import shutil
import struct
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from hostile_layers import BAT, HEADERS, REGIONS, guid, sealed_vhdx
from support import need, run
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import BmapError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.formats.images.vhdx import FORMAT
from virt_bmap.formats.images.vhdx.log import LogEntry, active_sequence
from virt_bmap.open import open_image
from virt_bmap.open.disks import Opening
from virt_bmap.open.host import open_host
from virt_bmap.open.raw import RawReader

MIB, SECTOR, SIZE = 1 << 20, 4096, 24 << 20
CONTENT = b"what only the log has"
LOG = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes_le
Write = tuple[int, bytes | int]
"""Where, and what: whole sectors, or so many bytes of zeroes."""


def entry(number: int, tail: int, writes: Sequence[Write], flushed: int, end: int, log: bytes = LOG) -> bytes:
    """An entry of a log, by the format's documentation; `tail` is a byte of the log."""
    descriptors, data = b"", b""
    for at, what in writes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, at, number)
        for part in range(0, 0 if isinstance(what, int) else len(what), SECTOR):
            block = what[part : part + SECTOR]
            descriptors += struct.pack("<4s4s8sQQ", b"desc", block[-4:], block[:8], at + part, number)
            data += b"data" + struct.pack("<I", number >> 32) + block[8:-4]
            data += struct.pack("<I", number & 0xFFFFFFFF)
    first = -(-(64 + len(descriptors)) // SECTOR) * SECTOR
    length, count = first + len(data), len(descriptors) // 32
    head = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, tail, number, count, 0, log, flushed, end
    )  # fmt: skip
    whole = bytearray((head + descriptors).ljust(first, b"\0") + data)
    struct.pack_into("<I", whole, 4, google_crc32c.value(bytes(whole)))
    return bytes(whole)


class Dirty:
    """A file whose last blocks lie where only its log says."""

    def __init__(self, path: Path, before: bytes = b"") -> None:
        """`before`: the file when they were not there; without it no block is."""
        self.path, self.data = path, bytearray(path.read_bytes())
        self.size = len(self.data)
        at = self.data.index(guid(BAT), REGIONS[0]) + 16
        self.bat = int.from_bytes(self.data[at : at + 8], "little")
        self.after = bytes(self.data[self.bat : self.bat + SECTOR])
        self.data[self.bat : self.bat + SECTOR] = before[self.bat : self.bat + SECTOR] or bytes(SECTOR)
        assert self.after != self.data[self.bat : self.bat + SECTOR]
        self.length, self.log = struct.unpack_from("<IQ", self.data, HEADERS[0] + 68)

    def written(self, *entries: tuple[int, bytes]) -> Path:
        """With these entries at their places in the ring, and a header that says so."""
        self.data[self.log : self.log + self.length] = bytes(self.length)
        for at, one in entries:
            for sector in range(0, len(one), SECTOR):
                place = self.log + (at + sector) % self.length
                self.data[place : place + SECTOR] = one[sector : sector + SECTOR]
        for head in HEADERS:
            self.data[head + 48 : head + 64] = LOG
        self.path.write_bytes(sealed_vhdx(self.data))
        return self.path


def read_both_ways(image: Path) -> bytes:
    with open_host([str(image)]) as host, contextlib.closing(open_image(str(image))) as shown:
        disk = host.disks[0]
        mine = MappedReader(disk.size, "disk", dict(enumerate(host.files)), disk.rows)
        content = mine.read(0, disk.size)
        assert shown.read(0, shown.size) == content
    return content


def held_against_qemu(image: Path) -> None:
    """Every byte of the file but its headers', and the disk, are as QEMU leaves them."""
    copy = image.with_suffix(".copy")
    shutil.copyfile(image, copy)
    run("qemu-img", "check", "-q", "-f", "vhdx", "-r", "all", copy)
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", copy, image.with_suffix(".raw"))
    assert read_both_ways(image) == image.with_suffix(".raw").read_bytes()
    with contextlib.closing(RawReader(str(image))) as raw:
        assert FORMAT.recovered(raw).read(MIB, len(copy.read_bytes()) - MIB) == copy.read_bytes()[MIB:]


def problems(image: Path) -> list[str]:
    with open_host([str(image)]) as host:
        return [problem.code for problem in host.disks[0].chain[0].layer.damage.problems()]


@pytest.fixture
def dirty(tmp_path: Path) -> Dirty:
    need("qemu-img", "qemu-utils")
    raw, image = tmp_path / "disk.raw", tmp_path / "dirty.vhdx"
    raw.write_bytes(np.random.default_rng(1).bytes(5 * MIB) + bytes(SIZE - 5 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", raw, image)
    before = image.read_bytes()
    run("qemu-io", "-f", "vhdx", "-c", "write -P 7 9M 3M", "-c", "write -P 8 20M 64k", image)
    return Dirty(image, before)


def test_one_entry(dirty: Dirty) -> None:
    image = dirty.written((0, entry(5, 0, [(dirty.bat, dirty.after)], dirty.size, dirty.size)))
    held_against_qemu(image)
    assert problems(image) == ["journal-replayed"]


def test_the_last_of_many_entries_counts_round_the_end_of_the_ring(dirty: Dirty) -> None:
    """As many descriptors as QEMU reads, zeroes, and numbers of more than 32 bits; before them the remains of
    an older log."""
    number, size, first = (7 << 32) - 1, dirty.size, dirty.length - 2 * SECTOR
    old = entry(number - 9, 8 * MIB // 2, [(dirty.bat, bytes(SECTOR))], size, size)
    many = [(dirty.bat + SECTOR * (2 + nth % 5), bytes([8 * nth % 256]) * SECTOR) for nth in range(125)]
    one = entry(number, first, [(dirty.bat, 4 * SECTOR)], size, size)
    two = entry(number + 1, first, [*many, (dirty.bat + 3 * SECTOR, 2 * SECTOR)], size, size)
    three = entry(number + 2, first, [(dirty.bat, dirty.after), *many[:3]], size, size)
    at = first + len(one), first + len(one) + len(two)
    image = dirty.written((first, one), (at[0], two), (at[1], three), (MIB // 2, old))
    held_against_qemu(image)


def test_the_log_of_a_crashed_hypervisor(corpus: Path, tmp_path: Path) -> None:
    name = "images/qemu+qemu/tests/qemu-iotests/sample_images/iotest-dirtylog-10G-4M.vhdx.bz2"
    image, copy = tmp_path / "dirty.vhdx", tmp_path / "copy.vhdx"
    for file in image, copy:
        file.write_bytes(run("bzcat", corpus / name))
    run("qemu-img", "check", "-q", "-r", "all", copy)
    with contextlib.closing(RawReader(str(image))) as raw:
        assert FORMAT.recovered(raw) is not raw
        assert FORMAT.recovered(raw).read(MIB, raw.size - MIB) == copy.read_bytes()[MIB:]
    assert problems(image) == ["journal-replayed"]
    with (
        contextlib.closing(open_image(str(image))) as mine,
        contextlib.closing(open_image(str(copy))) as qemus,
    ):
        assert mine.size == qemus.size
        for at in range(0, 64 * MIB, MIB):
            assert mine.read(at, MIB) == qemus.read(at, MIB)


def test_descriptors_in_several_sectors(dirty: Dirty) -> None:
    """126 are beside the header, 128 in each sector behind it; QEMU 7.2 refuses more than 126."""
    random = np.random.default_rng(2)
    writes: list[Write] = [(dirty.bat, dirty.after)]
    writes += [(dirty.bat + SECTOR * int(nth), random.bytes(SECTOR)) for nth in random.integers(2, 200, 190)]
    writes.insert(100, (dirty.bat + 50 * SECTOR, 60 * SECTOR))
    image = dirty.written((0, entry(5, 0, writes, dirty.size, dirty.size)))
    wanted = bytearray(dirty.data)
    for at, what in writes:
        wanted[at : at + (what if isinstance(what, int) else SECTOR)] = (
            bytes(what) if isinstance(what, int) else what
        )
    with contextlib.closing(RawReader(str(image))) as raw:
        assert FORMAT.recovered(raw).read(0, dirty.size) == wanted


def test_a_file_that_ends_before_its_blocks(dirty: Dirty) -> None:
    """It was not made longer yet; what is missing reads as zeroes."""
    image = dirty.written(
        (0, entry(1, 0, [(dirty.bat, dirty.after)], dirty.size - MIB, dirty.size)),
    )
    whole = read_both_ways(image)
    del dirty.data[-MIB:]
    image.write_bytes(dirty.data)
    assert read_both_ways(image) == whole.replace(b"\x08" * (64 << 10), bytes(64 << 10))
    with contextlib.closing(RawReader(str(image))) as raw:
        assert FORMAT.recovered(raw).size == dirty.size


def test_an_entry_that_was_not_finished_does_not_count(dirty: Dirty) -> None:
    broken = bytearray(entry(5, 0, [(dirty.bat, dirty.after)], dirty.size, dirty.size))
    broken[-100] ^= 1
    image = dirty.written((0, bytes(broken)))
    held_against_qemu(image)
    assert problems(image) == ["not-replayed"]
    other = entry(5, 0, [(dirty.bat, dirty.after)], dirty.size, dirty.size, guid(BAT))
    held_against_qemu(dirty.written((0, other)))


@pytest.mark.parametrize(
    "writes",
    [[(1 << 63, bytes(SECTOR))], [(MIB, 1 << 62)], [(1 << 62, 1 << 62)], [(SECTOR, 1 << 40)] * 100],
)
def test_what_no_file_has_is_refused(dirty: Dirty, writes: list[Write]) -> None:
    image = dirty.written((0, entry(5, 0, writes, dirty.size, dirty.size)))
    with pytest.raises(BmapError, match=r"dirty\.vhdx: .*log"), open_host([str(image)]):
        pass


def test_a_file_that_lost_its_end_is_refused(dirty: Dirty) -> None:
    image = dirty.written((0, entry(5, 0, [(dirty.bat, dirty.after)], dirty.size + MIB, dirty.size + MIB)))
    with pytest.raises(BmapError, match="its end is missing"), open_host([str(image)]):
        pass
    with pytest.raises(AssertionError, match="Could not open"):
        run("qemu-img", "check", "-r", "all", image)


def by_the_documentation(entries: dict[int, LogEntry], ring: int) -> list[LogEntry]:
    """[MS-VHDX] 2.3.3: try each sector as the first of a sequence."""
    best: list[LogEntry] = []
    for tail in range(ring):
        found: list[LogEntry] = []
        at = tail
        while (one := entries.get(at)) and (not found or one.number == found[-1].number + 1):
            found.append(one)
            at = (at + one.sectors) % ring
        places = [one.at for one in found]
        if found and found[-1].tail in places and (not best or found[-1].number > best[-1].number):
            best = found[places.index(found[-1].tail) :]
    return best


def test_the_active_sequence_is_the_documented_one() -> None:
    random = np.random.default_rng(3)
    none, blocks = ints([]), np.zeros((0, SECTOR), np.uint8)
    several = 0
    for _ in range(2000):
        ring = int(random.integers(4, 20))
        at, stop, found = int(random.integers(ring)), 0, []
        number = int(random.integers(1, 5))
        while stop < ring:
            sectors = int(random.integers(1, 4))
            if stop + sectors > ring:
                break
            number += 1 if random.random() < 0.8 else int(random.integers(2, 9))
            back = [one.at for one in found[-3:]] + [(at + stop) % ring]
            tail = int(random.choice(back)) if random.random() < 0.9 else int(random.integers(ring))
            place = (at + stop) % ring
            found.append(LogEntry(place, sectors, number, tail, 0, 0, none, none, none, blocks))
            stop += sectors + int(random.random() < 0.2)
        found.sort()
        mine = active_sequence(found, ring)
        wanted = by_the_documentation({one.at: one for one in found}, ring)
        assert [one.number for one in mine] == [one.number for one in wanted]
        several += len(mine) > 1
    assert several > 500


def test_a_log_below_an_overlay(dirty: Dirty) -> None:
    """QEMU replays nothing of what it only reads, so that both images are read by their own layers."""
    image = dirty.written((0, entry(5, 0, [(dirty.bat, dirty.after)], dirty.size, dirty.size)))
    whole, top = read_both_ways(image), image.with_name("top.qcow2")
    base = image.with_name("base.vhdx")
    shutil.copyfile(image, base)
    run("qemu-img", "check", "-q", "-r", "all", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.vhdx", "-F", "vhdx", top)
    run("qemu-io", "-c", "write -P 3 1M 64k", top)
    shutil.copyfile(image, base)
    with contextlib.closing(open_image(str(top), Opening(references=True))) as shown:
        assert shown.read(0, SIZE) == whole[:MIB] + b"\3" * 65536 + whole[MIB + 65536 :]


def test_a_log_of_an_image_inside_of_a_disk(tmp_path: Path) -> None:
    """The file of a guest is read as its log says, too, all of it: this log has content, which the format
    does not forbid."""
    folder = tmp_path / "files"
    folder.mkdir()
    inner = tmp_path / "inner.raw"
    inner.write_bytes(bytes(SIZE))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello").write_bytes(CONTENT)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "tree", inner)
    image = folder / "inner.vhdx"
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", inner, image)
    dirty = Dirty(image)
    place = dirty.data.index(CONTENT) // SECTOR * SECTOR
    block = bytes(dirty.data[place : place + SECTOR])
    dirty.data[place : place + SECTOR] = bytes(SECTOR)
    dirty.written((0, entry(5, 0, [(dirty.bat, dirty.after), (place, block)], dirty.size, dirty.size)))
    outer = tmp_path / "outer.raw"
    outer.write_bytes(bytes(64 * MIB))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", folder, outer)
    done = run(sys.executable, "-m", "virt_bmap", "cat", outer, "/dev/sda:/inner.vhdx", "/hello",
               "--nested", "all")  # fmt: skip
    assert done == CONTENT
