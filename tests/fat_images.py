"""FAT volumes for tests, made and filled by dosfstools and mtools, and what these say of them."""

import csv
import gzip
import lzma
import os
import random
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from support import need, run

UTF8 = {"LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"}

FLAVOURS = {
    "fat12-floppy": ("-F 12 -s 1", 1440),
    "fat12-one-fat": ("-F 12 -f 1 -s 8 -r 112", 4096),
    "fat16": ("-F 16 -s 1", 6144),
    "fat16-4k-sectors": ("-F 16 -S 4096 -s 1", 40960),
    "fat16-32k-clusters": ("-F 16 -s 64", 150000),
    "fat32": ("-F 32 -s 1 -n LABEL", 40960),
    "fat32-reserved": ("-F 32 -s 1 -R 64 -b 10", 40960),
    "fat32-mbr": ("-F 32 -s 1 --mbr=yes", 40960),
    "fat32-bad": ("-F 32 -s 1", 40960),
}
"""mkfs.fat's options and KiB."""
UNFILLED = {"fat12-atari": ("-A -F 12", 720), "fat32-small": ("-F 32 -s 2", 2048)}
"""mtools read neither: Atari's boot sector, and FAT32 with fewer clusters than its specification wants, which
the kernel accepts."""


def make(folder: Path, flavour: str) -> Path:
    """An empty volume."""
    need("mkfs.fat", "dosfstools")
    options, size = (FLAVOURS | UNFILLED)[flavour]
    image = folder / f"{flavour}.img"
    bad = folder / "bad-blocks"
    bad.write_text("20000\n20001\n30000\n")  # in KiB
    extra = ["-l", str(bad)] if flavour == "fat32-bad" else []
    run("mkfs.fat", *options.split(), "-i", "1234abcd", *extra, "-C", image, str(size))
    return image


def fill(image: Path, folder: Path, seed: int = 1) -> dict[str, bytes]:
    """Files, long and short names, directories of several clusters, gaps and pieces; {path: content},
    directories with b""."""
    need("mcopy", "mtools")
    chooser = random.Random(seed)
    contents: dict[str, bytes] = {}
    run("mmd", "-i", image, "::/first", env=UTF8)
    contents["/first"] = b""
    copy(
        image,
        folder,
        contents,
        {f"first {i}.dat": chooser.randbytes(chooser.randrange(1, 3000)) for i in range(40)},
        "/first",
    )
    run("mdel", "-i", image, *(f"::/first/first {i}.dat" for i in range(0, 40, 2)), env=UTF8)
    for i in range(0, 40, 2):
        del contents[f"/first/first {i}.dat"]
    names = ["SHORT.TXT", "lower.txt", "MIXED.txt", "A longer name than eight.html", "über straße.txt",
        "日本語の名前.txt",
             "empty", "x" * 150, "dots.in.the.name", "trailing tilde~1", "x" * 13, "y" * 26]  # fmt: skip
    copy(
        image,
        folder,
        contents,
        {name: b"" if name == "empty" else chooser.randbytes(chooser.randrange(1, 40000)) for name in names},
    )
    run(
        "mmd", "-i", image, "::/a directory", "::/a directory/deeper", "::/a directory/deeper/still", env=UTF8
    )
    contents |= {"/a directory": b"", "/a directory/deeper": b"", "/a directory/deeper/still": b""}
    many = {f"one of many files in here {i}.txt": chooser.randbytes(i % 700) for i in range(60)}
    copy(image, folder, contents, many, "/a directory/deeper")
    copy(image, folder, contents, {"last.bin": chooser.randbytes(30000)}, "/a directory/deeper/still")
    return contents


