"""NTFS, FAT and exFAT: filled by FUSE and by mtools."""

import os
from functools import partial
from pathlib import Path

import fat_images
import ntfs_images
from recipes.made import MIB, UTF8, Made, Recipe, blank, digest, one, plain_tree, seen
from support import mounted, need, need_root, run, sync


def ntfs(size: int, cluster: int, folder: Path) -> Made:
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
        found = seen(top)
    return one(volume.image, found)


FAT = {
    "fat12": ("-F 12 -s 1", 1440),
    "fat12-4k": ("-F 12 -S 4096 -s 1", 8192),
    "fat16": ("-F 16 -s 1", 6144),
    "fat32": ("-F 32 -s 1 -n LABEL", 36864),
}


def fat(options: str, kibibytes: int, folder: Path) -> Made:
    need("mkfs.fat", "dosfstools")
    image = folder / "disk.img"
    run("mkfs.fat", *options.split(), "-C", image, str(kibibytes))
    contents = fat_images.fill(image, folder)
    folders = {path for path in contents if any(other.startswith(f"{path}/") for other in contents)}
    return one(
        image,
        {path.encode(): None if path in folders else digest(data) for path, data in contents.items()},
    )


def exfat(folder: Path) -> Made:
    need("mount.exfat-fuse", "exfat-fuse")
    need("mkfs.exfat", "exfatprogs")
    image = blank(folder / "disk.img", 6 * MIB)
    run("mkfs.exfat", "-L", "label", image, env=UTF8)
    with mounted(image, kind="exfat-fuse") as top:
        for path, size in (
            ("fifteen or less", 70),
            ("a", 0),
            ("b", 1),
            ("c", 3000),
            ("a name of more than fifteen letters", 90_000),
        ):
            (top / path).write_bytes(os.urandom(size))
        (top / "many").mkdir()
        for number in range(90):
            (top / "many" / f"one of many files {number}").write_bytes(b"%d" % number)
        with open(top / "x", "wb", buffering=0) as first, open(top / "y", "wb", buffering=0) as other:
            for _ in range(6):
                first.write(os.urandom(9000))
                other.write(os.urandom(9000))
        for path in (top / "many").glob("*7"):
            path.unlink()
        found = seen(top)
    return one(image, found)


RECIPES: dict[str, Recipe] = {
    "ntfs": partial(ntfs, 8, 4096),
    "ntfs-512": partial(ntfs, 6, 512),
    "ntfs-64k": partial(ntfs, 24, 65536),
    **{name: partial(fat, *how) for name, how in FAT.items()},
    "exfat": exfat,
}
