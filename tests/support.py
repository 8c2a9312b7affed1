"""What tests of several formats share: tools, mounts, oracles of the running kernel, and content read by the
map."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from virt_bmap.ask.check import check
from virt_bmap.ask.content import Files
from virt_bmap.core.errors import FormatError
from virt_bmap.core.mapping import COPY, PARITY, Row, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import Asks
from virt_bmap.open.disks import Disks
from virt_bmap.open.raw import RawReader
from virt_bmap.survey import maps
from virt_bmap.survey.survey import survey


def run(
    *command: str | os.PathLike[str],
    stdin: bytes | None = None,
    ok: tuple[int, ...] = (0,),
    env: dict[str, str] | None = None,
) -> bytes:
    """The standard output of a command; fails the test with its words when it exits with a status that is not
    in `ok`."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run([os.fspath(part) for part in command], input=stdin, capture_output=True,
                          env={**os.environ, "PATH": path, "LC_ALL": "C", **(env or {})})  # fmt: skip
    if done.returncode not in ok:
        words = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
        raise AssertionError(f"{' '.join(map(str, command))} exited with {done.returncode}: {words}")
    return done.stdout


def need(tool: str, package: str) -> str:
    """The path of a program, or skip the test saying which Debian package has it."""
    found = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{tool} is not installed (apt-get install {package})")
    return found


def need_root() -> None:
    """Skip the test where loop devices and mounts can't be had."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")


def wait_for_socket(path: str | os.PathLike[str]) -> None:
    """Until an NBD server greets on a Unix socket: qemu-nbd listens before it has opened, and locked, its
    image. Fails the test after half a minute."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as link, contextlib.suppress(OSError):
            link.settimeout(30)
            link.connect(os.fspath(path))
            if link.recv(8) == b"NBDMAGIC":
                return
        time.sleep(0.02)
    raise AssertionError(f"nobody answers on {path}")


# ---- maps --------------------------------------------------------------------------------------------------


def mapped(*images: str | os.PathLike[str]) -> BlockMap:
    """The block map of raw images as the disks of one machine."""
    readers = [RawReader(os.fspath(image)) for image in images]
    try:
        return survey(readers, asks=Asks.PROOFS | Asks.SLEEP)
    finally:
        for reader in readers:
            reader.close()


def assert_proven(bmap: BlockMap) -> None:
    """`check` finds nothing: tiled, in agreement with the allocators, no problem of any severity but
    notes."""
    found = check(bmap).disagreements
    assert not found, "\n".join(map(str, found[:20]))


def assert_copies_and_parity(bmap: BlockMap, readers: list[Reader]) -> tuple[int, int]:
    """Every copy equals the data, and the XOR of what a parity chunk protects is what lies there; (bytes of
    copies, of parity) compared.

    `readers` are the volumes' by number. Of a filesystem's volume only what is owned counts: in free space
    copies may differ. RAID6's Q is no XOR: a parity place that differs is allowed where the same chunks have
    another one that agrees.
    """
    copied = parity = 0
    for volume in range(bmap.volumes.num_rows):
        rows = bmap.rows_of(volume)
        copied += _compare_copies(bmap, volume, rows.take(rows.role == COPY), readers)
        parity += _compare_parity(rows.take(rows.role == PARITY), readers, volume)
    return copied, parity


def one_by_one(rows: Rows) -> list[Row]:
    """Mapping rows, each by itself."""
    return [Row(*row) for row in zip(*(getattr(rows, name).tolist() for name in Row._fields), strict=True)]


def _compare_copies(bmap: BlockMap, volume: int, copies: Rows, readers: list[Reader]) -> int:
    _, extents = bmap.slice_of("extents", volume)
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    if bmap.slice_of("filesystems", volume)[1].num_rows:
        owned = np.isin(tables.codes(extents, "kind"), tables.OWNED) & (
            (tables.integers(extents, "flags") & tables.INLINE) == 0
        )
        # btrfs keeps copies of its superblock at places of each device: no data of the pool lies on the other
        # side there
        owned &= np.array([part != "superblock" for part in extents.column("part").to_pylist()])
        start, end = start[owned], (start + length)[owned]
    else:
        start, end = np.zeros(1, np.int64), np.array([readers[volume].size])
    pieces = copies.down(start, end)
    for row, low, high, size in zip(pieces.row, pieces.source, pieces.target, pieces.length, strict=True):
        parent = readers[copies.parent[row]]
        assert parent.read(int(high), int(size)) == readers[volume].read(int(low), int(size)), (
            volume,
            int(low),
            parent.name,
        )
    return int(pieces.length.sum())


