"""One small image of every format and layout, made by real tools: what is proven as it is, and damaged by
tools/fuzz.

A recipe makes its files in a folder and returns them: the disks of one machine, in order. Sizes are the
smallest that the tools take, since the time of a map follows them. Recipes say what they need, and are
skipped where it is missing.
"""

import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

import bitlocker_images
import btrfs_images
import ext_images
import fat_images
import ntfs_images
import xfs_images
from host_images import io
from support import mounted, need, need_root, run, sync

MIB = 1 << 20
Recipe = Callable[[Path], list[Path]]
UTF8 = {"LC_ALL": "C.UTF-8"}


def blank(path: Path, size: int) -> Path:
    """A file of zeroes that takes no space."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def tree(folder: Path) -> Path:
    """The files that go into most of these images; the ext recipes' tree, with fewer names and what
    compresses."""
    where = folder / "tree"
    where.mkdir()
    ext_images.fill(where, names=120)
    (where / "text").write_bytes(b"hello world, again and again\n" * 2000)
    return where


def plain_tree(folder: Path) -> Path:
    """The same without what some tools do not take: pipes, names with bytes that are not UTF-8, very long
    links."""
    where = tree(folder)
    (where / "fifo").unlink()
    (where / "long").unlink()
    for path in os.listdir(os.fsencode(where)):
        if not os.fsdecode(path).isprintable():
            os.unlink(os.path.join(os.fsencode(where), path))
    return where


# ---- filesystems -------------------------------------------------------------------------------------------


def ext(options: str, size: str, folder: Path) -> list[Path]:
    need("mke2fs", "e2fsprogs")
    return [ext_images.make(tree(folder), ext_images.Flavour("", options, size), folder / "disk.img")]


EXT = {
    "ext2": ("-t ext2 -b 1024 -g 512 -N 512", "4M"),
    "ext3": ("-t ext3 -b 1024 -J size=1 -N 256", "5M"),
    "ext4": ("-t ext4 -b 1024 -N 256 -O ^has_journal", "4M"),
    "ext4-4k": ("-t ext4 -N 256 -O ^has_journal", "8M"),
    "ext4-journal": ("-t ext4 -b 1024 -N 256 -J size=1", "6M"),
    "ext4-flex": ("-t ext4 -b 1024 -g 1024 -G 4 -N 512 -O ^has_journal,^resize_inode", "6M"),
    "ext4-meta-bg": ("-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^has_journal -N 1024", "6M"),
    "ext4-inline": ("-t ext4 -b 1024 -O inline_data,^has_journal -N 256", "4M"),
    "ext4-gdt-csum": (("-t ext4 -b 1024 -g 1024 -O "
        "sparse_super2,uninit_bg,^metadata_csum,^has_journal,^resize_inode -N 512"), "6M"),
    "ext4-bigalloc": ("-t ext4 -b 1024 -O bigalloc,^has_journal -C 4096 -N 256", "4M"),
    "ext4-quota": (("-t ext4 -b 1024 -O quota,project,orphan_file,ea_inode,casefold,large_dir,mmp -J "
        "size=1 -N 256"), "6M"),
}  # fmt: skip


def ext_dirty(folder: Path) -> list[Path]:
    """A filesystem copied while it was mounted: its journal holds what its blocks do not."""
    source = tree(folder)
    image = blank(folder / "disk.img", 6 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-N", "256", "-J", "size=1", image)
    with mounted(image) as top:
        run("cp", "-a", f"{source}/.", top)
        with open(top / "promised", "wb") as file:
            xfs_images.fallocate(file.fileno(), 0, 0, 200_000)
        sync(top)
        for number in range(3):
            for path in (top / "many").glob(f"*{number}"):
                path.unlink()
            (top / f"new-{number}").write_bytes(b"new" * 500)
            run("sync", top / f"new-{number}")
        return [_copy(image)]


def _copy(image: Path) -> Path:
    """The image as it is at this moment, under its own name once it is no longer mounted."""
    return Path(shutil.copy(image, image.with_suffix(".copy")))


XFS = {
    "xfs": (16, "-m rmapbt=1,reflink=1 -i size=512"),
    "xfs-1k": (24, "-b size=1024 -n size=4096 -m rmapbt=1,reflink=1"),
    "xfs-nrext64": (24, "-i nrext64=1 -m bigtime=1"),
}
"""MiB, and mkfs.xfs' options."""
XFS_V4 = "-m crc=0,finobt=0,rmapbt=0,reflink=0 -n ftype=0"
SMALL_XFS = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
"""What lets mkfs.xfs make less than 300 MiB: the environment of its own test suite."""


