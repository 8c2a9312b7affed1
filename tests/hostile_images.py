"""Images that try to reach into their host: what they refer to is a file that is none of their business.

And a watch over that file.
"""

import ctypes
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hostile_layers as layers
from support import need, run

IN_ACCESS, IN_MODIFY, IN_OPEN = 1, 2, 0x20
SECRET = b"TOP SECRET host file\n"
SIZE = 1 << 20


class Victim:
    """Files of the host, the first with a secret; the kernel tells of each time that one of them is opened,
    read or written."""

    def __init__(self, *paths: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self.path = paths[0]
        self.before = self.path.read_bytes()
        for path in paths:
            assert libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN | IN_ACCESS | IN_MODIFY) >= 0

    def touched(self) -> bool:
        """Was one of them opened since the last call?"""
        if not select.select([self._fd], [], [], 0)[0]:
            return False
        return bool(os.read(self._fd, 1 << 16))

    def unharmed(self) -> bool:
        same = self.path.read_bytes() == self.before
        self.touched()
        return same

    def close(self) -> None:
        os.close(self._fd)


def secret(folder: Path) -> Path:
    path = folder / "secret.raw"
    path.write_bytes(SECRET.ljust(SIZE, b"."))
    return path


def text(*extents: str, cid: str = "ffffffff", kind: str = "monolithicFlat", more: str = "") -> str:
    """A VMDK's descriptor."""
    lines = "\n".join(extents)
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID={cid}\ncreateType="{kind}"\n'
        f'{more}{lines}\nddb.adapterType = "ide"\n'
    )


def empty_sparse(folder: Path) -> bytearray:
    """QEMU's own sparse VMDK of 1 MiB, with its descriptor at 0x200."""
    need("qemu-img", "qemu-utils")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        "subformat=monolithicSparse",
        folder / "empty.vmdk",
        "1M",
    )
    return bytearray((folder / "empty.vmdk").read_bytes())


def with_text(data: bytearray, added: bytes) -> bytearray:
    """The embedded descriptor with more lines."""
    at = data.index(b"\0", 512)
    data[at : at + len(added)] = added
    return data


def capacity_0(descriptor: str, sectors: int) -> bytes:
    """A sparse header that leaves everything to its descriptor, of which it says that it has so many
    sectors."""
    head = struct.pack("<4sIIQQQQI", b"KDMV", 1, 3, 0, 128, 1, sectors, 512).ljust(512, b"\0")
    return (head + descriptor.encode()).ljust(1 << 16, b"\0")


def cowd(added: bytes) -> bytes:
    head = struct.pack("<4sIIIIIII", b"COWD", 1, 3, 2048, 1, 8, 1, 128).ljust(512, b"\0")
    return (head + added).ljust(1 << 16, b"\0")


def qcow2(
    backing: str = "",
    format: str = "",
    data: str = "",
    version: int = 3,
    cluster_bits: int = 16,
    header: int = 104,
) -> bytes:
    """An empty qcow2 of 1 MiB.

    Its tables are: L1 in cluster 1, refcount table and block in clusters 2 and 3.
    """
    cluster = 1 << cluster_bits
    extensions = b""
    for kind, value in ((0xE2792ACA, format), (0x44415441, data)):
        if value:
            extensions += struct.pack(">II", kind, len(value)) + value.encode().ljust(
                -(-len(value) // 8) * 8, b"\0"
            )
    extensions += bytes(8)
    at = header + len(extensions) if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        at,
        len(backing),
        cluster_bits,
        SIZE,
        0,
        1,
        cluster,
        2 * cluster,
        1,
        0,
        0,
    )
    head += struct.pack(">QQQII", 4 if data else 0, 0, 0, 4, header)
    start = (head.ljust(header, b"\0") + extensions + backing.encode()).ljust(cluster, b"\0")
    table = struct.pack(">Q", 3 * cluster).ljust(cluster, b"\0")
    counts = struct.pack(">4H", 1, 1, 1, 1).ljust(cluster, b"\0")
    return start + bytes(cluster) + table + counts


def qcow(backing: str) -> bytes:
    head = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 48, len(backing), 0, SIZE, 12, 9, 0, 0, 4096)
    return (head + backing.encode()).ljust(1 << 16, b"\0")


def qed(backing: str, raw: bool = True) -> bytes:
    head = struct.pack(
        "<4sIIIQQQQQII", b"QED\0", 65536, 4, 1, 1 | 4 * raw, 0, 0, 65536, SIZE, 64, len(backing)
    )
    return (head + backing.encode()).ljust(65536, b"\0") + bytes(4 * 65536)


def differencing_vhd(folder: Path, parent: str) -> bytes:
    """QEMU's own dynamic VHD with the type and a parent's name changed by hand."""
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "vpc", folder / "empty.vhd", "1M")
    data = bytearray((folder / "empty.vhd").read_bytes()[:-512])
    name = parent.encode("utf-16-le")
    struct.pack_into(">4sII4xQ", data, 512 + 576, b"W2ku", 512, len(name), len(data))
    struct.pack_into(">I", data, 60, 4)
    for start, length, at in ((0, 512, 64), (512, 1024, 36)):
        struct.pack_into(">I", data, start + at, 0)
        struct.pack_into(">I", data, start + at, ~sum(data[start : start + length]) & 0xFFFFFFFF)
    return bytes(data) + name.ljust(512, b"\0") + bytes(data[:512])