def _compare_parity(rows: Rows, readers: list[Reader], volume: int) -> int:
    """Rows of one place in one member tell which chunks are protected there, a whole column of stripes at
    once."""
    places: dict[tuple[int, ...], list[int]] = {}
    for at in range(len(rows)):
        place = (
            rows.parent[at],
            rows.parent_offset[at],
            rows.parent_step[at],
            rows.run[at],
            rows.count[at],
        )
        places.setdefault(tuple(map(int, place)), []).append(at)
    compared, agreed = 0, dict[tuple[int, ...], bool]()
    for (parent, offset, step, run, count), members in places.items():
        each = np.arange(count, dtype=np.int64)
        expected = np.zeros((count, run), np.uint8)
        for at in members:
            expected ^= readers[volume].read_blocks(rows.volume_offset[at] + each * rows.volume_step[at], run)
        stripes = tuple(int(rows.volume_offset[at]) for at in members)
        same = bool((readers[parent].read_blocks(offset + each * step, run) == expected).all())
        agreed[stripes] = agreed.get(stripes, False) or same
        compared += expected.size if same else 0
    assert all(agreed.values()), [stripe for stripe, same in agreed.items() if not same][:5]
    return compared


@dataclass(frozen=True)
class Extent:
    """One piece of a file, in bytes; `offset` counts from the volume's start."""

    file_offset: int
    offset: int
    length: int
    unwritten: bool = False


def file_extents(bmap: BlockMap, volume: int, inode: int) -> list[Extent]:
    """The plain content of an inode (no streams, no inline data), neighbours joined, in file order."""
    _, table = bmap.slice_of("extents", volume)
    kind, file_offset = tables.codes(table, "kind"), tables.integers(table, "file_offset")
    flags, part = tables.integers(table, "flags"), table.column("part").is_valid().to_numpy()
    mine = (
        (tables.integers(table, "inode") == inode)
        & (file_offset >= 0)
        & ((flags & tables.INLINE) == 0)
        & ~part
    )
    mine &= np.isin(kind, (tables.DATA, tables.UNWRITTEN, tables.DIRECTORY, tables.SYMLINK))
    rows = zip(
        file_offset[mine].tolist(),
        tables.integers(table, "volume_offset")[mine].tolist(),
        tables.integers(table, "length")[mine].tolist(),
        (kind[mine] == tables.UNWRITTEN).tolist(),
        strict=True,
    )
    return join([Extent(*row) for row in rows])


def join(extents: list[Extent]) -> list[Extent]:
    """Sorted by file offset, with pieces that continue each other on both sides made one."""
    result: list[Extent] = []
    for extent in sorted(extents, key=lambda e: e.file_offset):
        last = result[-1] if result else None
        if (
            last
            and last.unwritten == extent.unwritten
            and (
                last.file_offset + last.length == extent.file_offset
                and last.offset + last.length == extent.offset
            )
        ):
            result[-1] = Extent(last.file_offset, last.offset, last.length + extent.length, last.unwritten)
        else:
            result.append(extent)
    return result


