"""Files that are deleted, but that a map still names (NTFS): what lies in their clusters while these are
nobody's, and an error otherwise."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ntfs_images
from support import need, run
from virt_bmap import cli
from virt_bmap.core.arrays import complement_by

GONE, SMALL, KEPT = os.urandom(100_000), b"a resident file", os.urandom(70_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with deleted files and a deleted folder."""
    path = tmp_path_factory.mktemp("deleted") / "n.img"
    run("truncate", "-s", "20M", path)
    run(need("mkntfs", "ntfs-3g"), "-q", "-F", path)
    with ntfs_images.fuse(path, "rw") as where:
        (where / "d/sub").mkdir(parents=True)
        for name, data in {
            "d/keep": KEPT,
            "d/gone": GONE,
            "d/small": SMALL,
            "d/sub/inner": GONE[:30_000],
            "d/twice": GONE[:9000],
        }.items():
            (where / name).write_bytes(data)
    with ntfs_images.fuse(path, "rw") as where:
        for name in ("d/gone", "d/small", "d/sub/inner", "d/twice"):
            (where / name).unlink()
        (where / "d/sub").rmdir()
    return path


def cat(image: Path, path: str, capfd: pytest.CaptureFixture[bytes], *options: str) -> tuple[bytes, str]:
    assert cli.run(["cat", *options, str(image), "/dev/sda", path]) == 0
    out, err = capfd.readouterr()
    return out, err.decode()


def test_content_of_deleted_files(image: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for path, data in {
        "/d/gone": GONE,
        "/d/small": SMALL,
        "/d/keep": KEPT,
        "/d/sub/inner": GONE[:30_000],
    }.items():
        out, _ = cat(image, path, capfdbinary)
        assert out == data, path


def test_a_tree_has_living_files_only(image: Path, tmp_path: Path) -> None:
    assert cli.run(["extract", "-q", "-C", str(tmp_path), str(image), "/dev/sda", "/"]) == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {"$Extend"} == {"d", "d/keep"}


def test_deleted_files_are_extracted_by_name(image: Path, tmp_path: Path) -> None:
    assert cli.run(["extract", "-q", "-C", str(tmp_path), str(image), "/dev/sda", "/d/gone", "/d/sub"]) == 0
    assert (tmp_path / "gone").read_bytes() == GONE
    assert (tmp_path / "sub/inner").read_bytes() == GONE[:30_000]


def test_info_counts_the_living(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--json", str(image)]) == 0
    system = json.loads(capsys.readouterr().out)["filesystem"]
    assert (system["files"], system["deleted"]) == (1, 5)
    assert cli.run(["info", str(image)]) == 0
    assert "1 file (5 deleted)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def reused(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same volume, with the clusters of the deleted files given to a new one."""
    path = tmp_path_factory.mktemp("reused") / "n.img"
    path.write_bytes(image.read_bytes())
    with ntfs_images.fuse(path, "rw") as where:
        about = os.statvfs(where)
        with open(where / "new", "wb") as file:
            file.write(b"N" * (about.f_bavail * about.f_bsize - 200_000))
    return path


def test_clusters_of_another_file_are_no_content(
    reused: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from virt_bmap.core.errors import ImageError

    named = [name for name in ("/d/gone", "/d/sub/inner", "/d/twice") if not _readable(reused, name)]
    assert named, "the new file took none of them"
    with pytest.raises(ImageError, match="belong to something else now"):
        cli.run(["cat", str(reused), "/dev/sda", named[0]])
    assert b"NNNN" not in capfdbinary.readouterr().out
    out, err = cat(reused, named[0], capfdbinary, "--partial")
    whole = {"/d/gone": GONE, "/d/sub/inner": GONE[:30_000], "/d/twice": GONE[:9000]}[named[0]]
    assert len(out) == len(whole)
    assert all(got in (0, true) for got, true in zip(out, whole, strict=True)), "zeroes, or what it was"
    assert "zeroes were written for bytes 0x" in err
    assert cli.run(["extract", "-q", "-C", str(tmp_path), str(reused), "/dev/sda", named[0]]) == 1
    assert list(tmp_path.iterdir()) == []
    assert (
        cli.run(["extract", "-q", "--partial", "-C", str(tmp_path), str(reused), "/dev/sda", named[0]]) == 0
    )
    assert (tmp_path / Path(named[0]).name).read_bytes() == out


def _readable(image: Path, path: str) -> bool:
    from virt_bmap.core.errors import BmapError

    try:
        return cli.run(["cat", str(image), "/dev/sda", path]) == 0
    except BmapError:
        return False


def test_a_record_that_tells_no_place(image: Path, tmp_path: Path) -> None:
    """The run list of the deleted record is gone: nothing of it is content, and no zeroes come out."""
    from virt_bmap.core.errors import ImageError
    from virt_bmap.survey.maps import map_disks

    bmap = map_disks([str(image)])
    rows = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    (number,) = [row["inode"] for row in bmap.names.to_pylist() if row["name"] == b"gone"]
    data, at = bytearray(image.read_bytes()), rows[number]["record_offset"]
    record = data[at : at + 1024]
    assert record[:4] == b"FILE"
    place = int.from_bytes(record[20:22], "little")
    while int.from_bytes(record[place : place + 4], "little") != 0x80:
        place += int.from_bytes(record[place + 4 : place + 8], "little")
    data[at + place + int.from_bytes(record[place + 32 : place + 34], "little")] = 0
    broken = tmp_path / "n.img"
    broken.write_bytes(data)
    with pytest.raises(ImageError, match=r"bytes 0x0-0x186a0 \(deleted: where they lay is not kept\)"):
        cli.run(["cat", str(broken), "/dev/sda", "/d/gone"])


def test_a_living_file_comes_before_a_deleted_one_of_its_name(
    image: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "n.img"
    path.write_bytes(image.read_bytes())
    with ntfs_images.fuse(path, "rw") as where:
        # records of deleted files are used again, the one of this name too in the end
        for number in range(40):
            (where / f"other {number}").write_bytes(b"o")
        (where / "d/keep2").write_bytes(b"first")
    with ntfs_images.fuse(path, "rw") as where:
        (where / "d/keep2").unlink()
        (where / "x").write_bytes(b"takes its record")
        (where / "d/keep2").write_bytes(b"second")
    assert cat(path, "/d/keep2", capfdbinary)[0] == b"second"


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
def test_complement_by(sizes: list[int], ranges: list[tuple[int, int, int]]) -> None:
    """Byte for byte as a loop finds it."""
    ranges = [(group, low, high) for group, low, high in ranges if group < len(sizes)]
    columns = np.array(ranges, np.int64).reshape(-1, 3).T
    found = complement_by(np.array(sizes, np.int64), *columns)
    told = [
        (group, at)
        for group, low, high in zip(*(column.tolist() for column in found), strict=True)
        for at in range(low, high)
    ]
    wanted = [(group, at) for group, size in enumerate(sizes) for at in range(size)
              if not any(owner == group and low <= at < high for owner, low, high in ranges)]  # fmt: skip
    assert told == wanted
