"""ext, XFS, btrfs, F2FS and swap: filled by their makers, or by this kernel."""

import os
import subprocess
from functools import partial
from pathlib import Path

import btrfs_images
import ext_images
import minix_images
import xfs_images
from recipes.made import MIB, Made, Recipe, blank, copy, digest, one, plain_tree, seen, tree
from support import mounted, need, run, sync


def ext(options: str, size: str, folder: Path) -> Made:
    need("mke2fs", "e2fsprogs")
    source = tree(folder)
    image = ext_images.make(source, ext_images.Flavour("", options, size), folder / "disk.img")
    found = seen(source) | {b"/lost+found": None}
    if "inline_data" in options:
        found[b"/sparse"] = None  # mke2fs 1.47.0 itself writes sparse files wrongly then
    return one(image, found)


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


def ext_dirty(folder: Path) -> Made:
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
        return one(copy(image))


XFS = {
    "xfs": (16, "-m rmapbt=1,reflink=1 -i size=512"),
    "xfs-1k": (24, "-b size=1024 -n size=4096 -m rmapbt=1,reflink=1"),
    "xfs-nrext64": (24, "-i nrext64=1 -m bigtime=1"),
}
"""MiB, and mkfs.xfs' options."""
XFS_V4 = "-m crc=0,finobt=0,rmapbt=0,reflink=0 -n ftype=0"
SMALL_XFS = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
"""What lets mkfs.xfs make less than 300 MiB: the environment of its own test suite."""


def xfs(size: int, options: str, dirty: bool, folder: Path) -> Made:
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
        found = seen(top)
        if dirty:
            xfs_images.shut_down(top)
    return one(image, None if dirty else found)


def xfs_v4(folder: Path) -> Made:
    """The format before 2013, which new kernels no longer mount: filled by mkfs.xfs itself, from a prototype
    file."""
    need("mkfs.xfs", "xfsprogs")
    source, image = tree(folder), blank(folder / "disk.img", 16 * MIB)
    sizes = sorted(source.glob("size-*"))
    files = [f"{path.name} ---644 0 0 {path}" for path in sizes]
    many = [f"name-of-some-length-{number}" for number in range(120)]
    names = [f"{name} ---644 0 0 {source / 'size-1'}" for name in many]
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
    found = {f"/{path.name}".encode(): digest(path.read_bytes()) for path in sizes}
    found |= {f"/many/{name}".encode(): digest((source / "size-1").read_bytes()) for name in many}
    return one(image, found | dict.fromkeys([b"/link", b"/many", b"/pipe"]))


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
head -c 50000 /dev/urandom > gone; sync -f .; rm gone; sync -f .
echo late > late; sync late
"""


def btrfs(size: str, options: str, count: int, folder: Path) -> Made:
    """Copied while it is mounted, so that its log tree is there, and long before the next commit."""
    images = btrfs_images.make(folder, size, options, count)
    with btrfs_images.mounted_pool(images, folder / "top", "noatime,commit=300") as top:
        btrfs_images.fill(top, FILL_BTRFS)
        while True:
            before = [generation(image) for image in images]
            copies = [copy(image) for image in images]
            if len({*before, *map(generation, images)}) == 1:  # else it was committed meanwhile
                return Made(copies, {"/dev/sda": seen(top)})


def generation(image: Path) -> bytes:
    """The last transaction of a btrfs device, by its superblock."""
    with open(image, "rb") as file:
        file.seek(0x10048)
        return file.read(8)


F2FS = {
    "f2fs": "-O "
    "extra_attr,inode_checksum,sb_checksum,compression,flexible_inline_xattr,inode_crtime,lost_found",
    "f2fs-plain": "",
}


def f2fs(options: str, folder: Path) -> Made:
    need("mkfs.f2fs", "f2fs-tools")
    source, image = plain_tree(folder), blank(folder / "disk.img", 128 * MIB)
    run("mkfs.f2fs", "-q", "-f", *options.split(), image)
    run("sload.f2fs", "-f", source, image, ok=(0, 1))  # 1: an attribute that it does not know how to keep
    return one(image, seen(source) | ({b"/lost+found": None} if "lost_found" in options else {}))


def minix(version: str, folder: Path) -> Made:
    """By hand: see minix_images. Names are as long as they may be in the oldest version."""
    source = plain_tree(folder)
    for path in [*source.rglob("*")]:
        if len(path.name) > 14:
            path.rename(path.with_name(f"{path.name[:7]}{path.name[-7:]}"))
    return one(minix_images.make(folder / "disk.img", version, source), seen(source))


def swap(folder: Path) -> Made:
    image = blank(folder / "disk.img", MIB)
    run(need("mkswap", "util-linux"), "-L", "a label", image)
    return one(image)


RECIPES: dict[str, Recipe] = {
    **{name: partial(ext, *how) for name, how in EXT.items()},
    "ext4-dirty": ext_dirty,
    **{name: partial(xfs, *how, False) for name, how in XFS.items()},
    "xfs-dirty": partial(xfs, *XFS["xfs"], True),
    "xfs-v4": xfs_v4,
    **{name: partial(btrfs, *how) for name, how in BTRFS.items()},
    **{name: partial(f2fs, how) for name, how in F2FS.items()},
    **{f"minix-{version}": partial(minix, version) for version in minix_images.VERSIONS},
    "swap": swap,
}
