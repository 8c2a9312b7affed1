"""cat and extract: files and trees equal what was put in, on every filesystem, and nothing on a disk leads
out of the folder."""

import ast
import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_ext_corpus import LARGEST, unpack

import btrfs_images
import fat_images
import ntfs_images
import xfs_images
from support import BytesReader, mounted, mutations, need, need_root, run, unmount
from virt_bmap.act import extract as writer
from virt_bmap.ask import content
from virt_bmap.ask.content import Files
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import BmapError, OutputError, Unsupported, UsageError
from virt_bmap.open.disks import Disks
from virt_bmap.survey import maps
from virt_bmap.survey.survey import survey_open

MIB = 1 << 20
Facts = dict[str, tuple[object, ...]]


def plant(root: Path) -> None:
    """Files of many kinds: sizes around blocks, holes, preallocated space, links, modes, times, names."""
    random = np.random.default_rng(6)
    (root / "sizes").mkdir()
    for size in (0, 1, 40, 100, 511, 513, 4095, 4096, 4097, 70_000, 3 * MIB + 5):
        (root / "sizes" / str(size)).write_bytes(random.bytes(size))
    with open(root / "holes", "wb") as file:
        for at in (100_000, 900_000, 901_000, 5 * MIB):
            file.seek(at)
            file.write(random.bytes(3000))
        file.truncate(8 * MIB + 1)
    with open(root / "preallocated", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 200_000)
        file.seek(60_000)
        file.write(random.bytes(10_000))
    (root / "many").mkdir()
    for number in range(150):
        (root / "many" / f"file {number}").write_bytes(b"%d\n" % number * (number % 40))
    os.link(root / "sizes/4097", root / "many/another name")
    os.link(root / "sizes/4097", root / "third name")
    for name, target in {"short": "sizes/100", "long": "./" * 200 + "sizes/100", "absolute": "/sizes",
        "dangling": "/etc/nowhere",
                         "out": "../../sizes/1", "loop": "loop"}.items():  # fmt: skip
        os.symlink(target, root / name)
    (root / os.fsdecode(b"not utf-8 \xff\n")).write_bytes(b"odd")
    os.mkfifo(root / "fifo")
    (root / "closed").mkdir()
    (root / "closed/secret").write_bytes(b"secret")
    (root / "closed/secret").chmod(0o000)
    (root / "sizes/1").chmod(0o4751)
    os.chown(root / "sizes/40", 1234, 5678)
    os.utime(root / "sizes/100", ns=(0, 981_173_106_789_012_345))
    os.utime(root / "short", ns=(0, 1_234_567_890_123_456_789), follow_symlinks=False)
    (root / "closed").chmod(0o555)
    os.utime(root / "closed", ns=(0, 1_111_111_111_000_000_001))


def facts(root: Path, owners: bool = False, modes: bool = True) -> Facts:
    """By path: type and mode, time, size, other names, SHA-256 or target; what `extract` is to keep.

    Without fifos and lost+found.
    """
    found: Facts = {}
    names: dict[int, list[str]] = {}
    for folder, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(folder, name)
            here = os.path.relpath(path, root)
            about = path.lstat()
            if stat.S_ISFIFO(about.st_mode) or here == "lost+found":
                continue
            mode = about.st_mode & ~(0 if owners else 0o7000) if modes else stat.S_IFMT(about.st_mode)
            what = (
                os.readlink(path)
                if path.is_symlink()
                else ""
                if path.is_dir()
                else hashlib.sha256(path.read_bytes()).hexdigest()
            )
            size = 0 if path.is_dir() else about.st_size
            names.setdefault(about.st_ino, []).append(here)
            found[here] = (
                mode,
                about.st_mtime_ns,
                size,
                what,
                *((about.st_uid, about.st_gid) if owners else ()),
                about.st_ino,
            )
    return {path: (*row[:-1], sorted(names[row[-1]])) for path, row in found.items()}  # type: ignore[index]


def ext(folder: Path, options: str) -> Path:
    image = folder / "disk.img"
    run("truncate", "-s", "48M", image)
    run("mke2fs", "-q", "-t", "ext4", *options.split(), image)
    return image


