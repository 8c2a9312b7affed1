"""Tables that many point to, and arrays whose size is a number of the disk: what is told follows what is
stored, and honest sharing is told whole."""

import random
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from test_bombs import MEMORY, SECONDS, cost, grown

from support import BytesReader
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import CLAIM_FREE, allowance
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.formats.volumes.lvm.btree import BITMAP_SALT, Store
from virt_bmap.formats.volumes.lvm.thin import _runs
from virt_bmap.open.raw import RawReader

MIB, BLOCK, ROOM = 1 << 20, 4096, 252
INTERNAL, LEAF, NODE_SALT = 1, 2, 121107


def sealed(body: bytes, salt: int) -> bytes:
    body = body.ljust(BLOCK - 4, b"\0")
    return struct.pack("<I", google_crc32c.value(body) ^ salt) + body


def node(number: int, flags: int, entries: list[tuple[int, int]]) -> bytes:
    """A node of dm-persistent-data with values of eight bytes."""
    head = struct.pack("<IQIII4x", flags, number, len(entries), ROOM, 8)
    keys = struct.pack(f"<{len(entries)}Q", *(key for key, _ in entries)).ljust(8 * ROOM, b"\0")
    return sealed(head + keys + struct.pack(f"<{len(entries)}Q", *(value for _, value in entries)), NODE_SALT)


def store(*blocks: bytes) -> Store:
    """A metadata device of these blocks, from block 1 on."""
    return Store(BytesReader(np.frombuffer(bytes(BLOCK) + b"".join(blocks), np.uint8)))


def test_trees_that_share_nodes_by_brute_force() -> None:
    """Each tree is told whole; what a tree reaches twice, which is damage, is told once."""
    chance = random.Random(8)
    for _ in range(30):
        nodes: dict[int, list[tuple[int, int]]] = {}
        levels: list[list[int]] = [[], [], []]
        for level, made in enumerate(levels):
            for _ in range(chance.randint(1, 6)):
                below = levels[level - 1] if level else [0] * chance.randint(1, 40)
                chosen = chance.sample(below, chance.randint(1, len(below)))
                keys = sorted(chance.sample(range(1000), len(chosen)))
                made.append(len(nodes) + 1)
                nodes[made[-1]] = [(key, to or key << 24) for key, to in zip(keys, chosen, strict=True)]
        leaves = set(levels[0])

        def told_of(number: int, met: set[int]) -> list[tuple[int, int]]:
            if number in met:
                return []
            met.add(number)
            if number in leaves:  # noqa: B023 - called in this round only
                return nodes[number]  # noqa: B023
            return [entry for _, to in nodes[number] for entry in told_of(to, met)]  # noqa: B023

        roots = [chance.choice(levels[chance.randrange(3)]) for _ in range(5)]
        blocks = [
            node(number, LEAF if number in leaves else INTERNAL, found) for number, found in nodes.items()
        ]
        found = store(*blocks).walk("tree", ints(roots), 8)
        told = sorted(zip(found.tree.tolist(), found.keys.tolist(), found.numbers().tolist(), strict=True))
        assert told == sorted((tree, *one) for tree, root in enumerate(roots) for one in told_of(root, set()))


def test_a_leaf_of_a_hundred_thousand_trees() -> None:
    apart = node(1, LEAF, [(2 * n, 2 * n << 24) for n in range(ROOM)])
    with pytest.raises(Corrupt, match="entries of nodes that trees share"):
        store(apart).walk("mapping tree", np.ones(100_000, np.int64), 8, _runs)
    together = node(1, LEAF, [(n, n << 24) for n in range(ROOM)])
    found = store(together).walk("mapping tree", np.ones(100_000, np.int64), 8, _runs)
    assert (len(found.keys), set(found.keys.tolist())) == (100_000, {0})


def test_a_bitmap_describes_one_part() -> None:
    free = store(sealed(struct.pack("<IQ", 0, 1), BITMAP_SALT))
    many = np.arange(1 << 16, dtype=np.int64)
    found = free._bitmaps(np.ones(1 << 16, np.int64), many, (1 << 16) * 16320)
    assert len(found) <= 16320
    assert any("for several parts" in problem.detail for problem in free.damage.problems())


def test_an_array_of_what_is_not_there() -> None:
    with pytest.raises(Corrupt, match="an array of 4,294,967,296 entries would take"):
        store(node(1, LEAF, [])).array("cache mapping", 1, 1 << 32)


