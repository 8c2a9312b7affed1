"""Block status over NBD: what zeroes, layers and dirty bitmaps the client sees equals what nbdinfo and
qemu-img say; reads by structured replies are exact; servers that lie end in one clear line."""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from support import need, run, wait_for_socket
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import ImageError
from virt_bmap.open import open_image
from virt_bmap.open.disks import Opening
from virt_bmap.open.status import ALLOCATION, DEPTH, DIRTY, StatusReader

SIZE = 96 << 20


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base.raw, middle.qcow2 and top.qcow2, written at random places; `top` has the bitmaps b0
    (of its writes) and none."""
    need("qemu-img", "qemu-utils")
    need("qemu-io", "qemu-utils")
    folder = tmp_path_factory.mktemp("chain")
    random.seed(7)
    with open(folder / "base.raw", "wb") as file:
        file.truncate(SIZE)
        for _ in range(40):
            file.seek(random.randrange(0, SIZE - (1 << 20)) & ~4095)
            file.write(random.randbytes(random.randrange(1, 200000)))
    below, format = "base.raw", "raw"
    for name in ("middle.qcow2", "top.qcow2"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", folder / below, "-F", format, folder / name)
        if name == "top.qcow2":
            for bitmap in ("b0", "none"):
                run("qemu-img", "bitmap", "--add", "-g", "64k", folder / name, bitmap)
            run("qemu-img", "bitmap", "--disable", folder / name, "none")
        commands = []
        for _ in range(30):
            at, length = random.randrange(0, SIZE - (1 << 20)) & ~511, random.randrange(1, 400) * 512
            commands += [
                "-c",
                f"write -z {at} {length}"
                if random.random() < 0.2
                else f"write -P {random.randrange(1, 256)} {at} {length}",
            ]
        run("qemu-io", "-f", "qcow2", *commands, folder / name)
        below, format = name, "qcow2"
    return folder


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """top.qcow2 by a qemu-nbd of its own, as a URI."""
    path = folder / f"socket-{os.urandom(4).hex()}"
    server = subprocess.Popen(
        [
            need("qemu-nbd", "qemu-utils"),
            "-r",
            "-t",
            "-e",
            "8",
            "-f",
            "qcow2",
            "-k",
            path,
            *options,
            folder / "top.qcow2",
        ]
    )
    try:
        wait_for_socket(path)
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def bytes_of(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A flag for each sector of the disk."""
    flags = np.zeros(SIZE // 512, bool)
    for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
        flags[low // 512 : high // 512] = True
    return flags


@pytest.mark.parametrize(
    ("context", "options"), [(ALLOCATION, []), (DEPTH, ["-A"]), (f"{DIRTY}b0", ["-B", "b0"])]
)
def test_status_equals_what_nbdinfo_says(chain: Path, context: str, options: list[str]) -> None:
    need("nbdinfo", "libnbd-bin")
    with served(chain, *options) as uri:
        said = json.loads(run("nbdinfo", "--json", f"--map={context}", uri))
        reader = StatusReader(uri, wanted=[context])
        starts, ends, flags = reader.status(context)
        reader.close()
    expected = np.full(SIZE // 512, -1)
    for extent in said:
        expected[extent["offset"] // 512 : (extent["offset"] + extent["length"]) // 512] = extent["type"]
    found = np.full(SIZE // 512, -1)
    for low, high, flag in zip(starts.tolist(), ends.tolist(), flags.tolist(), strict=True):
        found[low // 512 : high // 512] = flag
    assert (found == expected).all()
    assert len(set(found.tolist())) > 1
    assert starts[0] == 0
    assert (starts[1:] == ends[:-1]).all()
    assert ends[-1] == SIZE
    assert (flags[1:] != flags[:-1]).all()


def test_the_layer_of_a_cluster_is_what_qemu_img_map_says(chain: Path) -> None:
    reader = open_image(str(chain / "top.qcow2"), Opening(references=True), status=[DEPTH])
    starts, ends, flags = reader.status(DEPTH)  # type: ignore[attr-defined]
    reader.close()
    top = bytes_of(starts[flags == 1], ends[flags == 1])
    expected = np.zeros(SIZE // 512, bool)
    for extent in json.loads(run("qemu-img", "map", "--output=json", chain / "top.qcow2")):
        expected[extent["start"] // 512 : (extent["start"] + extent["length"]) // 512] = extent[
            "depth"
        ] == 0 and extent.get("present", True)
    assert (top == expected).all()


def test_reads_by_structured_replies_are_the_bytes(chain: Path) -> None:
    plain = chain / "plain.raw"
    run("qemu-img", "convert", "-O", "raw", chain / "top.qcow2", plain)
    data = plain.read_bytes()
    random.seed(11)
    offsets = ints(sorted(random.sample(range(SIZE - 300000), 200)))
    lengths = ints([random.randrange(1, 300000) for _ in range(200)])
    reader = open_image(str(chain / "top.qcow2"), Opening(references=True), status=[])
    assert isinstance(reader, StatusReader)
    got = reader.read_ranges(offsets, lengths).tobytes()
    whole = reader.read(0, SIZE)
    starts, ends = reader.stored()
    reader.close()
    assert got == b"".join(
        data[at : at + n] for at, n in zip(offsets.tolist(), lengths.tolist(), strict=True)
    )
    assert whole == data
    zero = ~bytes_of(starts, ends)
    assert zero.any()
    assert not np.frombuffer(data, np.uint8).reshape(-1, 512)[zero].any()


def test_holes_of_a_raw_file_are_left_out(chain: Path) -> None:
    reader = open_image(str(chain / "base.raw"), status=[])
    starts, ends = reader.stored()
    reader.close()
    zero = ~bytes_of(starts, ends)
    assert zero.any()
    assert not np.frombuffer((chain / "base.raw").read_bytes(), np.uint8).reshape(-1, 512)[zero].any()


def test_a_bitmap_that_is_not_there_is_named_with_those_that_are(chain: Path) -> None:
    with (
        served(chain, "-B", "b0") as uri,
        pytest.raises(
            ImageError, match=r"has no qemu:dirty-bitmap:b1; it has: base:allocation, qemu:dirty-bitmap:b0$"
        ),
    ):
        StatusReader(uri, wanted=[f"{DIRTY}b1"])
    with pytest.raises(
        ImageError, match=r"top\.qcow2: qemu-nbd can't open it as qcow2: Bitmap 'b1' is not found"
    ):
        open_image(str(chain / "top.qcow2"), Opening(references=True), status=[f"{DIRTY}b1"])
    with pytest.raises(ImageError, match=r"base\.raw: is a raw disk, which has no dirty-bitmap:b1"):
        open_image(str(chain / "base.raw"), status=[f"{DIRTY}b1"])


def test_a_server_of_another_kind_gives_its_allocation(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "socket"
    with open(disk, "wb") as file:
        file.truncate(8 << 20)
        file.seek(1 << 20)
        file.write(b"x" * 65536)
    server = subprocess.Popen([need("nbdkit", "nbdkit"), "-f", "-r", "-U", path, "file", disk])
    try:
        wait_for_socket(path)
        reader = open_image(f"nbd+unix:///?socket={path}", status=[])
        assert [side.tolist() for side in reader.stored()] == [[1 << 20], [(1 << 20) + 65536]]
        assert reader.read(0, 8 << 20) == disk.read_bytes()
        reader.close()
        with pytest.raises(ImageError, match="has no qemu:allocation-depth; it has: base:allocation"):
            open_image(f"nbd+unix:///?socket={path}", status=[DEPTH])
    finally:
        server.terminate()
        server.wait(20)


# ---- servers that lie --------------------------------------------------------------------------------------

OPTION = struct.Struct(">QIII")


def handshake(link: socket.socket, structured: bool) -> None:
    """What a server with base:allocation and 1 MiB says until requests come."""

    def reply(option: int, kind: int, data: bytes = b"") -> None:
        link.sendall(OPTION.pack(0x3E889045565A9, option, kind, len(data)) + data)

    link.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    link.recv(4, socket.MSG_WAITALL)
    while True:
        head = link.recv(16, socket.MSG_WAITALL)
        if len(head) < 16:
            return
        option, length = struct.unpack(">8xII", head)
        link.recv(length, socket.MSG_WAITALL)
        if option == 8:
            reply(option, 1 if structured else (1 << 31) + 1)
        elif option == 10:
            reply(option, 4, struct.pack(">I", 9) + b"base:allocation")
            reply(option, 1)
        elif option == 7:
            reply(option, 3, struct.pack(">HQH", 0, 1 << 20, 1))
            reply(option, 1)
            return


@contextlib.contextmanager
def lying(tmp_path: Path, answer: Callable[[bytes], bytes], structured: bool = True) -> Iterator[str]:
    """A server that answers each request as `answer` says, as a URI."""
    path = tmp_path / "liar"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        with contextlib.suppress(OSError):
            link, _ = listener.accept()
            with link:
                handshake(link, structured)
                while len(request := link.recv(28, socket.MSG_WAITALL)) == 28 and request[6:8] != b"\0\2":
                    link.sendall(answer(request))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        listener.close()
        thread.join(10)


def chunk(request: bytes, kind: int, data: bytes, flags: int = 1) -> bytes:
    return struct.pack(">IHH", 0x668E33EF, flags, kind) + request[8:16] + struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(("answer", "words"), [
    (lambda r: chunk(r, 0, b""), "does not tell base:allocation at byte 0x0"),
    (lambda r: chunk(r, 5, struct.pack(">III", 8, 1 << 20, 0)), "does not tell base:allocation"),
    (lambda r: chunk(r, 5, struct.pack(">III", 9, 0, 0)), "does not tell base:allocation"),
    (lambda r: chunk(r, 5, b"123"), "chunk of type 5 that does not answer"),
    (lambda r: chunk(r, 1, b"12345678x"), "chunk of type 1 that does not answer"),
    (lambda r: chunk(r, 1 << 15 | 1, struct.pack(">IH", 5, 0)), "the server says: Input/output error"),
    (lambda r: struct.pack(">II", 0x67446698, 5) + r[8:16], "the server says: Input/output error"),
    (lambda r: struct.pack(">II", 0x67446698, 0) + r[8:16], "does not answer"),
    (lambda r: b"x" * 20, "not a reply to any request"),
    (lambda r: struct.pack(">IHHQI", 0x668E33EF, 1, 5, 77, 12) + bytes(12), "not a reply to any request"),
    (lambda r: struct.pack(">IHH", 0x668E33EF, 1, 5) + r[8:16] + b"\xff\xff\xff\xff",
        "not a reply to any request"),
])  # fmt: skip
def test_status_that_is_not_valid_ends_in_one_line(
    tmp_path: Path, answer: Callable[[bytes], bytes], words: str
) -> None:
    with (
        lying(tmp_path, answer) as uri,
        contextlib.closing(StatusReader(uri)) as reader,
        pytest.raises(ImageError, match=words),
    ):
        reader.stored()


def test_extents_that_reach_too_far_are_cut(tmp_path: Path) -> None:
    with (
        lying(tmp_path, lambda r: chunk(r, 5, struct.pack(">7I", 9, 4096, 0, 1 << 31, 2, 4096, 0))) as uri,
        contextlib.closing(StatusReader(uri)) as reader,
    ):
        assert [side.tolist() for side in reader.stored()] == [[0], [4096]]


@pytest.mark.parametrize(("answer", "words"), [
    (lambda r: chunk(r, 0, b""), "sent less than was asked for at byte 0x40000"),
    (lambda r: chunk(r, 1, r[16:24] + b"x" * 10), "sent less"),
    (lambda r: chunk(r, 1, r[16:24] + b"x" * 5000), "does not answer"),
    (lambda r: chunk(r, 1, bytes(8) + b"x" * 10), "does not answer"),
    (lambda r: chunk(r, 2, r[16:24] + struct.pack(">I", 1 << 31)), "does not answer"),
    (lambda r: chunk(r, 2, r[16:24] + struct.pack(">I", 4096), 0) + chunk(r, 2,
            r[16:24] + struct.pack(">I", 1)), "does not answer"),
])  # fmt: skip
def test_reads_that_are_not_valid_end_in_one_line(
    tmp_path: Path, answer: Callable[[bytes], bytes], words: str
) -> None:
    with (
        lying(tmp_path, answer) as uri,
        contextlib.closing(StatusReader(uri)) as reader,
        pytest.raises(ImageError, match=words),
    ):
        reader.read_ranges(ints(0x40000), ints(4096))


def test_a_server_without_structured_replies_is_read_as_a_plain_one_unless_status_is_wanted(
    tmp_path: Path,
) -> None:
    with lying(
        tmp_path, lambda r: struct.pack(">II", 0x67446698, 0) + r[8:16] + b"y" * 4096, structured=False
    ) as uri:
        reader = StatusReader(uri)
        assert reader.read_ranges(ints(0x40000), ints(4096)).tobytes() == b"y" * 4096
        assert [side.tolist() for side in reader.stored()] == [[0], [1 << 20]]
        reader.close()
    (tmp_path / "liar").unlink()
    with (
        lying(tmp_path, lambda r: b"", structured=False) as uri,
        pytest.raises(ImageError, match="refuses structured replies: unsupported"),
    ):
        StatusReader(uri, wanted=[DEPTH])
