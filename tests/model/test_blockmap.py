"""Lookups both ways against brute force, on a stack of layers with copies; saved maps come back as they
were."""

import contextlib
import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virt_bmap.ask.records import owner_records
from virt_bmap.core.errors import MapError, UsageError
from virt_bmap.core.escape import escape, escape_all, unescape
from virt_bmap.core.mapping import COPY, Row, Rows
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners
from virt_bmap.model.listing import describe
from virt_bmap.saved import bmap as text
from virt_bmap.saved import bmap_reader, parquet

SIZE = 4000


def stack() -> BlockMap:
    """One disk; two partitions; on both a mirror in stripes; on that a filesystem of three files, one of them
    hard-linked, one inside the inode table."""
    rows = [
        Rows.of([Row(0, 0, 100, 1500)], 1),
        Rows.of([Row(0, 0, 2000, 1500)], 2),
        Rows.of(
            [
                Row(0, 1, 10, 100, 10, 200, 100),
                Row(100, 2, 10, 100, 10, 200, 100),
                Row(0, 2, 1100, 300, 1, 0, 0, COPY),
            ],
            3,
        ),
    ]
    own = tables.ExtentRows()
    own.add(tables.METADATA, 0, 100, part="inode table")
    own.add(tables.DATA, 40, 8, inode=13, file_offset=0, flags=tables.INLINE)
    own.add(tables.DATA, np.array([100, 700]), np.array([350, 50]), inode=11, file_offset=np.array([0, 1000]))
    own.add(tables.DATA, 450, 250, inode=12, file_offset=0)
    own.add(tables.DIRECTORY, 750, 50, inode=2, file_offset=0)
    own.add(tables.FREE, 800, 1200)
    gaps = tables.ExtentRows()
    gaps.add(tables.GAP, np.array([0, 1600, 3500]), np.array([100, 400, 500]))
    return BlockMap(
        volumes=tables.make("volumes", volume=[0, 1, 2, 3], disk=[1, 1, 1, 1],
            kind=["disk", "partition", "partition", "md"],
                            name=["/dev/sda", "/dev/sda1", "/dev/sda2", "/dev/md0"],
                            size=[SIZE, 1500, 1500, 2000]),
        mappings=tables.mappings(rows),
        filesystems=tables.make("filesystems", volume=3, type="ext4", block_size=50, size=2000, root=2,
            state="clean"),
        inodes=tables.make("inodes", volume=3, inode=np.array([2, 11, 12, 13]),
                           type=np.array([tables.T_DIRECTORY] + [tables.T_FILE] * 3),
                           size=np.array([50, 1050, 250, 8]), nlink=1, flags=0),
        names=tables.make("names", volume=3, parent=2, inode=np.array([11, 12, 12, 13]),
            name=[b"a", b"b\n", b"hard", b"\xff"]),
        extents=tables.concat("extents", [gaps.table(0), own.table(3)]), problems=tables.empty("problems"),
    )  # fmt: skip


def brute(bmap: BlockMap) -> list[set[tuple[int, int, int]]]:
    """For each byte of the disk the set of (volume, extent or -1, offset in the volume) that own it."""
    owned = [{(0, -1, byte)} for byte in range(SIZE)]
    place = {0: [[byte] for byte in range(SIZE)]}
    for row in bmap.mappings.to_pylist():
        own = place.setdefault(
            row["volume"], [[] for _ in range(bmap.volumes.column("size")[row["volume"]].as_py())]
        )
        for i in range(row["count"]):
            for k in range(row["run"]):
                own[row["volume_offset"] + i * row["volume_step"] + k] += place[row["parent"]][
                    row["parent_offset"] + i * row["parent_step"] + k
                ]
    for volume in (1, 2, 3):
        for byte, where in enumerate(place[volume]):
            for at in where:
                owned[at].add((volume, -1, byte))
    for extent, row in enumerate(bmap.extents.to_pylist()):
        for byte in range(row["volume_offset"], row["volume_offset"] + row["length"]):
            for at in place[row["volume"]][byte]:
                owned[at].add((row["volume"], extent, byte))
    return owned


