"""Numbers that no disk has, rows outside, lists left empty, and what nobody expected: each is a problem or
one line, and the rest of the map is there."""

import struct
from pathlib import Path

import numpy as np
import pytest

import recipes
from support import BytesReader, run
from virt_bmap import cli
from virt_bmap.ask.check import check
from virt_bmap.core import errors
from virt_bmap.core.arrays import ints, joined
from virt_bmap.core.errors import BmapError, Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.formats.filesystems import example
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import Filesystem, FilesystemFormat
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows
from virt_bmap.survey import survey
from virt_bmap.survey.maps import map_disks


def sound(bmap: BlockMap) -> BlockMap:
    """The tables keep their contract, and the map is tiled."""
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))
    said = set(bmap.problems.column("detail").to_pylist())
    wrong = [
        found
        for found in check(bmap).disagreements
        if found.code in ("untiled", "outside", "inline-outside") and found.detail not in said
    ]
    assert not wrong
    return bmap


def made(name: str, folder: Path) -> Path:
    try:
        return recipes.make(name, folder).disks[0]
    except recipes.Left as reason:
        pytest.skip(str(reason))


def test_a_number_that_does_not_fit_is_the_disks_fault() -> None:
    assert ints([1, 2**63 - 1]).tolist() == [1, 2**63 - 1]
    for value in (2**63, [1, 2**64 - 1], [2**70]):
        with pytest.raises(Corrupt, match="more than any disk holds"):
            ints(value)


def test_columns_of_no_parts_are_empty() -> None:
    assert [column.tolist() for column in joined([], 3)] == [[], [], []]
    assert [
        column.tolist() for column in joined([(ints([1]), ints([2])), (ints([3, 4]), ints([5, 6]))], 2)
    ] == [
        [1, 3, 4],
        [2, 5, 6],
    ]


@pytest.mark.parametrize("field", [40, 24])
@pytest.mark.parametrize("value", [1 << 63, (1 << 64) - 512])
def test_offsets_and_sizes_of_qcow2(field: int, value: int, tmp_path: Path) -> None:
    """The offset of the L1 table, and the disk's size."""
    image = made("qcow2", tmp_path)
    data = bytearray(image.read_bytes())
    data[field : field + 8] = struct.pack(">Q", value)
    image.write_bytes(data)
    with pytest.raises(BmapError, match=r"qcow2\.qcow2"):
        map_disks([str(image)], host_offsets=True)


def test_the_size_of_a_snapshots_disk(tmp_path: Path) -> None:
    """It says no more than where the state of the virtual machine begins: the map is not lost with it."""
    image = made("qcow2-snapshots", tmp_path)
    data = bytearray(image.read_bytes())
    at = int.from_bytes(data[64:72], "big")
    assert int.from_bytes(data[at + 36 : at + 40], "big") >= 16, "the extra data has the disk's size"
    data[at + 48 : at + 56] = struct.pack(">Q", (1 << 63) + 5)
    image.write_bytes(data)
    assert sound(map_disks([str(image)], host_offsets=True)).volumes.num_rows > 1


def test_the_place_of_vhdxs_log(tmp_path: Path) -> None:
    image = made("vhdx", tmp_path)
    data = bytearray(image.read_bytes())
    for at in (0x10000, 0x20000):
        data[at + 72 : at + 80] = struct.pack("<Q", 0xFE00000000100000)
        data[at + 4 : at + 8] = bytes(4)
        data[at + 4 : at + 8] = struct.pack("<I", crc32c(bytes(data[at : at + 4096])))
    image.write_bytes(data)
    with pytest.raises(BmapError, match="vhdx"):
        map_disks([str(image)], host_offsets=True)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_problem_at_a_byte_that_no_disk_has(tmp_path: Path) -> None:
    """A mapping of a thin pool to block 2^54: the byte has no place in a table, the problem has."""
    bmap = given(filesystem(ExtentRows()), 4096, 2**64)
    assert [(row["code"], row["volume_offset"]) for row in bmap.problems.to_pylist()][:1] == [("tree", None)]


@pytest.mark.parametrize("mode", [0xED0081A4, 0x800081A4, 0xFFFFFFFF])
def test_modes_of_32_bits(mode: int) -> None:
    """Rock Ridge's and btrfs'. What no mode has is not there; -1 stays none."""
    table = tables.make(
        "inodes",
        volume=0,
        inode=np.array([5, 6]),
        type=0,
        mode=np.array([mode, -1]),
        size=0,
        nlink=1,
        flags=0,
    )
    assert table.column("mode").to_pylist() == [mode & 0xFFFF, None]


