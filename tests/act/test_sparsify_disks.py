"""sparsify in place and in a copy: space is given back, every file is as it was, checkers find nothing,
whenever and however it ends."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_dump import _raid5, digests

import ntfs_images
from support import mapped, mounted, need, need_root, run, unmount, wait_for_socket
from virt_bmap.act.sparsify.in_place import kept
from virt_bmap.act.sparsify.plan import plan
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import ImageError, OutputError, UsageError
from virt_bmap.host import in_use

MIB = 1 << 20
SIZES = {"ext4": 40, "xfs": 320, "btrfs": 128, "ntfs": 40, "vfat": 40}
"""MiB of each filesystem: as little as its mkfs takes, and for some no more than the test needs."""
MAKERS = {
    "ext4": (["mke2fs", "-q", "-t", "ext4", "-b", "1024"], "e2fsprogs"),
    "xfs": (["mkfs.xfs", "-q"], "xfsprogs"), "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs"),
    "ntfs": (["mkntfs", "-F", "-Q", "-q"], "ntfs-3g"),
    "vfat": (["mkfs.fat", "-F", "32", "-s", "1"], "dosfstools"),
}  # fmt: skip
CHECKERS = {
    "ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"],
    "ntfs": ["ntfsfix", "-n"], "vfat": ["fsck.fat", "-n"],
}  # fmt: skip


@contextlib.contextmanager
def filesystem(image: Path, kind: str, options: str) -> Iterator[Path]:
    """A folder with the files of the image; on FAT, which not every kernel mounts, copied in and out by
    mtools."""
    if kind == "ntfs":
        with ntfs_images.fuse(image, options) as root:
            yield root
    elif kind == "vfat":
        need("mcopy", "mtools")
        with tempfile.TemporaryDirectory() as folder:
            if options == "ro":
                run("mcopy", "-s", "-i", image, "::/", folder)
            yield Path(folder)
            if options != "ro":
                kept = [Path(folder) / name for name in os.listdir(folder)]
                run("mcopy", "-i", image, *kept, *(Path(folder) / f"gone{n}" for n in ()), "::/")
    else:
        with mounted(image, options) as root:
            yield root


def made(folder: Path, kind: str) -> Path:
    """A filesystem on which 60 files were written and half of them deleted.

    Where nothing was written lies noise, as on a disk that was used before.
    """
    command, package = MAKERS[kind]
    need(command[0], package), need_root()
    image = folder / f"{kind}.img"
    random = np.random.default_rng(1)
    with image.open("wb") as file:
        for _ in range(SIZES[kind]):
            file.write(random.bytes(MIB))
    extra = {"ext4": ["-E", "nodiscard"], "xfs": ["-K", "-f"], "btrfs": ["-K", "-f"]}.get(kind, [])
    run(*command, *extra, image)
    contents = {f"file{n}": random.bytes(int(random.integers(1, 400_000))) for n in range(60)}
    gone = [f"file{n}" for n in range(0, 60, 2)]
    with filesystem(image, kind, "rw") as root:
        for name, data in contents.items():
            (root / name).write_bytes(data)
        if kind != "vfat":
            os.sync() if kind == "ntfs" else run("sync", "-f", root)
            for name in gone:
                (root / name).unlink()
    if kind == "vfat":
        run("mdel", "-i", image, *(f"::/{name}" for name in gone))
    return image


@pytest.fixture(scope="module", params=SIZES)
def volume(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, str]]:
    """(filesystem, image, digest of each file); its checker finds nothing wrong."""
    kind = request.param
    image = made(tmp_path_factory.mktemp(kind), kind)
    run(*CHECKERS[kind], image)
    with filesystem(image, kind, "ro") as root:
        return kind, image, digests(root)


def sparsify(*arguments: object) -> None:
    assert bmap(["sparsify", "-q", *map(str, arguments)]) == 0


def held(path: Path) -> int:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def assert_same(kind: str, image: Path, files: dict[str, str]) -> None:
    run(*CHECKERS[kind], image)
    with filesystem(image, kind, "ro") as root:
        assert digests(root) == files


def test_every_filesystem(volume: tuple[str, Path, dict[str, str]], tmp_path: Path) -> None:
    kind, image, files = volume
    before = image.read_bytes()
    copy, changed, packed = tmp_path / "copy.img", tmp_path / "changed.img", tmp_path / "packed.qcow2"
    sparsify(image, copy)
    assert image.read_bytes() == before, "the source is only read"
    assert_same(kind, copy, files)
    shutil.copyfile(image, changed)
    sparsify("--in-place", changed)
    assert_same(kind, changed, files)
    kept = 30 * 400_000
    metadata = {"xfs": 80, "btrfs": 16, "ext4": 8, "ntfs": 8, "vfat": 4}[kind] * MIB
    for result in (copy, changed):
        assert held(result) < held(image) - 5 * MIB
        assert held(result) < kept + metadata
    need("qemu-img", "qemu-utils"), need("qemu-nbd", "qemu-utils")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, packed)
    whole = held(packed)
    sparsify("--in-place", packed)
    run("qemu-img", "check", packed)
    assert held(packed) < whole - 5 * MIB
    back = tmp_path / "back.img"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", packed, back)
    assert_same(kind, back, files)


# ---- copies ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("one"), "ext4")


@pytest.mark.parametrize(
    ("format", "options"), [("qcow2", []), ("qcow2", ["--compress"]), ("vmdk", []), ("vdi", []), ("vhdx", [])]
)
def test_formats_of_a_copy(ext4: Path, tmp_path: Path, format: str, options: list[str]) -> None:
    need("qemu-img", "qemu-utils"), need("qemu-nbd", "qemu-utils")
    raw, out, again = tmp_path / "raw", tmp_path / "with, comma", tmp_path / "again"
    sparsify(ext4, raw)
    sparsify("--convert", format, *options, ext4, out)
    assert f"file format: {format}" in run("qemu-img", "info", "-f", format, out).decode()
    run(
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        format,
        raw,
        f'json:{{"driver": "{format}", "file": {{"driver": "file", "filename": "{out}"}}}}',
    )
    if format == "qcow2":
        run(
            "qemu-img",
            "check",
            f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{out}"}}}}',
        )
        sparsify(out, again)  # as the disk was: qcow2
        assert again.read_bytes()[:4] == b"QFI\xfb"
        assert held(again) <= held(raw) + 2 * MIB
    assert held(out) <= held(raw) + 16 * MIB
    assert sorted(os.listdir(tmp_path)) == sorted(
        {"raw", "with, comma", *(["again"] if format == "qcow2" else [])}
    )


def test_what_exists_stays_until_the_copy_is_complete(ext4: Path, tmp_path: Path) -> None:
    need_root()
    out = tmp_path / "mount/out"
    out.parent.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", out.parent)
    try:
        out.write_bytes(b"mine")
        with pytest.raises(UsageError, match="exists already"):
            sparsify(ext4, out)
        for options in ([], ["--convert", "qcow2"]):
            with pytest.raises(OutputError, match="No space left on device"):
                sparsify("--force", *options, ext4, out)
        # Landlock lets go of a removed file a moment after the process has ended
        until = time.monotonic() + 10
        while (
            run("mount", "-o", "remount,ro", out.parent, ok=(0, 32) if time.monotonic() < until else (0,))
            or not os.statvfs(out.parent).f_flag & os.ST_RDONLY
        ):
            time.sleep(0.01)
        with pytest.raises(OutputError, match="Read-only file system"):
            sparsify("--force", ext4, out)
        assert os.listdir(out.parent) == ["out"]
        assert out.read_bytes() == b"mine"
    finally:
        unmount(out.parent)


def test_killed_while_copying(ext4: Path, tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils"), need("qemu-nbd", "qemu-utils")
    before = hashlib.sha256(ext4.read_bytes()).digest()
    for options in ([], ["--convert", "qcow2"]):
        code = "from virt_bmap.act import dump; count = [0]; copy = dump._copy\n"
        code += dying("dump._copy", "copy", 3)
        ended(code, ["sparsify", "-q", *options, str(ext4), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    assert hashlib.sha256(ext4.read_bytes()).digest() == before
    sparsify(ext4, tmp_path / "out")


# ---- killed in place ---------------------------------------------------------------------------------------


def dying(name: str, function: str, times: int) -> str:
    """Python that lets a function be called some times, and then kills its process with all that it
    started."""
    return f"""
