"""Whole stacks as a kernel made them in the appliance: filesystem on LVM on md RAID5, XFS on thin LVM, btrfs
RAID1 on LUKS, md on LVM, a table in a volume.

Each is compared with what the kernel says: hashes of its files read through mounts, `dmsetup table`, and the
disks' own bytes: copies and parity.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from appliance import Step, made
from support import assert_copies_and_parity, assert_proven, content, tree
from virt_bmap.ask.content import Files
from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.reader import Reader
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey_open

pytestmark = pytest.mark.slow

MIB = 1 << 20
PASSPHRASE = b"stack"
DISKS = {**{f"disk{letter}": 176 * MIB for letter in "abcd"}, "random": 0, "xfs": 0, "inner": 0}
WORDS = r"""
set -e
modprobe -a dm-mod raid456 raid1 dm-thin-pool dm-crypt xfs btrfs
rm -f /lib/udev/rules.d/*md*; udevadm control --reload; udevadm settle
disks="/dev/disk/guestfs/diska /dev/disk/guestfs/diskb /dev/disk/guestfs/diskc /dev/disk/guestfs/diskd"
mkdir -p /sysroot
lvm() { verb=$1; shift
command lvm $verb --yes --config 'global{thin_check_executable=""} activation{monitoring=0} '\
'devices{scan_lvs=1}' "$@"; }
table() { dmsetup table | sed "s/^/table $1 /"; }
majors() { for node in /dev/sd? /dev/md127
do test -b $node && echo "node $1 $(stat -c '%Hr:%Lr' $node) $(readlink -f $node)"; done
    for link in /dev/disk/guestfs/*; do echo "disk $1 $(readlink -f $link) $(basename $link)"; done; }
use() { # use a mounted filesystem as people do: many small files, some removed, two that grow in turn
    mkdir -p $1/dir/deeper
    for i in $(seq 40)
    do dd if=/dev/disk/guestfs/random of=$1/dir/file$2$i bs=1k skip=$((i * 53)) count=$((i * 5)) 2>/dev/null
    done
    for i in $(seq 6); do
        dd if=/dev/disk/guestfs/random bs=64k skip=$((i * 7)) count=5 2>/dev/null >> $1/dir/deeper/left$2
        dd if=/dev/disk/guestfs/random bs=64k skip=$((i * 9)) count=3 2>/dev/null >> $1/right$2
        sync -f $1
    done
    rm $1/dir/file$2[13579]
}
truth() { (cd $2; find . -type f -print0 | xargs -0 sha256sum | sed "s/^/sha $1 /"); }
flush() { sync; for disk in $disks; do blockdev --flushbufs $disk; done; }
"""
EXT4_LVM_RAID5 = r"""
mdadm --create /dev/md127 --name=stack --run --level=5 --chunk=64 --raid-devices=4 --bitmap=internal $disks
mdadm --wait /dev/md127 || true
lvm pvcreate /dev/md127; lvm vgcreate -s 1m vg /dev/md127
lvm lvcreate -L 40m -n home vg; lvm lvcreate -L 24m -n part vg; lvm lvextend -L 90m vg/home
mkfs.ext4 -q /dev/vg/home; mount /dev/vg/home /sysroot; use /sysroot a; truth raid5 /sysroot; umount /sysroot
dd if=/dev/disk/guestfs/inner of=/dev/vg/part bs=1M
table raid5; majors raid5
lvm vgchange -an vg; mdadm --stop /dev/md127; flush
"""
DEGRADED = r"""
set -- $disks
mdadm --assemble --run /dev/md127 $1 $2 $4; lvm vgchange -ay vg
mount /dev/vg/home /sysroot; use /sysroot b; rm /sysroot/dir/filea2?; truth degraded /sysroot; umount /sysroot
lvm vgchange -an vg; mdadm --stop /dev/md127; flush
"""
XFS_THIN = r"""
mdadm --zero-superblock $disks; wipefs -qa $disks; set -- $disks
lvm pvcreate $1 $2; lvm vgcreate -s 1m vg $1 $2
lvm lvcreate --type thin-pool -L 240m -c 64k --poolmetadatasize 4m -n pool vg
lvm lvcreate --thin -V 400m -n root vg/pool
dd if=/dev/disk/guestfs/xfs of=/dev/vg/root bs=64k conv=sparse,nocreat
mount /dev/vg/root /sysroot; use /sysroot a; umount /sysroot
lvm lvcreate -s -n before vg/root; lvm lvchange -ay -K vg/before
mount /dev/vg/root /sysroot; use /sysroot b; rm -r /sysroot/dir/deeper; truth thin /sysroot; umount /sysroot
mount -o ro,nouuid /dev/vg/before /sysroot; truth before /sysroot; umount /sysroot
table thin; majors thin
lvm vgchange -an vg; flush
"""
MD_LVM = r"""
lvm vgremove -f vg; lvm vgcreate -s 1m vg $(set -- $disks; echo $1 $2)
lvm lvcreate -L 40m -n one vg /dev/disk/guestfs/diska; lvm lvcreate -L 40m -n two vg /dev/disk/guestfs/diskb
mdadm --create /dev/md127 --name=top --run --level=1 --metadata=1.2 --raid-devices=2 /dev/vg/one /dev/vg/two
mdadm --wait /dev/md127 || true
mkfs.ext4 -q /dev/md127; mount /dev/md127 /sysroot; use /sysroot a; truth mdlvm /sysroot; umount /sysroot
table mdlvm; majors mdlvm
mdadm --stop /dev/md127; lvm vgchange -an vg; flush
"""
BTRFS_LUKS = r"""
lvm vgremove -f vg; wipefs -qa $disks; set -- $disks; number=0
for disk in $1 $2; do
    number=$((number + 1))
    printf stack | cryptsetup luksFormat -q --type luks$number --pbkdf pbkdf2 --pbkdf-force-iterations \
1000 $disk -
    printf stack | cryptsetup luksOpen $disk secret$number --key-file -
done
mkfs.btrfs -q -d raid1 -m raid1 /dev/mapper/secret1 /dev/mapper/secret2; btrfs device scan
mount /dev/mapper/secret1 /sysroot; use /sysroot a; truth luks /sysroot; umount /sysroot
table luks; majors luks
cryptsetup luksClose secret1; cryptsetup luksClose secret2; flush
"""
STACKS = {"raid5": 4, "degraded": 4, "thin": 2, "mdlvm": 2, "luks": 2}


def steps() -> list[Step]:
    def keep(name: str) -> Step:
        return "host", "; ".join(
            f"cp --sparse=always disk{'abcd'[at]} {name}.{at + 1}" for at in range(STACKS[name])
        )

    host = """python3 -c 'from numpy.random import PCG64; PCG64(4).random_raw(1 << 19).tofile("random")'
        truncate -s 400M xfs; mkfs.xfs -q xfs
        truncate -s 24M inner; printf 'label: gpt\\nsize=8MiB\\n\\n' | sfdisk -q inner
        mkdir tree; cp random tree/one
        mke2fs -q -t ext4 -d tree -E offset=1048576 inner 8m; rm -r tree"""
    made_in_turn = [
        (EXT4_LVM_RAID5, "raid5"),
        (DEGRADED, "degraded"),
        (XFS_THIN, "thin"),
        (MD_LVM, "mdlvm"),
        (BTRFS_LUKS, "luks"),
    ]
    result: list[Step] = [("host", host)]
    for commands, name in made_in_turn:
        result += [("sh", WORDS + commands), keep(name)]
    return result


@pytest.fixture(scope="session")
def stacks() -> Path:
    return made("stacks", DISKS, steps())


def opened(folder: Path, name: str, *gone: int) -> tuple[BlockMap, list[Reader], list[Reader]]:
    """(map, readers of the disks, readers of the volumes) of a stack, without the disks `gone` (from 0)."""
    disks: list[Reader] = [
        RawReader(str(folder / f"{name}.{at + 1}")) for at in range(STACKS[name]) if at not in gone
    ]
    bmap, volumes = survey_open(disks, keys=Keys((("all", PASSPHRASE),)) if name == "luks" else NO_KEYS)
    return bmap, disks, volumes


def hashes(folder: Path, name: str) -> dict[str, str]:
    """Path -> SHA-256, as read through the kernel's mount."""
    return {
        path: digest
        for digest, path in re.findall(rf"^sha {name} ([0-9a-f]{{64}})  \.(\S+)$", log(folder), re.MULTILINE)
    }


def log(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def mapped_hashes(bmap: BlockMap, volume: int, readers: list[Reader]) -> dict[str, str]:
    """The same through the map, read from the disks where it says they lie."""
    wanted = {
        path: inode
        for path, inode in tree(bmap, volume).items()
        if re.search(r"/(file|left|right)[ab]\d*$", path)
    }
    return {
        path: hashlib.sha256(content(bmap, readers, volume, inode)).hexdigest()
        for path, inode in wanted.items()
    }


def volume_hashes(bmap: BlockMap, volume: int, reader: Reader) -> dict[str, str]:
    """Like `mapped_hashes`, read through the layers: what is encrypted decrypted, what is missing computed
    from parity."""
    files = Files(bmap, volume, reader)
    wanted = {
        path: inode
        for path, inode in tree(bmap, volume).items()
        if re.search(r"/(file|left|right)[ab]\d*$", path)
    }
    found = {}
    for path, inode in wanted.items():
        data = bytearray(files.length(inode))
        for piece in files.pieces([inode]):
            data[piece.offset : piece.offset + len(piece.data)] = piece.data.tobytes()
        found[path] = hashlib.sha256(data).hexdigest()
    return found


PLACES = {
    "raid5": "/dev/vg/home",
    "degraded": "/dev/vg/home",
    "thin": "/dev/vg/root",
    "mdlvm": "/dev/md127",
    "luks": "",
}


def filesystem(bmap: BlockMap, name: str) -> int:
    """The volume with the stack's filesystem: by its device's name, or the only one there is."""
    return bmap.volume_named(PLACES[name]) if PLACES[name] else bmap.filesystems.column("volume")[0].as_py()


@pytest.mark.parametrize("name", STACKS)
def test_everything_is_owned_and_files_lie_where_the_map_says(stacks: Path, name: str) -> None:
    bmap, disks, volumes = opened(stacks, name)
    assert_proven(bmap)
    expected, volume = hashes(stacks, name), filesystem(bmap, name)
    assert len(expected) > 20
    assert volume_hashes(bmap, volume, volumes[volume]) == expected
    if name not in ("degraded", "luks"):
        assert mapped_hashes(bmap, volume, disks) == expected


def test_the_snapshot_keeps_what_was(stacks: Path) -> None:
    bmap, disks, _ = opened(stacks, "thin")
    assert (
        mapped_hashes(bmap, bmap.volume_named("/dev/vg/before"), disks)
        == hashes(stacks, "before")
        != hashes(stacks, "thin")
    )


def test_the_member_that_was_left_out_is_named(stacks: Path) -> None:
    bmap, *_ = opened(stacks, "degraded")
    assert {(row["code"], row["severity"]) for row in bmap.problems.to_pylist()} == {
        ("unused-member", "note"),
        ("missing-member", "note"),
    }


@pytest.mark.parametrize("gone", range(4))
def test_any_disk_may_be_missing(stacks: Path, gone: int) -> None:
    bmap, _, volumes = opened(stacks, "raid5", gone)
    assert_proven(bmap)
    volume = filesystem(bmap, "raid5")
    assert volume_hashes(bmap, volume, volumes[volume]) == hashes(stacks, "raid5")


@pytest.mark.parametrize("gone", range(2))
def test_either_half_of_a_mirror_may_be_missing(stacks: Path, gone: int) -> None:
    bmap, _, volumes = opened(stacks, "luks", gone)
    volume = filesystem(bmap, "luks")
    assert volume_hashes(bmap, volume, volumes[volume]) == hashes(stacks, "luks")


@pytest.mark.parametrize("name", ["raid5", "mdlvm", "luks"])
def test_copies_are_equal_and_parity_is_what_is_on_the_disks(stacks: Path, name: str) -> None:
    bmap, _, volumes = opened(stacks, name)
    copied, parity = assert_copies_and_parity(bmap, volumes)
    assert (parity if name == "raid5" else copied) > 4 * MIB


def test_a_partition_table_inside_a_logical_volume(stacks: Path) -> None:
    bmap, disks, _ = opened(stacks, "raid5")
    device = "/dev/vg/part1"
    assert bmap.volumes.column("type")[bmap.volume_named("/dev/vg/part")].as_py() == "gpt"
    volume = bmap.volume_named(device)
    assert content(bmap, disks, volume, tree(bmap, volume)["/one"]) == (stacks / "random").read_bytes()


# ---- dmsetup table -----------------------------------------------------------------------------------------


def rows_of(bmap: BlockMap, volume: int) -> set[tuple[int, int, str, int]]:
    """(first sector, sectors, parent's name, first sector there) of a volume's rows, neighbours joined."""
    rows = bmap.rows_of(volume)
    names = bmap.volumes.column("name").to_pylist()
    order = np.argsort(rows.volume_offset)
    found: list[tuple[int, int, str, int]] = []
    for at in order.tolist():
        assert rows.count[at] == 1
        start = int(rows.volume_offset[at]) // 512
        size = int(rows.run[at]) // 512
        up = int(rows.parent_offset[at]) // 512
        parent = names[rows.parent[at]]
        if (
            found
            and (last := found[-1])[2] == parent
            and last[0] + last[1] == start
            and last[3] + last[1] == up
        ):
            found[-1] = last[0], last[1] + size, parent, last[3]
        else:
            found.append((start, size, parent, up))
    return set(found)


@pytest.mark.parametrize("name", ["raid5", "thin", "mdlvm", "luks"])
def test_tables_are_those_of_dmsetup(stacks: Path, name: str) -> None:
    """Linear and crypt targets name their devices by number; thin ones say which volumes share which pool."""
    bmap, *_ = opened(stacks, name)
    labels = dict(re.findall(rf"^disk {name} (\S+) (\S+)$", log(stacks), re.MULTILINE))
    nodes = dict(re.findall(rf"^node {name} (\d+:\d+) (\S+)$", log(stacks), re.MULTILINE))
    ours = {f"disk{letter}": f"/dev/sd{letter}" for letter in "abcd"}
    device = {number: ours.get(labels.get(node, ""), node) for number, node in nodes.items()}
    found = re.findall(
        rf"^table {name} (\S+): (\d+) (\d+) (linear|crypt) (?:\S+ \S+ \d+ )?(\d+:\d+) (\d+)",
        log(stacks),
        re.MULTILINE,
    )
    expected: dict[str, set[tuple[int, int, str, int]]] = {}
    for volume, start, size, _, parent, at in found:
        if parent in device:  # what lies on another mapping has no number that lasts
            expected.setdefault(volume, set()).add((int(start), int(size), device[parent], int(at)))
    crypts = iter(row["volume"] for row in bmap.volumes.to_pylist() if row["kind"] == "crypt")
    assert len(expected) >= 2
    for volume, rows in sorted(expected.items()):
        number = next(crypts) if name == "luks" else bmap.volume_named("/dev/" + volume.replace("-", "/", 1))
        assert rows_of(bmap, number) == rows, volume