MAKE: dict[str, Callable[[Path], Path]] = {
    "ext4": lambda folder: ext(folder, "-O ^has_journal"),
    "ext4-inline": lambda folder: ext(folder, "-O inline_data,^has_journal -I 1024"),
    "ext2": lambda folder: ext(folder, "-O ^extent,^has_journal,^64bit,^metadata_csum"),
    "xfs": lambda folder: xfs_images.make(folder / "disk.img"),
    "btrfs": lambda folder: btrfs_images.make(folder, "128M", "-m dup")[0],
}


@pytest.mark.parametrize("kind", MAKE)
def test_trees_are_as_they_were(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_root()
    image = MAKE[kind](tmp_path)
    with mounted(image, kind="ext4" if kind.startswith("ext4") else "") as root:
        plant(root)
        before, owned = facts(root), facts(root, owners=True)
    for options, expected in (([], before), (["--same-owner"], owned)):
        out = tmp_path / f"out{len(options)}"
        out.mkdir()
        assert bmap(["extract", *options, str(image), "/dev/sda", "/", "-C", str(out)]) == 0
        assert "left out: devices, fifos and sockets: 1, the first: fifo" in capsys.readouterr().err
        assert facts(out, owners=bool(options)) == expected
        assert (out / "holes").stat().st_blocks * 512 < MIB, "holes stay holes"


def test_options_stand_between_plain_arguments(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "words").write_text("here")
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(4 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-d", source, tmp_path / "disk")
    orders = ("{} /dev/sda -C OUT /words", "{} -C OUT /dev/sda /words", "-a {} /dev/sda -q /words -C OUT")
    for at, words in enumerate(orders):
        out = tmp_path / str(at)
        out.mkdir()
        given = [word.format(tmp_path / "disk").replace("OUT", str(out)) for word in words.split()]
        assert bmap(["extract", *given]) == 0
        assert (out / "words").read_text() == "here"


def test_windows_filesystems(tmp_path: Path) -> None:
    need("mkntfs", "ntfs-3g"), need("ntfs-3g", "ntfs-3g"), need_root()
    volume = ntfs_images.make(tmp_path / "ntfs.img", 24, 4096, 512)
    with ntfs_images.fuse(volume.image, "rw") as root:
        ntfs_images._sizes(volume, root, np.random.default_rng(1), 4096)
        ntfs_images._names(volume, root)
        (root / "name" / ("€" * 200)).unlink()  # 600 bytes: more than a name may have here
        ntfs_images._streams(volume, root, np.random.default_rng(2))
        before = facts(root, modes=False)
    (tmp_path / "all").mkdir()
    assert bmap(["extract", "-q", str(volume.image), "/dev/sda", "/", "-C", str(tmp_path / "all")]) == 0
    whole = facts(tmp_path / "all")
    assert whole.pop("$Extend")
    assert {path: row[2:] for path, row in whole.items()} == {path: row[2:] for path, row in before.items()}
    out = tmp_path / "ntfs"
    out.mkdir()
    with maps.opened(Disks([str(volume.image)])) as (bmap_, readers):
        files = Files(bmap_, 0, readers[0])
        for (path, stream), data in volume.streams.items():
            inode = files.find(path.encode())
            if files.refusal(inode, stream) is None:
                assert (
                    b"".join(
                        part.tobytes()
                        for part in content.spread(files.pieces([inode], stream), files.length(inode, stream))
                    )
                    == data
                )
    tops = sorted({"/" + path.split("/")[0] for path in before})
    assert bmap(["extract", "-q", str(volume.image), "/dev/sda", *tops, "-C", str(out)]) == 0
    after = facts(out, modes=False)
    assert os.readlink(out / "name/soft") == "żółć"
    assert {path: row[2:] for path, row in after.items()} == {path: row[2:] for path, row in before.items()}
    assert all(
        abs(after[path][1] - row[1]) < 100 for path, row in before.items() if not stat.S_ISLNK(row[0])
    ), "units of 100 ns"  # type: ignore[operator]


@pytest.mark.parametrize("flavour", ["fat12", "fat32"])
def test_fat(flavour: str, tmp_path: Path) -> None:
    if flavour not in fat_images.FLAVOURS:
        flavour = next(name for name in fat_images.FLAVOURS if name.startswith(flavour))
    image = fat_images.make(tmp_path, flavour)
    contents = fat_images.fill(image, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert bmap(["extract", "-q", str(image), "/dev/sda", "/", "-C", str(out)]) == 0
    found = {
        f"/{path.relative_to(out)}": b"" if path.is_dir() else path.read_bytes() for path in out.rglob("*")
    }
    assert found == contents


def test_corpus_contents_are_those_that_kernels_read(corpus: Path) -> None:
    """SHA-256 of files and targets of links, as tables of a mounted walk have them."""
    compared = 0
    for truth in sorted((corpus / "truth").rglob("*.truth.tsv")):
        if not str(truth.relative_to(corpus / "truth")).startswith(("fox-it+dissect", "dsoprea", "tytso")):
            continue
        data = unpack(corpus / "images" / str(truth.relative_to(corpus / "truth")).removesuffix(".truth.tsv"))
        if len(data) > LARGEST:
            continue
        found, readers = survey_open([BytesReader(np.frombuffer(data, np.uint8))])
        volume = found.filesystems.column("volume")[0].as_py()
        files = Files(found, volume, readers[volume])
        if files.state != "clean":
            continue
        for line in truth.read_text().splitlines():
            if line.startswith("#") or line.split("\t")[1] not in "fl":
                continue
            path, kind, *_, said, _ = line.split("\t")
            inode = files.find(os.fsencode(ast.literal_eval(path)), follow=False)
            if kind == "l":
                target = files.target(inode)
                assert target is None or target == ast.literal_eval(said), (truth, path)
            elif not files.refusal(inode):
                parts = content.spread(files.pieces([inode]), files.length(inode))
                assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == said, (
                    truth,
                    path,
                )
                compared += 1
    assert compared > 200


# ---- one file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 with the files of `plant`, and a copy of these."""
    need_root()
    folder = tmp_path_factory.mktemp("content")
    (folder / "tree").mkdir()
    plant(folder / "tree")
    image = folder / "disk.img"
    run("truncate", "-s", "48M", image)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder / "tree", image)
    return image


def virt_bmap(*arguments: object, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "virt_bmap", *map(str, arguments)], capture_output=True, **more
    )  # type: ignore[call-overload,no-any-return]


def test_cat_gives_the_bytes_of_a_file(disk: Path) -> None:
    for path in (
        "sizes/0",
        "sizes/100",
        "short",
        "long",
        "absolute/4097",
        "holes",
        "preallocated",
        "out",
        "/sizes/../third name",
    ):
        name = {"out": "sizes/1", "absolute/4097": "sizes/4097"}.get(path, path.lstrip("/"))
        done = virt_bmap("cat", disk, "/dev/sda", path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (disk.parent / "tree" / name).read_bytes(), path


def test_cat_says_what_is_wrong(disk: Path, tmp_path: Path) -> None:
    for path, words in {
        "nowhere": "no file nowhere on /dev/sda",
        "dangling": "no file dangling",
        "loop": "more than 40 symbolic links",
        "sizes": "is not a file, but of type directory",
        "fifo": "of type fifo",
        "sizes/1/x": "no file",
    }.items():
        done = virt_bmap("cat", disk, "/dev/sda", path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert words in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1
    assert (
        b"no file on /dev/sda has a stream x"
        in virt_bmap("cat", disk, "/dev/sda", "short", "--stream", "x").stderr
    )
    assert b"cat needs a disk, DEVICE and PATH" in virt_bmap("cat", disk, "/dev/sda").stderr
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "virt_bmap", "cat", disk, "/dev/sda", "holes"],
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert b"standard output can't be written" in done.stderr


def test_batches_however_small_give_the_same(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BATCH", 1000)
    with maps.opened(Disks([str(disk)])) as (bmap_, readers):
        files = Files(bmap_, 0, readers[0])
        inodes = [files.find(path) for path in (b"sizes/3145733", b"holes", b"sizes/0", b"sizes/4097")]
        found = [np.zeros(files.length(inode), np.uint8) for inode in inodes]
        for piece in files.pieces(inodes):
            found[piece.file][piece.offset : piece.offset + len(piece.data)] = piece.data
    for data, name in zip(found, ("sizes/3145733", "holes", "sizes/0", "sizes/4097"), strict=True):
        assert data.tobytes() == (disk.parent / "tree" / name).read_bytes()


def test_compressed_and_encrypted_files_are_refused_by_name(tmp_path: Path) -> None:
    tree, image = tmp_path / "tree", tmp_path / "packed.erofs"
    tree.mkdir()
    (tree / "packed").write_bytes(b"again and again " * 10_000)
    run(need("mkfs.erofs", "erofs-utils"), "--quiet", "-zlz4", image, tree)
    done = virt_bmap("cat", image, "/dev/sda", "/packed")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"/packed on /dev/sda: can't be read: stored compressed or encrypted" in done.stderr
    out = tmp_path / "out"
    out.mkdir()
    done = virt_bmap("extract", image, "/dev/sda", "/", "-C", out)
    assert done.returncode == 1, "a file is missing"
    assert (
        b"left out: files whose content can't be read: stored compressed or encrypted: 1, the first: packed"
        in done.stderr
    )
    assert not (out / "packed").exists()


def test_what_lies_nowhere_is_told_and_takes_no_bytes(tmp_path: Path) -> None:
    """On a disk that was cut off, a file of 8 TiB may have had content anywhere."""
    tree, image, out = tmp_path / "tree", tmp_path / "cut.img", tmp_path / "out"
    tree.mkdir()
    out.mkdir()
    with open(tree / "long", "wb") as file:
        file.write(b"begin")
        file.truncate(8 << 40)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, image, "64M")
    os.truncate(image, 48 << 20)
    begun = time.monotonic()
    done = virt_bmap("extract", image, "/dev/sda", "/long", "-C", out)
    assert done.returncode == 1
    assert b"they lie beyond the end of the disk or volume" in done.stderr
    assert not (out / "long").exists()
    done = virt_bmap("extract", "--partial", image, "/dev/sda", "/long", "-C", out)
    assert (out / "long").stat().st_size == 8 << 40
    assert (out / "long").stat().st_blocks * 512 < 1 << 20
    with open(out / "long", "rb") as file:
        assert file.read(8) == b"begin\0\0\0"
    assert time.monotonic() - begun < 30


def test_a_filesystem_that_needs_recovery_is_said_to_be_old(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(disk.read_bytes())
    run("debugfs", "-w", "-R", "feature needs_recovery", image)
    done = virt_bmap("cat", image, "/dev/sda", "sizes/100")
    assert done.stdout == (disk.parent / "tree/sizes/100").read_bytes()
    assert b"is not clean" in done.stderr
    assert b"as recovery would leave them" in done.stderr


# ---- hostile disks -----------------------------------------------------------------------------------------


def patched(folder: Path, changes: dict[bytes, bytes]) -> Path:
    """An ext4 whose names are changed on the disk: names that no kernel would make."""
    need("debugfs", "e2fsprogs")
    tree = folder / "tree"
    for name in (b"AAAA", b"BBBBBB", b"Dtwin/inside", b"Etwin"):
        path = tree / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"evil")
    (tree / "Etwin").unlink()
    os.symlink(folder / "outside", tree / "Etwin")
    (tree / "FFFFFFFFFFFFFF").mkdir()
    (tree / "FFFFFFFFFFFFFF/inside").write_bytes(b"evil")
    os.symlink(folder / "outside", tree / "GGGG")
    image = folder / "disk.img"
    run("truncate", "-s", "8M", image)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^metadata_csum,^dir_index", "-d", tree, image)
    data = image.read_bytes()
    for name, other in changes.items():
        assert (len(name), data.count(name)) == (len(other), 1)
        data = data.replace(name, other)
    image.write_bytes(data)
    (folder / "outside").mkdir()
    (folder / "out").mkdir()
    return image


HOSTILE = {
    "above": ({b"FFFFFFFFFFFFFF": b"../outside/evi"}, b"names that can't be names here"),
    "absolute": ({b"BBBBBB": b"/tmp/x"}, b"names that can't be names here"),
    "nul": ({b"BBBBBB": b"BB\0BBB"}, b"names that can't be names here"),
    "twins": ({b"Dtwin": b"Etwin"}, b"files whose name is taken already"),
    "dots": ({b"FFFFFFFFFFFFFF": b"./././././././"}, b"names that can't be names here"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_name_leads_out_of_the_folder(kind: str, tmp_path: Path) -> None:
    changes, words = HOSTILE[kind]
    image = patched(tmp_path, changes)
    done = virt_bmap("extract", image, "/dev/sda", "/", "-C", tmp_path / "out")
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    assert list((tmp_path / "outside").iterdir()) == []
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "out", "outside", "tree"]
    assert not os.path.exists("/tmp/x")
    assert (tmp_path / "out/AAAA").read_bytes() == b"evil", "the others are there"


def test_a_directory_in_itself_is_made_once(tmp_path: Path) -> None:
    image = patched(tmp_path, {})
    run("debugfs", "-w", "-R", "link /Dtwin /Dtwin/again", image)
    done = virt_bmap("extract", image, "/dev/sda", "/Dtwin", "-C", tmp_path / "out")
    assert done.returncode == 1
    assert b"directories that lie inside themselves" in done.stderr
    assert os.listdir(tmp_path / "out/Dtwin") == ["inside"]


def test_where_a_snapshot_lacks_subvolumes_are_empty_directories(tmp_path: Path) -> None:
    """As the kernel shows them: all have one inode number, which is no loop."""
    image = btrfs_images.make(tmp_path, "128M", "-m single")[0]
    script = "btrfs -q subvolume create home; echo hello > home/file; mkdir d; btrfs -q subvolume create d/x"
    with mounted(image) as root:
        btrfs_images.fill(root, f"{script}; for i in 1 2 3; do btrfs -q subvolume snapshot . s$i; done")
        wanted = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        stubs = [path for path in wanted if (root / path).lstat().st_ino == 2]
    assert len(stubs) == 2 + 3 + 4
    (tmp_path / "out").mkdir()
    done = virt_bmap("extract", "-q", image, "/dev/sda", "/", "-C", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")) == wanted


def test_damage_ends_in_words(tmp_path: Path) -> None:
    """Damaged disks: what can be read is written, or one of the project's own errors says why not; nothing is
    left half done."""
    image = patched(tmp_path, {}).read_bytes()
    for number, data in enumerate(mutations(image, 60, 6, [(0, len(image) // 16)])):
        out = tmp_path / f"damaged{number}"
        out.mkdir()
        try:
            found, readers = survey_open([BytesReader(data)])
            files = Files(found, 0, readers[0])
            writer.extract(files, files.children(files.root), str(out), same_owner=False)
        except BmapError:
            assert os.listdir(out) == []
        assert not [name for name in os.listdir(out) if name.startswith(".virt-bmap")]
        assert os.listdir(tmp_path / "outside") == []


# ---- where it is written -----------------------------------------------------------------------------------


def extract(image: Path, out: Path, *paths: str) -> None:
    bmap(["extract", "-q", str(image), "/dev/sda", *paths, "-C", str(out)])


def test_existing_names_are_refused_and_nothing_is_half_done(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "holes").write_bytes(b"mine")
    with pytest.raises(OutputError, match="holes exists there already"):
        extract(disk, tmp_path, "/many", "/holes")
    os.symlink("/nowhere", tmp_path / "sizes")
    with pytest.raises(OutputError, match="sizes exists there already"):
        extract(disk, tmp_path, "/sizes")
    assert (tmp_path / "holes").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="no file /gone"):
        extract(disk, tmp_path, "/many", "/gone")
    with pytest.raises(UsageError, match="called 1"):
        extract(disk, tmp_path, "/sizes/1", "/sizes/1")
    with pytest.raises(OutputError, match="is not a directory"):
        extract(disk, tmp_path / "missing", "/many")
    with pytest.raises(UsageError, match="does not name a file"):
        extract(disk, tmp_path, "/many/../sizes/.")
    assert sorted(os.listdir(tmp_path)) == ["holes", "sizes"]


def test_no_space_and_no_permission_leave_nothing_behind(disk: Path, tmp_path: Path) -> None:
    need_root()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path)
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            extract(disk, tmp_path, "/")
        assert os.listdir(tmp_path) == []
        run("mount", "-o", "remount,ro", tmp_path)
        with pytest.raises(OutputError, match="Read-only file system"):
            extract(disk, tmp_path, "/sizes/1")
    finally:
        unmount(tmp_path)


def test_what_is_no_filesystem_has_no_files(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    run("truncate", "-s", "4M", image)
    run("mkswap", image)
    with pytest.raises(UsageError, match="holds no filesystem whose files can be read"):
        bmap(["cat", str(image), "/dev/sda", "/x"])
    with pytest.raises((UsageError, Unsupported)):
        bmap(["cat", str(image), "/dev/sdb", "/x"])
