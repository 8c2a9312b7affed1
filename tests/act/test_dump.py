"""dump: a volume's copy equals its bytes, opens again, and without its free space still holds every file."""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_lvm import Group, group  # noqa: F401  (a fixture: a volume group on two disks, and what lvs says of it)

from support import BytesReader, mapped, mounted, need, need_root, run, sync, unmount, wait_for_socket
from virt_bmap.act import dump as dumping
from virt_bmap.ask.space import free_space
from virt_bmap.cli import run as bmap
from virt_bmap.core.arrays import EMPTY, Bytes, Int, complement, ints
from virt_bmap.core.errors import ImageError, OutputError, UsageError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.model import tables
from virt_bmap.open.raw import RawReader

MIB = 1 << 20


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT with an ext4 (30 MiB at 1 MiB) of which half the files were deleted, and 5 MiB of bytes that nobody
    knows."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk"), need_root()
    folder = tmp_path_factory.mktemp("dump")
    image, part = folder / "disk.img", folder / "part.img"
    run("truncate", "-s", "30M", part)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", part)
    random = np.random.default_rng(1)
    with mounted(part) as root:
        for number in range(40):
            (root / f"file{number}").write_bytes(random.bytes(int(random.integers(1, 400_000))))
        sync(root)
        for number in range(0, 40, 2):
            (root / f"file{number}").unlink()
    run("truncate", "-s", "40M", image)
    run("sfdisk", "-q", image, stdin=b"label: gpt\nsize=30M\nsize=5M\n")
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(part.read_bytes())
        file.seek(31 * MIB)
        file.write(random.bytes(5 * MIB))
    return image


def dump(*arguments: object) -> None:
    assert bmap(["dump", "-q", *map(str, arguments)]) == 0


def part(disk: Path, start: int, size: int) -> bytes:
    with disk.open("rb") as file:
        file.seek(start * MIB)
        return file.read(size * MIB)


