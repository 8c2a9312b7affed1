"""DOS tables as others write them: chains of logical partitions, larger sectors, dynamic disks.

The truth is what partx (libblkid, which follows the kernel) and parted say of the same bytes.
"""

import struct
from pathlib import Path

import pytest

from support import assert_proven, mapped, need, need_root, run
from virt_bmap import cli

MIB, SECTORS = 1 << 20, 40960
Slots = list[tuple[int, int, int]]


def record(slots: Slots) -> bytes:
    """A boot record of these (type, start, length) in sectors."""
    table = b"".join(struct.pack("<B3xB3xII", 0, *slot) for slot in slots)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def disk(records: dict[int, Slots], path: Path, sector: int = 512, sectors: int = SECTORS) -> Path:
    """A disk with a boot record at each of these sectors."""
    with open(path, "wb") as file:
        for at, slots in records.items():
            file.seek(at * sector)
            file.write(record(slots))
        file.truncate(sectors * sector)
    return path


CHAINS: dict[str, dict[int, Slots]] = {
    "as everybody writes it": {
        0: [(0x83, 64, 2000), (5, 4096, 20000)],
        4096: [(0x83, 64, 1000), (5, 4096, 4000)],
        8192: [(0x83, 64, 1000), (5, 8192, 4000)],
        12288: [(0x83, 64, 1000)],
    },
    "right behind its record": {0: [(0x83, 1, 350), (5, 351, 3000)], 351: [(0x83, 1, 2999)]},
    "the link stands before the partition": {
        0: [(5, 4096, 20000)],
        4096: [(5, 4096, 4000), (0x83, 64, 1000)],
        8192: [(0x0F, 8192, 4000), (0x83, 64, 1000)],
        12288: [(0, 0, 0), (0x83, 64, 1000)],
    },
    "two extended partitions": {
        0: [(5, 4096, 4096), (0x83, 64, 2000), (0x85, 16384, 8192)],
        4096: [(0x83, 64, 1000), (5, 2048, 2048)],
        6144: [(0x83, 64, 1000)],
        16384: [(0x83, 64, 1000), (5, 4096, 4096)],
        20480: [(0x83, 64, 1000)],
    },
    "a record inside the partition before it": {
        0: [(5, 4096, 20000)],
        4096: [(0x83, 64, 6000), (5, 4096, 4000)],
        8192: [(0x83, 4096, 1000)],
    },
    "four partitions in a record": {
        0: [(5, 4096, 20000)],
        4096: [(0x83, 64, 500), (0x83, 1000, 500), (0x83, 2000, 500), (0x83, 3000, 500)],
    },
    "garbage in the third and fourth entry": {
        0: [(5, 4096, 8000)],
        4096: [(0x83, 64, 500), (5, 4096, 2000), (0x77, 5000, 90000), (0x20, 7990, 100)],
        8192: [(0x83, 64, 500), (0, 0, 0), (0x6F, 1 << 30, 1 << 30)],
    },
    "records without a partition": {
        0: [(5, 4096, 20000)],
        4096: [(0, 0, 0), (5, 4096, 4000)],
        8192: [(5, 8192, 4000)],
        12288: [(0x83, 64, 1000)],
    },
    "an entry of type 0 that has a size": {0: [(0, 64, 1000), (0x83, 2048, 1000)]},
}  # fmt: skip
ODD = "a record inside the partition before it"


def by_partx(path: Path) -> dict[int, tuple[int, int]]:
    need("partx", "util-linux")
    words = run("partx", "--noheadings", "--output", "NR,START,SECTORS", path).decode().split()
    return {
        int(nr): (int(start), int(size))
        for nr, start, size in zip(words[::3], words[1::3], words[2::3], strict=True)
    }


def by_parted(path: Path) -> dict[int, tuple[int, int]]:
    need("parted", "parted")
    rows = run("parted", "-sm", path, "unit", "s", "print").decode().splitlines()[2:]
    parts = [row.rstrip(";").replace("s", "").split(":")[:4] for row in rows]
    return {int(nr): (int(start), int(size)) for nr, start, _, size in parts}


def by_us(bmap, sector: int = 512) -> dict[int, tuple[int, int]]:
    """Number to (first sector, sectors), of all partitions of the disk."""
    rows = bmap.mappings.to_pylist()
    names = bmap.volumes.column("name").to_pylist()
    return {
        int(names[row["volume"]].removeprefix("/dev/sda")): (
            row["parent_offset"] // sector,
            row["run"] // sector,
        )
        for row in rows
    }


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_followed_and_numbered_as_by_the_kernel(name, tmp_path):
    path = disk(CHAINS[name], tmp_path / "disk")
    containers = {slot for slot, (kind, *_) in enumerate(CHAINS[name][0], 1) if kind in (5, 0x85)}
    found = mapped(path)
    names = found.volumes.column("name").to_pylist()
    assert len(set(names)) == len(names)
    truth, ours = by_partx(path), by_us(found)
    assert {nr: place for nr, place in ours.items() if nr not in containers} == {
        nr: place for nr, place in truth.items() if nr not in containers
    }
    # the kernel shows of a container two sectors
    assert all(ours[nr] == (truth[nr][0], 2) for nr in containers)
    problems = [row["code"] for row in found.problems.to_pylist()]
    assert problems == (["two-owners"] if name == ODD else [])


@pytest.mark.parametrize("name", ["as everybody writes it", "right behind its record"])
def test_a_chain_is_numbered_as_by_parted(name, tmp_path):
    path = disk(CHAINS[name], tmp_path / "disk")
    ours, truth = by_us(mapped(path)), by_parted(path)
    assert {nr: place for nr, place in ours.items() if nr > 4} == {
        nr: place for nr, place in truth.items() if nr > 4
    }
    assert_proven(mapped(path))