def xfs(size: int, options: str, dirty: bool, folder: Path) -> list[Path]:
    need("mkfs.xfs", "xfsprogs")
    source, image = tree(folder), blank(folder / "disk.img", size * MIB)
    run("mkfs.xfs", "--unsupported", "-q", "-f", *options.split(), image, env=SMALL_XFS)
    with mounted(image, "nouuid") as top:
        run("cp", "-a", f"{source}/.", top)
        with open(top / "pieces", "wb") as file:
            for number in range(60):
                file.seek(number * 12288)
                file.write(b"%4d" % number * 1024)
        for number in range(60):
            os.setxattr(top / "size-400", f"user.n{number}", b"v" * 100)
        os.setxattr(top / "size-1024", "user.remote", b"v" * 9000)
        (top / "links").mkdir()
        for number in range(250):
            os.link(top / "size-1", top / "links" / f"a name with some length {number}")
        subprocess.run(["cp", "--reflink=auto", top / "size-5000", top / "again"], check=True)
        sync(top)
        for path in (top / "links").glob("*7"):
            path.unlink()
        if dirty:
            xfs_images.shut_down(top)
    return [image]


def xfs_v4(folder: Path) -> list[Path]:
    """The format before 2013, which new kernels no longer mount: filled by mkfs.xfs itself, from a prototype
    file."""
    need("mkfs.xfs", "xfsprogs")
    source, image = tree(folder), blank(folder / "disk.img", 16 * MIB)
    files = [f"{path.name} ---644 0 0 {path}" for path in sorted(source.glob("size-*"))]
    names = [f"name-of-some-length-{number} ---644 0 0 {source / 'size-1'}" for number in range(120)]
    lines = [
        "/",
        "0 0",
        "d--755 0 0",
        *files,
        "link l--777 0 0 some/target",
        "many d--755 0 0",
        *names,
        "$",
        "pipe p--644 0 0",
        "$",
    ]
    (folder / "prototype").write_text("\n".join(lines) + "\n")
    run(
        "mkfs.xfs",
        "--unsupported",
        "-q",
        "-f",
        *XFS_V4.split(),
        "-p",
        folder / "prototype",
        image,
        env=SMALL_XFS,
    )
    return [image]


BTRFS = {
    "btrfs": ("114M", "-d single -m dup", 1),
    "btrfs-mixed": ("32M", "--mixed", 1),
    "btrfs-raid1": ("128M", "-d raid1 -m raid1", 2),
    "btrfs-raid5": ("128M", "-d raid5 -m raid5", 3),
    "btrfs-raid10": ("128M", "-d raid10 -m raid10", 4),
}
FILL_BTRFS = """
mkdir a many; for s in 0 10 3000 5000 90000; do head -c $s /dev/urandom > a/f$s; done; for i in $(seq 80)
do echo $i > many/file$i; done
for c in zlib lzo zstd; do
    touch c-$c; btrfs property set c-$c compression $c; yes "$c hello" | head -c 200000 > c-$c
    touch t-$c; btrfs property set t-$c compression $c; yes x | head -c 1500 > t-$c
done
ln -s some/target a/link; ln a/f10 a/hard; setfattr -n user.x -v $(printf '%0300d' 7) a/f10
fallocate -l 100000 a/prealloc
dd if=/dev/urandom of=a/prealloc bs=4k count=2 seek=3 conv=notrunc status=none; sync -f .
cp --reflink=always a/f90000 a/ref; dd if=/dev/urandom of=a/ref bs=4k count=2 seek=3 conv=notrunc status=none
btrfs -q subvolume create sub; echo in > sub/x; head -c 30000 /dev/urandom > sub/y
btrfs -q subvolume snapshot sub snap
dd if=/dev/urandom of=snap/y bs=4k count=1 seek=2 conv=notrunc status=none
btrfs -q subvolume snapshot -r . a/ro; sync -f .
echo late > late; sync late
"""


