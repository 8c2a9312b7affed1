"""md arrays: layouts against the kernel's formulas written out byte by byte, arrays that a kernel made,
members missing or out of date."""

import gzip
import struct
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from appliance import Step, made
from support import (
    BytesReader,
    assert_copies_and_parity,
    assert_proven,
    content,
    mapped,
    need,
    one_by_one,
    run,
    tree,
)
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import COPY
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import stripes
from virt_bmap.formats.common.rebuild import RebuiltReader, Stripes
from virt_bmap.formats.common.stripes import Place, Raid10
from virt_bmap.formats.volumes import md
from virt_bmap.model import tables
from virt_bmap.model.contract import Assembly, Member
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey, survey_open

CHUNK = 512

# ---- the kernel's formulas, one chunk at a time ------------------------------------------------------------


def raid5_compute_sector(level: int, algorithm: int, disks: int, chunk: int) -> tuple[int, int, int, int]:
    """(row, data disk, P disk, Q disk or -1) of a chunk: drivers/md/raid5.c, case by case."""
    data_disks = disks - (2 if level == 6 else 1)
    stripe, dd = divmod(chunk, data_disks)
    qd = -1
    if level == 4:
        return stripe, dd, data_disks, -1
    if level == 5:
        if algorithm == 0:
            pd = data_disks - stripe % disks
            dd += dd >= pd
        elif algorithm == 1:
            pd = stripe % disks
            dd += dd >= pd
        elif algorithm == 2:
            pd = data_disks - stripe % disks
            dd = (pd + 1 + dd) % disks
        elif algorithm == 3:
            pd = stripe % disks
            dd = (pd + 1 + dd) % disks
        elif algorithm == 4:
            pd = 0
            dd += 1
        else:
            pd = data_disks
        return stripe, dd, pd, qd
    if algorithm in (0, 1, 8, 9):
        pd = {0: disks - 1 - stripe % disks, 9: disks - 1 - (stripe + 1) % disks}.get(
            algorithm, stripe % disks
        )
        qd = pd + 1
        if pd == disks - 1:
            dd += 1
            qd = 0
        elif dd >= pd:
            dd += 2
    elif algorithm in (2, 3):
        pd = disks - 1 - stripe % disks if algorithm == 2 else stripe % disks
        qd = (pd + 1) % disks
        dd = (pd + 2 + dd) % disks
    elif algorithm == 4:
        pd, qd, dd = 0, 1, dd + 2
    elif algorithm == 5:
        pd, qd = data_disks, data_disks + 1
    elif algorithm == 10:
        pd = disks - 1 - stripe % disks
        qd = (pd + disks - 1) % disks
        dd = (pd + 1 + dd) % disks
    elif algorithm in (16, 17):
        pd = data_disks - stripe % (disks - 1) if algorithm == 16 else stripe % (disks - 1)
        dd += dd >= pd
        qd = disks - 1
    elif algorithm in (18, 19):
        pd = data_disks - stripe % (disks - 1) if algorithm == 18 else stripe % (disks - 1)
        dd = (pd + 1 + dd) % (disks - 1)
        qd = disks - 1
    else:
        pd, dd, qd = 0, dd + 1, disks - 1
    return stripe, dd, pd, qd


def syndrome_powers(algorithm: int, disks: int, pd: int, qd: int) -> dict[int, int]:
    """Data disk -> power of 2 in Q: raid6_d0 and raid6_idx_to_slot."""
    ddf = algorithm in (8, 9, 10)
    i = 0 if ddf or qd == disks - 1 else qd + 1
    powers, count = {}, 0
    for _ in range(disks):
        if ddf or i not in (pd, qd):
            slot, count = count, count + 1
        if i not in (pd, qd):
            powers[i] = slot
        i = (i + 1) % disks
    return powers