def test_partitions_that_lie_in_one_large_one_are_all_said(tmp_path):
    path = disk({0: [(0x83, 64, 20000), (0x83, 1000, 100), (0x83, 2000, 100)]}, tmp_path / "disk")
    said = [row["detail"] for row in mapped(path).problems.to_pylist()]
    assert [words.partition(" begins")[0] for words in said] == ["/dev/sda2", "/dev/sda3"]
    assert all("inside /dev/sda1" in words for words in said)


def table_in(sector: int, path: Path) -> Path:
    """A disk whose table counts in sectors of this size: ext4, swap and, logical, FAT."""
    sectors = 32 * MIB // sector
    first, third = MIB // sector, 24 * MIB // sector
    disk(
        {
            0: [(0x83, first, 16 * MIB // sector), (0x82, 18 * MIB // sector, 4 * MIB // sector),
                (5, third, 6 * MIB // sector)],
            third: [(0x0B, MIB // sector, 4 * MIB // sector)],
        },
        path, sector, sectors,
    )  # fmt: skip
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={MIB}", path, "16M")
    for name, place, maker in (
        ("swap", 18 * MIB, ("mkswap", "-q")),
        ("fat", 25 * MIB, ("mkfs.fat", "-S", str(sector))),
    ):
        part = path.with_name(name)
        part.write_bytes(bytes(4 * MIB))
        run(*maker, part)
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(part.read_bytes())
    return path


@pytest.mark.parametrize("sector", [512, 2048, 4096])
def test_sectors_of_a_table_are_told_by_what_lies_there(sector, tmp_path):
    need("mkfs.fat", "dosfstools")
    path = table_in(sector, tmp_path / "disk")
    bmap = mapped(path)
    assert bmap.volumes.column("type").to_pylist() == ["dos", "ext4", "swap", None, "vfat"]
    assert bmap.volumes.column("detail")[0].as_py() == (
        f"sectors of {sector:,} bytes" if sector > 512 else None
    )
    said = [row["code"] for row in bmap.problems.to_pylist() if row["volume"] == 0]
    assert said == (["sectors"] if sector > 512 else [])
    assert_proven(bmap)


@pytest.mark.parametrize("sector", [2048, 4096])
def test_a_device_tells_its_sectors(sector, tmp_path, capsys):
    """Nothing that is known lies in the partitions: the device alone can tell. sfdisk asks it, too."""
    need_root()
    need("sfdisk", "fdisk")
    path = disk({0: [(0x83, 256, 1000), (0x83, 2000, 500)]}, tmp_path / "disk", sector, 5000)
    loop = run("losetup", "--find", "--show", "--sector-size", str(sector), path).decode().strip()
    try:
        truth = [line.split()[1:4] for line in run("sfdisk", "-l", "-o", "Device,Start,End,Sectors", loop)
                 .decode().splitlines() if line.startswith(loop)]  # fmt: skip
        assert by_us(mapped(loop), sector) == {
            nr: (int(start), int(size)) for nr, (start, _, size) in enumerate(truth, 1)
        }
        assert not mapped(loop).problems.num_rows
    finally:
        run("losetup", "--detach", loop)
    assert by_us(mapped(path)) == {1: (256, 1000), 2: (2000, 500)}


def test_the_user_knows_better(tmp_path, capsys):
    """What lies there shows sectors of 4096 bytes; said is something else, also where files are mapped."""
    need("mkfs.fat", "dosfstools")
    path = table_in(4096, tmp_path / "disk")
    cli.run(["info", "--json", "--blocksize", "512", str(path)])
    assert '"ext4"' not in capsys.readouterr().out
    cli.run(["info", "--json", "--blocksize", "4096", str(path)])
    said = capsys.readouterr().out
    assert '"ext4"' in said
    assert '"sectors"' not in said
    saved = tmp_path / "map.parquet"
    cli.run(["-q", "--host-offsets", "--blocksize", "512", "-o", str(saved), str(path)])
    cli.run(["info", "--json", str(saved)])
    assert '"ext4"' not in capsys.readouterr().out


@pytest.mark.parametrize("table", ["dos", "gpt"])
def test_partitions_of_a_dynamic_disk_are_named_and_not_looked_into(table, tmp_path):
    """A volume may begin in one, so that it looks like a filesystem of its own, and go on in another."""
    kinds = {
        "dos": ("42", "42"),
        "gpt": ("5808C8AA-7E8F-42E0-85D2-E1E90434CFB3", "AF9B60A0-1431-4F62-BC68-3311714A69AD"),
    }[table]
    need("mkntfs", "ntfs-3g")
    need("sfdisk", "fdisk")
    path, part = tmp_path / "disk", tmp_path / "part"
    path.write_bytes(bytes(32 * MIB))
    script = f"label: {table}\nstart=2048,size=2048,type={kinds[0]}\nstart=4096,size=50000,type={kinds[1]}\n"
    run("sfdisk", "-q", path, stdin=script.encode())
    part.write_bytes(bytes(50000 * 512))
    run("mkntfs", "-F", "-q", "-f", part)
    with open(path, "r+b") as file:
        file.seek(2 * MIB)
        file.write(part.read_bytes())
    bmap = mapped(path)
    assert bmap.volumes.column("type").to_pylist() == [table, "ldm", "ldm"]
    assert not bmap.filesystems.num_rows
    (said,) = bmap.problems.to_pylist()
    assert (said["code"], "dynamic disk" in said["detail"]) == ("unsupported", True)
