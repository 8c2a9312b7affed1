"""bmaplogger: what the original did, and what it forgot; above all that no log, slow or dead, ever reaches
the guest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_watch import disk, place  # noqa: F401

from support import need, run
from virt_bmap.bmaplogger import _RECORD, _private, _split
from virt_bmap.model import tables
from virt_bmap.watch import plugin

LOGGER = str(Path(sys.executable).parent / "bmaplogger")
THROWN_AWAY = "bmaplogger: -r: what is written is thrown away at the end\n"
BMAP = str(Path(sys.executable).parent / "virt-bmap")


@pytest.fixture(autouse=True)
def tools() -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    if subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
        pytest.skip("nbdkit's Python plugin is not installed (apt-get install nbdkit-plugin-python)")


def logger(*arguments: object, ok: int = 0) -> tuple[list[str], str]:
    """Run bmaplogger: (lines printed, standard error)."""
    done = subprocess.run([LOGGER, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == ok, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_reads_and_writes_are_named(disk, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(disk.data)
    saved = tmp_path / "bmap"
    run(BMAP, "-o", saved, image)
    kernel, initrd = place(disk, "/boot/vmlinuz"), place(disk, "/boot/initrd")
    client = (
        f"qemu-io -f raw -c 'read {kernel} 4k' -c 'read {kernel + 4096} 4k' -c 'write -P 1 {initrd} "
        "4k' -c flush $uri >/dev/null"
    )
    for given in ([f"bmap={saved}"], []):  # with a saved map, and without
        lines, err = logger(f"file={image}", *given, "--run", client)
        assert err == ""
        named = [line.split("\t") for line in lines if line.startswith(("read f", "write f"))]
        assert [name for name, _ in named] == [
            "read f /dev/sda1 /boot/vmlinuz",
            "write f /dev/sda1 /boot/initrd",
        ]
        if not given:
            assert [where for _, where in named] == ["0x0-0x2000", "0x0-0x1000"]
    assert image.read_bytes()[initrd : initrd + 4096] == b"\1" * 4096


def test_original_call_with_nbd_and_logfile(disk, tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines, _ = logger(
        "-r",
        f"file={disk.image}",
        f"logfile={log}",
        "--run",
        " qemu-io -r -f raw -c 'read 0 512' $nbd > /dev/null; exit 5",
        ok=5,
    )
    assert lines == []
    assert "read b /dev/sda [boot code]\t@0x0-0x1be" in log.read_text().splitlines()


def test_read_only_leaves_the_disk_as_it_is(disk) -> None:
    before = disk.image.read_bytes()
    logger("-r", f"file={disk.image}", "--run", "qemu-io -f raw -c 'write 0 512' $uri > /dev/null 2>&1")
    assert disk.image.read_bytes() == before


def test_several_connections_and_content(disk, tmp_path: Path) -> None:
    need("nbdcopy", "libnbd-bin")
    copy = tmp_path / "copy"
    lines, err = logger(
        "-r", f"file={disk.image}", "--run", f"nbdcopy --connections=4 --requests=16 $uri {copy}"
    )
    assert copy.read_bytes() == disk.data
    assert err == THROWN_AWAY
    named = {line.split("\t")[0] for line in lines}
    assert {f"read f /dev/sda1 /many/{number}" for number in range(200)} <= named


def test_nobody_reads_the_log_and_the_guest_does_not_care(disk, tmp_path: Path) -> None:
    """The plugin with a pipe that fills up at once: every request is served, and every access is told or
    counted."""
    need("qemu-img", "qemu-utils")
    read, write = os.pipe()
    requests = 5000
    client = f"qemu-img bench -f raw -c {requests} -d 32 -s 4096 $uri > /dev/null"
    command = [
        "nbdkit",
        "-f",
        "-r",
        "-U",
        "-",
        "python",
        plugin.__file__,
        f"file={disk.image}",
        f"accesses={write}",
        "--run",
        client,
    ]
    subprocess.run(command, pass_fds=[write], check=True, timeout=60)
    os.set_blocking(read, False)
    os.close(write)
    data = b""
    while piece := os.read(read, 1 << 20):
        data += piece
    os.close(read)
    records = np.frombuffer(data, _RECORD)
    reads = int((records["op"] == plugin.READ).sum())
    assert (
        0 < reads < requests
    )  # the pipe did fill up; its last record is older than the last request, so the exact count is not in it
    assert len(data) % plugin.RECORD.size == 0


def test_what_was_dropped_is_said(disk) -> None:
    """A logger that is stopped for a while, as a busy machine might: the client goes on, and the end of the
    log admits the gap."""
    need("qemu-img", "qemu-utils")
    client = (
        "kill -STOP $PARENT; qemu-img bench -f raw -c 60000 -d 32 -s 4096 $uri > /dev/null; kill "
        "-CONT $PARENT"
    )
    script = f"export PARENT=$$; exec {LOGGER} -r file={disk.image} logfile=/dev/null --run '{client}'"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "accesses were dropped" in done.stderr
    assert 0 < int(done.stderr.removeprefix(THROWN_AWAY).split()[1].replace(",", "")) <= 60000


def test_a_log_on_a_full_disk_costs_only_the_log(disk) -> None:
    _, err = logger(
        "-r",
        f"file={disk.image}",
        "logfile=/dev/full",
        "--run",
        "qemu-io -r -f raw -c 'read 0 32M' $uri > /dev/null",
    )
    assert "could not be written to the log" in err


def test_what_goes_wrong_is_one_line(disk, tmp_path: Path) -> None:
    for arguments, words in (
        (["-r"], "file=DISK is missing"),
        ([f"file={tmp_path}/none"], "No such file"),
        ([f"file={disk.image}", f"bmap={disk.image}"], "not a block map"),
        ([f"file={disk.image}", "format=qcow2"], "use virt-bmap watch"),
    ):
        _, err = logger(*arguments, ok=1)
        assert err.startswith("bmaplogger: ")
        assert err.count("\n") == 1
        assert words in err
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "q", "1M")
    _, err = logger(f"file={tmp_path}/q", ok=1)
    assert "looks like qcow2" in err


def test_ends_with_nbdkit_when_told_to(disk, tmp_path: Path) -> None:
    socket = tmp_path / "sock"
    process = subprocess.Popen(
        [LOGGER, "-r", "-U", socket, f"file={disk.image}"], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < end:
        time.sleep(0.05)
    run("qemu-io", "-r", "-f", "raw", "-c", "read 1049600 1k", f"nbd+unix:///?socket={socket}")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert "read m /dev/sda1 [superblock]\t@0x100400-0x100800\n" in out
    assert process.returncode == 0


def test_records_and_arguments() -> None:
    assert plugin.RECORD.size == _RECORD.itemsize
    assert [tables.OPS[op] for op in (plugin.READ, plugin.WRITE, plugin.FLUSH)] == ["read", "write", "flush"]
    assert _split(["-r", "file=a=b", "--run", "x y=z"]) == ({"file": "a=b"}, ["-r", "--run", "x y=z"])
    assert _private(["--run", "x"]) == ["--unix", "-"]
    assert _private(["-p", "10000", "--run", "x"]) == []
    assert _private(["-r"]) == []