import os, signal, sys
def wrapped(*arguments):
    count[0] += 1
    if count[0] > {times}:
        os.killpg(0, signal.SIGKILL)
    return {function}(*arguments)
{name} = wrapped
from virt_bmap.cli import run
run(sys.argv[1:])
"""


def ended(code: str, arguments: list[str]) -> None:
    """Run it, which must end by SIGKILL."""
    command = [sys.executable, "-c", code, *arguments]
    assert (
        subprocess.run(command, capture_output=True, timeout=60, process_group=0).returncode
        == -signal.SIGKILL
    )


@pytest.mark.parametrize("times", [0, 2, 9])
def test_killed_in_place(ext4: Path, tmp_path: Path, times: int) -> None:
    with mounted(ext4, "ro") as root:
        files = digests(root)
    image, packed, back = tmp_path / "image", tmp_path / "packed", tmp_path / "back"
    shutil.copyfile(ext4, image)
    code = "from virt_bmap.act.sparsify import in_place; count = [0]; punch = in_place.punch\n" + dying(
        "in_place.punch", "punch", times
    )
    ended(code, ["sparsify", "--in-place", str(image)])
    assert_same("ext4", image, files)
    need("qemu-nbd", "qemu-utils")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", ext4, packed)
    code = (
        "from virt_bmap.open.nbd_writer import NbdWriter; from virt_bmap.act.sparsify import in_place; "
        "in_place.AT_ONCE = 1; count = [0]; trim = NbdWriter.trim\n"
    )
    ended(code + dying("NbdWriter.trim", "trim", times), ["sparsify", "--in-place", str(packed)])
    until = time.monotonic() + 30
    # qemu-nbd finishes what it was told before
    while in_use.user_of(str(packed)) and time.monotonic() < until:
        time.sleep(0.05)
    run("qemu-img", "check", packed, ok=(0, 3))  # 3: space that is not used, and nothing wrong
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", packed, back)
    assert_same("ext4", back, files)
    sparsify("--in-place", packed)


# ---- layers ------------------------------------------------------------------------------------------------


def test_inside_an_array_with_parity(tmp_path: Path) -> None:
    disks = _raid5(tmp_path)
    with mounted(tmp_path / "source", "ro") as root:
        files = digests(root)
    whole = [held(disk) for disk in disks]
    sparsify("--in-place", *disks)
    assert all(held(disk) < size / 4 for disk, size in zip(disks, whole, strict=True))
    columns = [np.fromfile(disk, np.uint8)[MIB:] for disk in disks]
    assert not np.bitwise_xor.reduce(columns).any(), "parity is right"
    out = tmp_path / "out"
    for some in (disks, disks[1:], disks[:2]):
        bmap(
            [
                "dump",
                "-q",
                "--force",
                *(word for disk in some for word in ("-a", str(disk))),
                "/dev/md127",
                str(out),
            ]
        )
        assert_same("ext4", out, files)


def test_below_encryption(ext4: Path, tmp_path: Path) -> None:
    tool = need("cryptsetup", "cryptsetup-bin")
    with mounted(ext4, "ro") as root:
        files = digests(root)
    image, secret, out = tmp_path / "image", tmp_path / "secret", tmp_path / "out"
    shutil.copyfile(ext4, image)
    with image.open("r+b") as file:
        file.truncate(ext4.stat().st_size + 32 * MIB)
    secret.write_bytes(b"secret")
    options = [
        "--reduce-device-size",
        "32M",
        "--key-file",
        secret,
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
    ]
    run(tool, "reencrypt", "-q", "--encrypt", *options, image)
    whole = held(image)
    sparsify("--in-place", image)
    assert held(image) > whole - 32 * MIB, "without the key the ciphertext is one piece"
    before = held(image)
    sparsify("--in-place", "--key", f"all:file:{secret}", image)
    assert held(image) < before - 10 * MIB
    device = f"/dev/mapper/luks-{run(tool, 'luksUUID', image).decode().strip()}"
    bmap(["dump", "-q", "--key", f"all:file:{secret}", str(image), device, str(out)])
    assert_same("ext4", out, files)


def test_a_block_device(ext4: Path, tmp_path: Path) -> None:
    with mounted(ext4, "ro") as root:
        files = digests(root)
    image = tmp_path / "image"
    shutil.copyfile(ext4, image)
    whole = held(image)
    loop = run("losetup", "-f", "--show", image).decode().strip()
    try:
        where = tmp_path / "mounted"
        where.mkdir()
        run("mount", "-o", "ro", loop, where)
        with pytest.raises(ImageError, match=f"{loop}: is in use: it is mounted"):
            sparsify("--in-place", loop)
        unmount(where)
        sparsify("--in-place", loop)
    finally:
        run("losetup", "-d", loop)
    assert held(image) < whole - 10 * MIB
    assert_same("ext4", image, files)


# ---- safety ------------------------------------------------------------------------------------------------


def test_filesystems_that_are_not_in_order_stay_as_they_are(
    ext4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = run("debugfs", "-R", "blocks file1", ext4).decode().split()[5]
    for request, words in (
        ("feature needs_recovery", "not clean: needs recovery"),
        ("ssv state 2", "not clean: damaged"),
        ("clri file1", "problem"),
        (f"freeb {block}", "not clean: damaged"),
    ):
        image = tmp_path / "image"
        shutil.copyfile(ext4, image)
        run("debugfs", "-w", "-R", request, image)
        before = image.read_bytes()
        sparsify("--in-place", image)
        said = capsys.readouterr().err
        assert re.search(f"/dev/sda: left as it is: .*{words}", said), (request, said)
        assert image.read_bytes() == before, request
        sparsify("--force", image, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == before, request
        capsys.readouterr()


def test_a_map_that_contradicts_the_allocator_is_not_believed(ext4: Path, tmp_path: Path) -> None:
    """Whatever the reader of the filesystem says of itself."""
    image = tmp_path / "image"
    shutil.copyfile(ext4, image)
    run(
        "debugfs",
        "-w",
        "-R",
        f"freeb {run('debugfs', '-R', 'blocks file1', ext4).decode().split()[5]}",
        image,
    )
    found = mapped(image)
    state = found.filesystems.schema.get_field_index("state")
    calm = found.filesystems.set_column(state, found.filesystems.schema.field(state), [["clean"]])
    assert plan(mapped(ext4), 0).all()[0].size
    space = plan(replace(found, filesystems=calm, problems=found.problems.slice(0, 0)), 0)
    assert space.left == {0: "the map and its allocator disagree: owned-but-free"}
    assert not space.all()[0].size


def test_images_in_use_are_refused(ext4: Path, tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-utils")
    image, packed = tmp_path / "image", tmp_path / "packed"
    shutil.copyfile(ext4, image)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", ext4, packed)
    before = image.read_bytes(), packed.read_bytes()
    out = tmp_path / "out"

    def refused(words: str, *, copy: bool) -> None:
        for path in (image, packed):
            with pytest.raises(ImageError, match=rf"{path}: is in use: .*{words}|{path}: is in use: QEMU"):
                sparsify("--in-place", path)
            if copy:
                with pytest.raises(ImageError, match="is in use: "):
                    sparsify(path, out)

    for options, copy in (([], True), (["--read-only"], False)):
        servers = [
            subprocess.Popen(
                ["qemu-nbd", "-t", "-f", format, "-k", str(path.with_suffix(".sock")), *options, str(path)]
            )
            for path, format in ((image, "raw"), (packed, "qcow2"))
        ]
        try:
            for path in (image, packed):
                wait_for_socket(path.with_suffix(".sock"))
            refused("QEMU holds its lock", copy=copy)
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    with image.open("r+b"), packed.open("r+b"):
        refused("open for writing", copy=True)
    loops = [
        run("losetup", "-f", "--show", *options, path).decode().strip()
        for path, options in ((image, ["-r"]), (packed, []))
    ]
    try:
        refused("the loop device /dev/loop", copy=False)
    finally:
        for loop in loops:
            run("losetup", "-d", loop)
    assert before == (image.read_bytes(), packed.read_bytes())
    assert not out.exists()


def test_an_image_mounted_through_fuse_is_refused(tmp_path: Path) -> None:
    need("ntfs-3g", "ntfs-3g"), need_root()
    image = tmp_path / "image"
    ntfs_images.make(image, 8, 4096, 512)
    with ntfs_images.fuse(image), pytest.raises(ImageError, match="is in use: it is mounted on /tmp/"):
        sparsify("--in-place", image)


def test_qemu_can_not_start_while_an_image_is_changed(ext4: Path, tmp_path: Path) -> None:
    need("qemu-io", "qemu-utils")
    image = tmp_path / "image"
    shutil.copyfile(ext4, image)
    write = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)]
    with kept(str(image)):
        assert "lock" in subprocess.run(write, capture_output=True, text=True).stderr
    run(*write)


def test_bad_input(ext4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, *arguments in (
        ("needs a disk and OUT", ext4),
        ("needs a disk and OUT", ext4, out, out),
        ("no disk given", "--in-place"),
        ("no disk given", "--estimate"),
        ("not allowed with", "--in-place", "--estimate", ext4),
        ("are about the copy OUT", "--in-place", "--compress", ext4),
        ("are about the copy OUT", "--estimate", "--force", ext4),
        ("--compress needs a qcow2 image", "--compress", ext4, out),
        ("would overwrite the file that is read", "--force", ext4, ext4),
        ("OUT must be the name of a file", ext4, "-"),
        ("OUT must be the name of a file", ext4, "/dev/null"),
        ("OUT must be the name of a file", ext4, "nbd://localhost"),
        ("who uses an NBD export can't be seen", "--in-place", "nbd://localhost"),
        ("a vmdk image can't give space back in place", "--in-place", "--format", "vmdk", ext4),
    ):
        with pytest.raises(UsageError, match=words):
            sparsify(*arguments)
    with pytest.raises(ImageError, match="can't be opened: No such file"):
        sparsify("--in-place", tmp_path / "none")
    assert os.listdir(tmp_path) == []


def test_filesystems_of_the_host_that_can_not(ext4: Path, tmp_path: Path) -> None:
    need_root()
    for options, words in (
        (["-t", "ramfs", "ramfs"], "can't punch holes; make a copy"),
        (["--bind", tmp_path], "Read-only file system"),
    ):
        where = tmp_path / "mount"
        where.mkdir(exist_ok=True)
        run("mount", *options, where)
        try:
            shutil.copyfile(ext4, where / "image")
            if "Read" in words:
                run("mount", "-o", "remount,bind,ro", where)
            with pytest.raises(OutputError, match=words):
                sparsify("--in-place", where / "image")
            assert (where / "image").read_bytes() == ext4.read_bytes()
        finally:
            unmount(where)


def test_swap_only_where_asked_for(tmp_path: Path) -> None:
    need("mkswap", "util-linux")
    image = tmp_path / "image"
    image.write_bytes(np.random.default_rng(2).bytes(8 * MIB))
    run("mkswap", image)
    sparsify("--in-place", image)
    assert held(image) >= 8 * MIB
    sparsify("--in-place", "--swap", image)
    assert held(image) <= 8192
    assert mapped(image).volumes.column("type").to_pylist() == ["swap"]
