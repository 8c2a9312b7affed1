"""Oracles for image formats: what QEMU says of the same image, and the content itself."""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support import assert_proven, need, run
from virt_bmap.act.sparsify.estimate import host_of
from virt_bmap.core.arrays import complement
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import PACKED, ROLES
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.host import Host
from virt_bmap.survey.maps import map_disks

PIECE = 4 << 20
"""Bytes that are read together: more of a hole than that would be refused."""


def io(image: Path, *commands: str, format: str = "qcow2", options: Sequence[str] = ()) -> None:
    """Let qemu-io write to an image."""
    need("qemu-io", "qemu-utils")
    words = [word for command in commands for word in ("-c", command)]
    run(
        "qemu-io", *(options or ("-f", format)), *words, *([] if options else [image]), ok=(0, 1)
    )  # a cluster in use can not be written compressed


def random_writes(
    image: Path,
    size: int,
    cluster: int,
    seed: int,
    count: int = 40,
    packed: bool = True,
    format: str = "qcow2",
) -> None:
    """Writes, zeroes, discards and compressed clusters at random places."""
    random = np.random.default_rng(seed)
    commands = []
    for _ in range(count):
        at = int(random.integers(0, size - 1)) // 512 * 512
        length = min(int(random.integers(1, 6 * cluster)) // 512 * 512 + 512, size - at)
        whole = at // cluster * cluster
        choice = int(random.integers(8))
        if choice < 4:
            commands.append(f"write -P {int(random.integers(1, 256))} {at} {length}")
        elif choice == 4:
            commands.append(f"write -z {at} {length}")
        elif choice == 5:
            commands.append(f"write -zu {whole} {min(2 * cluster, size - whole)}")
        elif choice == 6:
            commands.append(f"discard {whole} {min(cluster, size - whole)}")
        elif packed and whole + cluster <= size:
            commands.append(f"write -c -P {int(random.integers(1, 256))} {whole} {cluster}")
    io(image, *commands, format=format)


def numbered(path: Path, size: int, seed: int = 1) -> bytes:
    """A raw disk of 4 KiB blocks that are random, or zero, or repeat; the bytes that it has."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, size, dtype=np.uint8).reshape(-1, 4096)
    kind = random.integers(0, 12, len(data)) // 3
    data[np.repeat(kind == 0, 1)] = 0
    data[kind == 1] = random.integers(1, 256)
    data[:1, :512] = 0  # no image format's magic by chance
    path.write_bytes(data.tobytes())
    return data.tobytes()


Piece = tuple[int, int, str, int, int]
"""(guest start, guest end, role, position of the file in the chain, host offset; -1 where compressed)."""


def ours(host: Host, disk: int = 0, sparse: bool = False) -> list[Piece]:
    """What the rows say, in the words of qemu-img map, neighbours joined.

    Where metadata was preallocated (`sparse`), QEMU calls zero what is a hole of the file, too.
    """
    rows, chain = host.disks[disk].rows, host.disks[disk].chain
    depth = {file: level for level, link in enumerate(chain) for file in link.files.tolist()}
    found = [
        (start, start + run, ROLES[role], depth[file], -1 if role == PACKED else at)
        for start, run, role, file, at in zip(
            rows.volume_offset.tolist(),
            rows.run.tolist(),
            rows.role.tolist(),
            rows.parent.tolist(),
            rows.parent_offset.tolist(),
            strict=True,
        )
    ]
    if not sparse:
        return joined(sorted(found))
    holes = {
        depth[number]: _holes(host.paths[number], file.size)
        for number, file in enumerate(host.files)
        if number in depth
    }
    return joined(sorted(part for piece in found for part in _cut(piece, holes[piece[3]])))


def _holes(path: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    found = host_of(path)
    assert found
    return complement(*found.data, 0, size)


def _cut(piece: Piece, holes: tuple[np.ndarray, np.ndarray]) -> list[Piece]:
    """The piece with what lies in holes of the file called zero."""
    start, end, role, depth, at = piece
    if role != "data":
        return [piece]
    result = []
    for low, high, word in [(*pair, "zero") for pair in zip(*holes, strict=True)] + [
        (*pair, "data") for pair in zip(*complement(*holes, at, at + end - start), strict=True)
    ]:
        low, high = max(int(low), at), min(int(high), at + end - start)
        if low < high:
            result.append((start + low - at, start + high - at, word, depth, low))
    return result


def qemus(image: Path, format: str = "qcow2", data: Path | None = None) -> list[Piece]:
    """What qemu-img map says, but for space kept for zeroes where the file (`data`, if that is another) ends
    before it does."""
    need("qemu-img", "qemu-utils")
    found = []
    for row in json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", format, image)):
        role = "zero" if row["zero"] else "data" if "offset" in row else "compressed"
        if row["data"] or (row["zero"] and "offset" in row):
            length = (
                min(row["length"], (data or image).stat().st_size - row["offset"])
                if role == "zero" and row["depth"] == 0
                else row["length"]
            )
            found.append((row["start"], row["start"] + length, role, row["depth"], row.get("offset", -1)))
    return joined([piece for piece in found if piece[1] > piece[0]])


def joined(pieces: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last
            and last[1] == piece[0]
            and last[2:4] == piece[2:4]
            and (piece[4] == -1 or last[4] + last[1] - last[0] == piece[4])
        ):
            result[-1] = (last[0], piece[1], *last[2:])
        else:
            result.append(piece)
    return result


def content(host: Host, disk: int = 0, inflate: bool = True) -> bytes:
    """The guest's bytes, read where the rows say they lie: plain and zero rows through the mapping,
    compressed ones inflated one by one."""
    rows, size = host.disks[disk].rows, host.disks[disk].size
    reader = MappedReader(size, "disk", dict(enumerate(host.files)), rows)
    data = bytearray(size)
    for at in range(0, size, PIECE):
        data[at : at + PIECE] = reader.read(at, min(PIECE, size - at))
    packed = np.flatnonzero(rows.role == PACKED)
    for at in packed.tolist() if inflate else []:
        raw = host.files[int(rows.parent[at])].read(int(rows.parent_offset[at]), int(rows.parent_run[at]))
        start, length = int(rows.volume_offset[at]), int(rows.run[at])
        plain = (
            zlib.decompressobj(-12).decompress(raw)
            if host.disks[disk].format == "qcow2"
            else zlib.decompress(raw[12:])
        )
        (cluster,) = (
            link.layer.cluster
            for link in host.disks[disk].chain
            if int(rows.parent[at]) in link.files.tolist()
        )
        data[start : start + length] = plain[start % cluster :][:length]
    return bytes(data)


def raw_content(image: Path, format: str, target: Path) -> bytes:
    """The guest's bytes as QEMU reads them."""
    run("qemu-img", "convert", "-U", "-f", format, "-O", "raw", image, target)
    data = target.read_bytes()
    target.unlink()
    return data


def proven(*images: str | os.PathLike[str], references: bool = True, format: str | None = None) -> BlockMap:
    """The map on the host's files; check must find nothing."""
    bmap = map_disks(
        [os.fspath(image) for image in images], format=format, references=references, host_offsets=True
    )
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))
    assert_proven(bmap)
    return bmap


def parts(bmap: BlockMap, volume: int = 0) -> dict[str, int]:
    """Bytes of each part of a file's own extents."""
    _, table = bmap.slice_of("extents", volume)
    result: dict[str, int] = {}
    for row in table.to_pylist():
        result[row["part"] or row["kind"]] = result.get(row["part"] or row["kind"], 0) + row["length"]
    return result
