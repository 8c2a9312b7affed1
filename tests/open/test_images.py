"""Ways to open an image: by magic, by name, through QEMU and NBD; and what an image must not make us open."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from support import need, run, wait_for_socket
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.open import open_image, qemu
from virt_bmap.open.disks import Opening
from virt_bmap.open.nbd import NbdReader
from virt_bmap.open.raw import RawReader

FORMATS = {
    "qcow2": "qcow2",
    "vmdk": "vmdk",
    "vpc": "vpc",
    "vhdx": "vhdx",
    "vdi": "vdi",
    "qed": "qed",
    "parallels": "parallels",
    "qcow": "qcow",
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "disk.raw"
    data = np.random.default_rng(2).integers(0, 256, 3 << 20, dtype=np.uint8)
    data[:512] = 0  # no image format's magic by chance
    path.write_bytes(data.tobytes())
    return path


def convert(disk: Path, format: str, *options: str) -> Path:
    need("qemu-img", "qemu-utils")
    target = disk.with_suffix(f".{format}{len(options)}")
    run("qemu-img", "convert", "-O", format, *options, disk, target)
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_qemu_formats_are_found_by_magic_and_read_equal(disk, format):
    need("qemu-nbd", "qemu-utils")
    reader = open_image(str(convert(disk, format)))
    expected = disk.read_bytes()
    assert isinstance(reader, NbdReader)
    assert reader.size >= len(expected)
    random = np.random.default_rng(3)
    offsets = random.integers(0, len(expected) - 5000, 400)
    lengths = random.integers(1, 5000, 400)
    got = reader.read_ranges(offsets, lengths).tobytes()
    assert got == b"".join(expected[o : o + n] for o, n in zip(offsets, lengths, strict=True))
    reader.close()


def test_fixed_vhd_has_its_magic_at_the_end(disk):
    reader = open_image(str(convert(disk, "vpc", "-o", "subformat=fixed,force_size=on")))
    assert reader.read(1 << 20, 512) == disk.read_bytes()[1 << 20 : (1 << 20) + 512]
    reader.close()


def test_format_raw_overrides_the_magic(disk):
    reader = open_image(str(convert(disk, "qcow2")), Opening(format="raw"))
    assert isinstance(reader, RawReader)
    assert reader.read(0, 4) == b"QFI\xfb"
    reader.close()


# ---- attacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"SECRET" * 100_000)
    return path


def refused(image: Path, *names: str) -> None:
    with pytest.raises(ImageError) as found:
        open_image(str(image))
    message = str(found.value)
    assert "\n" not in message
    assert "--references" in message
    assert all(name in message for name in names), message


def test_backing_file_is_not_opened_unasked(tmp_path, secret):
    """Whether QEMU's own qemu-img made the overlay, or a guest wrote that header into its raw disk."""
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "overlay.qcow2")
    refused(tmp_path / "overlay.qcow2", str(secret))
    disk = tmp_path / "guest.raw"
    disk.write_bytes((tmp_path / "overlay.qcow2").read_bytes().ljust(2 << 20, b"\0"))
    refused(disk, str(secret))
    raw = open_image(str(disk), Opening(format="raw"))
    assert raw.size == 2 << 20
    raw.close()


def test_data_file_is_not_opened_unasked(tmp_path):
    need("qemu-img", "qemu-utils")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={tmp_path}/other.raw,data_file_raw=on",
        tmp_path / "a.qcow2",
        "1M",
    )
    refused(tmp_path / "a.qcow2", "other.raw")


def test_vmdk_extents_are_not_opened_unasked(tmp_path, secret):
    descriptor = (
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 1000 FLAT "{secret}" 0\n'
    )
    (tmp_path / "a.vmdk").write_text(descriptor)
    refused(tmp_path / "a.vmdk", str(secret))
    # QEMU takes the descriptor inside a sparse image of capacity 0 for a whole image's
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 2).ljust(512, b"\0")
    (tmp_path / "b.vmdk").write_bytes(header + descriptor.encode().ljust(1024, b"\0") + bytes(65536))
    refused(tmp_path / "b.vmdk", str(secret))


def test_a_chain_is_read_when_asked_and_formats_are_never_guessed(tmp_path, disk):
    need("qemu-nbd", "qemu-utils")
    base = tmp_path / "base, with a comma.raw"
    base.write_bytes(disk.read_bytes())
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "middle.qcow2")
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2"
    )
    reader = open_image(str(tmp_path / "top.qcow2"), Opening(references=True))
    assert reader.read(1 << 20, 4096) == disk.read_bytes()[1 << 20 : (1 << 20) + 4096]
    reader.close()
    run(
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "middle.qcow2",
        "-F",
        "",
        tmp_path / "top.qcow2",
        ok=(0, 1),
    )
    if "backing-filename-format" not in json.loads(
        run("qemu-img", "info", "-U", "--output=json", tmp_path / "top.qcow2")
    ):
        with pytest.raises(ImageError, match="without a format"):
            open_image(str(tmp_path / "top.qcow2"), Opening(references=True))


def test_a_loop_of_backing_files_ends(tmp_path):
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    run(
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "a.qcow2",
        "-F",
        "qcow2",
        tmp_path / "b.qcow2",
        "1M",
    )
    run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", tmp_path / "a.qcow2")
    with pytest.raises(ImageError, match="or loops"):
        open_image(str(tmp_path / "a.qcow2"), Opening(references=True))