BMAP = stack()
BRUTE = brute(BMAP)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 300)), min_size=1, max_size=5))
def test_owners_of_any_ranges(ranges):
    starts = np.array([s for s, _ in ranges])
    ends = np.minimum(starts + [n for _, n in ranges], SIZE)
    found = BMAP.owners(1, starts, ends)
    seen = [{} for _ in ranges]
    for query, volume, extent, low, high, inside in zip(
        found.query, found.volume, found.extent, found.start, found.end, found.inside, strict=True
    ):
        for byte in range(low, high):
            seen[query].setdefault(byte, set()).add((volume, extent, inside + byte - low))
    for query, (low, high) in enumerate(zip(starts, ends, strict=True)):
        assert seen[query] == {byte: BRUTE[byte] for byte in range(low, high)}


@given(st.integers(0, 1999), st.integers(1, 2000))
def test_descend_finds_every_copy(start, length):
    end = min(start + length, 2000)
    found = BMAP.descend(3, np.array([start]), np.array([end]))
    seen = {
        (inside + k, low + k)
        for low, high, inside in zip(found.start, found.end, found.inside, strict=True)
        for k in range(high - low)
    }
    assert seen == {
        (byte, at)
        for at in range(SIZE)
        for volume, extent, byte in BRUTE[at]
        if volume == 3 and extent < 0 and start <= byte < end
    }


def test_the_flattened_disk_is_the_same_map():
    found = BMAP.disk_extents(1)
    seen = [set() for _ in range(SIZE)]
    for volume, extent, low, high, inside in zip(
        found.volume, found.extent, found.start, found.end, found.inside, strict=True
    ):
        for byte in range(low, high):
            seen[byte].add((volume, extent, inside + byte - low))
    assert seen == BRUTE


def test_most_specific_first_with_hard_links_and_offsets():
    rows = owner_records(BMAP, 1, np.array([100 + 10 + 45]), np.array([100 + 10 + 46]))
    assert [(r["kind"], r["device"], r["path"], r["file_offset"]) for r in rows] == [
        ("data", "/dev/md0", "/\\xff", 5), ("metadata", "/dev/md0", None, None),
        ("md", "/dev/md0", None, None), ("partition", "/dev/sda1", None, None),
        ("disk", "/dev/sda", None, None),
    ]  # fmt: skip
    place = BMAP.descend(3, np.array([460]), np.array([461])).start
    rows = owner_records(BMAP, 1, place, place + 1)
    assert [(r["path"], r["file_offset"]) for r in rows[:2]] == [("/b\\x0a", 10), ("/hard", 10)]


def test_text_map_has_every_owner_of_every_byte():
    file = io.BytesIO()
    text.save(BMAP, file)
    seen = [set() for _ in range(SIZE)]
    last = 0
    for line in file.getvalue().decode().splitlines():
        disk, low, high, kind, device, *name = line.split(" ", 5)
        assert (disk, int(low, 16) >= last) == ("1", True)
        last = int(low, 16)
        for byte in range(int(low, 16), int(high, 16)):
            seen[byte].add((kind, device, *name))
    letters = {"data": "f", "directory": "d", "metadata": "m", "free": "e", "gap": "g"}
    names = {11: ["/a"], 12: ["/b\\x0a", "/hard"], 13: ["/\\xff"], 2: ["/"]}
    kinds, devices = "vppr", BMAP.volumes.column("name").to_pylist()
    extents = BMAP.extents.to_pylist()
    for byte, owners in enumerate(BRUTE):
        expected = set()
        for volume, extent, _ in owners:
            if extent < 0:
                expected.add((kinds[volume], devices[volume]))
                continue
            row = extents[extent]
            words = names.get(row["inode"]) or ([f"[{row['part']}]"] if row["part"] else [])
            expected |= {(letters[row["kind"]], devices[volume], word) for word in words} or {
                (letters[row["kind"]], devices[volume])
            }
        assert seen[byte] == expected, byte