def copy(
    image: Path, folder: Path, contents: dict[str, bytes], files: dict[str, bytes], where: str = ""
) -> None:
    """Put files into a directory of the volume and note them in `contents`."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    for name, data in files.items():
        (source / name).write_bytes(data)
        contents[f"{where}/{name}"] = data
    run("mcopy", "-m", "-i", image, *(source / name for name in files), f"::{where}/", env=UTF8)
    for name in files:
        (source / name).unlink()


def mshowfat(image: Path, paths: list[str]) -> dict[str, list[tuple[int, int]]]:
    """The clusters of files as mtools follow them: {path: [(first, last), ...]}; paths must be ASCII, which
    mtools print as given."""
    need("mshowfat", "mtools")
    lines = run("mshowfat", "-i", image, *(f"::{path}" for path in paths), env=UTF8).decode().splitlines()
    found = {}
    for path, line in zip(paths, lines, strict=True):
        pairs = re.findall(r"<(\d+)(?:-(\d+))?>", line.removeprefix(f"::{path}"))
        found[path] = [(int(low), int(high or low)) for low, high in pairs]
    return found


def fsck(image: Path) -> tuple[bool, str, int]:
    """(clean, words, used clusters) of fsck.fat without repairs."""
    need("fsck.fat", "dosfstools")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    done = subprocess.run(["fsck.fat", "-n", image], capture_output=True, env={**os.environ, "PATH": path})
    words = done.stdout.decode(errors="replace")
    counts = re.findall(r"(\d+)/\d+ clusters", words)
    return done.returncode == 0, words, int(counts[-1]) if counts else -1


class Fat:
    """A FAT16 or FAT32 image in memory whose FATs can be edited."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(data, np.uint8).copy()
        boot = data[:64]
        sector, reserved = int.from_bytes(boot[11:13], "little"), int.from_bytes(boot[14:16], "little")
        short = int.from_bytes(boot[22:24], "little")
        self.width = 2 if short else 4
        size = (short or int.from_bytes(boot[36:40], "little")) * sector
        self.cluster_size = sector * boot[13]
        root = int.from_bytes(boot[17:19], "little") * 32
        self.tables = [reserved * sector + i * size for i in range(boot[16])]
        self.start = self.tables[-1] + size + root

    def get(self, cluster: int) -> int:
        """What FAT 1 says of a cluster."""
        at = self.tables[0] + cluster * self.width
        return int.from_bytes(self.data[at : at + self.width].tobytes(), "little")

    def set(self, cluster: int, value: int) -> None:
        """Change the entry in all FATs."""
        for table in self.tables:
            at = table + cluster * self.width
            self.data[at : at + self.width] = np.frombuffer(value.to_bytes(self.width, "little"), np.uint8)

    def offset(self, cluster: int) -> int:
        """Where a cluster begins."""
        return self.start + (cluster - 2) * self.cluster_size


# ---- the corpus --------------------------------------------------------------------------------------------


LARGEST = 70_000_000
"""Bytes of an image that is unpacked: a few are larger, and take longer than all others together."""


def corpus_images(corpus: Path, folder: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """(name, raw image) of the corpus' images whose kind begins with a word; the file is gone when the next
    one comes."""
    image = folder / "corpus.img"
    with open(corpus / "INVENTORY.tsv", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file, delimiter="\t")
            if row["kind"].startswith(kind) or f"v{kind}" in row["kind"]
        ]
    for row in rows:
        path = corpus / row["file"]
        size = re.search(r"real=(\d+)", row["features"])
        if ".xxd" not in path.name and size and int(size[1]) > LARGEST:
            continue
        for number, data in enumerate(_unpacked(path)):
            write = undump if ".xxd" in path.name else write_sparse
            write(image, data, int(size[1]) if size and ".xxd" in path.name else len(data))
            yield f"{row['file']} {number}", image
            image.unlink()


def _unpacked(path: Path) -> list[bytes]:
    name, data = path.name, path.read_bytes()
    if name.endswith((".tgz", ".tar.xz")):
        with tarfile.open(path) as archive:
            return [
                archive.extractfile(member).read()
                for member in archive
                if member.isfile() and member.size > 60000
            ]
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(member) for member in archive.infolist() if member.file_size > 60000]
    if name.endswith((".E01", ".vhdx.gz", ".qcow2.xz")):
        return []  # containers, which `images` opens
    for ending, unpack in ((".xz", lzma.decompress), (".gz", gzip.decompress)):
        if name.endswith(ending):
            name, data = name.removesuffix(ending), unpack(data)
    return [data]


def undump(path: Path, text: bytes, size: int) -> None:
    """The opposite of `xxd -a`, into a file of `size` bytes: lines `offset: hex hex ...  text`, with zeroes
    in between."""
    with open(path, "wb") as file:
        for line in text.decode("latin-1").splitlines():
            if found := re.match(r"([0-9a-f]+): ((?:[0-9a-f]{2,4} )+)", line):
                file.seek(int(found[1], 16))
                file.write(bytes.fromhex(found[2]))
        file.truncate(size)


def write_sparse(path: Path, data: bytes, size: int) -> None:
    """A file of `size` bytes with holes where there are zeroes."""
    nothing = bytes(65536)
    with open(path, "wb") as file:
        for at in range(0, len(data), 65536):
            if (part := data[at : at + 65536]) != nothing[: len(part)]:
                file.seek(at)
                file.write(part)
        file.truncate(size)


def head(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size).ljust(size, b"\0")