def gf_multiply(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = (a << 1) ^ (0x11D if a & 0x80 else 0), b >> 1
    return product


def gf_power_of_2(power: int) -> int:
    value = 1
    for _ in range(power):
        value = gf_multiply(value, 2)
    return value


def raid10_find_phys(layout: int, disks: int, each: int, chunk: int) -> list[tuple[int, int]]:
    """(disk, chunk on it) of every copy: drivers/md/raid10.c."""
    near, far, offset = layout & 255, layout >> 8 & 255, layout >> 16 & 1
    far_set = {0: disks, 1: disks // far, 2: far * near}[layout >> 17]
    total = each // far * disks // near
    stride = 1 if offset else -(-total * near * far // disks) // far
    last_start = (disks // far_set - 1) * far_set
    last_size = far_set + disks % far_set
    stripe, dev = divmod(chunk * near, disks)
    sector = stripe * far if offset else stripe
    found = []
    for _ in range(near):
        d, s = dev, sector
        found.append((d, s))
        for _ in range(1, far):
            in_set = d // far_set
            d += near
            if disks % far_set and d > last_start:
                d = (d - last_start) % last_size + last_start
            else:
                d = d % far_set + far_set * in_set
            s += stride
            found.append((d, s))
        dev += 1
        if dev >= disks:
            dev, sector = 0, sector + 1
    return found


# ---- layouts -----------------------------------------------------------------------------------------------

PARITY_LAYOUTS = (
    [(4, 0, disks) for disks in (3, 5)]
    + [(5, layout, disks) for layout in range(6) for disks in (2, 3, 5)]
    + [
        (6, layout, disks)
        for layout in (0, 1, 2, 3, 4, 5, 8, 9, 10, 16, 17, 18, 19, 20)
        for disks in (4, 5, 7)
    ]
)


def striped_by_hand(level: int, layout: int, disks: int, chunks: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random bytes of an array, and what the kernel would put on each disk."""
    random = np.random.default_rng(level * 1000 + layout * 10 + disks)
    volume = random.integers(0, 256, (chunks, CHUNK), np.uint8)
    rows = chunks // (disks - (2 if level == 6 else 1))
    images = np.zeros((disks, rows, CHUNK), np.uint8)
    for chunk in range(chunks):
        row, dd, pd, qd = raid5_compute_sector(level, layout, disks, chunk)
        images[dd, row] = volume[chunk]
        images[pd, row] ^= volume[chunk]
        if qd >= 0:
            factor = gf_power_of_2(syndrome_powers(layout, disks, pd, qd)[dd])
            images[qd, row] ^= np.array([gf_multiply(byte, factor) for byte in range(256)], np.uint8)[
                volume[chunk]
            ]
    return volume.reshape(-1), [image.reshape(-1) for image in images]


@pytest.mark.parametrize(("level", "layout", "disks"), PARITY_LAYOUTS)
def test_parity_layouts_are_the_kernels(level: int, layout: int, disks: int) -> None:
    width = disks - (2 if level == 6 else 1)
    chunks = width * (2 * disks + 1)  # two periods and a row
    volume, images = striped_by_hand(level, layout, disks, chunks)
    parity = stripes.parity(level, layout, disks)
    for gone in [(), *combinations(range(disks), 1), *(combinations(range(disks), 2) if level == 6 else ())]:
        members: list[tuple[Reader, int] | None] = [
            None if at in gone else (BytesReader(images[at]), 0) for at in range(disks)
        ]
        spots = [None if at in gone else Place(at, 0) for at in range(disks)]
        rows = stripes.rows(parity.pattern(), CHUNK, len(volume), spots)
        base = MappedReader(
            len(volume), "array", {at: member[0] for at, member in enumerate(members) if member}, rows
        )
        rebuilt = RebuiltReader(base, Stripes(parity, CHUNK, len(volume), members))
        assert rebuilt.read(0, len(volume)) == volume.tobytes(), gone
        assert rebuilt.read(CHUNK - 7, 3 * CHUNK) == volume[CHUNK - 7 : 4 * CHUNK - 7].tobytes()


@pytest.mark.parametrize(("level", "layout", "disks"), PARITY_LAYOUTS)
def test_parity_rows_name_what_they_protect(level: int, layout: int, disks: int) -> None:
    width = disks - (2 if level == 6 else 1)
    chunks = width * (disks + 2)
    pattern = stripes.parity(level, layout, disks).pattern()
    rows = stripes.rows(pattern, CHUNK, chunks * CHUNK, [Place(at, 0) for at in range(disks)])
    at = np.arange(chunks, dtype=np.int64) * CHUNK + 100
    found = rows.down(at, at + 1)
    for chunk in range(chunks):
        mine = found.query == chunk
        places = {(int(rows.parent[row]), int(target), int(rows.role[row]))
                  for row, target in zip(found.row[mine], found.target[mine], strict=True)}  # fmt: skip
        row, dd, pd, qd = raid5_compute_sector(level, layout, disks, chunk)
        expected = {(dd, row * CHUNK + 100, 0), (pd, row * CHUNK + 100, 2)} | (
            {(qd, row * CHUNK + 100, 2)} if qd >= 0 else set()
        )
        assert places == expected


def raid10_layouts() -> list[tuple[int, int]]:
    words = [
        near | far << 8 | offset << 16 | sets << 17
        for near in (1, 2, 3)
        for far in (1, 2, 3)
        for offset in (0, 1)
        for sets in (0, 1, 2)
    ]
    return [
        (word, disks)
        for word in words
        for disks in (2, 3, 4, 5, 7)
        if (word & 255) * (word >> 8 & 255) <= disks
    ]


@pytest.mark.parametrize(("layout", "disks"), raid10_layouts())
def test_raid10_layouts_are_the_kernels(layout: int, disks: int) -> None:
    each = 24
    found = Raid10.of(layout, disks)
    total = found.chunks(each, disks)[0]
    places = [Place(at, 0) for at in range(disks)]
    rows = stripes.rows(found.pattern(each, disks), CHUNK, total * CHUNK, places)
    at = np.arange(total, dtype=np.int64) * CHUNK
    pieces = rows.down(at, at + CHUNK)
    for chunk in range(total):
        mine = pieces.query == chunk
        places = sorted(
            (int(rows.parent[row]), int(target) // CHUNK)
            for row, target in zip(pieces.row[mine], pieces.target[mine], strict=True)
        )
        assert places == sorted(raid10_find_phys(layout, disks, each, chunk))
        assert sorted(rows.role[pieces.row[mine]].tolist()) == [0] + [1] * (len(places) - 1)


# ---- arrays ------------------------------------------------------------------------------------------------


def array_of(readers: Sequence[Reader]) -> tuple[Assembly, Reader]:
    """What `assemble` makes of the members, and a reader of the one array."""
    assembly = md.assemble(
        [Member(at, f"/dev/sd{chr(97 + at)}", reader) for at, reader in enumerate(readers)]
    )
    (child,) = assembly.children
    return assembly, child.over(dict(enumerate(readers)), child.name)


def unpacked(path: Path) -> BytesReader:
    return BytesReader(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8), path.name)


CORPUS = {"md-90-raid1": 2, "md-linear": 2, "md-raid1": 2, "md-raid10": 2, "md-raid5": 3}


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(corpus: Path, name: str) -> None:
    folder = corpus / "images/fox-it+dissect.volume/tests/_data/md"
    readers = [unpacked(folder / f"{name}-{number}.bin.gz") for number in range(1, CORPUS[name] + 1)]
    bmap = survey(readers)
    assert bmap.volumes.column("kind").to_pylist() == ["disk"] * len(readers) + ["md"]
    assert_proven(bmap)
    _, whole = array_of(readers)
    everything = whole.read(0, whole.size)
    if name in ("md-raid1", "md-90-raid1", "md-raid10", "md-raid5"):
        for gone in range(len(readers)):
            left = [reader for at, reader in enumerate(readers) if at != gone]
            assembly, degraded = array_of(left)
            assert degraded.read(0, degraded.size) == everything
            assert [problem.severity for problem in assembly.children[0].damage.problems()] == ["note"]


def test_a_missing_member_of_a_linear_array_is_an_error(corpus: Path) -> None:
    folder = corpus / "images/fox-it+dissect.volume/tests/_data/md"
    bmap = survey([unpacked(folder / "md-linear-1.bin.gz")])
    (problem,) = bmap.problems.to_pylist()
    assert (problem["severity"], problem["code"]) == ("error", "missing-member")


def test_members_out_of_date_and_doubled_are_named(corpus: Path) -> None:
    folder = corpus / "images/fox-it+dissect.volume/tests/_data/md"
    first, second = (unpacked(folder / f"md-raid1-{number}.bin.gz") for number in (1, 2))
    data = second.data.copy()
    events = data[4096 + 0xC8 : 4096 + 0xD0].view("<u8")
    events -= 5
    bmap = survey([first, BytesReader(data), first])
    assert sorted(row["code"] for row in bmap.problems.to_pylist()) == [
        "checksum",
        "duplicate",
        "missing-member",
        "unused-member",
        "unused-member",
    ]
    assert set(tables.integers(bmap.mappings, "parent").tolist()) == {0}


# ---- arrays that a kernel made -----------------------------------------------------------------------------

ARRAYS = {
    **{f"raid5-{layout}": (f"--level=5 --layout={layout} --chunk=64", 4) for layout in ("la", "ra", "ls",
            "rs", "parity-first")},
    **{f"raid6-{layout}": (f"--level=6 --layout={layout} --chunk=64", 5)
       for layout in ("ls", "ra", "ddf-zero-restart", "ddf-N-restart", "ddf-N-continue", "left-symmetric-6")},
    **{f"raid10-{layout}-{disks}": (f"--level=10 --layout={layout} --chunk=64", disks)
       for layout, disks in (("n2", 3), ("f2", 4), ("f3", 5), ("o2", 3))},
    "raid4": ("--level=4 --chunk=32", 3),
    "raid1-0.90": ("--level=1 --metadata=0.90", 2),
    "raid1-1.0": ("--level=1 --metadata=1.0 --bitmap=internal", 2),
    "raid5-1.1": ("--level=5 --metadata=1.1 --bitmap=internal --chunk=64", 3),
    "raid5-0.90": ("--level=5 --metadata=0.90 --chunk=64", 3),
    "raid0": ("--level=0 --chunk=64", 5),
    "linear": ("--level=linear", 3),
}  # fmt: skip
SIZES = {
    "diska": 6 << 20,
    "diskb": 6 << 20,
    "diskc": 7 << 20,
    "diskd": 7 << 20,
    "diske": 8 << 20,
    "pattern": 0,
}


def steps() -> list[Step]:
    """Make each array on the same disks, fill it with the numbers 0, 1, 2, ... of 8 bytes, and keep copies of
    the disks."""
    numbers = "import numpy; numpy.arange(5 << 20, dtype='<u8').tofile('pattern')"
    start = (
        "modprobe -a raid456 raid10 raid1 raid0 linear; rm -f /lib/udev/rules.d/*md*; udevadm control "
        "--reload; udevadm settle"
    )
    result = [("host", f'python3 -c "{numbers}"'), ("sh", start)]
    for name, (options, disks) in ARRAYS.items():
        devices = " ".join(f"/dev/disk/guestfs/disk{letter}" for letter in "abcde"[:disks])
        result.append(("sh", f"""
            yes | mdadm --create /dev/md127 --name={name} --run {options} --raid-devices={disks} {devices}
            mdadm --wait /dev/md127 || true
            test -b /dev/md127
            dd if=/dev/disk/guestfs/pattern of=/dev/md127 bs=64k || true
            sync
            echo size {name} $(blockdev --getsize64 /dev/md127)
            mdadm --stop /dev/md127
            for device in {devices}; do blockdev --flushbufs $device; done
        """))  # fmt: skip
        copies = "; ".join(f"cp --sparse=always disk{'abcde'[at]} {name}.{at + 1}" for at in range(disks))
        result += [("host", copies), ("sh", f"mdadm --zero-superblock {devices}")]
    return result


@pytest.fixture(scope="session")
def kernel_arrays() -> Path:
    """The folder of member images, NAME.1 and on."""
    return made("md", SIZES, steps())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_the_kernel_made(kernel_arrays: Path, name: str) -> None:
    paths = [kernel_arrays / f"{name}.{number}" for number in range(1, ARRAYS[name][1] + 1)]
    readers = [RawReader(str(path)) for path in paths]
    _, array = array_of(readers)
    words = np.frombuffer(array.read(0, array.size), "<u8")
    assert (words == np.arange(len(words))).all()
    assert f"size {name} {array.size}\n" in (kernel_arrays / "log").read_text()
    assembly = md.assemble([Member(at, "", reader) for at, reader in enumerate(readers)])
    copies = [row for row in one_by_one(assembly.children[0].rows) if row.role == COPY]
    for row in copies[:50]:
        for number in (0, row.count - 1):
            found = readers[row.parent].read(row.parent_offset + number * row.parent_step, row.run)
            assert (
                np.frombuffer(found, "<u8")
                == (row.volume_offset + number * row.volume_step) // 8 + np.arange(row.run // 8)
            ).all()
    bmap, volumes = survey_open(list(readers))
    assert_proven(bmap)
    copied, parity = assert_copies_and_parity(bmap, volumes)
    assert (
        copied > 0
        if name.startswith("raid1")
        else parity > 0
        if name[:5] in ("raid4", "raid5", "raid6")
        else True
    )
    if name.startswith("raid6"):
        assert_q(list(readers), array)
    for gone in combinations(
        range(len(readers)), {"raid6": 2, "raid5": 1, "raid4": 1, "raid1": 1}.get(name.partition("-")[0], 0)
    ):
        _, degraded = array_of([reader for at, reader in enumerate(readers) if at not in gone])
        assert degraded.read(0, degraded.size) == words.tobytes(), gone


def assert_q(readers: list[Reader], array: Reader) -> None:
    """Q of every stripe, by the kernel's formulas from the array's bytes, is what lies on the disks."""
    heads = [md.superblock.read(Member(at, "", reader)) for at, reader in enumerate(readers)]
    chunk, layout, disks = heads[0].chunk, heads[0].layout, len(readers)
    volume = np.frombuffer(array.read(0, array.size), np.uint8).reshape(-1, chunk)
    for stripe in range(len(volume) // (disks - 2)):
        q, found = np.zeros(chunk, np.uint8), -1
        for number in range(stripe * (disks - 2), (stripe + 1) * (disks - 2)):
            row, dd, pd, found = raid5_compute_sector(6, layout, disks, number)
            factor = gf_power_of_2(syndrome_powers(layout, disks, pd, found)[dd])
            q ^= np.array([gf_multiply(byte, factor) for byte in range(256)], np.uint8)[volume[number]]
        assert readers[found].read(heads[found].data_offset + stripe * chunk, chunk) == q.tobytes(), stripe
        assert row == stripe


def test_a_reshape_is_refused_in_clear_words(corpus: Path) -> None:
    data = unpacked(corpus / "images/fox-it+dissect.volume/tests/_data/md/md-raid5-1.bin.gz").data.copy()
    data[4096 + 8] |= 4
    bmap = survey([BytesReader(data)])
    assert "unsupported" in bmap.problems.column("code").to_pylist()
    assert bmap.volumes.num_rows == 1


# ---- arrays and what lies around them ----------------------------------------------------------------------


def superblock(
    level: int, layout: int, chunk: int, size: int, role: int, disks: int, data_offset: int, at: int
) -> bytes:
    """A superblock of version 1 for member `role`, by the fields of md_p.h; sizes and offsets in sectors."""
    head = bytearray(256 + 2 * disks)
    struct.pack_into("<II", head, 0, 0xA92B4EFC, 1)
    head[0x10:0x20] = b"0123456789abcdef"
    head[0x20:0x29] = b"host:name"
    struct.pack_into("<iIQII", head, 0x48, level, layout, size, chunk, disks)
    struct.pack_into("<QQQ", head, 0x80, data_offset, size, at)
    struct.pack_into("<I", head, 0xA0, role)
    struct.pack_into("<QQ", head, 0xC8, 7, 2**64 - 1)
    struct.pack_into("<I", head, 0xDC, disks)
    struct.pack_into(f"<{disks}H", head, 256, *range(disks))
    head[0xD8:0xDC] = struct.pack("<I", md.superblock._checksum_1(bytes(head)))
    return bytes(head)


def test_an_ext4_over_raid5_over_partitions(tmp_path: Path) -> None:
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(np.random.default_rng(1).bytes(900_000))
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", source, tmp_path / "ext4", "4096k")
    volume = np.fromfile(tmp_path / "ext4", np.uint8).reshape(-1, 16384)
    members = np.zeros((3, len(volume) // 2, 16384), np.uint8)
    for chunk, data in enumerate(volume):
        row, dd, pd, _ = raid5_compute_sector(5, 2, 3, chunk)
        members[dd, row] = data
        members[pd, row] ^= data
    paths = []
    for role, member in enumerate(members):
        path = tmp_path / f"disk{role}"
        image = bytearray(5 << 20)
        start = 1 << 20
        image[start + 4096 : start + 4096 + 262] = superblock(5, 2, 32, member.size // 512, role, 3, 2048, 8)
        image[start + (1 << 20) : start + (1 << 20) + member.size] = member.tobytes()
        path.write_bytes(image)
        run("sfdisk", "-q", path, stdin=b"label: dos\n2048,,fd\n")
        paths.append(path)
    bmap = mapped(*paths)
    assert_proven(bmap)
    assert bmap.volumes.column("name").to_pylist()[-1] == "/dev/md127"
    number = bmap.volume_named("/dev/md127")
    inode = tree(bmap, number)["/file"]
    assert (
        content(bmap, [RawReader(str(path)) for path in paths], number, inode)
        == (source / "file").read_bytes()
    )
    degraded = mapped(*paths[1:])
    assert tree(degraded, degraded.volume_named("/dev/md127"))["/file"] == inode
    assert degraded.names.drop_columns(["volume"]).equals(bmap.names.drop_columns(["volume"]))


def test_lvm_on_a_mirror_whose_superblock_lies_at_the_end(corpus: Path) -> None:
    """At the start of each member there is LVM's label, which is not the member's but the array's."""
    group = unpacked(corpus / "images/fox-it+dissect.volume/tests/_data/lvm/lvm.bin.gz").data
    size = len(group) // 512
    disks = []
    for role in range(2):
        image = np.zeros(len(group) + 65536, np.uint8)
        image[: len(group)] = group
        at = (len(image) // 512 - 16) // 8 * 8
        head = np.frombuffer(superblock(1, 0, 0, size, role, 2, 0, at), np.uint8)
        image[at * 512 : at * 512 + len(head)] = head
        disks.append(BytesReader(image))
    bmap = survey(disks)
    assert bmap.volumes.column("name").to_pylist() == [
        "/dev/sda",
        "/dev/sdb",
        "/dev/md127",
        "/dev/vg_test/lv_test",
    ]
    assert bmap.volumes.column("type").to_pylist()[:3] == [
        "linux_raid_member",
        "linux_raid_member",
        "LVM2_member",
    ]
    assert_proven(bmap)
    assert bmap.volumes.column("label").to_pylist()[2] == "vg_test"
