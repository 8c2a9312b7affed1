"""Extents and volumes that LVM's text gives away twice: LVM's own tools refuse such a group, and what a
thousand volumes show is not read a thousand times."""

import json
import random
import re
import struct
import subprocess
from pathlib import Path

import pytest

import recipes
from btrfs_images import loops
from recipes.made import blank
from recipes.volumes import LINEAR, lvm_crc, write_lvm_text
from support import mapped, need, run
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.volumes.lvm import label, text
from virt_bmap.formats.volumes.lvm.text import parse
from virt_bmap.model.blockmap import BlockMap

MIB, EXTENT, EXTENTS = 1 << 20, 256 << 10, 60
GROUP = """
my-vg {{ id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa" seqno = 5
format = "lvm2" status = ["RESIZEABLE", "READ", "WRITE"] flags = []
extent_size = 512 max_lv = 0 max_pv = 0 metadata_copies = 0
physical_volumes {{ pv0 {{ id = "{pv}" device = "/dev/sda"
status = ["ALLOCATABLE"] flags = [] dev_size = 32768 pe_start = 2048 pe_count = 60 }} }}
logical_volumes {{
{volumes}
}} }}
contents = "Text Format Volume Group"
version = 1
description = ""
creation_host = "here"
creation_time = 1
"""


class Disk:
    """A physical volume that LVM made, and texts that are written into it."""

    def __init__(self, folder: Path) -> None:
        need("pvcreate", "lvm2")
        self.image = blank(folder / "disk.img", 16 * MIB)
        with loops([self.image]) as (device,):
            run("pvcreate", *self.options(device)[:2], device)
            run("vgcreate", *self.options(device), "-s", "256k", "my-vg", device)
            said = json.loads(
                run("pvs", *self.options(device), "--reportformat", "json", "-o", "pv_uuid", device)
            )
        self.pv = said["report"][0]["pv"][0]["pv_uuid"]

    @staticmethod
    def options(device: str) -> list[str]:
        return ["--config", f'devices{{filter=["a|{device}$|","r|.*|"]}}', "--driverloaded", "n"]

    def given(self, *volumes: str) -> BlockMap:
        """The map of a group of these volumes."""
        write_lvm_text(self.image, GROUP.format(pv=self.pv, volumes="\n".join(volumes)).encode())
        return mapped(self.image)

    def lvm_takes_it(self) -> bool:
        with loops([self.image]) as (device,):
            words = ["lvs", *self.options(device), "-o", "lv_name"]
            return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("overlaps"))


def id_of(name: str) -> str:
    return "-".join((name.ljust(6, "0")[:6], *["bbbb"] * 5, "cccccc"))


def linear(name: str, count: int, at: int, on: str = "pv0") -> str:
    return LINEAR.replace('"pv0"', f'"{on}"').format(
        name=name, id=id_of(name), visible=', "VISIBLE"', count=count, at=at
    )


def volume(name: str, *segments: str) -> str:
    numbered = "\n".join(f"segment{number} {{ {segment} }}" for number, segment in enumerate(segments, 1))
    return (
        f'{name} {{ id = "{id_of(name)}" status = ["READ", "WRITE", "VISIBLE"] flags = [] '
        f"segment_count = {len(segments)}\n{numbered} }}"
    )


def names(bmap: BlockMap) -> list[str]:
    return [name.removeprefix("/dev/my-vg/") for name in bmap.volumes.column("name").to_pylist()[1:]]


def refused(bmap: BlockMap) -> list[str]:
    problems = bmap.problems.to_pylist()
    return [
        problem["detail"].split(":")[0].removeprefix("logical volume my-vg/")
        for problem in problems
        if problem["code"] == "two-owners"
    ]


def how_many_refused(bmap: BlockMap) -> int:
    """By one line for all of the group; none where there is nothing to say."""
    said = [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "two-owners"]
    assert len(said) <= 1
    many = [re.match(r"([\d,]+) logical volumes of my-vg can't be read: ", words) for words in said]
    return sum(int(found[1].replace(",", "")) if found else 1 for found in many)