def test_a_damaged_qcow2_is_qemus_complaint_in_one_line(tmp_path, disk):
    image = convert(disk, "qcow2")
    data = bytearray(image.read_bytes())
    data[20:24] = struct.pack(">I", 60)  # cluster_bits
    (tmp_path / "bad.qcow2").write_bytes(data)
    with pytest.raises(
        ImageError, match=r"bad.qcow2: qemu-nbd can't open it as qcow2: .*[Cc]luster"
    ) as found:
        open_image(str(tmp_path / "bad.qcow2"))
    assert "\n" not in str(found.value)


def test_qemu_only_warns(tmp_path, disk, monkeypatch):
    """A word on standard error though its server waits: it is used, and gone when we are done."""
    real = need("qemu-nbd", "qemu-utils")
    fake = tmp_path / "bin/qemu-nbd"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho 'qemu: image is odd' >&2\nexec {real} \"$@\"\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    reader = open_image(str(convert(disk, "qcow2")))
    assert reader.read(0, 8192) == disk.read_bytes()[:8192]
    assert "the server says: Input/output error, and when it opened the image: image is odd" in str(
        reader._failed(5, 0)
    )
    number = reader.server.process.pid
    reader.close()
    assert not os.path.exists(f"/proc/{number}")


# ---- NBD ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nbdkit(tmp_path):
    """A function that serves with nbdkit and returns the URI."""
    need("nbdkit", "nbdkit")
    started = []

    def serve(*arguments: str) -> str:
        path = tmp_path / f"socket{len(started)}"
        started.append(subprocess.Popen(["nbdkit", "-f", "-r", "-U", path, *arguments]))
        wait_for_socket(path)
        return f"nbd+unix:///?socket={path}"

    yield serve
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_nbd_reads_equal(disk, nbdkit):
    reader = open_image(nbdkit("file", str(disk)))
    expected = disk.read_bytes()
    assert reader.size == len(expected)
    offsets = np.random.default_rng(4).integers(0, len(expected) - 4096, 3000)
    assert reader.read_ranges(offsets, np.full(3000, 4096)).tobytes() == b"".join(
        expected[o : o + 4096] for o in offsets
    )
    assert reader.read(0, reader.size) == expected
    reader.close()


def test_nbd_server_with_minimum_block_size(disk, nbdkit):
    reader = open_image(
        nbdkit(
            "--filter=blocksize-policy",
            "file",
            str(disk),
            "blocksize-minimum=4096",
            "blocksize-error-policy=error",
        )
    )
    expected = disk.read_bytes()
    assert reader.read(300_001, 5) == expected[300_001:300_006]
    offsets = ints([1 << 20, 200_007, 2 << 20])
    assert reader.read_ranges(offsets, ints([10, 9000, 4096])).tobytes() == (
        expected[1 << 20 : (1 << 20) + 10] + expected[200_007:209_007] + expected[2 << 20 : (2 << 20) + 4096]
    )
    reader.close()


def test_nbd_errors_say_which_byte(disk, nbdkit):
    uri = nbdkit("--filter=error", "file", str(disk), "error-pread=EIO", "error-pread-rate=100%")
    reader = open_image(uri)
    with pytest.raises(ImageError, match=r"byte 0x[0-9a-f]+: the server says: Input/output error"):
        reader.read(1 << 20, 4096)
    reader.close()


def test_nbd_addresses_that_lead_nowhere(tmp_path, disk, nbdkit):
    for uri in (f"nbd+unix:///?socket={tmp_path}/none", "nbd://localhost:1/"):
        with pytest.raises(ImageError, match="can't connect"):
            open_image(uri)
    with pytest.raises(UsageError, match="not a valid URI"):
        open_image("nbd://[bad")
    with pytest.raises(UsageError, match="TLS"):
        open_image("nbds://localhost/")
    with pytest.raises(UsageError, match="needs \\?socket"):
        open_image("nbd+unix:///")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"NBDMAGICIHAVEOPT\0\1" + b"\xff" * 40,
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(136),
    ],
)
def test_servers_that_talk_nonsense(tmp_path, answer):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen()

    def talk():
        link, _ = server.accept()
        link.sendall(answer)
        with link, contextlib.suppress(OSError):  # the client may be gone first
            link.shutdown(socket.SHUT_WR)
            while link.recv(4096):
                pass

    thread = threading.Thread(target=talk)
    thread.start()
    with pytest.raises(ImageError):
        open_image(f"nbd+unix:///?socket={tmp_path}/s")
    thread.join()
    server.close()


def test_a_server_that_dies_is_one_line(disk, nbdkit, tmp_path):
    uri = nbdkit("file", str(disk))
    reader = open_image(uri)
    run("pkill", "-KILL", "-f", f"nbdkit .*{os.path.basename(str(tmp_path))}", ok=(0, 1))
    time.sleep(0.2)
    with pytest.raises(ImageError, match=r"closed the connection|broke"):
        reader.read(1 << 20, 4096)
    reader.close()


def test_qemus_reason_is_the_line_that_holds_it():
    said = (
        "qemu-nbd: warning: something is old\nA driver has something to say\n"
        "qemu-nbd: Failed to blk_new_open 'json:{}': Could not open 'a': no key\n"
        "To find it, run:\nsomething\n"
    )
    assert qemu.reason(said, "json:{}") == "Could not open 'a': no key"
    assert qemu.reason("module dmg-bz2 not found\nqemu-nbd: warning: old\nqemu-nbd: Bad\n", "x") == "Bad"
    assert qemu.reason("qemu-nbd: warning: old\n", "x") == "warning: old"
    assert qemu.reason("", "x") == ""
