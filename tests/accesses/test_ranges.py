"""lookup --ranges: lists that real tools wrote, and what they hit, against content, debugfs and brute
force."""

import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import mapped, need, need_root, run, wait_for_socket
from virt_bmap.accesses.ranges import parse
from virt_bmap.act.make import make
from virt_bmap.ask.hits import grouped_union, hits
from virt_bmap.core.arrays import union
from virt_bmap.core.errors import BmapError, MapError, UsageError
from virt_bmap.core.mapping import COPY, Row, Rows
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

PROGRAM = [sys.executable, "-m", "virt_bmap", "lookup"]
START = 1 << 20
SIZE = 40 << 20


def words(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, **more)


def fails(*arguments: object, **more: Any) -> str:
    done = words(*arguments, **more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    return done.stderr


def objects(disk: Path, ranges: Path, *more: object) -> list[dict[str, Any]]:
    done = words("--json", disk, "--ranges", ranges, *more)
    assert done.returncode == 0, done
    return [json.loads(line) for line in done.stdout.splitlines()]


def pairs(data: str | bytes, **more: Any) -> list[tuple[int, int]]:
    found = parse(data.encode() if isinstance(data, str) else data, "list", **more)
    return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT with an ext4 of 300 files of odd sizes, some fragmented by the holes that deleted files left."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk")
    folder = tmp_path_factory.mktemp("ranges")
    rng = np.random.default_rng(7)
    for number in range(300):
        path = folder / f"tree/d{number % 7}/f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(int(rng.integers(1, 40_000))))
    path = folder / "disk.img"
    make(f"fs:ext4:{SIZE}:gpt", str(path), str(folder / "tree"))
    where = f"{path}?offset={START}"
    (folder / "gone").write_text("".join(f"rm d{n % 7}/f{n}\n" for n in range(0, 300, 3)))
    run("debugfs", "-w", "-f", folder / "gone", where)
    (folder / "big").write_bytes(rng.bytes(3_000_001))
    run("debugfs", "-w", "-R", f"write {folder}/big big", where)
    return path


