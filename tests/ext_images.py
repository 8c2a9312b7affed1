"""Small ext images for tests: one tree of files, and every flavour of filesystem that mke2fs makes of it."""

import contextlib
import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from support import run


@dataclass(frozen=True)
class Flavour:
    """How to make an image: options of mke2fs, its size, and whether this kind can be mounted to ask the
    kernel."""

    name: str
    options: str
    size: str = "24M"
    mount: str = "ro,noload"
    env: dict[str, str] = field(default_factory=dict)


FLAVOURS = (
    Flavour("ext2-rev0", "-t ext2 -r 0 -O none", mount="ro"),
    Flavour("ext2-1k", "-t ext2 -b 1024", mount="ro"),
    Flavour("ext2-4k", "-t ext2 -b 4096 -O ^resize_inode", mount="ro"),
    Flavour("ext2-hurd", "-t ext2 -o hurd", mount="ro"),
    Flavour("ext3-1k", "-t ext3 -b 1024 -I 128"),
    Flavour("ext3-many-groups", "-t ext3 -b 1024 -g 1024 -O ^sparse_super,^resize_inode"),
    Flavour("ext4", "-t ext4"),
    Flavour("ext4-1k", "-t ext4 -b 1024"),
    Flavour("ext4-2k", "-t ext4 -b 2048 -I 512"),
    Flavour("ext4-4k", "-t ext4 -b 4096 -I 1024"),
    Flavour("ext4-64k", "-t ext4 -b 65536 -F", "128M", mount=""),
    Flavour("ext4-16k-pointers", "-t ext4 -b 16384 -O ^extent,^64bit,^metadata_csum -F", "64M", mount=""),
    Flavour("no-journal", "-t ext4 -O ^has_journal", mount="ro"),
    Flavour("no-flex", "-t ext4 -b 1024 -g 1024 -O ^flex_bg"),
    Flavour("small-flex", "-t ext4 -b 1024 -g 1024 -G 4"),
    Flavour("meta-bg", "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode -N 2048"),
    Flavour("meta-bg-32bit", "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^64bit,^flex_bg -N 2048"),
    Flavour("sparse-super2", "-t ext4 -b 1024 -g 1024 -O sparse_super2"),
    Flavour("no-sparse-super", "-t ext4 -b 1024 -g 1024 -O ^sparse_super,^resize_inode"),
    Flavour("uninit", "-t ext4 -b 1024 -g 1024 -O uninit_bg,^metadata_csum"),
    Flavour("no-checksums", "-t ext4 -b 1024 -g 1024 -O ^uninit_bg,^metadata_csum"),
    Flavour("lazy", "-t ext4 -b 1024 -g 1024 -E lazy_itable_init=1,lazy_journal_init=1"),
    Flavour("bigalloc", "-t ext4 -O bigalloc -C 16384"),
    Flavour("bigalloc-1k", "-t ext4 -b 1024 -O bigalloc -C 8192 -g 8192"),
    Flavour("inline", "-t ext4 -O inline_data"),
    Flavour("inline-1k-512", "-t ext4 -O inline_data -b 1024 -I 512"),
    Flavour("quota", "-t ext4 -O quota -E quotatype=usrquota:grpquota:prjquota -O project"),
    Flavour("orphan-file", "-t ext4 -O orphan_file"),
    Flavour("mmp", "-t ext4 -O mmp"),
    Flavour("ea-inode", "-t ext4 -b 1024 -O ea_inode"),
    Flavour("casefold", "-t ext4 -O casefold -E encoding=utf8"),
    Flavour("encrypt-verity", "-t ext4 -O encrypt,verity,stable_inodes"),
    Flavour("large-dir", "-t ext4 -b 1024 -O large_dir -N 3000"),
    Flavour("csum-seed", "-t ext4 -O metadata_csum_seed"),
    Flavour("reserved-gdt", "-t ext4 -b 1024 -E resize=8000000"),
    Flavour("fast-commit", "-t ext4 -O fast_commit"),
)


def fill(folder: Path, names: int = 700) -> None:
    """Files of many sizes, holes, links, odd names, and a directory large enough for a hash tree."""
    rng = random.Random(4)
    deep = folder / "a" / "b" / "c"
    deep.mkdir(parents=True)
    for size in (0, 1, 59, 60, 61, 100, 155, 156, 160, 400, 1023, 1024, 4096, 5000, 13 * 1024, 300 * 1024):
        (folder / f"size-{size}").write_bytes(rng.randbytes(size))
    with open(folder / "sparse", "wb") as file:
        for at in (0, 11, 12, 13, 267, 268, 269, 900):
            file.seek(at * 1024)
            file.write(rng.randbytes(1024))
        file.truncate(3_000_000)
    (folder / "empty").mkdir()
    (deep / "deep").write_bytes(b"deep")
    os.link(deep / "deep", folder / "a" / "hard link")
    os.symlink("x", folder / "one")
    os.symlink("a" * 59, folder / "fast")
    os.symlink("b" * 60, folder / "slow")
    os.symlink("c" * 900, folder / "long")
    os.mkfifo(folder / "fifo")
    (folder / os.fsdecode(b"not \xff UTF-8")).write_bytes(b"?")
    (folder / "new\nline").write_bytes(b"!")
    (folder / ("n" * 255)).write_bytes(b"255")
    many = folder / "many"
    many.mkdir()
    for i in range(names):
        (many / f"a name that takes some room {i:06d}").write_bytes(b"" if i % 3 else b"%d" % i)
    inline = folder / "inline directory"
    inline.mkdir()
    for name in ("x", "yy", "zzz", "a longer name"):
        (inline / name).write_bytes(name.encode() * 9)
    with contextlib.suppress(OSError):  # no user attributes on this temporary folder: one kind of block less
        for file_name in ("size-1", "size-60", "size-100"):
            os.setxattr(folder / file_name, "user.small", b"value")
        for file_name in ("size-5000", "a", "size-1024"):
            os.setxattr(folder / file_name, "user.large", b"v" * 700)


def make(folder: Path, flavour: Flavour, image: Path) -> Path:
    """An image of this flavour that holds `folder`."""
    run("truncate", "-s", flavour.size, image)
    options = flavour.options.split()
    run(
        "mke2fs",
        "-q",
        "-F",
        *options,
        "-L",
        "a label",
        "-U",
        "01234567-89ab-cdef-0123-456789abcdef",
        "-d",
        folder,
        image,
    )
    return image


def hashes(folder: Path) -> dict[str, str]:
    """Path inside the folder to SHA-256 of every regular file."""
    found = {}
    for where, _, files in os.walk(folder):
        for name in files:
            path = Path(where) / name
            if not path.is_symlink() and path.is_file():
                found["/" + str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def all_paths(folder: Path) -> set[str]:
    """Every path inside the folder, absolute from there."""
    found = {"/"}
    for where, folders, files in os.walk(folder):
        found |= {"/" + str((Path(where) / name).relative_to(folder)) for name in folders + files}
    return found
