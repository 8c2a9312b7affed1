"""Expert Witness images against libewf's tools, which also make them, and The Sleuth Kit; what they say of
themselves, damage and hostile numbers by hand."""

import contextlib
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from host_images import numbered
from recipes import tables
from recipes.images import acquired
from recipes.made import digest
from support import assert_proven, need, run
from virt_bmap import cli
from virt_bmap.ask.check import check
from virt_bmap.core.errors import BmapError, Corrupt, ImageError
from virt_bmap.formats.images.ewf.names import segment_name
from virt_bmap.model import tables as columns
from virt_bmap.open import open_image
from virt_bmap.open.disks import Opening
from virt_bmap.open.host import LayeredReader, describe, open_host
from virt_bmap.survey.maps import map_disks

SIZE = (5 << 20) + 3 * 512
"""No multiple of a chunk: the last one is short."""
CASE = ("-C", "case 7", "-D", "a disk", "-e", "Eve", "-E", "item 3", "-N", "some\u00a0notes")
HOW = {
    "encase6": ("encase6", "best", ".E01"),
    "encase5": ("encase5", "fast", ".E01"),
    "encase4": ("encase4", "none", ".E01"),
    "encase2": ("encase2", "none", ".E01"),
    "empty blocks": ("encase7", "empty-block", ".E01"),
    "ftk": ("ftk", "fast", ".E01"),
    "linen6": ("linen6", "best", ".E01"),
    "smart": ("smart", "none", ".s01"),
    "ewf": ("ewf", "best", ".e01"),
    "ewfx": ("ewfx", "fast", ".e01"),
}
PIECE = 1 << 20
TRUSTED = Opening(references=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ewf") / "disk.raw"
    numbered(path, 6 << 20)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture(scope="module")
def whole(disk: Path) -> Path:
    """All kinds of chunks, in one segment."""
    return acquired(disk, disk.parent / "whole", "encase6", "fast", ".E01", "-d", "sha1", *CASE)


@pytest.fixture(scope="module")
def split(disk: Path) -> Path:
    """In segments of 1 MiB."""
    return acquired(disk, disk.parent / "split", "encase6", "none", ".E01", "-S", str(1 << 20))


def content(image: Path) -> bytes:
    with contextlib.closing(open_image(str(image), TRUSTED)) as reader:
        return b"".join(reader.read(at, min(PIECE, reader.size - at)) for at in range(0, reader.size, PIECE))


def exported(image: Path, folder: Path) -> bytes:
    """The disk as ewfexport gives it."""
    run(need("ewfexport", "ewf-tools"), "-u", "-q", "-f", "raw", "-t", folder / "out", image)
    return (folder / "out.raw").read_bytes()


# ---- images as they should be ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("sectors", [16, 64, 1024])
def test_every_kind_holds_its_disk(disk: Path, tmp_path: Path, how: str, sectors: int) -> None:
    format, level, ending = HOW[how]
    image = acquired(disk, tmp_path / "a", format, level, ending, "-b", str(sectors))
    assert content(image) == disk.read_bytes()
    bmap = map_disks([str(image)], host_offsets=True)
    assert_proven(bmap)
    assert columns.GAP not in columns.codes(bmap.extents, "kind"), "every byte of the file is named"
    with contextlib.closing(LayeredReader(str(image), Opening())) as reader:
        assert reader.disk.chain[0].layer.cluster == sectors * 512
        assert not reader.marks


def test_segments_are_one_disk(disk: Path, split: Path, tmp_path: Path) -> None:
    assert split.with_suffix(".E06").exists()
    assert content(split) == disk.read_bytes() == exported(split, tmp_path)
    bmap = map_disks([str(split)], host_offsets=True, references=True)
    assert_proven(bmap)
    assert len(bmap.disks) == len(list(split.parent.glob("split.E*")))


def test_a_chunk_lies_where_the_file_has_its_bytes(disk: Path, split: Path) -> None:
    raw = disk.read_bytes()
    with open_host([str(split)], TRUSTED) as host:
        for at in range(0, SIZE, 70_000):
            found = host.place(0, at)
            data = Path(found["file"]).read_bytes()[found["offset"] :][:64]
            assert data == raw[at : at + 64]
            assert found["cluster"] == at // 32768


def test_what_is_said_of_the_case_is_ewfinfos(whole: Path) -> None:
    said = run(need("ewfinfo", "ewf-tools"), whole).decode()
    with open_host([str(whole)]) as host:
        facts = describe(host)
    case = facts["case"]
    words = {
        "Case number": case["case_number"],
        "Description": case["description"],
        "Examiner name": case["examiner"],
        "Evidence number": case["evidence_number"],
        "Media type": "fixed disk" if facts["media"] == "fixed" else "",
        "Bytes per sector": str(facts["sector_size"]),
        "MD5": facts["hashes"]["md5"],
        "SHA1": facts["hashes"]["sha1"],
    }
    for word, value in words.items():
        assert re.search(rf"{word}:\s+{re.escape(value)}\s*$", said, re.MULTILINE), (word, value, said)
    assert case["notes"] == CASE[-1]


def test_the_sleuth_kit_agrees(disk: Path, split: Path) -> None:
    said = run(need("img_stat", "sleuthkit"), split).decode()
    with open_host([str(split)], TRUSTED) as host:
        facts = describe(host)
    assert f"Size of data in bytes:\t{facts['virtual_size']}" in said
    assert f"MD5 hash of data:\t{facts['hashes']['md5']}" in said


def test_info_shows_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "case number 'case 7'" in said
    assert "examiner 'Eve'" in said
    assert hashlib.sha1(content(whole)).hexdigest() in said
    assert cli.run(["info", "--json", str(whole)]) == 0
    image = json.loads(capsys.readouterr().out)["image"]
    assert image["version"] == 1
    assert image["segments"] == 1


def test_an_image_of_a_guests_disk_is_read_as_well(tmp_path: Path) -> None:
    """In a filesystem inside of an E01 lie the segments of an E01."""
    (raw,), trees = tables.gpt(tmp_path)
    image = acquired(raw, tmp_path / "inner", "encase6", "none", ".E01", "-S", str(1 << 20))
    folder = tmp_path / "files"
    folder.mkdir()
    for segment in image.parent.glob("inner.E*"):
        (folder / segment.name).write_bytes(segment.read_bytes())
    outer = tmp_path / "outer.raw"
    run(need("mke2fs", "e2fsprogs"), "-q", "-d", folder, outer, "24M")
    twice = acquired(outer, tmp_path / "outer", "encase6", "fast", ".E01")
    from virt_bmap.open.disks import nested

    bmap = map_disks([str(twice)], nested=nested(["/inner.E01"]))
    assert_proven(bmap)
    paths = bmap.names.column("name").to_pylist()
    names = {path.strip(b"/").rpartition(b"/")[2] for path in trees["/dev/sda1"]}
    assert names <= set(paths)


CORPUS = (
    "keramics+keramics/test_data/ewf/ext2.E01",
    "log2timeline+dfvfs/test_data/ext2.split.E01",
    "log2timeline+dfvfs/test_data/image-split.E01",
    "simsong+bulk_extractor/tests/Images/nps-2010-emails.E01",
    "simsong+bulk_extractor/tests/Images/kml_samples.E01",
    "strozfriedberg+e01-rs/data/image.E01",
    "SecurityRonin+ewf-forensic/core/tests/data/ntfs_sample.E01",
)


@pytest.mark.parametrize("name", CORPUS)
def test_images_of_others(corpus: Path, tmp_path: Path, name: str) -> None:
    image = corpus / "images" / name
    assert digest(content(image)) == digest(exported(image, tmp_path))
    report = check(map_disks([str(image)], host_offsets=True, references=True))
    assert not report.disagreements
    with contextlib.closing(LayeredReader(str(image), TRUSTED)) as reader:
        kept = describe_hashes(reader)
        assert kept["md5"] == hashlib.md5(content(image)).hexdigest()


def describe_hashes(reader: LayeredReader) -> dict[str, str]:
    found: dict[str, str] = reader.disk.chain[0].layer.facts["hashes"]
    return found


# ---- names of segments -------------------------------------------------------------------------------------


def test_segments_are_named_as_libewf_names_them() -> None:
    """The series of its documentation, by counting."""
    series = [f"{number:02}" for number in range(1, 100)]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    series = [f"E{two}" for two in series]
    series += [f"{a}{b}{c}" for a in letters[4:] for b in letters for c in letters]
    assert [segment_name("x.E01", number) for number in range(1, len(series) + 1)] == [
        f"x.{s}" for s in series
    ]
    with pytest.raises(ImageError, match="more segments than there are names"):
        segment_name("x.E01", len(series) + 1)
    assert segment_name("x.e01", 100) == "x.eaa"
    assert segment_name("y.s01", 776) == "y.taa"


# ---- what is opened, and what is not -----------------------------------------------------------------------


def test_further_segments_are_opened_only_where_asked(split: Path) -> None:
    for use in (open_image, lambda path: open_host([path]).__enter__()):
        with pytest.raises(ImageError, match=r"'split\.E02'.*--references"):
            use(str(split))


def test_a_missing_segment_is_named(split: Path, tmp_path: Path) -> None:
    for number in (1, 2, 4):
        (tmp_path / f"split.E0{number}").write_bytes(split.with_suffix(f".E0{number}").read_bytes())
    with pytest.raises(ImageError, match=r"split\.E03: can't be opened.*split\.E01 goes on in it"):
        open_image(str(tmp_path / "split.E01"), TRUSTED)


def test_a_segment_in_the_place_of_another_is_refused(split: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "split.E01").write_bytes(split.read_bytes())
    (tmp_path / "split.E02").write_bytes(split.with_suffix(".E03").read_bytes())
    with pytest.raises(BmapError, match=r"split\.E02: says that it is segment 3, but segment 2"):
        open_image(str(tmp_path / "split.E01"), TRUSTED)
    with pytest.raises(BmapError, match="is segment 2 of an Expert Witness image: open the first one"):
        open_image(str(split.with_suffix(".E02")), TRUSTED)


def test_a_segment_of_another_image_is_refused(split: Path, tmp_path: Path) -> None:
    (tmp_path / "split.E01").write_bytes(with_set(split.read_bytes(), b"volume", b"A" * 16))
    (tmp_path / "split.E02").write_bytes(with_set(split.with_suffix(".E02").read_bytes(), b"data", b"B" * 16))
    for number in range(3, 10):
        if split.with_suffix(f".E0{number}").exists():
            (tmp_path / f"split.E0{number}").write_bytes(split.with_suffix(f".E0{number}").read_bytes())
    with pytest.raises(BmapError, match=r"split\.E02: belongs to another image"):
        open_image(str(tmp_path / "split.E01"), TRUSTED)


def test_a_segment_that_is_the_first_one_again_is_refused(split: Path, tmp_path: Path) -> None:
    (tmp_path / "split.E01").write_bytes(split.read_bytes())
    (tmp_path / "split.E02").symlink_to("split.E01")
    with pytest.raises(BmapError, match="is a part that it has"):
        open_image(str(tmp_path / "split.E01"), TRUSTED)


# ---- changes by hand ---------------------------------------------------------------------------------------

Section = tuple[bytes, int, int]
"""(kind, byte of the descriptor, next section's)."""


def sections(data: bytes) -> Iterator[Section]:
    at = 13
    while at + 76 <= len(data):
        kind, follows = struct.unpack_from("<16sQ", data, at)
        yield kind.rstrip(b"\0"), at, follows
        if follows <= at:
            return
        at = follows


def place(data: bytes, kind: bytes) -> int:
    """The first byte of the data of the first such section."""
    return next(at for name, at, _ in sections(data) if name == kind) + 76


def seal(data: bytearray, start: int, length: int) -> None:
    """Make the Adler-32 at the end of these bytes right."""
    struct.pack_into("<I", data, start + length - 4, zlib.adler32(data[start : start + length - 4]))


def with_set(image: bytes, kind: bytes, identifier: bytes) -> bytes:
    data = bytearray(image)
    at = place(data, kind)
    data[at + 64 : at + 80] = identifier
    seal(data, at, 1052)
    return bytes(data)


def changed(image: Path, target: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(image.read_bytes())
    change(data)
    target.write_bytes(data)
    return target


def said(image: Path) -> dict[str, str]:
    """The problems of the image itself, by their codes."""
    with open_host([str(image)]) as host:
        return {row["code"]: row["detail"] for row in describe(host)["problems"]}


def test_a_damaged_table_is_read_from_its_backup(disk: Path, whole: Path, tmp_path: Path) -> None:
    def damage(data: bytearray) -> None:
        data[place(data, b"table") + 40] ^= 1

    image = changed(whole, tmp_path / "a.E01", damage)
    assert "copy-used" in said(image)
    assert content(image) == disk.read_bytes()
    image = changed(whole, tmp_path / "b.E01", lambda data: damage_backup(data))
    assert "copy-differs" in said(image)
    assert content(image) == disk.read_bytes()


def damage_backup(data: bytearray) -> None:
    data[place(data, b"table2") + 40] ^= 1


def test_an_image_that_was_never_finished_is_read_as_far_as_it_goes(disk: Path, tmp_path: Path) -> None:
    """Two rounds of chunks and tables, cut off in the second one's chunks."""
    raw = tmp_path / "two.raw"
    raw.write_bytes(disk.read_bytes())
    with raw.open("r+b") as file:
        file.truncate(140 << 20)
    image = acquired(raw, tmp_path / "long", "encase5", "fast", ".E01", "-b", "16")
    data = image.read_bytes()
    rounds = [at for kind, at, _ in sections(data) if kind == b"sectors"]
    assert len(rounds) > 1
    image.write_bytes(data[: rounds[1] + 5000])
    problems = said(image)
    assert "truncated" in problems
    with contextlib.closing(open_image(str(image))) as reader:
        known = 16375 * 8192
        assert reader.read(0, SIZE) == disk.read_bytes()
        assert not any(reader.read(known - PIECE, PIECE))
        gone = reader.lost(np.array([0]), np.array([reader.size]))
        assert gone.starts.tolist() == [known]
        assert gone.ends.tolist() == [raw.stat().st_size]
    with pytest.raises(ImageError, match=f"{known:#x}-"):
        cli.run(["dump", str(image), "/dev/sda", str(tmp_path / "out")])


def test_a_disk_whose_size_was_never_filled_in_is_what_the_tables_list(
    disk: Path, whole: Path, tmp_path: Path
) -> None:
    """So ewfacquirestream leaves it when it is killed: 0 sectors, and nothing behind the tables."""

    def interrupt(data: bytearray) -> None:
        for at, format in ((4, "<I"), (16, "<Q")):
            field(b"volume", at, format, 0, 1052)(data)
        del data[place(data, b"data") - 76 :]

    image = changed(whole, tmp_path / "a.E01", interrupt)
    assert {"count", "truncated"} <= set(said(image))
    assert content(image) == disk.read_bytes()


def test_what_is_on_the_disk_does_not_matter_to_its_hash(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of memory, or of a disk that nobody knows, the hash can be compared as well."""
    assert cli.run(["check", "--content", str(whole)]) == 0
    assert "proven: content" in capsys.readouterr().out
    with pytest.raises(BmapError, match="nothing known"):
        cli.run(["check", str(whole)])


def test_sectors_that_could_not_be_read_are_lost(whole: Path, tmp_path: Path) -> None:
    def add_errors(data: bytearray) -> None:
        done = next(at for kind, at, _ in sections(data) if kind == b"done")
        body = bytearray(520 + 2 * 8 + 4)
        struct.pack_into("<I", body, 0, 2)
        struct.pack_into("<IIII", body, 520, 100, 7, 300, 1)
        seal(body, 0, 520)
        seal(body, 520, 20)
        end = done + 76 + len(body)
        section = bytearray(struct.pack("<16sQQ", b"error2", end, 76 + len(body)).ljust(76, b"\0"))
        last = bytearray(struct.pack("<16sQQ", b"done", end, 0).ljust(76, b"\0"))
        seal(section, 0, 76)
        seal(last, 0, 76)
        data[done:] = section + body + last

    image = changed(whole, tmp_path / "a.E01", add_errors)
    assert re.search(
        r"Read errors.*\n.*total number:\s+2", run("ewfinfo", image).decode(), re.IGNORECASE | re.DOTALL
    )
    assert "4.0 KiB of the disk in 2 ranges" in said(image)["bad-blocks"]
    with contextlib.closing(open_image(str(image))) as reader:
        gone = reader.lost(np.array([0]), np.array([reader.size]))
        assert gone.starts.tolist() == [51200, 153600]
        assert gone.ends.tolist() == [54784, 154112]
    assert_proven(map_disks([str(image)], host_offsets=True))


def test_the_disk_is_compared_with_what_the_image_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw,), _ = tables.gpt(tmp_path)
    image = acquired(raw, tmp_path / "a", "encase6", "fast", ".E01", "-d", "sha1")
    assert cli.run(["check", "--content", str(image)]) == 0
    assert "MD5 and SHA-1 are what the image keeps" in capsys.readouterr().out
    stored = acquired(raw, tmp_path / "b", "encase2", "none", ".E01")
    for one, chunk in ((image, 40), (stored, 33)):
        bad = changed(one, tmp_path / "bad.E01", lambda data, chunk=chunk: spoil(data, chunk))
        assert b"FAILURE" in run(need("ewfverify", "ewf-tools"), "-q", bad, ok=(1,))
        assert cli.run(["check", "--content", "--host-offsets", str(bad)]) == 1
        told = capsys.readouterr().out
        assert "1 chunk is not what its checksum says" in told
        assert f"{chunk * 32768:#x}" in told
        assert "the MD5 of the disk is" in told


def spoil(data: bytearray, chunk: int) -> None:
    """One bit in the middle of a chunk."""
    table = place(data, b"table")
    base = struct.unpack_from("<Q", data, table + 8)[0]
    entry = struct.unpack_from("<I", data, table + 24 + 4 * chunk)[0]
    data[base + (entry & 0x7FFFFFFF) + 20] ^= 4


# ---- hostile numbers ---------------------------------------------------------------------------------------


def field(kind: bytes, offset: int, format: str, value: int, sealed: int) -> Callable[[bytearray], None]:
    """Set a field of the data of a section, and seal so many bytes of it."""

    def change(data: bytearray) -> None:
        at = place(data, kind)
        struct.pack_into(format, data, at + offset, value)
        seal(data, at, sealed)

    return change


def link(kind: bytes, offset: int, value: int) -> Callable[[bytearray], None]:
    """Set a number of a section's descriptor."""

    def change(data: bytearray) -> None:
        at = place(data, kind) - 76
        struct.pack_into("<Q", data, at + offset, value)
        seal(data, at, 76)

    return change


def entries(value: Callable[[int], int]) -> Callable[[bytearray], None]:
    """All entries of both tables."""

    def change(data: bytearray) -> None:
        for kind in (b"table", b"table2"):
            at = place(data, kind)
            count = struct.unpack_from("<I", data, at)[0]
            struct.pack_into(f"<{count}I", data, at + 24, *(value(nth) & 0xFFFFFFFF for nth in range(count)))
            seal(data, at + 24, count * 4 + 4)

    return change


def both(offset: int, format: str, value: int) -> Callable[[bytearray], None]:
    """A field of the headers of both tables."""

    def change(data: bytearray) -> None:
        for kind in (b"table", b"table2"):
            field(kind, offset, format, value, 24)(data)

    return change


HOSTILE: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "a chain that leads back": (link(b"sectors", 16, 13), "leads back to byte 0xd"),
    "a chain that stands still": (link(b"volume", 16, 735), "leads back"),
    "a chain beyond the end": (link(b"sectors", 16, 1 << 63), "the file ends at"),
    "a section of 2^63 bytes": (link(b"sectors", 24, 1 << 63), "programs do not agree"),
    "a disk of 2^64 sectors": (field(b"volume", 16, "<Q", (1 << 64) - 1, 1052), "sectors of"),
    "a disk of 2^52 sectors": (field(b"volume", 16, "<Q", 1 << 52, 1052), "of its disk are not in it"),
    "chunks of 2^40 bytes": (field(b"volume", 8, "<I", 1 << 31, 1052), "a chunk"),
    "chunks of no bytes": (field(b"volume", 8, "<I", 0, 1052), "a chunk"),
    "sectors of 7 bytes": (field(b"volume", 12, "<I", 7, 1052), "of 7 bytes"),
    "a table of 2^32 entries": (both(0, "<I", (1 << 32) - 1), "damaged"),
    "a table that counts from 2^63": (both(8, "<Q", 1 << 63), "damaged"),
    "entries beyond the end": (entries(lambda nth: 0x7FFFFFF0 - nth), "no chunk can be"),
    "entries that are all one": (entries(lambda nth: 0x8000004C), "two owners"),
    "entries one byte apart": (entries(lambda nth: 0x4C + nth), "end before their bytes do"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers_are_said(
    whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = HOSTILE[name]
    image = changed(whole, tmp_path / "a.E01", change)
    told = ""
    try:
        cli.run(["info", str(image)])
    except BmapError as error:
        told = str(error)
    assert words in capsys.readouterr().out + told
    with contextlib.suppress(BmapError):
        bmap = map_disks([str(image)], host_offsets=True)
        check(bmap)
    with contextlib.suppress(BmapError), contextlib.closing(open_image(str(image))) as reader:
        reader.read(0, min(reader.size, 1 << 20))


def test_a_chain_of_more_sections_than_anybody_writes_ends(whole: Path, tmp_path: Path) -> None:
    """131,072 are followed."""

    def lengthen(data: bytearray) -> None:
        at = next(at for kind, at, _ in sections(data) if kind == b"done")
        del data[at:]
        for follows in range(at + 76, at + 76 * (1 << 17), 76):
            section = bytearray(struct.pack("<16sQQ", b"more", follows, 76).ljust(76, b"\0"))
            seal(section, 0, 76)
            data += section

    image = changed(whole, tmp_path / "a.E01", lengthen)
    assert "too-many" in said(image)
    assert len(content(image)) == SIZE


def test_what_is_written_of_a_case_is_harmless(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = acquired(
        disk, tmp_path / "a", "encase6", "best", ".E01", "-C", "x" * 2000, "-N", "\x1b[2J\x07\x9b31m"
    )
    assert cli.run(["info", str(image)]) == 0
    told = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", told)
    assert "x" * 200 + "..." in told


def test_a_chunk_never_inflates_to_more_than_a_chunk(whole: Path, tmp_path: Path) -> None:
    """The first chunk is a bomb of 64 MiB, in the place of the chunks of 32 KiB that were there."""
    bomb = zlib.compress(bytes(64 << 20), 9)

    def lay(data: bytearray) -> None:
        table = place(data, b"table")
        count = struct.unpack_from("<I", data, table)[0]
        entries(
            lambda nth: (
                (0x80000000 if nth == 0 else 0) + (0x4C if nth == 0 else 0x4C + len(bomb) + nth * 32772)
            )
        )(data)
        assert count > 3
        at = place(data, b"sectors")
        data[at : at + len(bomb)] = bomb

    image = changed(whole, tmp_path / "a.E01", lay)
    with contextlib.closing(open_image(str(image))) as reader:
        with pytest.raises(Corrupt, match="holds more than a chunk"):
            reader.read(0, 512)
        with contextlib.suppress(Corrupt):
            reader.read(32768, 512)


def test_offsets_beyond_2_gib_of_encase_6_7(tmp_path: Path) -> None:
    """It used the bit that says compressed for the offset: written by hand, with a hole in the middle."""
    chunks = {0: b"a" * 32768, 1: b"b" * 32768, 2: b"c" * 32768}
    places = {0: 2000, 1: (1 << 31) - 40_000, 2: (1 << 31) + 5000}
    image = tmp_path / "big.E01"
    volume = bytearray(1052)
    struct.pack_into("<B3xIIIQ", volume, 0, 1, 3, 64, 512, 192)
    seal(volume, 0, 1052)
    table = bytearray(24 + 12 + 4)
    struct.pack_into("<I", table, 0, 3)
    seal(table, 0, 24)
    struct.pack_into("<3I", table, 24, *places.values())
    seal(table, 24, 16)
    layout = [(b"volume", bytes(volume), 13), (b"sectors", b"", 13 + 76 + 1052)]
    tables_at = (1 << 31) + 100_000
    layout += [(b"table", bytes(table), tables_at), (b"done", b"", tables_at + 76 + len(table))]
    with image.open("wb") as file:
        file.write(b"EVF\t\r\n\xff\0\1\1\0\0\0")
        for nth, (kind, body, at) in enumerate(layout):
            follows = layout[nth + 1][2] if nth + 1 < len(layout) else at
            head = bytearray(struct.pack("<16sQQ", kind, follows, follows - at).ljust(76, b"\0"))
            seal(head, 0, 76)
            file.seek(at)
            file.write(head + body)
        for number, data in chunks.items():
            file.seek(places[number])
            file.write(data + struct.pack("<I", zlib.adler32(data)))
    assert content(image) == b"".join(chunks.values())