def contents(disk: Path, folder: Path) -> dict[str, bytes]:
    """All files of the filesystem, as debugfs reads them."""
    folder.mkdir()
    run("debugfs", "-R", f"rdump / {folder}", f"{disk}?offset={START}")
    return {
        f"/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_files_named_damaged_are_those_whose_content_changes(disk: Path, tmp_path: Path) -> None:
    """Every byte in 500 bad ranges is inverted: exactly the files and bytes that are named read differently,
    and nothing else does."""
    chance = random.Random(3)
    bmap = mapped(disk)
    kind, offset, length = (
        tables.codes(bmap.extents, "kind"),
        tables.integers(bmap.extents, "volume_offset"),
        tables.integers(bmap.extents, "length"),
    )
    harmless = np.flatnonzero(
        np.isin(kind, (tables.DATA, tables.FREE)) & (tables.integers(bmap.extents, "volume") == 1)
    )
    data, bad = bytearray(disk.read_bytes()), []
    for _ in range(500):
        row = int(chance.choice(harmless))
        low = START + int(offset[row]) + chance.randrange(int(length[row]))
        bad.append((low, min(chance.choice([1, 512, 4096]), START + int(offset[row] + length[row]) - low)))
    for low, high in zip(
        *(side.tolist() for side in union(np.array([a for a, _ in bad]), np.array([a + n for a, n in bad]))),
        strict=True,
    ):
        data[low:high] = bytes(255 - byte for byte in data[low:high])
    (tmp_path / "bad.img").write_bytes(data)
    (tmp_path / "bad.csv").write_text("offset,length\n" + "".join(f"{a},{n}\n" for a, n in bad))
    before, after = contents(disk, tmp_path / "before"), contents(tmp_path / "bad.img", tmp_path / "after")
    expected = {}
    for path, content in before.items():
        different = np.flatnonzero(np.frombuffer(content, np.uint8) != np.frombuffer(after[path], np.uint8))
        if len(different):
            low, high = union(different, different + 1)
            expected[path] = np.stack([low, high], 1).tolist()
    found = objects(disk, tmp_path / "bad.csv")
    assert {row["path"]: row["ranges"] for row in found if row["kind"] == "data"} == expected
    assert {row["path"]: row["bytes"] for row in found if row["kind"] == "data"} == {
        path: sum(high - low for low, high in ranges) for path, ranges in expected.items()
    }
    assert len(expected) > 50
    assert {row["kind"] for row in found} == {"data", "free", "slack"}
    assert [row["bytes"] for row in found] == sorted((row["bytes"] for row in found), reverse=True)
    everything = sum(
        b - a
        for a, b in zip(*union(np.array([a for a, _ in bad]), np.array([a + n for a, n in bad])), strict=True)
    )
    assert sum(row["bytes"] for row in found) == everything
    shown = words(disk, "--ranges", tmp_path / "bad.csv").stdout.splitlines()
    assert shown[-1].split(" in ")[0].strip() == f"{everything:,} bytes"
    assert all(any(path in line for line in shown) for path in expected)


def test_damaged_files_on_fat(tmp_path: Path) -> None:
    """The same with one cluster in three inverted, and mcopy as the reader."""
    need("mkfs.vfat", "dosfstools"), need("mcopy", "mtools")
    rng = np.random.default_rng(2)
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / f"in/F{number}").write_bytes(rng.bytes(int(rng.integers(0, 9000))))
    image, bad = tmp_path / "fat", tmp_path / "bad"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    run("mkfs.vfat", "-s", "1", image)
    run("mcopy", "-i", image, *sorted((tmp_path / "in").iterdir()), "::/")
    bmap = mapped(image)
    used = np.flatnonzero(tables.codes(bmap.extents, "kind") == tables.DATA)
    low = np.concatenate([np.arange(row["volume_offset"], row["volume_offset"] + row["length"], 1536)
                          for row in bmap.extents.take(used).to_pylist()])  # fmt: skip
    data = np.frombuffer(image.read_bytes(), np.uint8).copy()
    for at in low.tolist():
        data[at : at + 512] ^= 0xFF
    bad.write_bytes(data.tobytes())
    expected = {}
    for path in sorted((tmp_path / "in").iterdir()):
        content = np.frombuffer(path.read_bytes(), np.uint8)
        now = np.frombuffer(run("mtype", "-i", bad, f"::/{path.name}"), np.uint8)
        changed = np.flatnonzero(content != now)
        if len(changed):
            expected[f"/{path.name}"] = np.stack(union(changed, changed + 1), 1).tolist()
    found = hits(bmap, 1, low, low + 512)
    assert {row["path"]: row["ranges"] for row in found.objects if row["kind"] == "data"} == expected
    assert len(expected) > 30
    assert set(found.kinds) == {"data", "slack"}


def test_inode_records_that_a_bad_sector_hits(disk: Path, tmp_path: Path) -> None:
    """debugfs says which inodes a sector of the inode table holds."""
    where = f"{disk}?offset={START}"
    place = run("debugfs", "-R", "imap /d1/f1", where).decode().split("located at block ")[1]
    at = START + int(place.split(",")[0]) * 1024
    (tmp_path / "list").write_text(f"{at // 1024}\n")
    found = objects(disk, tmp_path / "list", "--block-size", "1k")
    records = {row["inode"] for row in found if row["kind"] == "record"}
    number = int(run("debugfs", "-R", "stat /d1/f1", where).decode().split("Inode: ")[1].split()[0])
    first = (number - 1) // 4 * 4 + 1
    used = {
        n for n in range(first, first + 4) if b"marked in use" in run("debugfs", "-R", f"testi <{n}>", where)
    }
    assert records == used
    assert "/d1/f1" in [row["path"] for row in found if row["kind"] == "record"]
    assert [(row["part"], row["bytes"]) for row in found if row["kind"] == "metadata"] == [
        ("inode table", 1024)
    ]


