"""LVM's RAID, mirrors, thin pools, snapshots and caches: what a kernel read from each volume must be what is
read through the map."""

import hashlib
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from appliance import Step, made
from support import BytesReader, assert_proven, mapped, mutations, need, run, survives
from virt_bmap.core.arrays import covered_twice
from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes import lvm
from virt_bmap.formats.volumes.lvm.btree import Store
from virt_bmap.formats.volumes.lvm.cache import read_cache, read_writecache
from virt_bmap.formats.volumes.lvm.snapshot import read_exceptions
from virt_bmap.formats.volumes.lvm.thin import read_pool
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import Assembly, Member
from virt_bmap.open.raw import RawReader

pytestmark = pytest.mark.slow

MIB = 1 << 20
DISKS = {**{f"disk{letter}": 48 * MIB for letter in "abcde"}, "pattern": 0}
RAIDS = ("raid1 -m1", "raid4 -i2 -I64k", "raid5 -i2 -I64k", "raid5_ra -i3 -I32k", "raid5_n -i2 -I64k",
    "raid6 -i3 -I64k",
         "raid6_nr -i3 -I64k", "raid6_nc -i3 -I64k", "raid6_n_6 -i3 -I64k", "raid6_ls_6 -i3 -I64k",
         "raid10 -i2 -m1 -I64k", "raid0 -i3 -I64k", "raid0_meta -i3 -I64k",
         "mirror -m1 --mirrorlog disk")  # fmt: skip