def btrfs(size: str, options: str, count: int, folder: Path) -> list[Path]:
    """Copied while it is mounted, so that its log tree is there."""
    images = btrfs_images.make(folder, size, options, count)
    with btrfs_images.mounted_pool(images, folder / "top") as top:
        btrfs_images.fill(top, FILL_BTRFS)
        return [_copy(image) for image in images]


def ntfs(size: int, cluster: int, folder: Path) -> list[Path]:
    need("mkntfs", "ntfs-3g")
    need_root()
    source = plain_tree(folder)
    volume = ntfs_images.make(folder / "disk.img", size, cluster, 512)
    with ntfs_images.fuse(volume.image, "rw,compression,noatime") as top:
        run("cp", "-r", "--preserve=links", f"{source}/.", top)
        (top / "packed").mkdir()
        os.setxattr(top / "packed", "system.ntfs_attrib_be", (0x810).to_bytes(4, "big"))
        (top / "packed" / "text").write_bytes(b"compress me\n" * 10_000)
        (top / "size-1:stream").write_bytes(b"a stream of its own" * 500)
        for number in range(30):
            os.link(top / "size-1023", top / "many" / f"a hard link with a name of some length {number}")
        with open(top / "pieces", "wb", buffering=0) as file:
            for number in range(80):
                file.seek(2 * number * cluster)
                file.write(b"%4d" % number * (cluster // 4))
        (top / "gone").write_bytes(b"gone" * 2000)
        sync(top)
        (top / "gone").unlink()
    return [volume.image]


FAT = {
    "fat12": ("-F 12 -s 1", 1440),
    "fat12-4k": ("-F 12 -S 4096 -s 1", 8192),
    "fat16": ("-F 16 -s 1", 6144),
    "fat32": ("-F 32 -s 1 -n LABEL", 36864),
}


def fat(options: str, kibibytes: int, folder: Path) -> list[Path]:
    need("mkfs.fat", "dosfstools")
    image = folder / "disk.img"
    run("mkfs.fat", *options.split(), "-C", image, str(kibibytes))
    fat_images.fill(image, folder)
    return [image]


def exfat(folder: Path) -> list[Path]:
    need("mount.exfat-fuse", "exfat-fuse")
    need("mkfs.exfat", "exfatprogs")
    image = blank(folder / "disk.img", 6 * MIB)
    run("mkfs.exfat", "-L", "label", image, env=UTF8)
    with mounted(image, kind="exfat-fuse") as top:
        for path, size in (("a", 0), ("b", 1), ("c", 3000), ("a name of more than fifteen letters", 90_000)):
            (top / path).write_bytes(os.urandom(size))
        (top / "many").mkdir()
        for number in range(90):
            (top / "many" / f"one of many files {number}").write_bytes(b"%d" % number)
        with open(top / "x", "wb", buffering=0) as one, open(top / "y", "wb", buffering=0) as other:
            for _ in range(6):
                one.write(os.urandom(9000))
                other.write(os.urandom(9000))
        for path in (top / "many").glob("*7"):
            path.unlink()
    return [image]


def iso(command: str, options: str, folder: Path) -> list[Path]:
    source = plain_tree(folder)
    (source / "boot.img").write_bytes(bytes(4096))
    run(
        need(command.split()[0], command.split()[0]),
        *command.split()[1:],
        *options.split(),
        "-o",
        folder / "disk.img",
        source,
        env=UTF8,
    )
    return [folder / "disk.img"]


ISO = {
    "iso": ("genisoimage -quiet", "-R -J -joliet-long -b boot.img -no-emul-boot -c boot.cat"),
    "iso-plain": ("genisoimage -quiet", "-iso-level 4"),
    "iso-udf": ("genisoimage -quiet", "-R -udf -allow-limited-size"),
    "iso-level-3": ("xorriso -as mkisofs -quiet", "-R -J -iso-level 3"),
}


def iso_zisofs(folder: Path) -> list[Path]:
    """Files that are compressed one by one."""
    image = folder / "disk.img"
    run(need("xorriso", "xorriso"), "-outdev", f"stdio:{image}", "-zisofs", "level=6", "-map",
        plain_tree(folder), "/",
        "-set_filter_r", "--zisofs", "/", "--", "-commit")  # fmt: skip
    return [image]


def iso_sessions(folder: Path) -> list[Path]:
    """Two sessions: the second shows the files of the first, and more."""
    (image,) = iso("genisoimage -quiet", "-R -J", folder)
    (folder / "more").mkdir()
    (folder / "more" / "added").write_bytes(b"added" * 1000)
    blocks = image.stat().st_size // 2048
    run(
        "genisoimage",
        "-quiet",
        "-R",
        "-M",
        image,
        "-C",
        f"0,{blocks}",
        "-o",
        folder / "session",
        folder / "more",
    )
    with open(image, "ab") as file:
        file.write((folder / "session").read_bytes())
    return [image]


UDF = {
    "udf-512": ("hd", "2.01", 512),
    "udf-1024": ("hd", "1.50", 1024),
    "udf-2048": ("hd", "1.02", 2048),
    "udf-sparing": ("dvdrw", "2.01", 2048),
}


def udf(media: str, revision: str, block: int, folder: Path) -> list[Path]:
    """An empty volume: nothing here fills one but an appliance. `iso-udf` has files."""
    need("mkudffs", "udftools")
    image = blank(folder / "disk.img", 4 * MIB)
    run("mkudffs", f"--media-type={media}", f"--udfrev={revision}", f"--blocksize={block}", image)
    return [image]


SQUASHFS = {
    **{f"squashfs-{name}": f"-comp {name} -b 16k" for name in ("gzip", "lzma", "lzo", "lz4", "xz", "zstd")},
    "squashfs-stored": "-noI -noD -noF -noX",
    "squashfs-no-fragments": "-no-fragments -no-exports -comp gzip",
}


def squashfs(options: str, folder: Path) -> list[Path]:
    image = folder / "disk.img"
    run(
        need("mksquashfs", "squashfs-tools"),
        tree(folder),
        image,
        "-noappend",
        "-no-progress",
        "-quiet",
        *options.split(),
    )
    return [image]


EROFS = {
    "erofs": "",
    "erofs-extended": "-x1 -Eforce-inode-extended",
    "erofs-lz4": "-zlz4",
    "erofs-lz4hc": "-zlz4hc -C16384",
    "erofs-fragments": "-zlz4 -Efragments,ztailpacking,dedupe",
    "erofs-legacy": "-zlz4 -Elegacy-compress",
}


def erofs(options: str, folder: Path) -> list[Path]:
    image, source = folder / "disk.img", plain_tree(folder)
    for path in ("n" * 255, "sparse"):  # mkfs.erofs 1.5 stops at either
        (source / path).unlink()
    run(need("mkfs.erofs", "erofs-utils"), "--quiet", *options.split(), image, source)
    return [image]


F2FS = {
    "f2fs": "-O "
    "extra_attr,inode_checksum,sb_checksum,compression,flexible_inline_xattr,inode_crtime,lost_found",
    "f2fs-plain": "",
}


def f2fs(options: str, folder: Path) -> list[Path]:
    need("mkfs.f2fs", "f2fs-tools")
    source, image = plain_tree(folder), blank(folder / "disk.img", 128 * MIB)
    run("mkfs.f2fs", "-q", "-f", *options.split(), image)
    run("sload.f2fs", "-f", source, image, ok=(0, 1))  # 1: an attribute that it does not know how to keep
    return [image]


def swap(folder: Path) -> list[Path]:
    image = blank(folder / "disk.img", MIB)
    run(need("mkswap", "util-linux"), "-L", "a label", image)
    return [image]


# ---- partition tables --------------------------------------------------------------------------------------


def _put(image: Path, offset: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(data)


def _small_ext(folder: Path) -> bytes:
    """An ext4 of 4 MiB, to lie in something."""
    inside = folder / "inside"
    inside.mkdir()
    (made,) = ext(*EXT["ext4"], inside)
    return made.read_bytes()


def gpt(folder: Path) -> list[Path]:
    """An ext4 at 1 MiB, and two empty partitions."""
    image = blank(folder / "table.img", 12 * MIB)
    run(
        need("sfdisk", "fdisk"),
        "-q",
        "--no-tell-kernel",
        image,
        stdin=b'label: gpt\nsize=4M,name="first"\nsize=2M\n,\n',
    )
    _put(image, MIB, _small_ext(folder))
    return [image]


def mbr(folder: Path) -> list[Path]:
    """Primary and logical partitions; a FAT in the first."""
    image, script = (
        blank(folder / "table.img", 12 * MIB),
        b"label: dos\nsize=2M,type=1\nsize=2M,type=83\n,,E\nsize=1M,type=83\nsize=2M,type=82\n,,83\n",
    )
    run(need("sfdisk", "fdisk"), "-q", "--no-tell-kernel", image, stdin=script)
    (inner,) = fat(*FAT["fat12"], folder)
    _put(image, MIB, inner.read_bytes())
    return [image]


def labelled(label: str, parts: Sequence[str], folder: Path) -> list[Path]:
    """A label of another machine, by parted."""
    image = blank(folder / "table.img", 12 * MIB)
    run(
        need("parted", "parted"),
        "-s",
        image,
        "mklabel",
        label,
        *(word for part in parts for word in f"mkpart {part}".split()),
    )
    return [image]


def sun(folder: Path) -> list[Path]:
    image = blank(folder / "table.img", 12 * MIB)
    run(
        need("sfdisk", "fdisk"),
        "-q",
        "--no-tell-kernel",
        image,
        stdin=b"label: sun\nstart=0,size=8192\n",
        ok=(0, 1),
    )
    return [image]


# ---- volume managers, arrays, encryption -------------------------------------------------------------------


def lvm(folder: Path) -> list[Path]:
    """Two disks, one with two metadata areas; a linear volume with an ext4, a striped one, one of two
    segments."""
    need("lvcreate", "lvm2")
    images = [blank(folder / f"disk{number}.img", 16 * MIB) for number in (1, 2)]
    with btrfs_images.loops(images) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}']
        away = [*options, "--driverloaded", "n"]
        run("pvcreate", *options, "--metadatacopies", "2", devices[0])
        run("pvcreate", *options, devices[1])
        run("vgcreate", *away, "-s", "512k", "my-vg", *devices)
        for words in ("-n lin -L 4M", "-n str -i2 -I64k -L 4M", "-n two -l 12"):
            run("lvcreate", *away, "-an", "-Zn", "-Wn", "my-vg", *words.split())
        said = run(
            "pvs", *away, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "pe_start", devices[0]
        )
    _put(images[0], int(json.loads(said)["report"][0]["pv"][0]["pe_start"]), _small_ext(folder))
    return images


THIN_POOL = """
my-vg {{ id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa" seqno = 5 format = "lvm2" status = ["RESIZEABLE", \
"READ", "WRITE"] flags = []
extent_size = 512 max_lv = 0 max_pv = 0 metadata_copies = 0
physical_volumes {{ pv0 {{ id = "{pv}" device = "/dev/sda" status = ["ALLOCATABLE"] flags = [] dev_size = \
32768 pe_start = 2048 pe_count = 60 }} }}
logical_volumes {{
{volumes}
}} }}
"""
LINEAR = """{name} {{ id = "{id}" status = ["READ", "WRITE"{visible}] flags = [] segment_count = 1
segment1 {{ start_extent = 0 extent_count = {count} type = "striped" stripe_count = 1 stripes = ["pv0", \
{at}] }} }}"""


def thin(folder: Path) -> list[Path]:
    """A thin pool without a kernel: metadata restored by thin_restore, and LVM's text written by hand into a
    physical volume that LVM made."""
    restore = need("thin_restore", "thin-provisioning-tools")
    need("pvcreate", "lvm2")
    metadata = blank(folder / "metadata", MIB)
    (folder / "xml").write_text(
        '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
        '<device dev_id="1" mapped_blocks="20" transaction="0" creation_time="0" snap_time="0">'
        '<range_mapping origin_begin="0" data_begin="0" length="16" time="0"/><single_mapping '
        'origin_block="40" data_block="20" time="0"/>'
        '<range_mapping origin_begin="50" data_begin="30" length="3" time="0"/></device>'
        '<device dev_id="2" mapped_blocks="4" transaction="1" creation_time="1" snap_time="1">'
        '<range_mapping origin_begin="0" data_begin="0" length="4" time="0"/></device></superblock>'.replace(
            'nr_data_blocks="0"', 'nr_data_blocks="64"'
        )
    )
    run(restore, "-i", folder / "xml", "-o", metadata)
    image = blank(folder / "disk.img", 16 * MIB)
    with btrfs_images.loops([image]) as (device,):
        options = ["--config", f'devices{{filter=["a|{device}$|","r|.*|"]}}', "--driverloaded", "n"]
        run("pvcreate", *options[:2], device)
        run("vgcreate", *options, "-s", "256k", "my-vg", device)
        pv = json.loads(run("pvs", *options, "--reportformat", "json", "-o", "pv_uuid", device))["report"][0][
            "pv"
        ][0]["pv_uuid"]

    def id_of(number: int) -> str:
        return "-".join((f"{number:06}", *["bbbb"] * 5, "cccccc"))

    hidden = [
        LINEAR.format(name=name, id=id_of(at), visible="", count=count, at=at)
        for name, count, at in (("pool_tmeta", 4, 0), ("pool_tdata", 16, 8))
    ]
    pool = (
        f'pool {{ id = "{id_of(90)}" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count '
        f"= 1 segment1 {{ start_extent = 0 extent_count = 16 "
        'type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata" transaction_id = 2 '
        'chunk_size = 128 discards = "passdown" zero_new_blocks = 1 } }'
    )
    thins = [
        f'{name} {{ id = "{id_of(91 + device)}" status = ["READ", "WRITE", "VISIBLE"] flags = [] '
            f'segment_count = 1 segment1 {{ start_extent = 0 extent_count = {count} '
        f'type = "thin" thin_pool = "pool" transaction_id = {device - 1} device_id = {device} }} }}'
        for name, count, device in (("t1", 16, 1), ("t2", 16, 2))
    ]  # fmt: skip
    write_lvm_text(image, THIN_POOL.format(pv=pv, volumes="\n".join([*hidden, pool, *thins])).encode())
    _put(image, MIB, metadata.read_bytes())
    inner = _small_ext(folder)
    _put(image, MIB + 8 * (256 << 10), inner[: 16 * 65536])
    return [image]


def lvm_crc(data: bytes) -> int:
    """LVM's checksum of labels and metadata (lib/misc/crc.c): CRC-32 with its own start and no last
    complement."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def write_lvm_text(image: Path, text: bytes, area: int = 4096) -> None:
    """Other metadata for a physical volume's only metadata area, checksums and all."""
    text = text.strip() + b"\n\0"
    with open(image, "r+b") as file:
        file.seek(area)
        head = bytearray(file.read(512))
        struct.pack_into("<QQII", head, 40, 512, len(text), lvm_crc(text), 0)
        head[:4] = struct.pack("<I", lvm_crc(bytes(head[4:])))
        file.seek(area)
        file.write(head + text)


def md(level: int, metadata: int, folder: Path) -> list[Path]:
    """An array with an ext4: mirrors, or a RAID5 left-symmetric of chunks of 16 KiB; superblocks of version
    1.0 (at the end) or 1.2, or 0.90."""
    volume, chunk = _small_ext(folder), 16384
    count, start = (2, 0) if level == 1 else (3, MIB)
    members = [bytearray() for _ in range(count)]
    if level == 1:
        members = [bytearray(volume), bytearray(volume)]
    else:
        for row in range(len(volume) // chunk // 2):
            pieces = [volume[(2 * row + at) * chunk :][:chunk] for at in (0, 1)]
            parity = bytes(a ^ b for a, b in zip(*pieces, strict=True))
            place = 2 - row % 3
            order = {place: parity, (place + 1) % 3: pieces[0], (place + 2) % 3: pieces[1]}
            for number, member in enumerate(members):
                member += order[number]
    result = []
    for role, member in enumerate(members):
        size = len(member)
        path = folder / f"disk{role}.img"
        total = (start + size if start else size + 131072) // 65536 * 65536
        image = bytearray(total)
        image[start : start + size] = member
        if metadata == 0:
            at = total // 65536 * 65536 - 65536
            head = _md_90(level, size, role, count)
        else:
            at = 4096 if metadata == 2 else (total // 512 - 16) // 8 * 8 * 512
            head = _md_1(level, chunk // 512, size // 512, role, count, start // 512, at // 512)
        image[at : at + len(head)] = head
        path.write_bytes(image)
        result.append(path)
    return result


def _md_1(level: int, chunk: int, size: int, role: int, disks: int, data_offset: int, at: int) -> bytes:
    """A superblock of version 1 by the fields of md_p.h; sizes and offsets in sectors."""
    head = bytearray(256 + 2 * disks)
    struct.pack_into("<II", head, 0, 0xA92B4EFC, 1)
    head[0x10:0x20], head[0x20:0x29] = b"0123456789abcdef", b"host:name"
    struct.pack_into(
        "<iIQII", head, 0x48, level, 2 if level == 5 else 0, size, chunk if level == 5 else 0, disks
    )
    struct.pack_into("<QQQ", head, 0x80, data_offset, size, at)
    struct.pack_into("<I", head, 0xA0, role)
    struct.pack_into("<QQ", head, 0xC8, 7, 2**64 - 1)
    struct.pack_into("<I", head, 0xDC, disks)
    struct.pack_into(f"<{disks}H", head, 256, *range(disks))
    words = struct.unpack(f"<{len(head) // 4}I", bytes(head[: len(head) // 4 * 4]))
    total = sum(words) + (struct.unpack_from("<H", head, len(head) - 2)[0] if len(head) % 4 else 0)
    head[0xD8:0xDC] = struct.pack("<I", (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    return bytes(head)


def _md_90(level: int, size: int, role: int, disks: int) -> bytes:
    """A superblock of version 0.90 by the fields of md_p.h, little endian; `size` of a member in bytes."""
    words = [0] * 1024
    words[0:4], words[7], words[8] = [0xA92B4EFC, 0, 90, 0], level, size // 1024
    words[4], words[9], words[10], words[11] = 32 * 31, disks, disks, 127
    words[5], words[13], words[14], words[15] = 0x12345678, 0x9ABCDEF0, 0x0FEDCBA9, 0x87654321
    words[32:37] = [0x5F000000, 1, disks, disks, 0]
    words[39] = 7  # events, low half
    for number in range(disks):
        # active and in sync
        words[128 + 32 * number : 128 + 32 * number + 5] = [number, 8, 16 * number, number, 6]
    words[992:997] = [role, 8, 16 * role, role, 6]
    total = sum(words)
    words[38] = (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF
    return struct.pack("<1024I", *words)


PASSPHRASE = b"correct horse battery staple"


def luks(version: str, folder: Path) -> list[Path]:
    """An empty container; its key derivation is quick."""
    tool = need("cryptsetup", "cryptsetup-bin")
    image, secret = blank(folder / "disk.img", 20 * MIB if version == "luks2" else 5 * MIB), folder / "secret"
    secret.write_bytes(PASSPHRASE)
    run(
        tool,
        "luksFormat",
        "-q",
        "--type",
        version,
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--key-file",
        secret,
        image,
    )
    return [image]


def bitlocker(folder: Path) -> list[Path]:
    """A volume whose protection is suspended, encrypted by hand: nothing on Linux makes one."""
    need("mkntfs", "ntfs-3g")
    plain = ntfs_images.make(folder / "plain.img", 16, 4096, 512).image
    image = folder / "disk.img"
    image.write_bytes(bitlocker_images.by_hand(plain.read_bytes()).tobytes())
    return [image]


# ---- image formats -----------------------------------------------------------------------------------------

HOST = {
    "qcow2": ("qcow2", "cluster_size=4k"),
    "qcow2-v2": ("qcow2", "compat=0.10,cluster_size=512"),
    "qcow2-extended-l2": ("qcow2", "extended_l2=on,cluster_size=16k"),
    "qcow2-64k": ("qcow2", "cluster_size=64k,lazy_refcounts=on,refcount_bits=64"),
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "vmdk-stream": ("vmdk", "subformat=streamOptimized"),
    "vhd": ("vpc", "subformat=dynamic"),
    "vhd-fixed": ("vpc", "subformat=fixed"),
    "vhdx": ("vhdx", "block_size=1M"),
    "vdi": ("vdi", "static=off"),
}
ENDINGS = {"qcow2": ".qcow2", "vmdk": ".vmdk", "vpc": ".vhd", "vhdx": ".vhdx", "vdi": ".vdi"}
"""The endings of files whose own layer is what is looked at; all others are raw disks."""


def host(format: str, options: str, folder: Path) -> list[Path]:
    """The GPT disk above in an image format."""
    need("qemu-img", "qemu-utils")
    (raw,) = gpt(folder)
    image = folder / f"disk{ENDINGS[format]}"
    run("qemu-img", "convert", "-q", "-O", format, "-o", options, raw, image)
    return [image]


def qcow2_snapshots(folder: Path) -> list[Path]:
    """Snapshots, a bitmap, zero clusters and discarded ones."""
    (image,) = host("qcow2", "cluster_size=4k", folder)
    run("qemu-img", "snapshot", "-c", "one", image)
    io(image, "write -P 7 1M 64k", "write -z 3M 64k", "discard 2M 64k")
    run("qemu-img", "snapshot", "-c", "two", image)
    run("qemu-img", "bitmap", "--add", "-g", "4096", image, "b0")
    io(image, "write -P 9 2M 64k")
    return [image]


def qcow2_compressed(kind: str, folder: Path) -> list[Path]:
    need("qemu-img", "qemu-utils")
    (raw,) = gpt(folder)
    image = folder / "disk.qcow2"
    run(
        "qemu-img",
        "convert",
        "-q",
        "-c",
        "-O",
        "qcow2",
        "-o",
        f"compression_type={kind},cluster_size=16k",
        raw,
        image,
    )
    return [image]


RECIPES: dict[str, Recipe] = {
    **{name: partial(ext, *how) for name, how in EXT.items()},
    "ext4-dirty": ext_dirty,
    **{name: partial(xfs, *how, False) for name, how in XFS.items()},
    "xfs-dirty": partial(xfs, *XFS["xfs"], True),
    "xfs-v4": xfs_v4,
    **{name: partial(btrfs, *how) for name, how in BTRFS.items()},
    "ntfs": partial(ntfs, 8, 4096),
    "ntfs-512": partial(ntfs, 6, 512),
    "ntfs-64k": partial(ntfs, 24, 65536),
    **{name: partial(fat, *how) for name, how in FAT.items()},
    "exfat": exfat,
    **{name: partial(iso, *how) for name, how in ISO.items()},
    "iso-zisofs": iso_zisofs,
    "iso-sessions": iso_sessions,
    **{name: partial(udf, *how) for name, how in UDF.items()},
    **{name: partial(squashfs, how) for name, how in SQUASHFS.items()},
    **{name: partial(erofs, how) for name, how in EROFS.items()},
    **{name: partial(f2fs, how) for name, how in F2FS.items()},
    "swap": swap,
    "gpt": gpt,
    "mbr": mbr,
    "apm": partial(labelled, "mac", ("p1 1MB 4MB", "p2 4MB 7MB")),
    "sgi": partial(labelled, "dvh", ("primary 4096s 8191s",)),
    "sun": sun,
    "lvm": lvm,
    "lvm-thin": thin,
    "md-raid1": partial(md, 1, 0),
    "md-raid1-end": partial(md, 1, 1),
    "md-raid5": partial(md, 5, 2),
    "luks1": partial(luks, "luks1"),
    "luks2": partial(luks, "luks2"),
    "bitlocker": bitlocker,
    **{name: partial(host, *how) for name, how in HOST.items()},
    "qcow2-snapshots": qcow2_snapshots,
    "qcow2-zlib": partial(qcow2_compressed, "zlib"),
    "qcow2-zstd": partial(qcow2_compressed, "zstd"),
}
"""By name; the part before the first hyphen is the format."""


class Left(Exception):
    """A recipe that can't be followed here; the message says why."""


def make(name: str, folder: Path) -> list[Path]:
    """The images of one recipe: NAME.img, or NAME.1.img, NAME.2.img, ... for the disks of one machine;
    nothing else is left in the folder."""
    work = folder / f".{name}"
    work.mkdir(parents=True)
    try:
        made, result = RECIPES[name](work), []
        for number, path in enumerate(made, 1):
            ending = path.suffix if path.suffix in ENDINGS.values() else ".img"
            result.append(folder / (f"{name}{ending}" if len(made) == 1 else f"{name}.{number}{ending}"))
            run("cp", "--sparse=always", path, result[-1])
        return result
    except pytest.skip.Exception as reason:
        raise Left(str(reason)) from reason
    finally:
        shutil.rmtree(work)