def content(bmap: BlockMap, disks: list[Reader], volume: int, inode: int) -> bytes:
    """A file's bytes, read from the disks where the map says they lie: holes and unwritten parts as zeroes,
    inline data included."""
    _, inodes = bmap.slice_of("inodes", volume)
    size = int(tables.integers(inodes, "size")[tables.integers(inodes, "inode") == inode][0])
    _, table = bmap.slice_of("extents", volume)
    kind, file_offset = tables.codes(table, "kind"), tables.integers(table, "file_offset")
    part = table.column("part").is_valid().to_numpy()
    mine = np.flatnonzero((tables.integers(table, "inode") == inode) & (file_offset >= 0) & ~part
                          & np.isin(kind, (tables.DATA, tables.SYMLINK)))  # fmt: skip
    start, length = tables.integers(table, "volume_offset")[mine], tables.integers(table, "length")[mine]
    found = bmap.descend(volume, start, start + length)
    found = found.take(found.role == 0)
    result = bytearray(size)
    for query, disk, low, high, inside in zip(
        found.query, found.volume, found.start, found.end, found.inside, strict=True
    ):
        at = int(file_offset[mine[query]] + inside - start[query])
        want = min(int(high - low), size - at)
        if want > 0:
            result[at : at + want] = disks[bmap.disks.index(int(disk))].read(int(low), want)
    return bytes(result)


def tree(bmap: BlockMap, volume: int) -> dict[str, int]:
    """Every path of a filesystem with its inode; bytes that are not UTF-8 as surrogates, as os.fsdecode gives
    them."""
    inode, path = bmap.paths(volume)
    return dict(zip((os.fsdecode(p) for p in path.to_pylist()), inode.tolist(), strict=True))