# ---- rows of a reader --------------------------------------------------------------------------------------


def filesystem(rows: ExtentRows) -> Filesystem:
    """What a reader found on 4096 bytes."""
    reader = BytesReader(np.zeros(4096, np.uint8))
    inodes, names = tables.empty("inodes"), tables.empty("names")
    return Filesystem("one", 4096, 512, -1, "clean", inodes, names, rows.table(0), reader)


def given(found: Filesystem | Exception, size: int, bad: int | None = None) -> BlockMap:
    """The map of a disk on which a reader finds this, with damage at byte `bad`, or fails so."""

    def read(_: Reader, __: object, damage: Damage) -> Filesystem:
        if bad is not None:
            damage.say("tree", "words", bad)
        if isinstance(found, Exception):
            raise found
        return found

    format = FilesystemFormat(
        "one", probe=lambda _: True, read=read, docs=example.FORMAT.docs, checks=example.FORMAT.checks
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "filesystem_on", lambda _: format)
        return survey.survey([BytesReader(np.zeros(size, np.uint8))])


def test_rows_outside_are_cut_off() -> None:
    rows = ExtentRows()
    rows.add(
        tables.METADATA,
        np.array([0, 3000, 4096, 2**62, -512]),
        np.array([512, 2000, 512, 2**62, 512]),
        part="x",
    )
    rows.add(tables.DATA, 1024, 2**63 - 1, file_offset=0)
    bmap = sound(given(filesystem(rows), 4096))
    mine = {
        (row["volume_offset"], row["length"])
        for row in bmap.extents.to_pylist()
        if row["kind"] in ("metadata", "data")
    }
    assert mine == {(0, 512), (3000, 1096), (1024, 3072)}
    assert [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "outside"] == [
        "5 extents lie outside the volume, or reach out of it: cut off"
    ]
    assert {row["file_length"] for row in bmap.extents.to_pylist() if row["kind"] == "data"} == {3072}


def test_what_lies_in_others_covers_nothing() -> None:
    """A small file's content in a record that nobody owns: the bytes get an owner all the same."""
    rows = ExtentRows()
    rows.add(tables.DATA, 512, 100, file_offset=0, inode=7, flags=tables.INLINE)
    bmap = sound(given(filesystem(rows), 4096))
    assert "unreferenced" in bmap.problems.column("code").to_pylist()


# ---- what nobody expected ----------------------------------------------------------------------------------


def test_a_fault_of_a_reader_is_a_problem_of_its_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        given(ZeroDivisionError("words"), 4096)
    monkeypatch.delenv("VIRT_BMAP_STRICT")
    bmap = sound(given(ZeroDivisionError("words\x1b"), 4096))
    (row,) = bmap.problems.to_pylist()
    assert (row["severity"], row["code"]) == ("error", "unexpected")
    assert "ZeroDivisionError at formats/test_hostile_numbers.py" in row["detail"]
    assert "please report it" in row["detail"]
    assert "\x1b" not in row["detail"]
    assert bmap.extents.column("kind").to_pylist() == ["content"]
    with pytest.raises(errors.ImageError):
        given(errors.ImageError("the disk is gone"), 4096)


def test_a_fault_among_volumes_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LVM's reader fails after it made a volume: none of its volumes stays, and the partition beside it is
    mapped."""
    from virt_bmap.formats.volumes import lvm

    image = made("gpt", tmp_path)
    label = bytearray(512)
    label[:8], label[24:32] = b"LABELONE", b"LVM2 001"
    with open(image, "r+b") as file:
        file.seek((5 << 20) + 512)
        file.write(label)
    before = map_disks([str(image)], format="raw")
    monkeypatch.delenv("VIRT_BMAP_STRICT")

    def fails(_: object) -> object:
        raise KeyError("what")

    monkeypatch.setattr(
        lvm,
        "FORMAT",
        lvm.FORMAT._replace(assemble=fails, probe=lambda reader: reader.read_clipped(512, 8) == b"LABELONE"),
    )
    bmap = sound(map_disks([str(image)], format="raw"))
    assert "unexpected" in bmap.problems.column("code").to_pylist()
    assert bmap.inodes.num_rows == before.inodes.num_rows > 100
    assert bmap.volumes.column("name").to_pylist() == ["/dev/sda", "/dev/sda1", "/dev/sda2", "/dev/sda3"]


def test_the_program_ends_with_one_line(tmp_path: Path) -> None:
    """And with all that is known where that is asked for."""
    import subprocess
    import sys

    script = (
        "import sys; from virt_bmap import cli; from virt_bmap.survey import maps\n"
        "def fails(*_, **__): raise KeyError('what\\x1b')\n"
        "maps.mapped = fails\nsys.argv[1:] = ['info', 'x']\ncli.main()"
    )
    for strict in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={"VIRT_BMAP_STRICT": strict, "PATH": "/usr/bin"},
        )
        assert done.returncode == 1
        assert done.stdout == ""
        *traceback, line = done.stderr.splitlines()
        assert line.startswith("virt-bmap: a fault of virt-bmap itself: KeyError at ")
        assert "\x1b" not in line
        assert bool(traceback) == bool(strict)


# ---- diff --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("swap", "ext4"), ("udf-512", "swap"), ("swap", "swap")])
def test_a_side_without_files(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways: nothing of one side has a counterpart."""
    paths = [str(made(name, tmp_path / str(number))) for number, name in enumerate(names)]
    for old, new in (paths, paths[::-1]):
        assert cli.run(["diff", "--force", "--format", "raw", old, new]) in (0, 1)
    capsys.readouterr()


