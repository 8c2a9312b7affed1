"""NTFS volumes made with mkntfs and filled through ntfs-3g, and what was put into them."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support import run

LARGE = 1 << 16


@dataclass
class Volume:
    """An image and the contents that were written: by path, and by (path, stream)."""

    image: Path
    files: dict[str, bytes] = field(default_factory=dict)
    streams: dict[tuple[str, str], bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)


VARIANTS = {
    "c512": (12, 512, 512),
    "c4k": (24, 4096, 512),
    "c64k": (24, 65536, 512),
    "c1m": (160, 1 << 20, 512),
    "s4k": (24, 4096, 4096),
}
"""(MiB, bytes a cluster, bytes a sector)"""


@contextlib.contextmanager
def fuse(image: Path, options: str = "ro") -> Iterator[Path]:
    """The image mounted with ntfs-3g; NotMounted where it refuses.

    The daemon has written everything when this ends.
    """
    where = Path(tempfile.mkdtemp(prefix="bmap-ntfs-"))
    command = ["ntfs-3g", "-o", f"{options},no_detach,streams_interface=windows", image, where]
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not os.path.ismount(where):
            if daemon.poll() is not None:
                raise NotMounted(daemon.communicate()[1].decode(errors="replace"))
            time.sleep(0.01)
        try:
            yield where
        finally:
            while subprocess.run(["umount", where], capture_output=True).returncode and daemon.poll() is None:
                time.sleep(0.05)
    finally:
        daemon.communicate()
        where.rmdir()


class NotMounted(Exception):
    """ntfs-3g does not mount an image."""


def make(image: Path, mebibytes: int, cluster: int, sector: int) -> Volume:
    """An empty volume."""
    with open(image, "wb") as file:
        file.truncate(mebibytes << 20)
    run("mkntfs", "-F", "-Q", "-q", "-L", "тест", "-c", str(cluster), "-s", str(sector), image)
    return Volume(image)


def fill(volume: Volume, cluster: int) -> Volume:
    """Files of all sizes around the places where NTFS changes its mind; links, streams, holes, compression;
    fragments; deleted files."""
    random = np.random.default_rng(20261123)
    with fuse(volume.image, "rw,compression,noatime") as root:
        _sizes(volume, root, random, cluster)
        _names(volume, root)
        _streams(volume, root, random)
        _compressed(volume, root, random)
        if cluster < LARGE:
            _fragments(volume, root, random, cluster)
        for path in ("gone.txt", "size/gone too.bin"):
            (root / path).write_bytes(b"deleted" * 1000)
            volume.deleted.append(path)
        os.sync()
        for path in volume.deleted:
            (root / path).unlink()
    return volume


def _put(volume: Volume, root: Path, path: str, data: bytes) -> None:
    (root / path).write_bytes(data)
    volume.files[path] = data


def _sizes(volume: Volume, root: Path, random: np.random.Generator, cluster: int) -> None:
    (root / "size").mkdir()
    for size in (0, 1, 100, 400, 500, 600, 700, 1000, 3000, 3600, 5000, 70000):
        _put(volume, root, f"size/{size}", random.bytes(size))
    data = random.bytes(3000)
    with open(root / "size/sparse", "wb") as file:
        file.seek(300000)
        file.write(data)
        file.truncate(400000)
    volume.files["size/sparse"] = bytes(300000) + data + bytes(400000 - 303000)
    (root / "many").mkdir()
    for number in range(200):
        _put(volume, root, f"many/a file with number {number}", b"%d" % number * 5)


def _names(volume: Volume, root: Path) -> None:
    (root / "name").mkdir()
    for name in (
        "żółć",
        "日本語",
        "emoji 😀 end",
        "x" * 255,
        "€" * 200,
        " spaces ",
        "semi;colon",
        "new\nline",
    ):
        _put(volume, root, f"name/{name}", name.encode())
    _put(volume, root, "name/linked", b"many names" * 200)
    for number in range(40):
        os.link(root / "name/linked", root / f"name/hard link number {number} with a name of some length")
        volume.files[f"name/hard link number {number} with a name of some length"] = b"many names" * 200
    os.symlink("żółć", root / "name/soft")
    volume.links["name/soft"] = "żółć"


def _streams(volume: Volume, root: Path, random: np.random.Generator) -> None:
    (root / "stream").mkdir()
    _put(volume, root, "stream/file", b"plain")
    for stream, size in (("Zone.Identifier", 26), ("big", 90000), ("ü", 600)):
        data = random.bytes(size)
        (root / f"stream/file:{stream}").write_bytes(data)
        volume.streams["stream/file", stream] = data


def _compressed(volume: Volume, root: Path, random: np.random.Generator) -> None:
    (root / "packed").mkdir()
    os.setxattr(root / "packed", "system.ntfs_attrib_be", (0x810).to_bytes(4, "big"))
    text = b"".join(b"line %d of a text that repeats itself\n" % (n % 50) for n in range(8000))
    for name, data in (
        ("text", text),
        ("noise", random.bytes(200000)),
        ("mixed", text[:150000] + random.bytes(150000) + text[:100000]),
    ):
        _put(volume, root, f"packed/{name}", data)


def _fragments(volume: Volume, root: Path, random: np.random.Generator, cluster: int) -> None:
    """A file with more runs than a record can list; two that grow in turn; and a $MFT that can only grow into
    the holes of one of them."""
    (root / "frag").mkdir()
    sparse = bytearray(1200 * cluster)
    with open(root / "frag/every second", "wb", buffering=0) as file:
        for at in range(cluster, len(sparse), 2 * cluster):
            sparse[at : at + cluster] = random.bytes(cluster)
            file.seek(at)
            file.write(sparse[at : at + cluster])
    volume.files["frag/every second"] = bytes(sparse)
    piece = max(cluster, 1024)
    data = random.bytes(1000 * piece)
    with (
        open(root / "frag/kept", "wb", buffering=0) as kept,
        open(root / "frag/holes", "wb", buffering=0) as holes,
    ):
        for at in range(0, len(data), piece):
            kept.write(data[at : at + piece])
            holes.write(bytes(piece))
    volume.files["frag/kept"] = data
    with open(root / "frag/plug", "wb", buffering=0) as plug, contextlib.suppress(OSError):
        while plug.write(bytes(65536)):
            pass
    (root / "frag/holes").unlink()
    for number in range(500):
        _put(volume, root, f"frag/{number}", b"%d" % number * 50)
    (root / "frag/plug").unlink()


def unpack_lznt1(data: bytes, size: int) -> bytes:
    """LZNT1, the compression of NTFS ([MS-XCA] 2.5): chunks of 4096 bytes, each a header and tokens."""
    result, at = bytearray(), 0
    while at + 2 <= len(data) and len(result) < size:
        header = int.from_bytes(data[at : at + 2], "little")
        if header == 0:
            break
        end, base = at + 3 + (header & 0xFFF), len(result)
        at += 2
        if not header & 0x8000:
            result += data[at:end]
            at = end
            continue
        while at < end:
            flags, at = data[at], at + 1
            for bit in range(8):
                if at >= end:
                    break
                if not flags >> bit & 1:
                    result.append(data[at])
                    at += 1
                    continue
                token, at = int.from_bytes(data[at : at + 2], "little"), at + 2
                length_bits = 12
                while (len(result) - base - 1) >> (16 - length_bits):
                    length_bits -= 1
                start = len(result) - (token >> length_bits) - 1
                for n in range((token & ((1 << length_bits) - 1)) + 3):
                    result.append(result[start + n])
        result += bytes((-len(result)) % 4096)
    return bytes(result[:size]).ljust(size, b"\0")