def hashes(image: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of every regular file of the one filesystem of an image, read as `cat` reads; nothing may be
    lost."""
    with maps.opened(Disks([str(image)])) as (bmap, readers):
        volume = int(tables.integers(bmap.filesystems, "volume")[0])
        files = Files(bmap, volume, readers[volume])
        found = {
            path.removeprefix("/"): inode
            for path, inode in tree(bmap, volume).items()
            if files.is_kind(inode, tables.T_FILE)
        }
        refused = {path: files.refusal(inode) for path, inode in found.items()}
        assert not any(refused.values()), refused
        inodes = list(found.values())
        content = [np.zeros(files.length(inode), np.uint8) for inode in inodes]
        for piece in files.pieces(inodes):
            assert not len(piece.lost.starts), piece
            content[piece.file][piece.offset : piece.offset + len(piece.data)] = piece.data
    digests = [hashlib.sha256(data).hexdigest() for data in content]
    return dict(zip(found, digests, strict=True))


def lz4_block(data: bytes) -> bytes:
    """What an LZ4 block unpacks to, as far as it is one."""
    out, at = bytearray(), 0

    def length(count: int) -> int:
        nonlocal at
        more = 255 if count == 15 else 0
        while more == 255:
            more = data[at]
            count, at = count + more, at + 1
        return count

    try:
        while True:
            token = data[at]
            at += 1
            count = length(token >> 4)
            out += data[at : at + count]
            at += count
            distance = data[at] | data[at + 1] << 8
            at += 2
            count = length(token & 15) + 4
            if not 0 < distance <= len(out):
                break
            piece = bytes(out[-distance:])
            out += (piece * (count // distance + 1))[:count]
    except IndexError:
        pass
    return bytes(out)


# ---- the running kernel ------------------------------------------------------------------------------------

FS_IOC_FIEMAP, FIEMAP_FLAG_SYNC = 0xC020660B, 1
FIEMAP_EXTENT_LAST, FIEMAP_EXTENT_UNKNOWN, FIEMAP_EXTENT_DELALLOC = 1, 2, 4
FIEMAP_EXTENT_INLINE, FIEMAP_EXTENT_UNWRITTEN = 0x200, 0x800


def fiemap(path: str | os.PathLike[str]) -> list[Extent]:
    """What the kernel says of a file (include/uapi/linux/fiemap.h), joined like `file_extents`; inline data
    left out."""
    result, start, done = [], 0, False
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        while not done:
            buffer = bytearray(
                struct.pack("=QQIIII", start, 2**64 - 1 - start, FIEMAP_FLAG_SYNC, 0, 512, 0)
                + bytes(512 * 56)
            )
            fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
            count = struct.unpack_from("=I", buffer, 20)[0]
            done = count == 0
            for i in range(count):
                logical, physical, length, _, _, flags = struct.unpack_from("=QQQQQI", buffer, 32 + 56 * i)
                if not flags & (FIEMAP_EXTENT_INLINE | FIEMAP_EXTENT_UNKNOWN):
                    result.append(Extent(logical, physical, length, bool(flags & FIEMAP_EXTENT_UNWRITTEN)))
                start, done = logical + length, done or bool(flags & FIEMAP_EXTENT_LAST)
    finally:
        os.close(fd)
    return join(result)


@contextlib.contextmanager
def mounted(
    image: str | os.PathLike[str], options: str = "", offset: int = 0, kind: str = ""
) -> Iterator[Path]:
    """A filesystem in an image mounted through a loop device; skips where this kernel can't.

    `options` as for mount -o.
    """
    need_root()
    loop = run("losetup", "-f", "--show", "-o", str(offset), image).decode().strip()
    where = Path(tempfile.mkdtemp(prefix="bmap-mount-"))
    try:
        command = [
            "mount",
            *(["-t", kind] if kind else []),
            *(["-o", options] if options else []),
            loop,
            str(where),
        ]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip(f"this kernel does not mount it: {done.stderr.decode(errors='replace').strip()}")
        try:
            yield where
        finally:
            unmount(where)
    finally:
        where.rmdir()
        detach(loop, image)


def unmount(where: str | os.PathLike[str]) -> None:
    """Unmount, and wait for whoever looks at it: a process that another test began in a mount namespace of
    its own has this mount as well, and it is busy until that process has left it."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if subprocess.run(["umount", where], capture_output=True).returncode == 0:
            return
        time.sleep(0.05)
    run("umount", where)


def detach(loop: str, image: str | os.PathLike[str]) -> None:
    """Give a loop device back, and wait until it is gone: while another test looks at it, or has our mount in
    a namespace of its own, it stays, and not all is written yet."""
    run("losetup", "-d", loop)
    until = time.monotonic() + 10
    while run("losetup", "-j", image) and time.monotonic() < until:
        time.sleep(0.01)


def sync(mount: Path) -> None:
    """Write out one filesystem. os.sync() would write out those of all other tests as well, the crashed ones
    among them."""
    run("sync", "-f", mount)


# ---- damage ------------------------------------------------------------------------------------------------


class BytesReader(Reader):
    """A disk in memory."""

    def __init__(self, data: np.ndarray, name: str = "memory") -> None:
        super().__init__(len(data), name)
        self.data = data

    def _fetch(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.data[low : low + n] for low, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
        )


def mutations(
    image: bytes, count: int, seed: int, ranges: list[tuple[int, int]] | None = None
) -> Iterator[np.ndarray]:
    """`count` damaged copies of an image: flipped bits, bytes, 4-byte words, zeroed or copied sectors, and
    cut-off ends.

    `ranges` are [start, end) in bytes where metadata lies and damage hurts; most damage goes there.
    """
    random = np.random.default_rng(seed)
    base = np.frombuffer(image, np.uint8)
    ranges = ranges or [(0, len(base))]
    for _ in range(count):
        data = base.copy()
        for _ in range(int(random.integers(1, 6))):
            low, high = ranges[int(random.integers(len(ranges)))]
            at = int(random.integers(low, min(high, len(base)) - 4))
            if at + 512 > len(data):
                continue
            choice = int(random.integers(6))
            if choice == 0:
                data[at] ^= np.uint8(1 << int(random.integers(8)))
            elif choice == 1:
                data[at] = random.integers(256)
            elif choice == 2:
                word = int(
                    random.choice(
                        [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, int(random.integers(2**32))]
                    )
                )
                data[at : at + 4] = np.frombuffer(struct.pack("<I", word), np.uint8)
            elif choice == 3:
                data[at & ~511 : (at & ~511) + 512] = 0
            elif choice == 4:
                source = int(random.integers(0, len(base) - 512)) & ~511
                data[at & ~511 : (at & ~511) + 512] = base[source : source + 512]
            elif random.integers(8) == 0:
                data = data[: max(4096, int(random.integers(len(data) // 2, len(data))) & ~511)]
        yield data


def survives(data: np.ndarray) -> BlockMap | None:
    """Map and check a damaged disk: tables that keep the contract, or one of the project's own errors;
    anything else fails the test."""
    try:
        bmap = survey([BytesReader(data)])
    except FormatError:
        return None
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))
    check(bmap)
    return bmap
