"""Image formats, around a partitioned disk."""

from functools import partial
from pathlib import Path

from host_images import io
from recipes import tables
from recipes.made import Made, Recipe
from support import need, run

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
EWF = {
    "ewf": ("encase6", "best", ".E01"),
    "ewf-stored": ("encase2", "none", ".E01"),
    "ewf-smart": ("smart", "fast", ".s01"),
}
"""By name: ewfacquire's words for the format and how hard to compress, and the ending that it gives."""
ENDINGS = {
    "qcow2": ".qcow2", "vmdk": ".vmdk", "vpc": ".vhd", "vhdx": ".vhdx", "vdi": ".vdi",
    "ewf": ".E01", "smart": ".s01",
}  # fmt: skip
"""The endings of files whose own layer is what is looked at; all others are raw disks."""


def host(format: str, options: str, folder: Path) -> Made:
    """The GPT disk above in an image format."""
    need("qemu-img", "qemu-utils")
    (raw,), trees = tables.gpt(folder)
    image = folder / f"disk{ENDINGS[format]}"
    run("qemu-img", "convert", "-q", "-O", format, "-o", options, raw, image)
    return Made([image], trees)


def qcow2_snapshots(folder: Path) -> Made:
    """Snapshots, a bitmap, zero clusters and discarded ones."""
    (image,), _ = host("qcow2", "cluster_size=4k", folder)
    run("qemu-img", "snapshot", "-c", "one", image)
    io(image, "write -P 7 1M 64k", "write -z 3M 64k", "discard 2M 64k")
    run("qemu-img", "snapshot", "-c", "two", image)
    run("qemu-img", "bitmap", "--add", "-g", "4096", image, "b0")
    io(image, "write -P 9 2M 64k")
    return Made([image])


def qcow2_compressed(kind: str, folder: Path) -> Made:
    need("qemu-img", "qemu-utils")
    (raw,), trees = tables.gpt(folder)
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
    return Made([image], trees)


def ewf(format: str, level: str, ending: str, folder: Path) -> Made:
    """The GPT disk above as a forensic program keeps it, in one segment."""
    (raw,), trees = tables.gpt(folder)
    return Made([acquired(raw, folder / "disk", format, level, ending)], trees)


def acquired(raw: Path, target: Path, format: str, level: str, ending: str, *options: str) -> Path:
    """The first segment of an Expert Witness image of a disk; `target` is its name without the ending."""
    tool = need("ewfacquire", "ewf-tools")
    run(tool, "-u", "-q", "-f", format, "-c", level, "-t", target, *options, raw)
    return target.with_name(target.name + ending)


RECIPES: dict[str, Recipe] = {
    **{name: partial(host, *how) for name, how in HOST.items()},
    **{name: partial(ewf, *how) for name, how in EWF.items()},
    "qcow2-snapshots": qcow2_snapshots,
    "qcow2-zlib": partial(qcow2_compressed, "zlib"),
    "qcow2-zstd": partial(qcow2_compressed, "zstd"),
}
