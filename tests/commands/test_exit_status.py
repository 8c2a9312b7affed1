"""One rule for what can't be read: it is named, the status is 1, nothing half-written has a final name;
--partial: zeroes, named all the same, and 0.

The rule is EXIT STATUS in virt-bmap(1). Lost here: the second half of an image that was cut off, and chunks
on a disk that is not given.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_lvm import Group, files
from test_lvm import group as group  # a fixture

from support import need, run
from virt_bmap.act.dump import SparseFile, dump
from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.errors import ImageError
from virt_bmap.core.lost import BEHIND, CHECKSUM, MISSING, NAMED, UNREADABLE, Lost, Missing
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import BytesReader, Reader
from virt_bmap.core.salvage import read_known

MIB = 1 << 20
FILL = np.random.default_rng(3).bytes(5 * MIB)


def virt_bmap(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "virt_bmap", *map(str, arguments)], capture_output=True
    )


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filesystem of 16 MiB of which 9 MiB are left: of one of its files a part is gone, the other is
    whole."""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tree").mkdir()
    for name in ("big1", "big2"):
        (folder / "tree" / name).write_bytes(FILL)
    image = folder / "cut.img"
    run("truncate", "-s", "16M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", folder / "tree", image)
    os.truncate(image, 9 * MIB)
    return image


def lost_one(image: Path) -> str:
    return next(
        name for name in ("big1", "big2") if virt_bmap("cat", image, "/dev/sda", f"/{name}").returncode
    )