@pytest.fixture
def sparse(tmp_path: Path) -> Reader:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
        file.write(b"\x55" * (8 * MIB))
    return RawReader(str(tmp_path / "sparse"))


def test_a_budget_is_what_is_stored(sparse: Reader) -> None:
    assert allowance(sparse) == CLAIM_FREE + 4 * 8 * MIB
    assert allowance(BytesReader(np.zeros(4096, np.uint8))) == 4096


def test_a_bitmap_of_every_other_bit(sparse: Reader) -> None:
    with pytest.raises(Corrupt, match="runs of a bitmap would take"):
        bitmap_runs(sparse, ints(0), ints(8 * MIB), 64 * MIB, True)


# ---- whole images ---------------------------------------------------------------------------------------


def record(extent: int, size: int, name: bytes, directory: bool) -> bytes:
    """A directory record of ISO 9660."""
    body = (
        struct.pack("<xI", extent)
        + struct.pack(">I", extent)
        + struct.pack("<I", size)
        + struct.pack(">I", size)
    )
    body += bytes(7) + bytes([2 * directory, 0, 0]) + struct.pack("<H", 1) + struct.pack(">H", 1)
    body += bytes([len(name)]) + name + b"\0" * (1 - len(name) % 2)
    return bytes([len(body) + 1]) + body


def sectors(records: list[bytes]) -> bytes:
    """Records that cross no sector."""
    found, at = [b""], 0
    for one in records:
        if len(found[at]) + len(one) > 2048:
            found.append(b"")
            at += 1
        found[at] += one
    return b"".join(part.ljust(2048, b"\0") for part in found)


def iso(folder: Path) -> Path:
    """A thousand directories, each in all of those that begin later: 2 GiB of records in 4 MiB."""
    field = sectors([record(0, 0, b"%05d" % (n % 99999), False) for n in range(2000 * 53)])[: 2000 * 2048]
    begin = 64
    inside = [record(begin + n, (2000 - n) * 2048, b"d%04d" % n, True) for n in range(1000)]
    root = sectors([record(32, 32 * 2048, b"\0", True), record(32, 32 * 2048, b"\1", True), *inside])
    head = bytearray(2048)
    head[:7] = b"\1CD001\1"
    struct.pack_into("<I", head, 80, 1 << 28)
    struct.pack_into("<H", head, 128, 2048)
    head[156:190] = record(32, len(root), b"\0", True)[:34]
    path = folder / "iso.img"
    data = bytes(16 * 2048) + bytes(head) + b"\xffCD001\1".ljust(2048, b"\0")
    path.write_bytes(data.ljust(32 * 2048, b"\0") + root.ljust((begin - 32) * 2048, b"\0") + field)
    return grown(path, 1 << 39)


def erofs(folder: Path) -> Path:
    """A thousand files, each with an index of a million entries in those of all before: in 4 MiB."""
    block, count = 4096, 1000
    first = block // 32
    head = bytearray(128)
    struct.pack_into("<I", head, 0, 0xE0F5E1E2)
    struct.pack_into("<BxHQ", head, 12, 12, first, count)
    struct.pack_into("<I", head, 36, 0xFFFFFFF0)
    struct.pack_into("<I", head, 80, 4)
    names = [(b".", first), (b"..", first), *((b"%05d" % n, first + 1 + n) for n in range(count))]
    root = b""
    for low in range(0, len(names), 200):
        part, text, entries = names[low : low + 200], b"", b""
        for name, nid in part:
            entries += struct.pack("<QHBx", nid, 12 * len(part) + len(text), 1)
            text += name
        root += (entries + text).ljust(block, b"\0")
    place = 1 + -(-32 * (count + 1) // block)
    table = struct.pack("<HHHHIIIIII", 0, 0, 0o40755, 2, len(root), 0, place, 0, 0, 0)
    table += struct.pack("<HHHHIIIIII", 8, 0, 0o100644, 1, 0xFFFFF000, 0, 0, 0, 0, 0) * count
    data = (bytes(1024) + bytes(head)).ljust(block, b"\0") + table.ljust((place - 1) * block, b"\0") + root
    path = folder / "erofs.img"
    path.write_bytes(data + np.arange(1, MIB, dtype="<u4").tobytes())
    return grown(path, 1 << 43)


@pytest.mark.parametrize("make", [iso, erofs])
def test_tables_over_each_other_cost_little(make: object, tmp_path: Path) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    memory, seconds, said = cost("info", "--format", "raw", path)
    assert memory < MEMORY, said
    assert seconds < SECONDS, said