def test_a_copy_equals_the_bytes(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    for device, start, size in (("/dev/sda1", 1, 30), ("/dev/sda2", 31, 5), ("/dev/sda", 0, 40)):
        dump("--force", disk, device, out)
        assert out.read_bytes() == part(disk, start, size), device
    assert out.stat().st_blocks * 512 < 32 * MIB, "zeroes are holes"
    assert mapped(out).volumes.column("name").to_pylist() == ["/dev/sda", "/dev/sda1", "/dev/sda2"]
    piped = subprocess.run(
        [sys.executable, "-m", "virt_bmap", "dump", disk, "/dev/sda1", "-"], capture_output=True, check=True
    )
    assert piped.stdout == part(disk, 1, 30)
    assert piped.stderr == b""


def test_every_volume_of_a_group(group: Group, tmp_path: Path) -> None:
    for name in ("line-ar", "striped", "two_segments"):
        out = tmp_path / name
        dump("-a", group.disks[0], "-a", group.disks[1], f"/dev/my-vg/{name}", out)
        disks = [path.read_bytes() for path in group.disks]
        expected = bytearray(out.stat().st_size)
        for at, disk, where, length in group.pieces(name):
            expected[at : at + length] = disks[disk][where : where + length]
        assert out.read_bytes() == expected
        run("e2fsck", "-fn", out)


def test_an_opened_luks_volume(tmp_path: Path) -> None:
    tool = need("cryptsetup", "cryptsetup-bin")
    plain = np.random.default_rng(2).bytes(4 * MIB)
    image, secret, out = tmp_path / "image", tmp_path / "secret", tmp_path / "out"
    image.write_bytes(plain + bytes(32 * MIB))
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
    device = f"/dev/mapper/luks-{run(tool, 'luksUUID', image).decode().strip()}"
    with pytest.raises(UsageError, match="no device /dev/mapper"):
        dump(image, device, out)
    dump("--key", f"all:file:{secret}", image, device, out)
    assert out.read_bytes()[: 4 * MIB] == plain
    assert set(os.listdir(tmp_path)) == {"image", "secret", "out"}


# ---- without free space ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "at"), [("/dev/sda1", 0), ("/dev/sda", MIB)])
def test_free_space_left_out_costs_no_file(disk: Path, tmp_path: Path, device: str, at: int) -> None:
    out, whole = tmp_path / "out.img", tmp_path / "whole.img"
    dump("--skip-free", disk, device, out)
    dump(disk, device, whole)
    with mounted(whole, "ro", at) as root:
        before = digests(root)
    with mounted(out, "ro", at) as root:
        assert digests(root) == before
    checked = tmp_path / "checked"
    dump("-q", out, "/dev/sda1" if at else "/dev/sda", checked)
    run("e2fsck", "-fn", checked)
    assert out.stat().st_blocks < whole.stat().st_blocks - 1000
    # brute force: what differs is what the kernel's own allocator calls free, and is zero in the copy
    bitmap = run("dumpe2fs", checked).decode()
    free = np.zeros(30 * 1024, bool)
    for line in bitmap.splitlines():
        if line.startswith("  Free blocks: "):
            for span in filter(None, line.removeprefix("  Free blocks: ").split(", ")):
                low, _, high = span.partition("-")
                free[int(low) : int(high or low) + 1] = True
    a, b = (
        np.frombuffer(path.read_bytes(), np.uint8)[at : at + 30 * MIB].reshape(-1, 1024)
        for path in (whole, out)
    )
    differ = (a != b).any(axis=1)
    assert differ.any()
    assert not (differ & ~free).any()
    assert not b[free].any()


def test_filesystems_that_can_not_be_trusted_are_copied_whole(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, image, out = tmp_path / "source", tmp_path / "image", tmp_path / "out"
    dump(disk, "/dev/sda1", source)
    for request in ("feature needs_recovery", "ssv state 2"):
        image.write_bytes(source.read_bytes())
        run("debugfs", "-w", "-R", request, image)
        dump("--force", "--skip-free", image, "/dev/sda", out)
        assert "free space is copied as well" in capsys.readouterr().err, request
        assert out.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_a_mount_would_recover_says_so(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    """Whatever is copied: the partition, or the disk that holds it; whatever else is wrong with it."""
    image, out = tmp_path / "image", tmp_path / "out"
    shutil.copyfile(disk, image)
    for request in ("feature needs_recovery", "clri file1")[: 1 + damaged]:
        run("debugfs", "-w", "-R", request, f"{image}?offset={MIB}")
    for device, at in (("/dev/sda", MIB), ("/dev/sda1", 0)):
        dump("--force", image, device, out)
        assert "/dev/sda1: its journal is not replayed" in capsys.readouterr().err, device
        assert b"needs_recovery" in run("dumpe2fs", "-h", f"{out}?offset={at}")
    dump("--force", disk, "/dev/sda", out)
    assert "journal" not in capsys.readouterr().err


def test_what_another_volume_uses_is_not_free(tmp_path: Path) -> None:
    """An ext4 and a partition of unknown content that overlap: only what lies outside of that is free."""
    image = tmp_path / "disk.img"
    run("truncate", "-s", "20M", image)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", f"offset={MIB}", image, "16M")
    with image.open("r+b") as file:
        file.seek(446)
        for start, size in ((2048, 32768), (20480, 8192)):
            file.write(struct.pack("<B3sB3sII", 0, b"", 0x83, b"", start, size))
        file.seek(510)
        file.write(b"\x55\xaa")
    found = mapped(image)
    space = free_space(found, 0)
    assert not space.all()[0].size
    assert space.left == {1: "/dev/sda, on which it lies, has a problem: two-owners"}
    low, high = free_space(replace(found, problems=found.problems.slice(0, 0)), 0).all()
    assert len(low)
    assert not ((low < 14 * MIB) & (high > 10 * MIB)).any()


def test_arrays_with_a_missing_member(tmp_path: Path) -> None:
    """What the missing member holds is computed."""
    disks, out = _raid5(tmp_path), tmp_path / "out"
    for some in (disks, disks[1:], disks[:2]):
        dump("--force", *(word for disk in some for word in ("-a", disk)), "/dev/md127", out)
        assert out.read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("present", [(0, 1, 2), (1, 2), (0, 1)])
def test_free_space_below_parity(tmp_path: Path, present: tuple[int, ...]) -> None:
    """What is free on the members may become zeroes together: parity stays right, and no byte that is not
    free changes."""
    disks, out = _raid5(tmp_path), tmp_path / "out"
    some = [disks[number] for number in present]
    found = mapped(*some)
    free = free_space(found, found.volumes.column("kind").to_pylist().index("md")).all()
    given, columns = 0, []
    for disk, path in enumerate(some):
        low, high = free_space(found, disk).all()
        given += int((high - low).sum())
        data = np.fromfile(path, np.uint8)
        for start, end in zip(low.tolist(), high.tolist(), strict=True):
            data[start:end] = 0
        data.tofile(path)
        columns.append(data[MIB:])
    assert len(present) < 3 or not np.bitwise_xor.reduce(columns).any()
    most = int((free[1] - free[0]).sum()) * len(present) / 2
    assert 0.8 * most < given <= most, "two bytes of data share one of parity"
    dump("--force", *(word for disk in some for word in ("-a", disk)), "/dev/md127", out)
    run("e2fsck", "-fn", out)
    now, before = np.fromfile(out, np.uint8), np.fromfile(tmp_path / "source", np.uint8)
    assert (now != before).any()
    for start, end in zip(*(side.tolist() for side in free), strict=True):
        before[start:end] = now[start:end]
    assert (now == before).all()


def _raid5(folder: Path) -> list[Path]:
    """Three disks of a RAID5, by hand: an ext4 in the data strips, with a superblock 1.2 as test_md makes
    it."""
    from test_md import superblock  # its byte layout is checked there

    source = folder / "source"
    source.write_bytes(np.random.default_rng(4).bytes(16 * MIB))
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "nodiscard", source)
    data = np.fromfile(source, np.uint8).reshape(-1, 2, 65536)
    disks = [folder / f"disk{number}" for number in range(3)]
    columns = np.zeros((3, len(data), 65536), np.uint8)
    for row, strips in enumerate(data):  # left-symmetric: parity moves down, data follow behind it
        parity = 2 - row % 3
        columns[parity, row] = strips[0] ^ strips[1]
        for number in range(2):
            columns[(parity + 1 + number) % 3, row] = strips[number]
    for role, path in enumerate(disks):
        body = columns[role].tobytes()
        head = superblock(5, 2, 128, len(body) // 512, role, 3, 2048, 8)
        path.write_bytes(bytes(4096) + head.ljust(MIB - 4096, b"\0") + body)
    return disks


# ---- bad input ---------------------------------------------------------------------------------------------


def test_what_exists_is_not_replaced_by_accident(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    os.link(disk, tmp_path / "same")
    for words, *arguments in (
        ("exists already; --force", disk, "/dev/sda1", out),
        ("would overwrite the file that is read", "--force", disk, "/dev/sda1", disk),
        ("same: would overwrite .*disk.img that is read", "--force", disk, "/dev/sda1", tmp_path / "same"),
        ("no device /dev/sdb1 in this map", "--force", disk, "/dev/sdb1", out),
        ("dump needs a disk, DEVICE and OUT", disk, "/dev/sda1"),
        ("dump needs DEVICE and OUT", "-a", disk, disk, "/dev/sda1", out),
    ):
        with pytest.raises(UsageError, match=words):
            dump(*arguments)
    with pytest.raises(OutputError, match="can't be written: No such file or directory"):
        dump(disk, "/dev/sda1", tmp_path / "missing/out")
    with pytest.raises(OutputError, match="is a directory"):
        dump(disk, "/dev/sda1", tmp_path)
    assert out.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["out", "same"]


def test_no_space_and_read_only_leave_nothing_behind(disk: Path, tmp_path: Path) -> None:
    need_root()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path)
    try:
        (tmp_path / "out").write_bytes(b"mine")
        with pytest.raises(OutputError, match="No space left on device"):
            dump("--force", disk, "/dev/sda1", tmp_path / "out")
        run("mount", "-o", "remount,ro", tmp_path)
        with pytest.raises(OutputError, match="Read-only file system"):
            dump("--force", disk, "/dev/sda1", tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out").read_bytes() == b"mine"
    finally:
        unmount(tmp_path)
    with pytest.raises(OutputError, match="No space left on device"):
        dump(disk, "/dev/sda1", "/dev/full")


def test_block_devices(disk: Path, tmp_path: Path) -> None:
    need_root()
    for size in (20, 31):
        target = tmp_path / "target"
        target.write_bytes(b"\xff" * (size * MIB))
        loop = run("losetup", "-f", "--show", target).decode().strip()
        try:
            with pytest.raises(UsageError, match="is a block device; --force"):
                dump(disk, "/dev/sda1", loop)
            if size < 30:
                with pytest.raises(OutputError, match="the device has"):
                    dump("--force", disk, "/dev/sda1", loop)
            else:
                dump("--force", disk, "/dev/sda1", loop)
        finally:
            run("losetup", "-d", loop)
        assert target.read_bytes() == (
            b"\xff" * (size * MIB) if size < 30 else part(disk, 1, 30) + b"\xff" * MIB
        )


def test_an_nbd_export(disk: Path, tmp_path: Path) -> None:
    """What the export held before is overwritten, with zeroes too, whether or not the server makes those by
    itself."""
    need("nbdkit", "nbdkit")
    target, socket = tmp_path / "target", tmp_path / "socket"
    uri = f"nbd+unix:///?socket={socket}"
    for filters in ([], ["--filter=nozero"]):
        target.write_bytes(b"\xff" * (31 * MIB))
        server = subprocess.Popen(["nbdkit", "-f", "-U", socket, *filters, "file", target])
        try:
            wait_for_socket(socket)
            with pytest.raises(UsageError, match="what the export holds is overwritten"):
                dump(disk, "/dev/sda1", uri)
            with pytest.raises(OutputError, match="the export has"):
                dump("--force", disk, "/dev/sda", uri)
            dump("--force", disk, "/dev/sda1", uri)
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)
        assert target.read_bytes() == part(disk, 1, 30) + b"\xff" * MIB


def test_an_nbd_export_that_can_not_be_written(disk: Path, tmp_path: Path) -> None:
    need("nbdkit", "nbdkit")
    socket = tmp_path / "socket"
    uri = f"nbd+unix:///?socket={socket}"
    with pytest.raises(ImageError, match="can't connect"):
        dump("--force", disk, "/dev/sda1", uri)
    for plugin, words in (
        (["-r", "memory", "64M"], "the server exports it read-only"),
        (["full", "64M"], "No space left on device"),
    ):
        server = subprocess.Popen(["nbdkit", "-f", "-U", socket, *plugin])
        try:
            wait_for_socket(socket)
            with pytest.raises(OutputError, match=words):
                dump("--force", disk, "/dev/sda1", uri)
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)


class Asked(BytesReader):
    """Counts the bytes that it is asked for."""

    asked = 0

    def read_ranges(self, offsets: Int, lengths: Int) -> Bytes:
        self.asked += int(lengths.sum())
        return super().read_ranges(offsets, lengths)


def test_batches_and_skips_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumping, "BATCH", 12288)
    random = np.random.default_rng(3)
    for size in (1, 4095, 4096, 50_001, 200_000):
        data = random.integers(0, 256, size).astype(np.uint8)
        data[size // 3 : size // 3 * 2] = 0
        starts = np.sort(random.integers(0, size, 12))
        ends = np.minimum(starts + random.integers(0, 9000, 12), size)
        for skip in ((EMPTY, EMPTY), (ints(starts), ints(ends)), (ints(0), ints(size))):
            expected = data.copy()
            for low, high in zip(*skip, strict=True):
                expected[low:high] = 0
            for sparse in (True, False):
                with (tmp_path / "out").open("wb") as file:
                    reader, kept = Asked(data), complement(*skip, 0, size)
                    target = dumping.SparseFile(file, size) if sparse else dumping.StreamTarget(file)
                    assert not dumping.dump(reader, target, skip)
                    assert reader.asked == int((kept[1] - kept[0]).sum())
                assert (tmp_path / "out").read_bytes() == expected.tobytes()


def test_kinds_that_hold_nothing_are_the_only_ones_left_out(disk: Path) -> None:
    """Free ranges meet no extent of any other kind."""
    found = mapped(disk)
    low, high = free_space(found, 1).all()
    _, table = found.slice_of("extents", 1)
    start, kind = tables.integers(table, "volume_offset"), tables.codes(table, "kind")
    end = start + tables.integers(table, "length")
    for a, b in zip(start[kind != tables.FREE].tolist(), end[kind != tables.FREE].tolist(), strict=True):
        assert not ((low < b) & (high > a)).any()


def test_what_is_not_stored_is_not_read(tmp_path: Path) -> None:
    """Holes of image files are holes of the volumes that lie on them, wherever rows put them; all that is not
    told as a hole is there."""
    image = tmp_path / "image"
    random = np.random.default_rng(5)
    with image.open("wb") as file:
        file.truncate(4 * MIB)
        for at in random.choice(1024, 60, replace=False).tolist():
            file.seek(at * 4096)
            file.write(random.bytes(4096))
    parents = {0: RawReader(str(image))}
    rows = Rows.of([Row(0, 0, MIB, 8192, 64, 16384, 16384), Row(8192, 0, 0, 8192, 64, 16384, 8192)], 1)
    reader = MappedReader(MIB + 8192, "volume", parents, rows)
    starts, ends = reader.stored()
    data = np.frombuffer(reader.read(0, reader.size), np.uint8).reshape(-1, 4096)
    there = np.zeros(len(data), bool)
    for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
        there[low // 4096 : -(-high // 4096)] = True
    assert (there == data.any(axis=1)).all()
    parents[0].close()


def test_a_device_that_loses_what_is_written(disk: Path, tmp_path: Path) -> None:
    """The kernel takes it all, and tells of the loss when it is flushed."""
    need_root(), need("nbdfuse", "libnbd-bin"), need("nbdkit", "nbdkit")
    folder = tmp_path / "served"
    folder.mkdir()
    failing = ["nbdkit", "-s", "--exit-with-parent", "--filter=error", "memory", "40M", "error-pwrite=EIO"]
    served = subprocess.Popen(["nbdfuse", str(folder), "--command", *failing, "error-pwrite-rate=100%"])
    try:
        while not (folder / "nbd").exists() and served.poll() is None:
            time.sleep(0.05)
        loop = run("losetup", "-f", "--show", folder / "nbd").decode().strip()
        try:
            with pytest.raises(OutputError, match="can't be written: Input/output error"):
                dump("--force", disk, "/dev/sda1", loop)
        finally:
            run("losetup", "-d", loop)
    finally:
        unmount(folder)
        served.wait()