WORDS = r"""
lvm() {
    verb=$1; shift
    checks='thin_check_executable="" cache_check_executable="" thin_repair_executable="" '\
'cache_repair_executable=""'
    command lvm $verb --yes --config "global{$checks} activation{monitoring=0} \
allocation{raid_stripe_all_devices=0}" "$@"
}
fill() { dd if=/dev/disk/guestfs/pattern of=/dev/vg/$1 bs=64k skip=$2 count=$(($(blockdev --getsize64 \
/dev/vg/$1) / 65536)); sync; }
piece() { dd if=/dev/disk/guestfs/pattern of=/dev/vg/$1 bs=4k seek=$2 count=$3 skip=$4 conv=notrunc; sync; }
truth() { for name in "$@"
do echo sha $name $(blockdev --getsize64 /dev/vg/$name) $(sha256sum < /dev/vg/$name); done; }
flush() { sync; for disk in a b c d e; do blockdev --flushbufs /dev/disk/guestfs/disk$disk; done; }
"""
RAID = rf"""
modprobe -a dm-mod dm-raid raid456 raid10 raid1 raid0 dm-mirror dm-snapshot dm-thin-pool dm-cache \
dm-cache-smq dm-writecache dm-integrity
lvm pvcreate /dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc \
/dev/disk/guestfs/diskd /dev/disk/guestfs/diske
lvm vgcreate -s 256k vg /dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc \
/dev/disk/guestfs/diskd /dev/disk/guestfs/diske
number=0
for spec in {" ".join(f'"{spec}"' for spec in RAIDS)}; do
    number=$((number + 1)); set -- $spec; name=r$number-$1
    lvm lvcreate --type "$@" -L 1536k -n $name vg
    fill $name $number
    truth $name
done
sleep 3
lvm vgchange -an vg; flush
"""
THIN = """
lvm vgremove -f vg
lvm vgcreate -s 256k vg /dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc
lvm lvcreate -L 4M -n origin vg; fill origin 0
lvm lvcreate -s -c 4k -L 2M -n snap vg/origin
piece origin 0 3 5000; piece origin 100 40 5100; piece snap 50 5 5200; piece snap 110 5 5300
piece snap 1000 8 5400
lvm lvcreate -s -c 8k -L 2M -n snap2 vg/origin; piece origin 90 20 6000; piece snap2 3 2 6100
truth origin snap snap2
lvm lvcreate --type thin-pool -L 12M -c 64k --poolmetadatasize 2M -n pool vg
lvm lvcreate --thin -V 40M -n t1 vg/pool; lvm lvcreate --thin -V 8M -n t2 vg/pool
lvm lvcreate --thin -V 1M -n empty vg/pool
piece t1 0 100 0; piece t1 5000 300 200; piece t2 17 200 7000; piece t1 900 3 3000
lvm lvcreate -s -n t1s vg/t1; lvm lvchange -ay -K vg/t1s
piece t1 20 30 4000; piece t1s 5010 30 4100; piece t1s 8000 30 4200
lvm lvcreate -s -n t1ss vg/t1s; lvm lvchange -ay -K vg/t1ss; piece t1ss 2 3 4300
blkdiscard -o 20480000 -l 524288 /dev/vg/t1; sync
lvm lvcreate -L 2M -n outside vg; fill outside 9; lvm lvchange -an vg/outside; lvm lvchange -p r vg/outside
lvm lvcreate -s --thinpool vg/pool -n t3 vg/outside; lvm lvchange -ay -K vg/t3; piece t3 40 9 4400
truth t1 t2 t1s t1ss empty t3
lvm vgchange -an vg; flush
"""
CACHE = """
lvm vgremove -f vg
lvm vgcreate -s 256k vg /dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc
for name in wb wt vol wc; do lvm lvcreate -L 4M -n $name vg /dev/disk/guestfs/diska; fill $name 3; done
lvm lvcreate --type cache-pool -L 4M -c 32k -n fast1 vg /dev/disk/guestfs/diskb
lvm lvconvert --type cache --cachepool vg/fast1 --cachemode writeback vg/wb
lvm lvcreate --type cache-pool -L 4M -c 32k -n fast2 vg /dev/disk/guestfs/diskb
lvm lvconvert --type cache --cachepool vg/fast2 --cachemode writethrough vg/wt
lvm lvcreate -L 8M -n fast3 vg /dev/disk/guestfs/diskb
lvm lvconvert --type cache --cachevol vg/fast3 --cachemode writeback -c 32k vg/vol
for round in 1 2 3 4 5 6; do
    for name in wb wt vol; do
        dd if=/dev/vg/$name of=/dev/null bs=4k iflag=direct skip=$((round * 8)) count=64
        dd if=/dev/disk/guestfs/pattern of=/dev/vg/$name bs=4k skip=$((round + 100)) seek=64 count=64 \
oflag=direct conv=notrunc
    done
    sleep 1
done
for name in wb vol; do
    dmsetup message vg-$name 0 migration_threshold 0
    dd if=/dev/disk/guestfs/pattern of=/dev/vg/$name bs=4k skip=999 seek=66 count=20 oflag=direct conv=notrunc
done
lvm lvcreate -L 4M -n fast4 vg /dev/disk/guestfs/diskb; lvm lvchange -an vg/fast4; lvm lvchange -an vg/wc
lvm lvconvert --type writecache --cachevol vg/fast4 vg/wc; lvm lvchange -ay vg/wc; piece wc 5 10 4000
piece wc 9 3 4100
lvm lvcreate --type raid1 --raidintegrity y -m1 -L 2M -n integ vg; fill integ 4
truth wb wt vol wc integ
dmsetup status
flush
"""
RESHAPE = """
modprobe -a dm-mod dm-raid raid456 raid10 raid1 raid0
lvm pvcreate /dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc \
/dev/disk/guestfs/diskd /dev/disk/guestfs/diske; lvm vgcreate -s 256k vg /dev/disk/guestfs/diska \
/dev/disk/guestfs/diskb /dev/disk/guestfs/diskc /dev/disk/guestfs/diskd /dev/disk/guestfs/diske
lvm lvcreate --type raid5 -i2 -I64k -L 3M -n a vg; fill a 1; sleep 2
lvm lvcreate --type raid5 -i2 -I64k -L 3M -n b vg; fill b 2; sleep 2
lvm lvconvert --type raid5_rs vg/b || echo NOCONV; sleep 8
lvm lvconvert --stripes 3 vg/a || echo NORESHAPE; sleep 8
lvm lvs -a -o name,size,segtype,reshape_len,data_offset,new_data_offset,devices vg
truth a b
lvm vgchange -an vg; lvm vgchange -ay vg; truth a b; dmsetup table; lvm vgchange -an vg; flush
"""
NUMBERS: Step = ("host", "python3 -c \"import numpy; numpy.arange(5 << 20, dtype='<u8').tofile('pattern')\"")


def steps() -> list[Step]:
    def keep(name: str, disks: int) -> Step:
        return "host", "; ".join(
            f"cp --sparse=always disk{'abcde'[at]} {name}.{at + 1}" for at in range(disks)
        )

    return [
        NUMBERS,
        ("sh", WORDS + RAID),
        keep("raid", 5),
        ("sh", WORDS + THIN),
        keep("thin", 3),
        ("sh", WORDS + CACHE),
        keep("running", 2),
        ("sh", WORDS + "lvm vgchange -an vg; flush"),
        keep("cache", 2),
    ]


@pytest.fixture(scope="session")
def kernel_volumes() -> Path:
    return made("lvm", DISKS, steps())