def test_words_of_the_text_map_are_made_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words take hundreds of bytes an owner, and there may be millions of these."""
    bmap, whole, batched = stack(), io.BytesIO(), io.BytesIO()
    text.save(bmap, whole)
    described = []

    def counted(bmap: BlockMap, disk: int, owners: Owners) -> pa.Table:
        described.append(len(owners.query))
        return describe(bmap, disk, owners)

    monkeypatch.setattr(text, "BATCH", 3)
    monkeypatch.setattr(text, "describe", counted)
    text.save(bmap, batched)
    assert batched.getvalue() == whole.getvalue()
    assert max(described) <= 3 < len(described)


def test_text_map_is_read_back():
    file = io.BytesIO()
    text.save(BMAP, file)
    again = io.BytesIO()
    text.save(bmap_reader.load(file.getvalue(), "bmap"), again)
    assert again.getvalue() == file.getvalue()


def test_the_originals_map(corpus):
    """A map written in 2014 loads, answers, and is written back to the letter."""
    data = (corpus / "bmap" / "fedora20.bmap").read_bytes()
    bmap = bmap_reader.load(data, "fedora20.bmap")
    again = io.BytesIO()
    assert text.save(bmap, again) == data.count(b"\n") == 66425
    assert again.getvalue() == data
    rows = owner_records(bmap, 1, np.array([0x541000]), np.array([0x541001]))
    assert [(r["kind"], r["device"], r["path"]) for r in rows] == [
        ("directory", "/dev/sda1", "/"), ("partition", "/dev/sda1", None), ("disk", "/dev/sda", None),
    ]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), [
    (b"nonsense", "line 1 is not a line"),
    (b"1 0 400 v /dev/sda\n1 10 5 f /dev/sda /x\n", "line 2: the range ends"),
    (b"1 0 400 v /dev/sda\n\xff\n", "not UTF-8"), (b"1 0 400 q /dev/sda\n", "line 1"), (b"", "line 1"),
    (b"1 0 ffffffffffffffffff v /dev/sda", "line 1"),
])  # fmt: skip
def test_what_is_no_text_map(line, words):
    with pytest.raises(MapError, match=words):
        bmap_reader.load(line, "bmap")


def test_parquet_gives_back_every_table(tmp_path):
    with open(tmp_path / "m.parquet", "wb") as file:
        parquet.save(BMAP, file, ["disk.img"])
    found = parquet.load(str(tmp_path / "m.parquet"))
    for name in BlockMap.TABLES:
        tables.check(name, getattr(found, name))
        assert getattr(found, name).to_pylist() == getattr(BMAP, name).to_pylist()
    assert owner_records(found, 1, np.array([0]), np.array([SIZE])) == owner_records(
        BMAP, 1, np.array([0]), np.array([SIZE])
    )


def test_damaged_parquet_is_a_map_error(tmp_path):
    with open(tmp_path / "m.parquet", "wb") as file:
        parquet.save(BMAP, file)
    data = (tmp_path / "m.parquet").read_bytes()
    for at in range(4, len(data), max(1, len(data) // 150)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
            (tmp_path / "b.parquet").write_bytes(broken)
            with contextlib.suppress(MapError):  # what is not noticed must at least not crash
                parquet.load(str(tmp_path / "b.parquet"))


@given(st.lists(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(str.encode)), max_size=6))
def test_escapes_are_printable_and_reversible(names):
    import pyarrow as pa

    for name in names:
        shown = escape(name)
        assert unescape(shown) == name
        assert shown.isprintable() or all(c.isprintable() or c.isspace() or ord(c) > 0xA0 for c in shown)
        assert "\n" not in shown
        assert "\x1b" not in shown
    assert escape_all(pa.array(names, pa.large_binary())).to_pylist() == [escape(name) for name in names]


def test_hexadecimal():
    values = np.array([0, 1, 15, 16, 255, 0x541000, 2**62, 2**63 - 1])
    assert text.hexadecimal(values).to_pylist() == [f"{value:x}" for value in values.tolist()]


def test_devices_and_paths_that_are_not_there():
    with pytest.raises(UsageError, match="no device /dev/sdz in this map; there are: /dev/sda, /dev/sda1"):
        BMAP.volume_named("/dev/sdz")
    with pytest.raises(UsageError, match="no file '/zz' on /dev/md0"):
        BMAP.inode_of(3, b"/zz")
    assert BMAP.inode_of(3, b"/hard") == 12