def test_a_damaged_byte_of_a_compressed_block_spoils_the_block(tmp_path: Path) -> None:
    need("mksquashfs", "squashfs-tools")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"".join(b"%d\n" % n for n in range(60_000)))
    size = (tmp_path / "tree/file").stat().st_size
    run("mksquashfs", tmp_path / "tree", tmp_path / "image", "-b", "131072", "-no-fragments", "-quiet")
    bmap = mapped(tmp_path / "image")
    row = next(
        row for row in bmap.extents.to_pylist() if row["kind"] == "data" and row["file_offset"] == 262144
    )
    found = hits(bmap, 1, np.array([row["volume_offset"] + 5]), np.array([row["volume_offset"] + 6]))
    ((hit),) = [each for each in found.objects if each["kind"] == "data"]
    assert (hit["path"], hit["bytes"], hit["ranges"]) == ("/file", 1, [[262144, min(size, 393216)]])


def test_copies_and_files_that_share(tmp_path: Path) -> None:
    """A mirror whose halves lie on one disk, two files that share bytes, and one with the same bytes
    twice."""
    own = tables.ExtentRows()
    own.add(tables.DATA, 0, 100, inode=11, file_offset=0, flags=tables.SHARED)
    own.add(tables.DATA, 0, 100, inode=11, file_offset=500, flags=tables.SHARED)
    own.add(tables.DATA, 50, 50, inode=12, file_offset=7, flags=tables.SHARED)
    bmap = BlockMap(
        volumes=tables.make("volumes", volume=[0, 1], disk=[1, 1], kind=["disk", "md"],
            name=["/dev/sda", "/dev/md0"], size=[1000, 100]),
        mappings=tables.mappings([Rows.of([Row(0, 0, 100, 100), Row(0, 0, 600, 100, role=COPY)], 1)]),
        filesystems=tables.make("filesystems", volume=1, type="xfs", block_size=50, size=100, root=2,
            state="clean"),
        inodes=tables.make("inodes", volume=1, inode=np.array([2, 11, 12]), type=np.array([1, 0, 0]),
            size=np.array([0, 600, 57]), nlink=1, flags=0),
        names=tables.make("names", volume=1, parent=2, inode=np.array([11, 12]), name=[b"a", b"b"]),
        extents=own.table(1), problems=tables.empty("problems"),
    )  # fmt: skip
    found = hits(bmap, 1, np.array([140, 160, 690]), np.array([170, 180, 695]))
    rows = {(row["path"], row["role"]): (row["bytes"], row["ranges"]) for row in found.objects}
    assert rows == {
        ("/a", "data"): (40, [[40, 80], [540, 580]]),
        ("/b", "data"): (30, [[7, 37]]),
        ("/a", "copy"): (5, [[90, 95], [590, 595]]),
        ("/b", "copy"): (5, [[47, 52]]),
    }
    assert (found.size, found.kinds) == (45, {"data": 45})


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_ranges_are_merged_within_their_group(rows):
    group, start, length = (np.array([row[n] for row in rows], np.int64) for n in range(3))
    found = list(zip(*(side.tolist() for side in grouped_union(group, start, start + length)), strict=True))
    expected = {(g, byte) for g, s, n in rows for byte in range(s, s + n)}
    assert {(g, byte) for g, low, high in found for byte in range(low, high)} == expected
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in itertools.pairwise(found)), (
        "sorted, and none touches the next"
    )


# ---- lists that real tools wrote ---------------------------------------------------------------------------