@pytest.mark.parametrize(
    ("places", "sound"),
    [
        ([(0, 4), (4, 4)], True),
        ([(0, 4), (0, 4)], False),
        ([(0, 4), (2, 4)], False),
        ([(2, 4), (0, 4)], False),
        ([(0, 8), (3, 2)], False),
        ([(3, 2), (0, 8)], False),
    ],
)
def test_lvm_refuses_what_is_refused_here(disk: Disk, places: list[tuple[int, int]], sound: bool) -> None:
    bmap = disk.given(*(linear(f"v{number}", count, at) for number, (at, count) in enumerate(places)))
    assert disk.lvm_takes_it() == sound
    assert names(bmap) == ["v0", "v1"][: 1 + sound]
    assert refused(bmap) == [] if sound else ["v1"]


def test_any_extents_by_brute_force(disk: Disk) -> None:
    """A volume is there where none of its extents was given away before, one by one; what is left is free, or
    nobody's."""
    chance = random.Random(5)
    for _ in range(60):
        taken: set[int] = set()
        texts, good = [], []
        for number in range(chance.randint(1, 9)):
            pieces = [
                (chance.randrange(EXTENTS - 8), chance.randint(1, 8)) for _ in range(chance.randint(1, 3))
            ]
            start, segments, fits = 0, [], True
            for at, count in pieces:
                segments.append(
                    f'start_extent = {start} extent_count = {count} type = "striped" stripe_count = '
                    f'1 stripes = ["pv0", {at}]'
                )
                start += count
                fits = fits and not taken & set(range(at, at + count))
                if fits:
                    taken |= set(range(at, at + count))
            texts.append(volume(f"v{number}", *segments))
            good += [f"v{number}"] if fits else []
        bmap = disk.given(*texts)
        assert names(bmap) == good
        assert how_many_refused(bmap) == len(texts) - len(good)


def test_hundreds_over_the_same_extents(disk: Disk) -> None:
    """One is shown, and one line tells of all others; LVM takes none of them."""
    bmap = disk.given(*(linear(f"v{number}", 4, number % 4) for number in range(500)))
    assert not disk.lvm_takes_it()
    assert names(bmap) == ["v0"]
    (problem,) = bmap.problems.to_pylist()
    assert (problem["code"], problem["severity"], problem["volume"]) == ("two-owners", "error", 0)
    assert how_many_refused(bmap) == 499
    assert re.search(r"v1: its extents at byte 0x[0-9a-f]+ of \S+ are also those of v0; ", problem["detail"])
    assert problem["detail"].endswith("; and 496 more")


INNER = linear("in", 4, 0)
RAID = 'start_extent = 0 extent_count = 4 type = "raid1" device_count = 2 region_size = 1024 raids = [{}]'
PARTS = [linear(f"p{number}", 4, 4 * number) for number in range(1, 7)]
SHARED = {
    "two over one": [INNER, linear("a", 4, 0, "in"), linear("b", 3, 1, "in")],
    "twice in one": [INNER, volume("a", *(f'start_extent = {at} extent_count = 2 type = "striped" '
        'stripe_count = 1 stripes = ["in", 1]' for at in (0, 2)))],
    "stripes of one": [INNER, volume("a", 'start_extent = 0 extent_count = 4 type = "striped" '
        'stripe_count = 2 stripe_size = 128 stripes = ["in", 0, "in", 1]')],
    "images of two arrays": [*PARTS, volume("a", RAID.format('"p1", "p2", "p3", "p4"')),
        volume("b", RAID.format('"p5", "p2", "p6", "p4"'))],
    "an image twice": [*PARTS, volume("a", RAID.format('"p1", "p2", "p3", "p2"'))],
    "empty images of two arrays": [
        *(linear(f"p{number}", 0, 0) for number in range(1, 5)),
        *(volume(name, RAID.format('"p1", "p2", "p3", "p4"')) for name in "ab"),
    ],
    "the metadata of two images": [*PARTS, volume("a", RAID.format('"p1", "p2", "p1", "p4"'))],
    "one origin of two with checksums": [
        INNER, *PARTS[:2],
        *(volume(name, 'start_extent = 0 extent_count = 4 type = "integrity" origin = "in" meta_dev = '
            f'"{beside}"') for name, beside in (("a", "p1"), ("b", "p2"))),
    ],
}  # fmt: skip