def test_cat(cut: Path) -> None:
    name = lost_one(cut)
    done = virt_bmap("cat", cut, "/dev/sda", f"/{name}")
    assert done.returncode == 1
    assert f"/{name} on /dev/sda: can't be read whole: bytes 0x".encode() in done.stderr
    assert b"they lie beyond the end of the disk or volume" in done.stderr
    assert FILL.startswith(done.stdout)
    done = virt_bmap("cat", "--partial", cut, "/dev/sda", f"/{name}")
    assert done.returncode == 0
    assert b"zeroes were written for bytes 0x" in done.stderr
    out, true = np.frombuffer(done.stdout, np.uint8), np.frombuffer(FILL, np.uint8)
    assert len(out) == len(true)
    assert (out[out != true] == 0).all()
    assert (out[: MIB // 4] == true[: MIB // 4]).all()


def test_extract(cut: Path, tmp_path: Path) -> None:
    name = lost_one(cut)
    done = virt_bmap("extract", "-C", tmp_path, cut, "/dev/sda", "/")
    assert done.returncode == 1
    assert f"{name}: left out (--partial fills what is missing with zeroes): bytes 0x".encode() in done.stderr
    assert not (tmp_path / name).exists()
    whole = {"big1": "big2", "big2": "big1"}[name]
    assert (tmp_path / whole).read_bytes() == FILL
    again = tmp_path / "again"
    again.mkdir()
    done = virt_bmap("extract", "--partial", "-C", again, cut, "/dev/sda", "/")
    assert done.returncode == 0
    assert f"{name}: zeroes were written for bytes 0x".encode() in done.stderr
    assert (again / name).read_bytes() == virt_bmap("cat", "--partial", cut, "/dev/sda", f"/{name}").stdout


# ---- a lost member -----------------------------------------------------------------------------------------


def expected(group: Group, name: str, disk: int) -> tuple[bytes, np.ndarray]:
    """The bytes of a logical volume, from the words of `lvs`, and which of them lie on one of the disks."""
    pieces = sorted(group.pieces(name))
    size = pieces[-1][0] + pieces[-1][3]
    data, here = bytearray(size), np.zeros(size, bool)
    images = [image.read_bytes() for image in group.disks]
    for at, number, start, length in pieces:
        data[at : at + length] = images[number][start : start + length]
        here[at : at + length] = number == disk
    return bytes(data), here


@pytest.mark.parametrize("name", ["striped", "two_segments"])
def test_dump_of_a_volume_with_a_lost_member(group: Group, name: str, tmp_path: Path) -> None:
    """Refused before anything is written; with --partial what is there is right, and zeroes stand for the
    rest."""
    out, device = tmp_path / "out", f"/dev/my-vg/{name}"
    done = virt_bmap("dump", group.disks[0], device, out)
    assert done.returncode == 1
    assert b"can't be read whole: bytes 0x" in done.stderr
    assert b"none of the members present holds them" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = virt_bmap("dump", "--partial", group.disks[0], device, out)
    assert done.returncode == 0
    assert f"{device}: zeroes were written for bytes 0x".encode() in done.stderr
    whole, here = expected(group, name, 0)
    assert 0 < here.sum() < len(whole)
    assert out.read_bytes() == np.where(here, np.frombuffer(whole, np.uint8), 0).astype(np.uint8).tobytes()


def test_files_on_a_volume_with_a_lost_member(group: Group, tmp_path: Path) -> None:
    """extract makes what can be read whole, and names the others."""
    done = virt_bmap("extract", "-C", tmp_path, group.disks[0], "/dev/my-vg/striped", "/")
    assert done.returncode == 1
    true = files("striped")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == true[str(path.relative_to(tmp_path))]


def test_a_whole_volume_beside_a_lost_one(group: Group, tmp_path: Path) -> None:
    """What lies on the disk that is there is not refused for its neighbours' sake."""
    assert virt_bmap("dump", group.disks[0], "/dev/my-vg/line-ar", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").read_bytes() == expected(group, "line-ar", 0)[0]


# ---- a disk that fails -------------------------------------------------------------------------------------


class Failing(Reader):
    """A disk with bad sectors."""

    def __init__(self, data: bytes, bad: list[tuple[int, int]]) -> None:
        super().__init__(len(data), "failing")
        self.data, self.bad, self.asked = np.frombuffer(data, np.uint8), bad, 0

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        self.asked += 1
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            if any(low < offset + length and offset < high for low, high in self.bad):
                raise ImageError("Input/output error")
        return np.concatenate(
            [self.data[at : at + n] for at, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
        )


def test_dump_passes_over_bad_sectors_only_where_that_is_known(tmp_path: Path) -> None:
    reader = Failing(FILL, [(MIB + 512, MIB + 1024), (3 * MIB, 3 * MIB + 8192)])
    with (
        (tmp_path / "out").open("wb") as file,
        pytest.raises(ImageError, match=r"0x100000-0x101000 \(reading fails\)"),
    ):
        dump(reader, SparseFile(file, reader.size))
    with (tmp_path / "out").open("wb") as file:
        missing = dump(reader, SparseFile(file, reader.size), partial=True)
    assert missing.first == [(MIB, MIB + 4096, UNREADABLE), (3 * MIB, 3 * MIB + 8192, UNREADABLE)]
    assert missing.size == 3 * 4096
    true = bytearray(FILL)
    true[MIB : MIB + 4096], true[3 * MIB : 3 * MIB + 8192] = bytes(4096), bytes(8192)
    assert (tmp_path / "out").read_bytes() == true


def test_a_disk_that_fails_everywhere_is_not_asked_for_ever() -> None:
    reader = Failing(bytes(64 * MIB), [(0, 64 * MIB)])
    data, lost = read_known(reader, ints(0), ints(64 * MIB))
    assert not data.any()
    assert int((lost.ends - lost.starts).sum()) == 64 * MIB
    assert reader.asked < 2100


def test_sparsify_of_a_disk_that_fails(tmp_path: Path) -> None:
    """nbdkit serves an error for every read behind a place; the copy is made with --partial only."""
    need("nbdkit", "nbdkit")
    image, script, out = tmp_path / "disk.img", tmp_path / "plugin.sh", tmp_path / "out.img"
    run("truncate", "-s", "8M", image)
    image.write_bytes(FILL[: 8 * MIB].ljust(8 * MIB, b"x"))
    script.write_text(
        "#!/bin/bash\n"
        'case "$1" in get_size) echo 8388608;; pread) if [ $4 -lt 4198400 ] && [ $(($4 + $3)) -gt '
        '4194304 ]; then echo "EIO bad sector" >&2; exit 1; fi;'
        f" dd if={image} bs=64k iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none;; *) exit 2;; esac"
    )
    script.chmod(0o755)
    copy = f"{sys.executable} -P -m virt_bmap sparsify -q"
    done = subprocess.run(
        ["nbdkit", "-U", "-", "sh", script, "--run", (f'{copy} "$uri" {out}; echo $?; ls {tmp_path}; '
            f'{copy} --partial "$uri" {out}; echo $?')],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.split()
    assert (words[0], words[-1]) == ("1", "0"), done.stderr
    assert "out.img" not in words
    assert "zeroes were written for bytes 0x400000-0x401000 (reading fails)" in done.stderr
    true = bytearray(image.read_bytes())
    true[4194304:4198400] = bytes(4096)
    assert out.read_bytes() == true


# ---- what is told ------------------------------------------------------------------------------------------


def test_lost_bytes_of_mapped_volumes_are_those_that_no_row_places() -> None:
    """Two layers of rows with gaps, against a count byte by byte."""
    random = np.random.default_rng(5)
    for _ in range(40):
        edges = np.sort(random.choice(400, 12, replace=False)).tolist()
        inner = [Row(low, 0, low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        below = MappedReader(
            400, "inner", {0: BytesReader(np.ones(400, np.uint8), "disk")}, Rows.of(inner, 1), [(0, 30)]
        )
        outer = [Row(0, 1, 200, 150), Row(200, 1, 0, 150)]
        reader = MappedReader(400, "outer", {1: below}, Rows.of(outer, 2))
        has = np.zeros(400, bool)
        for low, high in [*zip(edges[::2], edges[1::2], strict=True), (0, 30)]:
            has[low:high] = True
        there = np.zeros(400, bool)
        there[0:150], there[200:350] = has[200:350], has[0:150]
        low, high = sorted(random.integers(0, 400, 2).tolist())
        lost = reader.lost(ints(low), ints(high + 1))
        told = np.zeros(400, bool)
        for start, end in zip(lost.starts.tolist(), lost.ends.tolist(), strict=True):
            told[start:end] = True
        assert (told[low : high + 1] == ~there[low : high + 1]).all()
        assert not told[:low].any()
        assert not told[high + 1 :].any()
        assert not reader.whole


def test_ranges_are_counted_and_the_first_are_named() -> None:
    missing = Missing()
    assert not missing
    for at in range(0, 40_000, 2000):
        missing.add(Lost(ints([at, at + 500]), ints([at + 500, at + 1000]), ints([MISSING, MISSING])))
    missing.add(Lost(ints(39_000), ints(40_000), ints(MISSING)))  # goes on where the last one ended
    assert (missing.ranges, missing.size, len(missing.first)) == (20, 21_000, NAMED)
    assert missing.first[1] == (2000, 3000, MISSING)
    assert "and 12 more ranges, 20.5 KiB in all" in str(missing)
    other = Missing()
    other.add(Lost(ints([0, 10]), ints([10, 20]), ints([CHECKSUM, BEHIND])))
    assert other.ranges == 2


def test_every_command_that_moves_bytes_says_so() -> None:
    """The word is one, and those that have it tell of it where statuses are told."""
    pages = Path(__file__).resolve().parents[2] / "docs/man"
    for name in ("cat", "extract", "dump", "sparsify"):
        assert b"--partial" in virt_bmap(name, "--help").stdout
        assert "\\-\\-partial" in (pages / f"virt-bmap-{name}.1").read_text().split(".SH EXIT STATUS")[1]
    assert "\\-\\-partial" in (pages / "virt-bmap.1").read_text().split(".SH EXIT STATUS")[1]
