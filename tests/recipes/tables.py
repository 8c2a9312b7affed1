"""Partition tables."""

from functools import partial
from pathlib import Path

from recipes import linux, windows
from recipes.made import MIB, Made, Recipe, Tree, blank, put
from support import need, run


def small_ext(folder: Path) -> tuple[bytes, Tree]:
    """An ext4 of 4 MiB, to lie in something, and what is in it."""
    inside = folder / "inside"
    inside.mkdir()
    (made,), trees = linux.ext(*linux.EXT["ext4"], inside)
    return made.read_bytes(), trees["/dev/sda"]


def gpt(folder: Path) -> Made:
    """An ext4 at 1 MiB, and two empty partitions."""
    image = blank(folder / "table.img", 12 * MIB)
    script = b'label: gpt\nsize=4M,name="first"\nsize=2M\n,\n'
    run(need("sfdisk", "fdisk"), "-q", "--no-tell-kernel", image, stdin=script)
    data, tree = small_ext(folder)
    put(image, MIB, data)
    return Made([image], {"/dev/sda1": tree})


def mbr(folder: Path) -> Made:
    """Primary and logical partitions; a FAT in the first."""
    image = blank(folder / "table.img", 12 * MIB)
    script = b"label: dos\nsize=2M,type=1\nsize=2M,type=83\n,,E\nsize=1M,type=83\nsize=2M,type=82\n,,83\n"
    run(need("sfdisk", "fdisk"), "-q", "--no-tell-kernel", image, stdin=script)
    (inner,), trees = windows.fat(*windows.FAT["fat12"], folder)
    put(image, MIB, inner.read_bytes())
    return Made([image], {"/dev/sda1": trees["/dev/sda"]})


def labelled(label: str, first: int, device: str, folder: Path) -> Made:
    """A label of another machine, by parted, with two partitions; a FAT in the first, at this sector."""
    image = blank(folder / "table.img", 12 * MIB)
    parts = f"mkpart primary {first}s {first + 4095}s mkpart primary {first + 4096}s {first + 8191}s".split()
    run(need("parted", "parted"), "-s", image, "mklabel", label, *parts)
    (inner,), trees = windows.fat(*windows.FAT["fat12"], folder)
    put(image, first * 512, inner.read_bytes())
    return Made([image], {device: trees["/dev/sda"]})


def sun(folder: Path) -> Made:
    """By sfdisk, which says where it put the second partition; a FAT there."""
    image, tool = blank(folder / "table.img", 24 * MIB), need("sfdisk", "fdisk")
    script = b"label: sun\nstart=0,size=8192\nstart=16065,size=16065\n"
    run(tool, "-q", "--no-tell-kernel", image, stdin=script, ok=(0, 1))
    (inner,), trees = windows.fat(*windows.FAT["fat12"], folder)
    put(image, 16065 * 512, inner.read_bytes())
    return Made([image], {"/dev/sda2": trees["/dev/sda"]})


RECIPES: dict[str, Recipe] = {
    "gpt": gpt,
    "mbr": mbr,
    "apm": partial(labelled, "mac", 2048, "/dev/sda2"),
    "sgi": partial(labelled, "dvh", 4096, "/dev/sda1"),
    "sun": sun,
}