def volume_names(texts: list[str]) -> set[str]:
    return {text.split(None, 1)[0] for text in texts}


@pytest.mark.parametrize("how", SHARED)
def test_a_volume_is_a_part_of_one_other_only(disk: Disk, how: str) -> None:
    bmap = disk.given(*SHARED[how])
    last = "b" if volume_names(SHARED[how]) >= {"a", "b"} else "a"
    assert refused(bmap) == [last]
    assert (["a"] if last == "b" else []) == [name for name in names(bmap) if name in "ab"]


def test_a_thin_device_is_one_volume(tmp_path: Path) -> None:
    (image,) = recipes.make("lvm-thin", tmp_path).disks
    assert names(mapped(image))[-2:] == ["t1", "t2"]
    data = image.read_bytes()
    begin = 4096 + 512
    text = data[begin : data.index(b"\0", begin)]
    assert text.count(b"device_id = 2 ") == 1
    write_lvm_text(image, text.replace(b"device_id = 2 ", b"device_id = 1 "))
    bmap = mapped(image)
    assert names(bmap)[-1] == "t1"
    assert refused(bmap) == ["t2"]


# ---- texts -------------------------------------------------------------------------------------------------


def test_what_areas_hold_alike_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two disks with three areas; LVM writes the same text into each."""
    parsed: list[str] = []
    monkeypatch.setattr(label, "parse", lambda text: parsed.append(text) or parse(text))
    disks = recipes.make("lvm", tmp_path).disks
    assert names(mapped(*disks))[-3:] == ["lin", "str", "two"]
    assert len(parsed) == 1
    # the limits leave room for what LVM writes: more bytes a word than MAX_TEXT has for each of MAX_WORDS
    assert len(parsed[0]) / sum(1 for _ in text._tokens(parsed[0])) > label.MAX_TEXT / text.MAX_WORDS


def test_a_text_of_too_many_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_WORDS", 100)
    assert len(parse("a { } " * 33).sections) == 1
    with pytest.raises(Corrupt, match="more than 100 words"):
        parse("a { } " * 34)


def test_metadata_areas_that_overlap(tmp_path: Path) -> None:
    """A second area in the first one, whose header leads to the first one's text: one text is not read for
    each of sixteen areas."""
    made = Disk(tmp_path)
    made.given(linear("lin", 4, 0))
    with open(made.image, "r+b") as file:
        sector = bytearray(file.read(1024)[512:])
        assert sector[:8] == b"LABELONE"
        first, size = struct.unpack_from("<QQ", sector, 32 + 40 + 32)
        inner = first + (size >> 1)
        file.seek(first)
        head = bytearray(file.read(512))
        begin, length = struct.unpack_from("<QQ", head, 40)
        file.seek(first + begin)
        words = file.read(length)
        struct.pack_into("<QQ", head, 24, inner, size >> 1)
        head[:4] = struct.pack("<I", lvm_crc(bytes(head[4:])))
        for at, data in ((inner, bytes(head)), (inner + begin, words)):
            file.seek(at)
            file.write(data)
        # behind the first area its end, then the extension: one more area before that
        behind = bytes(sector[32 + 40 + 48 :])
        struct.pack_into("<QQ", sector, 32 + 40 + 48, inner, size >> 1)
        sector[32 + 40 + 64 :] = behind[: 512 - (32 + 40 + 64)]
        sector[16:20] = struct.pack("<I", lvm_crc(bytes(sector[20:])))
        file.seek(512)
        file.write(sector)
    bmap = mapped(made.image)
    assert names(bmap)[-1] == "lin"
    said = [row for row in bmap.problems.to_pylist() if row["code"] == "two-owners"]
    assert ["overlaps another one" in row["detail"] for row in said] == [True]
