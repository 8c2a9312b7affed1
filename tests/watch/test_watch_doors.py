"""Guests whose VMM takes no URI: a file, a vhost-user socket, a socket or port that is the same each time."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_watch_serving import folder_of, gone, seen

from boot_sector import boot_sector
from support import need, run

BMAP = str(Path(sys.executable).parent / "virt-bmap")
SECTOR = 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 with a file that its boot sector reads."""
    need("nbdkit", "nbdkit")
    need("mke2fs", "e2fsprogs")
    (tmp_path / "tree" / "boot").mkdir(parents=True)
    for name in ("kernel", "state"):
        (tmp_path / "tree" / "boot" / name).write_bytes(os.urandom(40_000))
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", tmp_path / "tree", image)
    with open(image, "r+b") as file:
        file.write(boot_sector(place(image, "kernel") // SECTOR, 8, place(image, "state") // SECTOR))
    return image


def place(image: Path, name: str) -> int:
    return int(run("debugfs", "-R", f"blocks /boot/{name}", image).split()[0]) * 1024


def watch(image: Path, *arguments: object, ok: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [BMAP, "watch", *map(str, arguments[:-1]), image, "--", "sh", "-c", str(arguments[-1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == ok, done.stderr
    return done


def named(done: "subprocess.CompletedProcess[str]") -> set[str]:
    return {line.split("\t")[0] for line in done.stdout.splitlines() if line[:7] in ("read f ", "write f")}


def read_from(descriptor: int, at: int) -> str:
    return f"dd bs=1024 skip={at // 1024} count=1 <&{descriptor} 2>/dev/null"


def fuse() -> None:
    need("nbdfuse", "libnbd-bin")
    need("fusermount3", "fuse3")
    if not Path("/dev/fuse").exists():
        pytest.skip("needs FUSE (/dev/fuse)")


def test_a_file_for_those_that_take_no_uri(image: Path, tmp_path: Path) -> None:
    fuse()
    before, at = image.read_bytes(), place(image, "kernel")
    write = f"dd if=/dev/zero of=${{file}} bs=1024 seek={at // 1024} count=1 conv=notrunc,fsync 2>/dev/null"
    done = watch(image, f"cmp $file {image} && {write} && echo $file >{tmp_path}/file")
    assert named(done) >= {"read f /dev/sda /boot/kernel", "write f /dev/sda /boot/kernel"}
    assert image.read_bytes() == before
    path = Path((tmp_path / "file").read_text().strip())
    assert gone(seen(str(path.parent.parent)))


def test_a_file_that_is_still_open_stays(image: Path, tmp_path: Path) -> None:
    """The command puts the guest into the background and ends."""
    fuse()
    at = place(image, "kernel")
    later = f"exec 5<$file; sleep 2; {read_from(5, at)} >{tmp_path}/read"
    done = watch(image, f"({later}) >/dev/null 2>&1 &")
    assert "read f /dev/sda /boot/kernel" in named(done)
    assert (tmp_path / "read").read_bytes() == image.read_bytes()[at : at + 1024]


def test_a_killed_watch_leaves_the_file_until_nobody_uses_it(image: Path, tmp_path: Path) -> None:
    fuse()
    at = place(image, "kernel")
    later = f"touch {tmp_path}/open; sleep 3; {read_from(5, at)} >{tmp_path}/read; touch {tmp_path}/done"
    command = [BMAP, "watch", "-q", image, "--", "sh", "-c", f"exec 5<$file; {later}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "open")
    known = seen(folder_of(process))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(tmp_path / "done")
    assert (tmp_path / "read").read_bytes() == image.read_bytes()[at : at + 1024]
    assert gone(known)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.05)


def test_a_vhost_user_socket_for_a_real_guest(image: Path) -> None:
    need("qemu-storage-daemon", "qemu-utils")
    qemu = need("qemu-system-x86_64", "qemu-system-x86")
    state, kernel = place(image, "state"), place(image, "kernel")
    before = image.read_bytes()
    memory = "-m 64 -object memory-backend-memfd,id=m,size=64M,share=on -machine accel=tcg,memory-backend=m"
    door = "-chardev socket,id=c,path=$vhost -device vhost-user-blk-pci,chardev=c,bootindex=1"
    done = watch(image, "--write", f"timeout 60 {qemu} -display none {memory} {door}")
    assert named(done) >= {"read f /dev/sda /boot/kernel", "write f /dev/sda /boot/state"}
    assert image.read_bytes()[state : state + SECTOR] == before[kernel : kernel + SECTOR]


def test_a_socket_that_is_the_same_each_time(image: Path, tmp_path: Path) -> None:
    need("qemu-io", "qemu-utils")
    path = tmp_path / "vm.sock"
    read = f"qemu-io -r -f raw -c 'read {place(image, 'kernel')} 4k' 'nbd+unix:///?socket={path}' >/dev/null"
    for _ in range(2):
        assert named(watch(image, "--socket", path, read)) == {"read f /dev/sda /boot/kernel"}
        assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:  # what a killed one has left
        dead.bind(str(path))
    assert named(watch(image, "--socket", path, read)) == {"read f /dev/sda /boot/kernel"}
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another server listens there" in watch(image, "--socket", path, "true", ok=1).stderr
    path.unlink()
    path.write_text("precious")
    assert "is there, and no socket" in watch(image, "--socket", path, "true", ok=1).stderr
    assert path.read_text() == "precious"


def test_a_port_that_is_the_same_each_time(image: Path) -> None:
    need("qemu-io", "qemu-utils")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"nbd://127.0.0.1:{port}/"
    read = f"qemu-io -r -f raw -c 'read {place(image, 'kernel')} 4k' {uri} >/dev/null && test $uri = {uri}"
    assert named(watch(image, "--port", port, read)) == {"read f /dev/sda /boot/kernel"}
    assert "not a port" in watch(image, "--port", "70000", "true", ok=1).stderr
