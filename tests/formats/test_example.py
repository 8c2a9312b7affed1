"""The template reader does what every reader must: see docs/adding-a-format.md."""

import struct

import numpy as np
import pytest

from support import BytesReader, assert_proven, content, mutations, survives, tree
from virt_bmap.formats import registry as formats
from virt_bmap.formats.filesystems import example
from virt_bmap.survey.survey import survey

BLOCK = example.BLOCK


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """What a real format does by standing in the tuple."""
    format = formats.Listed("filesystems.example", ((0, example.MAGIC),), (example.NAME,))
    monkeypatch.setattr(formats, "FILESYSTEMS", (*formats.FILESYSTEMS, format))


def write(files: dict[str, bytes], blocks: int = 200, pieces: int = 3) -> np.ndarray:
    """A disk with these files, each in up to `pieces` extents that lie backwards; directories from the
    paths."""
    disk = np.zeros(blocks * BLOCK, np.uint8)
    used, top = set(range(2)) | set(range(2, 10)), blocks - 1
    directories: dict[str, dict[str, int]] = {"": {}}
    number, inodes = 2, {}

    def put(at, data):
        disk[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def store(data: bytes) -> list[tuple[int, int]]:
        nonlocal top
        need, result = -(-len(data) // BLOCK), []
        for nth in range(min(pieces, need)):
            count = (
                need // pieces
                if nth < min(pieces, need) - 1 and need >= pieces
                else need - sum(n for _, n in result)
            )
            if nth < min(pieces, need) - 1 and need < pieces:
                count = 1
            top -= count + 1  # a hole between any two extents
            result.append((top, count))
            used.update(range(top, top + count))
            put(top * BLOCK, data[(sum(n for _, n in result) - count) * BLOCK :][: count * BLOCK])
        return result

    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            name = "/".join(parts[:depth])
            if name not in directories:
                directories[name] = {}
                inodes[name] = number
                directories["/".join(parts[: depth - 1])][parts[depth - 1]] = number
                number += 1
        directories["/".join(parts[:-1])][parts[-1]] = number
        inodes[path] = number
        number += 1
    table = {inodes[path]: (1, len(data), store(data)) for path, data in files.items()}
    for name, entries in directories.items():
        data = b"".join(
            struct.pack("<IB", inode, len(leaf)) + leaf.encode() for leaf, inode in entries.items()
        )
        table[inodes.get(name, 1)] = (2, BLOCK, store(data.ljust(BLOCK, b"\0")))
    for inode, (kind, size, extents) in table.items():
        starts = [s for s, _ in extents] + [0] * (6 - len(extents))
        counts = [n for _, n in extents] + [0] * (6 - len(extents))
        put(
            2 * BLOCK + (inode - 1) * 64,
            struct.pack("<BBxxI6I6I", kind, len(extents), size, *starts, *counts),
        )
    put(0, struct.pack("<8sIIII", example.MAGIC, blocks, 64, 1, 2))
    bits = np.zeros(blocks, np.uint8)
    bits[list(used)] = 1
    put(BLOCK, np.packbits(bits, bitorder="little").tobytes())
    return disk


FILES = {"a": b"A" * 1200, "dir/b": bytes(range(256)) * 20, "dir/sub/c": b"c", "empty": b""}


def test_names_content_and_allocator():
    disk = write(FILES)
    bmap = survey([BytesReader(disk)])
    assert_proven(bmap)
    paths = tree(bmap, 0)
    assert set(paths) == {"/", "/a", "/dir", "/dir/b", "/dir/sub", "/dir/sub/c", "/empty"}
    for path, data in FILES.items():
        assert content(bmap, [BytesReader(disk)], 0, paths[f"/{path}"]) == data


def test_damage():
    image = write(FILES).tobytes()
    outcomes = [survives(data) for data in mutations(image, 500, 1, [(0, 4 * BLOCK)])]
    assert any(bmap is not None and bmap.problems.num_rows for bmap in outcomes)


def test_an_impossible_superblock_is_one_piece_with_a_reason():
    disk = write(FILES)
    disk[8:12] = 255
    bmap = survey([BytesReader(disk)])
    assert bmap.extents.column("kind").to_pylist() == ["content"]
    assert "do not fit into" in bmap.problems.column("detail")[0].as_py()