def images(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.[0-9]"))


def truth(folder: Path) -> dict[str, tuple[int, str]]:
    """Volume -> (size, SHA-256), as read through the kernel."""
    found = re.findall(
        r"^sha (\S+) (\d+) ([0-9a-f]{64})", (folder / "log").read_text(errors="replace"), re.MULTILINE
    )
    return {name: (int(size), digest) for name, size, digest in found}


def volumes_of(paths: list[Path]) -> tuple[Assembly, dict[str, Reader]]:
    """What `assemble` makes of the disks, and a reader of every volume by its name without /dev/vg/."""
    readers: dict[int, Reader] = {at: RawReader(str(path)) for at, path in enumerate(paths)}
    assembly = lvm.assemble([Member(at, f"/dev/sd{chr(97 + at)}", reader) for at, reader in readers.items()])
    found = {}
    for child in assembly.children:
        reader = readers[child.number] = child.over(readers, child.name)
        found[child.name.removeprefix("/dev/vg/")] = reader
    return assembly, found


def digest(reader: Reader) -> str:
    return hashlib.sha256(reader.read(0, reader.size)).hexdigest()


SETS = {
    "raid": [f"r{number}-{spec.split()[0]}" for number, spec in enumerate(RAIDS, 1)],
    "thin": ["origin", "snap", "snap2", "t1", "t2", "t1s", "t1ss", "empty", "t3"],
    # dm-integrity keeps what is fresh in a journal until it is shut down
    "running": ["wb", "wt", "vol", "wc"],
    "cache": ["wb", "wt", "vol", "wc", "integ"],
}


@pytest.mark.parametrize("name", SETS)
def test_every_volume_reads_as_the_kernel_reads_it(kernel_volumes: Path, name: str) -> None:
    _, found = volumes_of(images(kernel_volumes, name))
    expected = truth(kernel_volumes)
    assert set(SETS[name]) <= set(found)
    for volume in SETS[name]:
        assert (found[volume].size, digest(found[volume])) == expected[volume], volume


@pytest.mark.parametrize("name", SETS)
def test_every_byte_has_one_owner(kernel_volumes: Path, name: str) -> None:
    bmap = mapped(*images(kernel_volumes, name))
    if name == "running":  # was not shut down, and says so
        assert set(bmap.problems.column("code").to_pylist()) == {"unclean"}
        return
    assert_proven(bmap)


def test_raid_after_a_reshape() -> None:
    """Images begin with room that the reshape left, or end with it; the number of stripes has grown."""
    folder = made(
        "reshape",
        {**{f"disk{letter}": 32 * MIB for letter in "abcde"}, "pattern": 0},
        [NUMBERS, ("sh", WORDS + RESHAPE)],
    )
    disks = sorted(folder.glob("disk?"))
    for gone in (None, *disks):
        _, found = volumes_of([disk for disk in disks if disk != gone])
        for name in ("a", "b"):
            assert (found[name].size, digest(found[name])) == truth(folder)[name], (name, gone)
    assert_proven(mapped(*disks))


def test_caches_hold_what_the_origin_lacks(kernel_volumes: Path) -> None:
    assembly, _ = volumes_of(images(kernel_volumes, "cache"))
    detail = {child.name: child.detail or "" for child in assembly.children}
    for name in ("wb", "vol", "wc"):
        newer = re.search(r"(\d+) of them newer", detail[f"/dev/vg/{name}"])
        assert newer
        assert int(newer[1]) > 0
    assert "0 of them newer" in detail["/dev/vg/wt"]


def test_raid_with_missing_disks(kernel_volumes: Path) -> None:
    disks, expected = images(kernel_volumes, "raid"), truth(kernel_volumes)
    for gone in range(len(disks)):
        assembly, found = volumes_of([disk for at, disk in enumerate(disks) if at != gone])
        for volume in SETS["raid"]:
            if "raid0" not in volume:
                assert digest(found[volume]) == expected[volume][1], (gone, volume)
        errors = {child.name for child in assembly.children
                  if child.damage.is_damaged}  # fmt: skip
        assert all("raid0" in name for name in errors), "all others have a copy or parity of what is gone"
    for gone_two in combinations(range(len(disks)), 2):
        assembly, found = volumes_of([disk for at, disk in enumerate(disks) if at not in gone_two])
        said = {
            child.name: {problem.severity for problem in child.damage.problems()}
            for child in assembly.children
        }
        for volume in SETS["raid"]:
            lost = digest(found[volume]) != expected[volume][1]
            assert lost == ("error" in said[f"/dev/vg/{volume}"]), (gone_two, volume)
            if "raid6" in volume:
                assert digest(found[volume]) == expected[volume][1], (gone_two, volume)


def test_thin_mappings_are_those_of_thin_dump(kernel_volumes: Path, tmp_path: Path) -> None:
    tool = need("thin_dump", "thin-provisioning-tools")
    assembly, found = volumes_of(images(kernel_volumes, "thin"))
    metadata = tmp_path / "tmeta"
    metadata.write_bytes(found["pool_tmeta"].read(0, found["pool_tmeta"].size))
    dump = run(tool, metadata).decode()
    pool = read_pool(RawReader(str(metadata)), found["pool_tdata"].size)
    device, expected = 0, set()
    for line in dump.splitlines():
        if match := re.search(r'<device dev_id="(\d+)"', line):
            device = int(match[1])
        elif match := re.search(r'<single_mapping origin_block="(\d+)" data_block="(\d+)"', line):
            expected.add((device, int(match[1]), int(match[2])))
        elif match := re.search(
            r'<range_mapping origin_begin="(\d+)" data_begin="(\d+)" length="(\d+)"', line
        ):
            expected |= {
                (device, int(match[1]) + step, int(match[2]) + step) for step in range(int(match[3]))
            }
    runs = zip(
        pool.device.tolist(), pool.virtual.tolist(), pool.block.tolist(), pool.count.tolist(), strict=True
    )
    assert {
        (device, virtual + step, block + step)
        for device, virtual, block, count in runs
        for step in range(count)
    } == expected
    assert not assembly.children[0].damage.problems()


def test_blocks_that_snapshots_share_belong_to_each(kernel_volumes: Path) -> None:
    bmap = mapped(*images(kernel_volumes, "thin"))
    pool = bmap.volume_named("/dev/vg/pool_tdata")
    thin = {bmap.volume_named(f"/dev/vg/{name}") for name in ("t1", "t1s", "t1ss")}
    into = bmap.rows_into(pool)
    start, _ = covered_twice(into.parent_offset, into.parent_offset + into.run)
    assert len(start)
    on_disk = bmap.descend(pool, start, start + 1)
    for disk, at in zip(on_disk.volume.tolist(), on_disk.start.tolist(), strict=True):
        owners = bmap.owners(bmap.disks.index(disk) + 1, np.array([at]), np.array([at + 1]))
        assert len(thin & set(owners.volume.tolist())) >= 2


def _damaged(read: Callable[[Reader], object], data: bytes, seed: int, ranges: list[tuple[int, int]]) -> None:
    for image in mutations(data, 150, seed, ranges):
        try:
            read(BytesReader(image))
        except FormatError:
            continue


def test_damage_never_escapes(kernel_volumes: Path) -> None:
    _, found = volumes_of(images(kernel_volumes, "thin"))
    tmeta = found["pool_tmeta"].read(0, 512 << 10)
    _damaged(partial(read_pool, data_size=12 * MIB), tmeta, 1, [(0, 512), (60 << 10, 400 << 10)])
    store = found["snap-cow"].read(0, MIB)
    _damaged(partial(read_exceptions, origin_size=4 * MIB), store, 2, [(0, 64), (4096, 6000)])
    _, found = volumes_of(images(kernel_volumes, "cache"))
    cmeta = found["fast1_cpool_cmeta"].read(0, 256 << 10)
    _damaged(partial(read_cache, data_size=4 * MIB), cmeta, 3, [(0, 512), (4096, 64 << 10)])
    _damaged(read_writecache, found["fast4_cvol"].read(0, MIB), 4, [(0, 64), (64, 4096)])
    disk = images(kernel_volumes, "thin")[0].read_bytes()[: 8 * MIB]
    for image in mutations(disk, 60, 5, [(512, 1024), (4096, 24 << 10), (MIB, 2 * MIB)]):
        survives(image)


def test_a_tree_that_runs_in_a_circle_ends() -> None:
    data = np.zeros(16 * 4096, np.uint8)
    node = data[4096:8192]
    node[:32].view("<u4")[[1, 4, 5, 6]] = 1, 252, 252, 8
    node[8:16].view("<u8")[:] = 1
    node[32 + 252 * 8 : 32 + 252 * 16].view("<u8")[:] = 1
    store = Store(BytesReader(data))
    assert len(store.walk("tree", np.array([1, 1]), 8).keys) == 0
    assert store.damage.problems()


def test_tables_keep_the_contract(kernel_volumes: Path) -> None:
    for name in SETS:
        bmap = mapped(*images(kernel_volumes, name))
        for table in BlockMap.TABLES:
            tables.check(table, getattr(bmap, table))