def test_qemu_img_map(disk: Path, tmp_path: Path) -> None:
    """An overlay that changes 5,000 bytes of one file: what is allocated in it is whole clusters around
    these."""
    need("qemu-img", "qemu-utils"), need("qemu-io", "qemu-utils")
    block = int(run("debugfs", "-R", "bmap /big 100", f"{disk}?offset={START}"))
    at = START + block * 1024
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        disk,
        "-F",
        "raw",
        tmp_path / "over.qcow2",
    )
    run("qemu-io", "-c", f"write {at} 5000", tmp_path / "over.qcow2")
    (tmp_path / "list").write_bytes(run("qemu-img", "map", "--output=json", tmp_path / "over.qcow2"))
    assert pairs((tmp_path / "list").read_bytes()) == [(at // 4096 * 4096, (at + 5000 + 4095) // 4096 * 4096)]
    assert "/big" in [row["path"] for row in objects(disk, tmp_path / "list")]
    assert "leaves out everything but data" in fails(
        disk, "--ranges", "-", input=run("qemu-img", "map", disk).decode()
    )


def test_nbdinfo_map(disk: Path, tmp_path: Path) -> None:
    need("nbdinfo", "libnbd-bin"), need("nbdkit", "nbdkit")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 << 20)
        for at in (0, 65536, 1 << 20):
            file.seek(at)
            file.write(b"x" * 5000)
    outputs = {
        words: run(
            "nbdkit", "-r", "-U", "-", "file", tmp_path / "sparse", "--run", f"nbdinfo --map {words} $uri"
        )
        for words in ("", "--json", "--totals")
    }
    assert pairs(outputs[""]) == pairs(outputs["--json"]) != []
    text = [line.split() for line in outputs[""].decode().splitlines()]
    assert pairs(outputs[""]) == [(int(a), int(a) + int(n)) for a, n, kind, _ in text if kind == "0"]
    assert "has no offsets" in fails(disk, "--ranges", "-", input=outputs["--totals"].decode())
    words_ = {"dirty": [(5, 6)], "clean": [], "local": [(5, 6)], "backing depth 2": [], "absent": []}
    for word, expected in words_.items():
        assert pairs(f"0 5 0 hole,zero\n5 1 1 {word}\n") == expected
        assert pairs(json.dumps([{"offset": 5, "length": 1, "type": 1, "description": word}])) == expected


def test_dirty_bitmap_of_an_export(tmp_path: Path) -> None:
    """What a guest wrote since the last backup, as qemu-nbd and nbdinfo tell it."""
    need("qemu-nbd", "qemu-utils"), need("nbdinfo", "libnbd-bin")
    image, socket = tmp_path / "image.qcow2", tmp_path / "socket"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "10M")
    run("qemu-io", "-c", "write 5M 1M", image)
    run("qemu-img", "bitmap", "--add", "-g", "64k", image, "b0")
    run("qemu-io", "-c", "write 1M 100k", image)
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-B", "b0", "-A", "-k", socket, "-f", "qcow2", image])
    try:
        wait_for_socket(socket)
        uri = f"nbd+unix:///?socket={socket}"
        for more in ([], ["--json"]):
            dirty = run("nbdinfo", *more, "--map=qemu:dirty-bitmap:b0", uri)
            assert pairs(dirty) == [(1 << 20, (1 << 20) + (128 << 10))]
            local = run("nbdinfo", *more, "--map=qemu:allocation-depth", uri)
            assert pairs(local) == [(1 << 20, (1 << 20) + (128 << 10)), (5 << 20, 6 << 20)]
    finally:
        server.kill()
        server.wait()


