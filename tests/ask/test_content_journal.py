"""Content on a filesystem that needs recovery: what is read is what a mount would show, whoever reads it."""

import json
import os
import shutil
from pathlib import Path

import pytest

import xfs_images
from support import mounted, need, need_root, run, sync
from virt_bmap import cli
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened

OLD = b"OLD-CONTENT-"
MIB = 1 << 20


def fsync(path: Path) -> None:
    """Commit the journal's transaction, which leaves the blocks themselves where they were."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def age(where: Path) -> None:
    """Fill nine tenths of the disk with a pattern and delete it: what is not in place yet shows as this
    pattern."""
    about = os.statvfs(where)
    with open(where / "old", "wb") as file:
        file.write(OLD * (about.f_bavail * about.f_bsize * 9 // 10 // len(OLD)))
        os.fsync(file.fileno())
    os.unlink(where / "old")
    sync(where)


def plant(where: Path) -> dict[str, str]:
    """Short and long links, committed to the journal only; their targets."""
    (where / "d").mkdir()
    targets = {f"s{i}": f"short{i}" for i in range(20)} | {f"l{i}": "long/" * 100 + str(i) for i in range(20)}
    for name, target in targets.items():
        os.symlink(target, where / "d" / name)
    fsync(where / "d")
    fsync(where)
    return targets


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def links(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A crashed filesystem with links, whole-disk, and what they lead to."""
    need_root()
    folder = tmp_path_factory.mktemp("crashed-links")
    image, crashed = folder / "disk.img", folder / "crashed.img"
    if request.param == "ext4":
        run("truncate", "-s", "32M", image)
        run("mke2fs", "-q", "-F", "-t", "ext4", image)
    else:
        need("mkfs.xfs", "xfsprogs")
        image = xfs_images.make(image, "--unsupported", size=96 * MIB)
    with mounted(image, "commit=300" if request.param == "ext4" else "") as where:
        age(where)
        targets = plant(where)
        run("cp", "--sparse=always", image, crashed)
    return crashed, targets


def test_links_of_a_crashed_disk_lead_where_the_journal_says(
    links: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    image, targets = links
    assert cli.run(["extract", "-q", "-C", str(tmp_path), str(image), "/dev/sda", "/d"]) == 0
    assert {path.name: os.readlink(path) for path in (tmp_path / "d").iterdir()} == targets


def test_paths_lead_through_links_that_only_the_journal_holds(links: tuple[Path, dict[str, str]]) -> None:
    """A path that passes a link: find() reads the target through the same reader."""
    image, _ = links
    from virt_bmap.ask.content import Files

    with opened(Disks([str(image)])) as (bmap, readers):
        files = Files(bmap, 0, readers[0])
        assert files.target(files.find(b"/d/l7", follow=False)) == b"long/" * 100 + b"7"


def test_a_dump_is_the_disk_as_it_lies_and_says_so(
    links: tuple[Path, dict[str, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image, _ = links
    assert cli.run(["dump", "-q", str(image), "/dev/sda", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert "journal is not replayed" in capfd.readouterr().err


def test_sparsify_copies_what_lies_there(links: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The free space of a filesystem that needs recovery is not given back, and nothing of it is replayed in
    the copy."""
    image, _ = links
    assert cli.run(["sparsify", "-q", str(image), str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_explain_shows_both(links: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes on the disk, and those that the journal has for their place."""
    image, _ = links
    assert cli.run(["locate", "--json", str(image), "/dev/sda", "/d/l3"]) == 0
    place = next(row for row in map(json.loads, capsys.readouterr().out.splitlines()))
    assert cli.run(["explain", "--json", str(image), str(place["start"])]) == 0
    found = json.loads(capsys.readouterr().out)
    there = image.read_bytes()[place["start"] :][:64]
    assert bytes.fromhex(found["bytes"]) == there
    assert b"long/" not in there
    assert b"long/" in bytes.fromhex(found["meant"]["bytes"])
    assert cli.run(["explain", str(image), str(place["start"])]) == 0
    assert "once its journal is replayed" in capsys.readouterr().out


def test_files_whose_content_is_in_the_journal(tmp_path: Path) -> None:
    """data=journal: every file equals what a mount of the same disk shows after its recovery, an image inside
    an image among them."""
    need_root()
    image, crashed, inner = (tmp_path / name for name in ("disk.img", "crashed.img", "inner.img"))
    run("truncate", "-s", "64M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-J", "size=16", image)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/inside").write_bytes(b"inside" * 1000)
    run("truncate", "-s", "2M", inner)
    run("mke2fs", "-q", "-F", "-t", "ext2", "-d", tmp_path / "tree", inner)
    with mounted(image, "data=journal,commit=300") as where:
        age(where)
        (where / "d").mkdir()
        for i in range(100):
            (where / f"d/{i}").write_bytes(b"%d " % i * 3000)
        shutil.copyfile(inner, where / "inner.img")
        fsync(where / "d")
        run("cp", "--sparse=always", image, crashed)
    out = tmp_path / "out"
    out.mkdir()
    assert cli.run(["extract", "-q", "-C", str(out), str(crashed), "/dev/sda", "/"]) == 0
    nested = tmp_path / "nested"
    nested.mkdir()
    options = ["--nested", "/inner.img", str(crashed), "/dev/sda:/inner.img", "/inside"]
    assert cli.run(["extract", "-q", "-C", str(nested), *options]) == 0
    assert (nested / "inside").read_bytes() == b"inside" * 1000
    with mounted(crashed) as where:  # recovers it
        expected = {
            str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()
        }
    assert len(expected) == 101
    assert {name: (out / name).read_bytes() for name in expected} == expected


def test_inline_files_that_only_the_journal_holds(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A crafted journal: the blocks of the inode table as they should be lie in it, and zeroes in their
    place."""
    debugfs, image = need("debugfs", "e2fsprogs"), tmp_path / "inline.img"
    (tmp_path / "tree").mkdir()
    for i in range(30):
        (tmp_path / f"tree/f{i}").write_bytes(b"content of file %d" % i)
    run("truncate", "-s", "16M", image)
    run(
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-O",
        "inline_data",
        "-d",
        tmp_path / "tree",
        image,
    )
    words = run(debugfs, "-R", "imap /f7", image).decode()
    block = int(words.split("located at block ")[1].split(",")[0])
    with open(image, "r+b") as file:
        file.seek(block * 4096)
        (tmp_path / "block").write_bytes(file.read(4096))
    commands = f"journal_open\njournal_write -b {block} {tmp_path / 'block'}\njournal_close\n"
    run(debugfs, "-w", "-f", "/dev/stdin", image, stdin=commands.encode())
    with open(image, "r+b") as file:
        file.seek(block * 4096)
        file.write(bytes(4096))
    assert cli.run(["cat", str(image), "/dev/sda", "/f7"]) == 0
    assert capfdbinary.readouterr().out == b"content of file 7"
