"""btrfs on several devices: every profile, against the kernel, its own copies and its own parity; with
devices missing."""

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from test_btrfs import compare_with_kernel, pool

import support
from btrfs_images import fill, make, mounted_pool
from virt_bmap.core.mapping import COPY, DATA, PARITY
from virt_bmap.model.blockmap import BlockMap

FILL = (
    "for i in $(seq 12); do head -c $((i * 37000)) /dev/urandom > f$i; done; head -c 9000000 "
    "/dev/urandom > big; mkdir d; echo x > d/x; sync -f ."
)
PROFILES = (
    ("raid0", "raid1", 3), ("raid10", "raid10", 4), ("raid5", "raid5", 3), ("raid6", "raid6", 4),
    ("raid1c3", "raid1c4", 4), ("single", "dup", 2), ("raid5", "raid1", 2),
)  # fmt: skip
STRIPE = 64 << 10


@pytest.fixture(scope="module", params=PROFILES, ids=lambda profile: "-".join(map(str, profile)))
def members(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    data, metadata, count = request.param
    folder = tmp_path_factory.mktemp("pool")
    images = make(folder, "200M", f"-d {data} -m {metadata}", count)
    with mounted_pool(images, folder / "mnt") as where:
        fill(where, FILL)
    return images


def strips(bmap: BlockMap, volume: int, images: list[Path], role: str) -> dict[int, list[bytes]]:
    """For a role, the bytes that stand for each used strip of data of the pool, by logical address."""
    _, table = bmap.slice_of("extents", volume)
    used = [
        row
        for row in table.to_pylist()
        if row["kind"] in ("data", "metadata") and not row["flags"] & 1 and row["part"] != "superblock"
    ]
    start = np.array([row["volume_offset"] for row in used])
    found = bmap.descend(volume, start, start + np.array([row["length"] for row in used]))
    found = found.take(found.role == role)
    content = [np.memmap(image, np.uint8, "r") for image in images]
    result: dict[int, list[bytes]] = {}
    for disk, low, high, inside in zip(
        found.volume.tolist(), found.start.tolist(), found.end.tolist(), found.inside.tolist(), strict=True
    ):
        for at in range(0, high - low, 4096):
            result.setdefault(inside + at, []).append(
                content[bmap.disks.index(disk)][low + at : low + at + 4096].tobytes()
            )
    return result


def test_kernel_and_copies(members: list[Path], tmp_path: Path) -> None:
    with mounted_pool(members, tmp_path / "mnt", "ro") as where:
        assert compare_with_kernel(members, where) == 16
    bmap = support.mapped(*members)
    data, copies = (strips(bmap, pool(bmap), members, role) for role in (DATA, COPY))
    assert all(len(pieces) == 1 for pieces in data.values())
    assert all(piece == data[at][0] for at, pieces in copies.items() for piece in pieces)
    every = bmap.volumes.column("detail")[pool(bmap)].as_py()
    expected = {"RAID1C3": 3, "RAID1C4": 4, "DUP": 2, "RAID1": 2, "RAID10": 2}
    assert {len(pieces) + 1 for pieces in copies.values()} == {
        n for name, n in expected.items() if name in every.replace(",", "").split()
    }


def test_parity_computed_anew(members: list[Path]) -> None:
    """P is the XOR of the strips of its row; every strip of data is told where P lies."""
    bmap = support.mapped(*members)
    volume = pool(bmap)
    rows = bmap.rows_of(volume)
    parity = rows.take(rows.role == PARITY)
    if len(parity) == 0:
        pytest.skip("this profile has no parity")
    content = {disk: np.memmap(image, np.uint8, "r") for disk, image in zip(bmap.disks, members, strict=True)}
    data = rows.take(rows.role == DATA)
    by_place: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for at in range(len(parity)):
        for nth in range(int(parity.count[at])):
            logical = int(parity.volume_offset[at] + nth * parity.volume_step[at])
            place = int(parity.parent[at]), int(parity.parent_offset[at] + nth * parity.parent_step[at])
            found = data.down(np.array([logical]), np.array([logical + STRIPE]))
            assert found.length.tolist() == [STRIPE]
            by_place.setdefault(place, set()).add((int(data.parent[found.row[0]]), int(found.target[0])))
    exact = 0
    for (disk, start), strips_of_row in by_place.items():
        row = [content[where][at : at + STRIPE] for where, at in strips_of_row]
        exact += bool((reduce(np.bitwise_xor, row) == content[disk][start : start + STRIPE]).all())
        assert disk not in {where for where, _ in strips_of_row}
    share = (
        0.49 if "RAID6" in bmap.volumes.column("detail")[volume].as_py() else 0.99
    )  # Q is no plain XOR, but where a row is all zero
    assert exact / len(by_place) >= share


def test_a_missing_device(members: list[Path]) -> None:
    """Copies and P parity stand in for a lost device: no name is lost where there is redundancy, and the loss
    is told."""
    if len(members) < 2:
        pytest.skip("one device")
    whole = support.mapped(*members)
    detail = whole.volumes.column("detail")[pool(whole)].as_py()
    if "metadata DUP" in detail:
        pytest.skip("DUP keeps both copies on one device")
    for lost in range(len(members)):
        left = [member for number, member in enumerate(members) if number != lost]
        bmap = support.mapped(*left)
        codes = {row["code"] for row in bmap.problems.to_pylist()}
        assert "missing-member" in codes
        assert support.tree(bmap, pool(bmap)) == support.tree(whole, pool(whole))


def test_two_copies_of_one_device(members: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    support.run("cp", "--sparse=always", members[0], copy)
    bmap = support.mapped(*members, copy)
    assert [row["code"] for row in bmap.problems.to_pylist() if row["severity"] != "note"] == ["duplicate"]
    assert bmap.filesystems.num_rows == 1