def test_ddrescue_of_a_disk_with_bad_sectors(disk: Path, tmp_path: Path) -> None:
    """A disk that can't be read in three places, through FUSE; ddrescue writes its map, and the files it
    names are those of debugfs."""
    need("ddrescue", "gddrescue"), need("nbdfuse", "libnbd-bin"), need("nbdkit", "nbdkit"), need_root()
    where = f"{disk}?offset={START}"
    blocks = {
        path: int(run("debugfs", "-R", f"bmap {path} 0", where)) for path in ("/big", "/d1/f1", "/d2/f2")
    }
    bad = sorted((START + block * 1024) // 4096 * 4096 for block in blocks.values())
    tests = " || ".join(f"[ {at} -lt $(($4 + $3)) -a $4 -lt {at + 4096} ]" for at in bad)
    (tmp_path / "server").write_text(
        f'case "$1" in get_size) echo {SIZE} ;; pread) if {tests}; then echo EIO bad >&2; exit 1; fi; '
        f"dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=64k status=none ;; *) exit 2 ;; esac"
    )
    (tmp_path / "server").chmod(0o755)
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", tmp_path / "s", "sh", tmp_path / "server"])
    (tmp_path / "mount").mkdir()
    fuse = None
    try:
        wait_for_socket(tmp_path / "s")
        (tmp_path / "mount/nbd").touch()
        fuse = subprocess.Popen(
            ["nbdfuse", "-r", tmp_path / "mount/nbd", f"nbd+unix:///?socket={tmp_path}/s"]
        )
        until = time.monotonic() + 10
        while (tmp_path / "mount/nbd").stat().st_size != SIZE:
            if time.monotonic() > until or fuse.poll() is not None:
                pytest.skip("FUSE is not to be had here")
            time.sleep(0.05)
        run(
            "ddrescue",
            "-q",
            "-b",
            "4096",
            "-c",
            "64",
            "-r",
            "0",
            tmp_path / "mount/nbd",
            tmp_path / "copy",
            tmp_path / "map",
        )
    finally:
        if fuse:
            subprocess.run(["fusermount3", "-u", tmp_path / "mount/nbd"], check=False)
            fuse.wait(timeout=10)
        server.kill()
        server.wait()
    assert pairs((tmp_path / "map").read_bytes()) == [(at, at + 4096) for at in bad]
    hit = {row["path"] for row in objects(disk, tmp_path / "map") if row["kind"] in ("data", "directory")}
    listed = [number for at in bad for number in range((at - START) // 1024, (at - START) // 1024 + 4)]
    owners = run("debugfs", "-R", f"icheck {' '.join(map(str, listed))}", where).decode().split("\n")[1:]
    inodes = {line.split("\t")[1] for line in owners if line and not line.endswith(">")}
    names = run("debugfs", "-R", f"ncheck {' '.join(inodes)}", where).decode().split("\n")[1:]
    assert hit == {line.split("\t")[1].replace("//", "/") for line in names if line}
    assert set(blocks) <= hit
    rows = [row for row in objects(disk, tmp_path / "map") if row["kind"] == "directory"]
    for row in rows:
        listing = run("debugfs", "-R", f"ls -p {row['path']}", where).decode().splitlines()
        assert row["names"] == sum(line.split("/")[5] not in (".", "..") for line in listing if line)
    everything = pairs((tmp_path / "map").read_bytes(), status="+")
    assert sum(high - low for low, high in everything) == SIZE - 3 * 4096


def test_ddrescue_statuses() -> None:
    text = (
        "# Mapfile. Created by GNU ddrescue version 1.27\n# comment\n0x0 + 1\n0 0x10 +\n0x10 16 -\n040 "
        "0x10 *\n48 0x10 /\n0x40 0x10 ?\n"
    )
    assert pairs(text) == [(16, 32), (32, 48), (48, 64)], "numbers as in C: 040 is 32"
    assert pairs(text, status="?+") == [(0, 16), (64, 80)]
    assert pairs(
        text.replace("0x0 + 1", "0x0 F").replace("# Mapfile. Created by GNU ddrescue version 1.27\n", "")
    ) == pairs(text)


def test_badblocks_and_pairs(disk: Path) -> None:
    assert pairs("2\n3\n10\n", block_size=512) == [(1024, 1536), (1536, 2048), (5120, 5632)]
    assert pairs("0x200, 0x200\n1024,1\n2000,0\n") == [(512, 1024), (1024, 1025)], "empty ranges hit nothing"
    assert pairs("Offset,Length\n# a comment\n5,6\n") == [(5, 11)]
    assert pairs("") == pairs("\n\n") == pairs("# nothing\n", block_size=1024) == []
    done = words(disk, "--ranges", "-", input="")
    assert (done.returncode, done.stdout.split()) == (0, ["0", "bytes", "in", "0", "ranges"])
    assert "standard input: empty, 0 ranges" in done.stderr


def test_the_last_block_of_a_disk_may_be_cut(tmp_path: Path) -> None:
    found = parse(b"9\n", "list", block_size=1000).inside(9500, "/dev/sda")
    assert [side.tolist() for side in found] == [[9000], [9500]]


def test_ranges_of_a_saved_map_and_another_disk(disk: Path, tmp_path: Path) -> None:
    block = int(run("debugfs", "-R", "bmap /big 100", f"{disk}?offset={START}"))
    (tmp_path / "list").write_text(f"{START + block * 1024},512\n")
    subprocess.run([*PROGRAM[:-1], "-q", "-o", tmp_path / "m.parquet", disk], check=True)
    subprocess.run([*PROGRAM[:-1], "-q", "-o", tmp_path / "m.bmap", disk], check=True)
    (row,) = objects(disk, tmp_path / "list")
    assert (row["path"], row["ranges"], row["bytes"]) == ("/big", [[102400, 102912]], 512)
    assert objects(tmp_path / "m.parquet", tmp_path / "list") == [row]
    (bare,) = objects(tmp_path / "m.bmap", tmp_path / "list")
    assert (bare["path"], bare["bytes"], bare["ranges"]) == ("/big", 512, []), "text maps hold no offsets"
    done = words("--json", "-a", disk, "-a", disk, "--disk", "2", "--ranges", tmp_path / "list")
    assert json.loads(done.stdout)["device"] == "/dev/sdb1"


# ---- bad input ---------------------------------------------------------------------------------------------

DDRESCUE = "# Mapfile. Created by GNU ddrescue version 1.27\n0x0 + 1\n"
MALFORMED = {
    "nonsense": ("hello world\n", "line 1: 'hello world' is not of a known format; expected a ddrescue map"),
    "binary": ("\udcff\udcfe", "byte 0x0 is not text"),
    "ddrescue block": (DDRESCUE + "0x0 0x200 x\n", "line 3: '0x0 0x200 x' is not a block of a ddrescue map"),
    "ddrescue octal": (DDRESCUE + "09 0x200 -\n", "line 3: '09' is not a number as in C"),
    "ddrescue head": ("# Mapfile. Created by GNU ddrescue version 1.27\n0x0 0x200 +\n",
        "line 2: '0x0 0x200 +' is not the status line"),
    "ddrescue empty": ("# Mapfile. Created by GNU ddrescue version 1.27\n", "with nothing but comments"),
    "ddrescue huge": (DDRESCUE + "0x0 0x200 +\n0x7fffffffffffffff 0x200 -\n",
        "line 4: the range ends beyond byte 2**63"),
    "pairs": ("1,2\n3;4\n", "line 2: '3;4' is not offset,length"),
    "negative": ("1,2\n-3,4\n", "line 2: '-3,4' is not offset,length"),
    "long": (f"1,2\n{'9' * 5000},4\n", "line 2: '9999"),
    "three": ("1,2\n3,4,5\n", "line 2: '3,4,5' is not offset,length"),
    "nbdinfo": ("0 5 0 data\n5 x 0 data\n", "line 2: '5 x 0 data' is not an extent of nbdinfo"),
    "numbers": ("1\n2 3\n", "line 2: '2 3' is not a block number"),
    "unit": ("1\n2\n", "say with --block-size"),
    "JSON": ('[{"start": 0,\n}]', "line 2: is not JSON"),
    "object": ("{}", "line 1: is a JSON object; expected the array"),
    "entry": ('[{"offset": 0, "length": 5, "type": 0}, {"offset": -1, "length": 5, "type": 0}]', "entry 2: "),
    "entry text": ('[{"start": 0, "length": "5", "depth": 0, "data": true}]', "entry 1: "),
    "deep": ("[" * 100_000, "line 1"),
    "another disk": (f"{SIZE - 512},512\n{SIZE},512\n", ("line 2: bytes 0x2800000-0x2800200 lie beyond the "
        "end of /dev/sda")),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lists_are_said_with_their_line(disk: Path, tmp_path: Path, name: str) -> None:
    text, said = MALFORMED[name]
    (tmp_path / "list").write_bytes(text.encode(errors="surrogateescape"))
    more = ["--block-size", "512"] if name == "numbers" else []
    assert said in fails(disk, "--ranges", tmp_path / "list", *more)


@given(st.text(alphabet='0123456789xX,[]{}"# \n\t+-*/?abcdefstartlngh:.%', max_size=60))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    with contextlib.suppress(BmapError):
        found = parse(text.encode(), "list")
        assert (found.ends > found.starts).all()


def test_bad_words(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("1,2\n")
    assert "No such file" in fails(disk, "--ranges", tmp_path / "no")
    assert "Is a directory" in fails(disk, "--ranges", tmp_path)
    assert "not both" in fails(disk, "5", "--ranges", tmp_path / "list")
    assert "not both" in fails("-a", disk, "5", "--ranges", tmp_path / "list")
    assert "not both" in fails(disk, "--ranges", "-", "--keys-from-stdin")
    assert "belong to --ranges" in fails(disk, "5", "--disk", "1")
    assert "there is no disk 3" in fails(disk, "--ranges", tmp_path / "list", "--disk", "3")
    assert "--status is for a ddrescue map" in fails(disk, "--ranges", tmp_path / "list", "--status=+")
    assert "--block-size is for a list of block numbers" in fails(
        disk, "--ranges", tmp_path / "list", "--block-size", "512"
    )
    assert "no disk given" in fails("--ranges", tmp_path / "list")
    (tmp_path / "map").write_text(DDRESCUE + "0x0 0x200 -\n")
    assert "--status takes letters" in fails(disk, "--ranges", tmp_path / "map", "--status", "bad")
    (tmp_path / "numbers").write_text("1\n")
    assert "more than 0" in fails(disk, "--ranges", tmp_path / "numbers", "--block-size", "0")


LOGS = {
    "blkparse": "  8,0    1        1     0.000000000  4510  D   R 2048 + 8 [cat]\n  8,0    1        2     "
    "0.100000000  4510  D   W 4096 + 16 [cat]\n",
    "fio": "fio version 2 iolog\n/dev/sda add\n/dev/sda open\n/dev/sda read 1048576 4096\n/dev/sda write "
    "2097152 8192\n/dev/sda close\n",
    "csv": "time(s),op,sector,bytes\n0.1,R,2048,4096\n0.2,W,4096,8192\n",
}


@pytest.mark.parametrize("name", LOGS)
def test_logs_of_accesses(name):
    found = parse(LOGS[name].encode(), "log")
    assert found.format.startswith("a log of accesses")
    assert sorted(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == [
        (1 << 20, (1 << 20) + 4096),
        (2 << 20, (2 << 20) + 8192),
    ]
    written = parse(LOGS[name].encode(), "log", op="write")
    assert written.starts.tolist() == [2 << 20]
    with pytest.raises(MapError, match=f"line {found.at.max()}: .* beyond the end of /dev/sda"):
        found.inside(2 << 20, "/dev/sda")
    with pytest.raises(UsageError, match="--op is for a log of accesses, but list is offset,length lines"):
        parse(b"1,2\n", "list", op="read")