def test_a_volume_that_lost_its_only_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A UDF volume whose root can't be read has no inode left."""
    old = made("udf-512", tmp_path)
    run("cp", old, new := tmp_path / "new.img")
    bmap = map_disks([str(old)], format="raw")
    at = tables.integers(bmap.inodes, "record_offset")[0]
    with open(new, "r+b") as file:
        file.seek(int(at))
        file.write(bytes(512))
    assert map_disks([str(new)], format="raw").inodes.num_rows == 0
    for first, second in ((old, new), (new, old)):
        assert cli.run(["diff", "--format", "raw", str(first), str(second)]) in (0, 1)
    capsys.readouterr()


def test_a_udf_volume_without_a_root(tmp_path: Path) -> None:
    """Nothing beside the tree is listed, and nothing is unpacked."""
    bmap = map_disks([str(image := made("udf-512", tmp_path))], format="raw")
    data = bytearray(image.read_bytes())
    for part in ("file set descriptor", "file entry"):
        for row in bmap.extents.to_pylist():
            if row["part"] == part:
                data[row["volume_offset"] + 16 : row["volume_offset"] + row["length"]] = bytes(
                    row["length"] - 16
                )
    image.write_bytes(data)
    sound(map_disks([str(image)], format="raw"))


def test_a_block_map_of_holes(tmp_path: Path) -> None:
    """VDI grown by a hole: each entry in it leads to block 0, and millions of rows are not made of
    nothing."""
    image = made("vdi", tmp_path)
    data = bytearray(image.read_bytes()[:512])
    count = 1 << 24
    data[0x154:0x15C] = struct.pack("<II", 1 << 20, (1 << 20) + 4 * count)
    data[0x170:0x178] = struct.pack("<Q", count << 20)
    data[0x180:0x184] = struct.pack("<I", count)
    with open(image, "r+b") as file:
        file.write(data)
        file.truncate(1 << 40)
    with pytest.raises(BmapError, match=r"only .* are stored"):
        map_disks([str(image)], host_offsets=True)


def test_arrays_in_arrays_are_each_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen arrays with parity, each in the one before: asked by all below it, each would be worked out
    2^15 times."""
    from virt_bmap.ask import space
    from virt_bmap.core.mapping import DATA, PARITY, Row, Rows

    depth, size = 16, 1 << 20
    roles = (DATA, PARITY)
    rows = [
        Rows.of([Row(0, number - 1, 0, size // 2, role=role) for role in (DATA, PARITY)], number)
        for number in range(1, depth + 1)
    ]
    assert all(set(each.role.tolist()) == set(roles) for each in rows)
    extents = [ExtentRows() for _ in range(depth + 1)]
    extents[depth].add(tables.FREE, 0, size)
    kind = ["disk", *["md"] * depth]
    none = [None] * (depth + 1)
    bmap = BlockMap(
        volumes=tables.make("volumes", volume=np.arange(depth + 1), disk=[1] * (depth + 1), kind=kind,
            name=[f"v{n}" for n in range(depth + 1)],
                            size=[size] * (depth + 1), type=none, label=none, uuid=none, detail=none),
        mappings=tables.mappings(rows), filesystems=tables.empty("filesystems"),
        inodes=tables.empty("inodes"), names=tables.empty("names"),
        extents=tables.concat("extents", [each.table(number) for number, each in enumerate(extents)]),
        problems=tables.empty("problems"),
    )  # fmt: skip
    asked = []
    real = space.sharing_parity
    monkeypatch.setattr(space, "sharing_parity", lambda *given: asked.append(1) or real(*given))
    space.free_space(bmap, 0, doubted={})
    assert depth <= len(asked) <= depth * depth
