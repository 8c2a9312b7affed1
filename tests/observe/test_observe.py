"""Observed maps without an appliance: a stand-in plays the kernel over a really served disk; content told
from what is read beside it, by brute force."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import mapped, need, run
from virt_bmap import cli
from virt_bmap.ask.check import check
from virt_bmap.core.arrays import union
from virt_bmap.core.errors import BmapError, ImageError, MapError, MissingTool, OutputError, UsageError
from virt_bmap.formats import foreign
from virt_bmap.host import kvm
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.observe import appliance, engine, trace
from virt_bmap.observe.advice import advice
from virt_bmap.observe.climb import climb
from virt_bmap.observe.disks import Reads
from virt_bmap.observe.engine import Observed
from virt_bmap.observe.judge import Judge
from virt_bmap.survey import maps

SIZE = 8 << 20
FAKE = Path(__file__).parents[1] / "fake_guest.py"
KINDS = dict(enumerate(tables.KINDS))


# ---- which reads are content -------------------------------------------------------------------------------


@given(st.data())
def test_content_is_found_where_it_was_read_from_and_nowhere_else(data):
    """Files of random pieces, holes and repeated blocks, read with metadata in between: every row is true,
    and nothing that is not zero is missing."""
    chooser = random.Random(data.draw(st.integers(0, 1 << 30)))
    disk = bytearray(chooser.randbytes(1 << 17))
    disk[4096:8192] = bytes(4096)  # metadata that is all zero
    content, reads, at = bytearray(), [], 16384
    for _ in range(chooser.randrange(1, 12)):
        kind = chooser.choice(("run", "run", "hole", "metadata", "zeroes", "again"))
        units = chooser.randrange(1, 9)
        if kind == "hole":
            content += bytes(units * 512)
        elif kind == "metadata":
            reads.append((chooser.choice((0, 4096)), units * 512))
        else:
            if kind == "zeroes":
                disk[at : at + units * 512] = bytes(units * 512)
            if kind == "again" and content:
                disk[at : at + 512] = content[:512]
            content += disk[at : at + units * 512]
            reads.append((at, units * 512))
            at += (units + chooser.randrange(0, 2)) * 512
    size = max(0, len(content) - chooser.randrange(0, 500))
    content = bytes(content[:size])
    starts = np.array([start for start, _ in reads], np.int64)
    ends = np.array([start + length for start, length in reads], np.int64)
    what = b"".join(bytes(disk[start : start + length]) for start, length in reads)
    if not content:
        return
    found = trace.find(content, starts, ends, np.frombuffer(what, np.uint8))
    known = np.zeros(size, bool)
    for offset, place, length in zip(
        found.offset.tolist(), found.place.tolist(), found.length.tolist(), strict=True
    ):
        assert bytes(disk[place : place + length]) == content[offset : offset + length]
        assert not known[offset : offset + length].any() or not any(content[offset : offset + length])
        known[offset : offset + length] = True
    for low, high in [
        *zip(*map(np.ndarray.tolist, found.left), strict=True),
        *zip(*map(np.ndarray.tolist, found.unsure), strict=True),
    ]:
        known[low:high] = True
    assert not np.frombuffer(content, np.uint8)[~known].any()


def test_content_inside_another_block_is_found_by_its_bytes():
    block = bytearray(random.Random(1).randbytes(4096))
    block[1000:1300] = b"inline content!!" * 18 + b"and a bit..."
    content = bytes(block[1000:1300])
    found = trace.find(content, np.array([8192]), np.array([12288]), np.frombuffer(bytes(block), np.uint8))
    assert (found.offset.tolist(), found.place.tolist(), found.length.tolist()) == ([0], [9192], [300])
    assert found.packed.all()


def test_blocks_that_come_out_of_order_are_no_inline_content():
    data = random.Random(2).randbytes(2048)
    swapped = data[1024:] + data[:1024]
    found = trace.find(data, np.array([5120, 4096]), np.array([6144, 5120]), np.frombuffer(swapped, np.uint8))
    assert sorted(zip(found.offset.tolist(), found.place.tolist(), found.length.tolist(), strict=True)) == [
        (0, 4096, 1024),
        (1024, 5120, 1024),
    ]
    assert not found.packed.any()


def test_zeroes_of_which_only_some_were_read_are_not_guessed():
    found = trace.find(bytes(4096), np.array([0]), np.array([512]), np.zeros(512, np.uint8))
    assert (found.unsure[0].tolist(), found.unsure[1].tolist()) == ([0], [4096])


def test_a_hole_is_not_in_doubt_where_nothing_was_read_for_it():
    found = trace.find(
        bytes(4096) + b"x" * 512, np.array([512]), np.array([1024]), np.full(512, ord("x"), np.uint8)
    )
    assert (found.offset.tolist(), found.place.tolist(), len(found.unsure[0])) == ([4096], [512], 0)


def test_reads_are_climbed_in_their_order():
    rows = tables.make("mappings", volume=[1, 1], volume_offset=[0, 4096], parent=0,
        parent_offset=[8192, 1024], run=4096, parent_run=4096, count=1,
                       volume_step=0, parent_step=0, role=np.zeros(2, np.int8))  # fmt: skip
    volumes = tables.make(
        "volumes",
        volume=[0, 1],
        disk=1,
        kind=["disk", "lv"],
        name=["/dev/sda", "/dev/v/l"],
        size=[1 << 20, 8192],
    )
    bmap = BlockMap(volumes, rows, *(tables.empty(name) for name in BlockMap.TABLES[2:]))
    reads = Reads(np.array([1, 1, 1]), np.array([8192, 512, 1024]), np.array([12288, 2048, 1536]))
    starts, ends = climb(bmap, 1, reads)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(0, 4096), (4096, 5120), (4096, 4608)]


def test_rows_that_overlap_or_go_on_become_one():
    rows = [
        (0, 1000, 4096, 4096, 0),
        (4096, 5096, 4096, 4096, 0),
        (2048, 3048, 512, 512, 0),
        (8192, 0, 512, 512, 0),
    ]
    assert engine.joined(rows).tolist() == [[0, 1000, 8192, 8192, 0], [8192, 0, 512, 512, 0]]


# ---- a whole observation -----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch) -> SimpleNamespace:
    """A disk that only the stand-in understands (its magic says hfs), and the plan of what lies on it."""
    need("nbdkit", "nbdkit")
    chooser = random.Random(3)
    data = bytearray(chooser.randbytes(SIZE))
    data[1024:1026] = b"BD"
    data[510:512] = b"\0\0"
    data[3 << 20 : (3 << 20) + 4096] = bytes(4096)
    image = tmp_path / "disk.img"
    image.write_bytes(data)
    files = {
        "/plain": {"ino": 20, "size": 10_000, "runs": [[0, 1 << 20, 10_240]], "first": [[65536, 1024]]},
        "/pieces": {
            "ino": 21,
            "size": 20_480,
            "runs": [
                [0, 2 << 20, 4096],
                [4096, 1 << 19, 1024],
                [5120, 600 << 10, 3072],
                [16384, 700 << 10, 4096],
            ],
        },
        "/zero": {"ino": 22, "size": 12_288, "runs": [[4096, 3 << 20, 4096]]},
        "/packed": {"ino": 23, "size": 300, "runs": [[0, (4 << 20) + 100, 300]]},
        "/coded": {
            "ino": 24,
            "size": 30_000,
            "coded": [[0, 16384, 5 << 20, 2048], [16384, 16384, (5 << 20) + 65536, 1024]],
            "first": [[65536, 1024]],
        },
        "/empty": {"ino": 25, "size": 0},
        "/broken": {"ino": 26, "size": 5000, "error": "pread: Input/output error"},
        "/same": {"ino": 27, "size": 10_000, "runs": [[0, 1 << 20, 10_240]]},
    }
    plan = {"type": "hfs", "image": str(image), "files": files, "directories": {"/": [800 << 10, 1024]}}
    monkeypatch.setattr(appliance, "GUEST", FAKE)
    monkeypatch.setattr(appliance, "interpreter", lambda: sys.executable)
    monkeypatch.setattr(kvm, "accelerator", lambda: "tcg")
    monkeypatch.setenv("BMAP_FAKE_PLAN", str(tmp_path / "plan"))
    monkeypatch.chdir(tmp_path)

    def write() -> None:
        (tmp_path / "plan").write_text(json.dumps(plan))

    write()
    return SimpleNamespace(
        image=image, data=bytes(data), plan=plan, files=files, write=write, folder=tmp_path
    )


def rows_of(bmap: BlockMap, inode: int) -> list[tuple[str, int | None, int, int, int]]:
    found = bmap.extents.filter(pa.array(tables.integers(bmap.extents, "inode") == inode)).to_pylist()
    return [
        (row["kind"], row["file_offset"], row["volume_offset"], row["length"], row["flags"]) for row in found
    ]


def test_a_filesystem_without_reader_is_mapped_by_observation(machine, capsys):
    assert cli.run(["map", "--method", "observe", "-o", "map.parquet", str(machine.image)]) == 0
    bmap = maps.load("map.parquet")
    assert bmap.filesystems.column("state").to_pylist() == [tables.OBSERVED]
    assert rows_of(bmap, 20) == [("data", 0, 1 << 20, 10_000, tables.SHARED)]
    assert rows_of(bmap, 27) == [("data", 0, 1 << 20, 10_000, tables.SHARED)]
    assert rows_of(bmap, 21) == [
        ("data", at, place, length, 0) for at, place, length in machine.files["/pieces"]["runs"]
    ]
    assert rows_of(bmap, 22) == [("data", 4096, 3 << 20, 4096, 0)]
    assert rows_of(bmap, 23) == [("data", 0, (4 << 20) + 100, 300, tables.INLINE)]
    assert rows_of(bmap, 24) == [
        ("data", 0, 5 << 20, 2048, tables.COMPRESSED),
        ("data", 16384, (5 << 20) + 65536, 1024, tables.COMPRESSED),
    ]
    assert rows_of(bmap, 26) == []
    assert rows_of(bmap, 2) == [("directory", None, 800 << 10, 1024, 0)]
    owner = bmap.owners(1, [65536], [65537])
    assert KINDS[int(tables.codes(bmap.extents, "kind")[owner.extent[-1]])] == "metadata"
    assert bmap.inode_of(0, b"/pieces") == 21
    assert "unreadable" in bmap.problems.column("code").to_pylist()
    assert not list(machine.folder.glob("*.observed"))
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))
    starts = tables.integers(bmap.extents, "volume_offset")
    whole = union(starts, starts + tables.integers(bmap.extents, "length"))
    assert (whole[0].tolist(), whole[1].tolist()) == ([0], [SIZE])
    assert cli.run(["lookup", "map.parquet", hex(1 << 20)]) == 0
    assert "/plain" in capsys.readouterr().out


def test_check_does_not_call_an_observed_map_proven(machine, capsys):
    cli.run(["map", "--method", "observe", "-q", "-o", "map.parquet", str(machine.image)])
    del machine.files["/broken"]
    machine.write()
    cli.run(["map", "--method", "observe", "-q", "-o", "good.parquet", str(machine.image)])
    found = check(maps.load("good.parquet"))
    assert {row.subject for row in found.verdicts if row.result == "proven"} == set()
    capsys.readouterr()
    assert cli.run(["check", "good.parquet"]) == 0
    printed = capsys.readouterr().out
    assert "bytes were never observed" in printed
    assert printed.splitlines()[-2:] == [
        "proven: nothing",
        "not looked at: owners, allocator, structure and checksums of /dev/sda",
    ]
    assert cli.run(["check", "--strict", "good.parquet"]) == 1


def test_an_appliance_that_dies_half_way_loses_nothing_and_the_rest_is_resumed(machine, capsys):
    machine.files["/pieces"]["die"] = True
    machine.write()
    command = ["map", "--method", "observe", "-o", "map.parquet", str(machine.image)]
    with pytest.raises(ImageError, match=r"appliance died during pread: Kernel panic - not syncing"):
        cli.run(command)
    assert "kept in map.parquet.observed: --resume goes on" in capsys.readouterr().err
    assert not (machine.folder / "map.parquet").exists()
    kept = [
        json.loads(line) for line in (machine.folder / "map.parquet.observed").read_text().splitlines()[1:]
    ]
    assert {row["inode"] for row in kept} >= {25, 26}
    with pytest.raises(OutputError, match="interrupted: go on with --resume"):
        cli.run(command)
    del machine.files["/pieces"]["die"]
    for row in kept:  # what was seen before is not read again
        path = next(path for path, about in machine.files.items() if about["ino"] == row["inode"])
        machine.files[path]["die"] = True
    machine.write()
    with open(machine.folder / "map.parquet.observed", "ab") as file:
        file.write(b'{"device": "/dev/sda", "ino')  # the line that was being written
    assert cli.run([*command, "--resume"]) == 0
    assert f"resuming: {len(kept)} files observed before" in capsys.readouterr().out
    assert rows_of(maps.load("map.parquet"), 21)[0] == ("data", 0, 2 << 20, 4096, 0)


def test_files_that_a_dead_virtual_machine_could_not_read_are_not_taken_as_observed(machine):
    machine.files["/pieces"]["crash"] = True
    machine.write()
    with pytest.raises(ImageError, match="died during pread: pread: appliance closed the connection"):
        cli.run(["map", "--method", "observe", "-q", "-o", "map.parquet", str(machine.image)])
    kept = [
        json.loads(line) for line in (machine.folder / "map.parquet.observed").read_text().splitlines()[1:]
    ]
    assert [row["inode"] for row in kept if row["failed"]] == [26]  # /broken: an error of the disk


def test_a_journal_of_another_disk_or_no_journal_is_refused(machine):
    command = ["map", "--method", "observe", "--resume", "-o", "map.parquet", str(machine.image)]
    path = machine.folder / "map.parquet.observed"
    path.write_text('{"virt-bmap observed":1,"disks":[]}\n')
    with pytest.raises(MapError, match="other disks, or they have changed"):
        cli.run(command)
    for text in ("no journal\n", '{"virt-bmap observed":7}\n', "[]\n", "7\n"):
        path.write_text(text)
        with pytest.raises(MapError, match="remove"):
            cli.run(command)
    assert path.exists()


def test_journals_with_impossible_numbers_are_refused(machine):
    machine.files["/same"]["die"] = True
    machine.write()
    command = ["map", "--method", "observe", "-q", "-o", "map.parquet", str(machine.image)]
    with pytest.raises(ImageError):
        cli.run(command)
    path = machine.folder / "map.parquet.observed"
    lines = path.read_text().splitlines(keepends=True)
    good = json.loads(lines[1])
    for change in (
        {"rows": [[0, -1, 1, 1, 0]]},
        {"rows": [[0, 1 << 63, 1, 1, 0]]},
        {"rows": [[1]]},
        {"read": 7},
        {"inode": "x"},
        {"device": None},
    ):
        path.write_text(lines[0] + json.dumps({**good, **change}) + "\n")
        with pytest.raises(MapError, match="line 2 does not belong to an observation"):
            cli.run([*command, "--resume"])


def test_what_can_not_be_observed_is_said_in_a_line(machine, monkeypatch):
    command = ["map", "--method", "observe", "-o", "map.parquet", str(machine.image)]

    def says(words: str, error: type[BmapError], **plan: object) -> None:
        machine.plan.update(plan)
        machine.write()
        with pytest.raises(error, match=words):
            cli.run(command)
        for name in plan:
            del machine.plan[name]
        assert not (machine.folder / "map.parquet.observed").exists()
        machine.plan["type"] = "hfs"

    says(
        "did not start: guestfs_launch failed.*libguestfs-test-tool",
        ImageError,
        launch="guestfs_launch failed. This usually means the",
    )
    says("can mount none.*unknown filesystem type", UsageError, mount="mount: unknown filesystem type 'hfs'")
    says("finds no filesystem", UsageError, filesystems={})
    says("a device that this map does not have", UsageError, filesystems={"/dev/sdq": "hfs"})
    with pytest.raises(UsageError, match="give it a file with -o"):
        cli.run(["map", "--method", "observe", "-o", "-", str(machine.image)])
    with pytest.raises(UsageError, match="needs --method observe"):
        cli.run(["map", "--resume", str(machine.image)])
    monkeypatch.undo()
    monkeypatch.setattr(appliance.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(MissingTool, match="apt-get install python3-guestfs"):
        appliance.interpreter()


def test_an_appliance_that_hangs_is_ended(machine, tmp_path):
    machine.files["/plain"]["hang"] = True
    machine.write()
    with (
        appliance.started(str(tmp_path)) as guest,
        pytest.raises(ImageError, match="did not answer pread for 1 seconds"),
    ):
        guest.call("pread", "/plain", 1, 0, timeout=1)


def test_answers_that_are_none_end_in_words(tmp_path):
    for text in (
        "print('hello')",
        "print('{\"bytes\": 10}')",
        "print('{\"bytes\": -1}')",
        "print('7')",
        "pass",
    ):
        with (
            appliance.started(str(tmp_path), [sys.executable, "-c", text]) as guest,
            pytest.raises(ImageError, match="appliance died"),
        ):
            guest.call("launch")


def test_what_libguestfs_leaves_goes_with_our_folder(tmp_path):
    """It is ended where it makes temporary files, and can't remove them."""
    names = ("LIBGUESTFS_TMPDIR", "XDG_RUNTIME_DIR")
    text = f"import os; [os.mkdir(os.environ[name] + '/' + name) for name in {names}]"
    with appliance.started(str(tmp_path), [sys.executable, "-c", text]) as guest:
        guest._process.wait()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names)