class Hostile(NamedTuple):
    """An image: how it is made of (folder, the victim's path, the path of a second descriptor that leads to
    the victim), and the format that is forced."""

    make: Callable[[Path, Path, Path], bytes]
    format: str | None = None


def _text(line: str, **named: str) -> Hostile:
    return Hostile(lambda _folder, victim, second: text(line.format(v=victim, s=second), **named).encode())


def _hint(line: str) -> Hostile:
    return Hostile(
        lambda folder, victim, second: bytes(
            with_text(empty_sparse(folder), line.format(v=victim, s=second).encode())
        )
    )


def _without_offset(folder: Path, _victim: Path, second: Path) -> bytes:
    data = with_text(empty_sparse(folder), f'parentFileNameHint="{second}"\n'.encode())
    data[28:36] = bytes(8)
    return bytes(data)


def _delta(folder: Path, _victim: Path, second: Path) -> bytes:
    data = with_text(empty_sparse(folder), f'parentFileNameHint="{second}"\n'.encode())
    return bytes(data.replace(b"parentCID=ffffffff", b"parentCID=00000001"))


FLAT = 'RW 2048 FLAT "{v}" 0'
IMAGES = {
    "extent": _text(FLAT),
    "extent behind a blank": _text(" " + FLAT),
    "extent with a plus": _text('RW +2048 FLAT "{v}" 0'),
    "extent with vertical tabs": _text('RW\x0b2048\x0bFLAT\x0b"{v}" 0'),
    "extent with a return": _text('RW 2048 FLAT "{v}" \r0'),
    "extent behind a form feed": _text("\f" + FLAT),
    "extent behind a return": _text("\r" + FLAT),
    "extent in hexadecimal": _text('RW 0x800 FLAT "{v}" 0'),
    "extent without an offset": _text('RW 2048 VMFS "{v}"'),
    "extent in a second line": _text(f'RW 8 ZERO\n {FLAT}'),
    "extent that is a descriptor": _text('RW 2048 SPARSE "{s}"', kind="twoGbMaxExtentSparse"),
    "text with a parent": _text('RW 2048 SPARSE "none"', cid="1", more='parentFileNameHint="/none"\n'),
    "text, format forced": Hostile(lambda _f, victim, _s: ("#\n" + text(FLAT.format(v=victim))).encode(),
        "vmdk"),
    "capacity 0": Hostile(lambda _f, victim, _s: capacity_0(text(FLAT.format(v=victim)), 4)),
    "capacity 0, a text of size 0": Hostile(lambda _f, victim,
        _s: capacity_0(text(FLAT.format(v=victim)), 0)),
    "capacity 0, a short text": Hostile(lambda _f, victim,
        _s: capacity_0(text("#" * 500 + "\n" + FLAT.format(v=victim)), 1)),
    "parent though parentCID says none": _hint('parentFileNameHint="{s}"\n'),
    "parent in a comment": _hint('# parentFileNameHint="{s}"\n'),
    "parent by nbd": _hint('parentFileNameHint="nbd://127.0.0.1:{port}/"\n'.replace("{port}", "1")),
    "parent without a descriptor": Hostile(_without_offset),
    "parent": Hostile(_delta),
    "COWD with a parent": Hostile(lambda _f, _v, second: cowd('parentCID=ffffffff\n'
        f'parentFileNameHint="{second}"\n'.encode())),
    "qcow2, backing file": Hostile(lambda _f, victim, _s: qcow2(str(victim), "raw")),
    "qcow2, backing file without a format": Hostile(lambda _f, victim, _s: qcow2(str(victim))),
    "qcow2, file:": Hostile(lambda _f, victim, _s: qcow2(f"file:{victim}", "raw")),
    "qcow2, json:": Hostile(lambda _f, victim,
        _s: qcow2(f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{victim}"}}}}', "raw")),
    "qcow2, backing file of another format": Hostile(lambda _f, _v, second: qcow2(str(second), "vmdk")),
    "qcow2 of version 2": Hostile(lambda _f, victim, _s: qcow2(str(victim), "raw", version=2, header=72)),
    "qcow2, data file": Hostile(lambda _f, victim, _s: qcow2(data=str(victim))),
    "qcow2, data file behind a long header": Hostile(lambda _f, victim,
        _s: qcow2(data=str(victim), cluster_bits=21, header=1 << 17)),
    "qcow, backing file": Hostile(lambda _f, victim, _s: qcow(str(victim))),
    "qed, backing file": Hostile(lambda _f, victim, _s: qed(str(victim))),
    "qed, backing file of any format": Hostile(lambda _f, _v, second: qed(str(second), raw=False)),
    "vhd, parent": Hostile(lambda folder, victim, _s: differencing_vhd(folder, str(victim))),
    "vhdx, parent": Hostile(
        lambda folder, victim, _s: bytes(layers.vhdx(layers.parent(str(victim)))(folder))
    ),
    "vdi, parent": Hostile(
        lambda folder, victim, _s: bytes(layers.changed("vdi", layers.differing(str(victim)))(folder))
    ),
    "parallels, extension": Hostile(
        lambda folder, victim, _s: bytes(layers.changed("parallels", layers.extended(str(victim)))(folder))
    ),
    "bochs, parent": Hostile(
        lambda folder, victim, _s: bytes(layers.bochs(subtype=b"Undoable", named=bytes(victim))(folder))
    ),
    "dmg, names": Hostile(
        lambda folder, victim, _s: bytes(layers.dmg(layers.ONE_CHUNK, named=str(victim))(folder))
    ),
}  # fmt: skip
"""By what they do."""