def test_volumes_that_only_an_observation_maps_are_named(machine):
    assert [line.split(":")[0] for line in advice(mapped(machine.image))] == ["/dev/sda"]
    assert "apt-get install python3-guestfs" in next(advice(mapped(machine.image)))
    assert {name for name, *_ in foreign.FILESYSTEMS} >= foreign.MOUNTED


# ---- the judge ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> SimpleNamespace:
    """An ext4 with a file in pieces, its direct map, and what a kernel that agrees sees of it: by debugfs."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("judge")
    (folder / "tree").mkdir()
    with open(folder / "tree/file", "wb") as file:
        file.write(random.Random(4).randbytes(20_000))
        file.seek(100_000)
        file.write(random.Random(5).randbytes(30_000))
    image = folder / "disk.img"
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", folder / "tree", image, "16M")
    blocks = [int(word) for word in run("debugfs", "-R", "blocks /file", image).split()]
    offsets = [*range(0, 20_480, 1024), *range(100_000 // 1024 * 1024, 130_000, 1024)]
    size = 130_000
    rows = [
        (at, block * 1024, min(1024, size - at), min(1024, size - at), 0)
        for at, block in zip(offsets, blocks, strict=True)
    ]
    bmap = mapped(image)
    return SimpleNamespace(image=image, bmap=bmap, rows=rows, size=size, inode=bmap.inode_of(0, b"/file"))


def verdict(
    judged: SimpleNamespace, rows: list, path: str = "/file", size: int | None = None, **more: object
) -> tuple[dict, list[str]]:
    judge = Judge(judged.bmap, 0)
    judge.hear(path, judged.size if size is None else size, Observed(1, rows, **more))
    return judge.verdict.bytes, [row.code for row in judge.verdict.disagreements]


def test_the_judge_agrees_where_both_say_the_same(judged):
    counted, wrong = verdict(judged, judged.rows)
    assert not wrong
    assert counted["agreed"] == sum(row[2] for row in judged.rows)
    assert counted["agreed"] + counted["hole"] == judged.size


def test_the_judge_sees_every_kind_of_disagreement(judged):
    moved = [(at, place + (1024 if at == 3072 else 0), *rest) for at, place, *rest in judged.rows]
    assert set(verdict(judged, moved)[1]) == {"elsewhere"}
    assert verdict(judged, judged.rows[:5] + judged.rows[6:])[1] == ["unread"]
    assert verdict(judged, [*judged.rows, (50_176, 9 << 20, 1024, 1024, 0)])[1] == ["unmapped"]
    assert verdict(judged, judged.rows, path="/other")[1] == ["missing"]
    assert "size" in verdict(judged, judged.rows, size=judged.size + 1)[1]
    assert verdict(judged, judged.rows, failed="Input/output error")[1] == ["unreadable"]
    free = judged.bmap.extents.filter(pa.array(tables.codes(judged.bmap.extents, "kind") == tables.FREE))
    at = (
        tables.integers(free, "volume_offset")[np.argmax(tables.integers(free, "length"))] // 4096 * 4096
        + 8192
    )
    assert verdict(judged, judged.rows, read=[(int(at), int(at) + 4096)])[1] == ["free"]
    assert verdict(judged, judged.rows, read=[(1024, 2048)])[1] == []


def test_zeroes_that_can_not_be_told_from_holes_are_no_disagreement(judged):
    at, place, length, _, _ = judged.rows[5]
    rest = judged.rows[:5] + judged.rows[6:]
    assert verdict(judged, rest, unsure=[(at, at + length)], read=[(place, place + length)]) == (
        {"agreed": sum(row[2] for row in rest), "zeroes": length,
            "hole": judged.size - sum(row[2] for row in judged.rows)}, [],
    )  # fmt: skip
    assert verdict(judged, rest, unsure=[(at, at + length)])[1] == ["unread"]


@given(seed=st.integers(0, 1 << 30))
def test_the_judge_by_brute_force(judged, seed):
    """Rows moved, dropped and added at random: it disagrees about exactly the bytes that differ."""
    chooser = random.Random(seed)
    rows = []
    for at, place, length, file_length, flags in judged.rows:
        change = chooser.randrange(12)
        if change:
            rows.append((at, place + (2048 if change == 1 else 0), length, file_length, flags))
    judge = Judge(judged.bmap, 0)
    judge.hear("/file", judged.size, Observed(1, rows))
    wrong = np.zeros(judged.size, bool)
    for row in judge.verdict.disagreements:
        wrong[row.start : row.end] = True
    expected = np.zeros(judged.size, bool)
    there = {row[0]: row[1] for row in rows}
    for at, place, length, _, _ in judged.rows:
        expected[at : at + length] = there.get(at) != place
    assert (wrong == expected).all()


def test_verify_through_the_command(judged, machine, capsys):
    """The stand-in reads an ext4 as its map says, then otherwise."""
    about = {"ino": judged.inode, "size": judged.size, "runs": [list(row[:3]) for row in judged.rows]}
    machine.plan.update(
        type="ext4",
        image=str(judged.image),
        files={"/file": about, "/lost+found": {"ino": 11, "mode": 0o40700, "size": 12288}},
    )
    machine.write()
    machine.plan["files"]["/file"]["runs"][3][1] += 4096
    with pytest.raises(UsageError, match="--sample 0"):
        cli.run(["verify", "--sample", "0", str(judged.image)])
    # the root directory of the plan has a name that the image lacks
    assert cli.run(["verify", "--json", str(judged.image)]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["code"], row["path"]) for row in lines[1:]] == [("missing", "/lost")]
    machine.write()
    assert cli.run(["verify", str(judged.image)]) == 1
    assert "elsewhere: /file bytes 0xc00-0x1000: in the map at" in capsys.readouterr().out
