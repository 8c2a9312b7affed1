"""What is written once: CD and DVD images, squashfs, EROFS."""

from functools import partial
from pathlib import Path

from recipes.made import MIB, UTF8, Made, Recipe, blank, one, plain_tree, seen, tree
from support import need, run


def iso(command: str, options: str, folder: Path) -> Made:
    source = plain_tree(folder)
    (source / "boot.img").write_bytes(bytes(4096))
    longest = 255 if "-R" in options and "-udf" not in options else 207
    for path in source.iterdir():
        if len(path.name) > longest or (path.is_symlink() and "-R" not in options):
            path.unlink()  # neither is in the format
    run(
        need(command.split()[0], command.split()[0]),
        *command.split()[1:],
        *options.split(),
        "-o",
        folder / "disk.img",
        source,
        env=UTF8,
    )
    return one(folder / "disk.img", seen(source) | ({b"/boot.cat": None} if "boot.cat" in options else {}))


ISO = {
    "iso": ("genisoimage -quiet", "-R -J -joliet-long -b boot.img -no-emul-boot -c boot.cat"),
    "iso-plain": ("genisoimage -quiet", "-iso-level 4"),
    "iso-udf": ("genisoimage -quiet", "-R -udf -allow-limited-size"),
    "iso-level-3": ("xorriso -as mkisofs -quiet", "-R -J -iso-level 3"),
}


def iso_zisofs(folder: Path) -> Made:
    """Files that are compressed one by one."""
    image = folder / "disk.img"
    source = plain_tree(folder)
    run(need("xorriso", "xorriso"), "-outdev", f"stdio:{image}", "-zisofs", "level=6", "-map", source, "/",
        "-set_filter_r", "--zisofs", "/", "--", "-commit")  # fmt: skip
    return one(image, seen(source))


def iso_sessions(folder: Path) -> Made:
    """Two sessions: the second shows the files of the first, and more. Only a CD's table of contents, which
    no image has, says that there is one."""
    (image,), trees = iso("genisoimage -quiet", "-R -J", folder)
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
    return Made([image], trees)


UDF = {
    "udf-512": ("hd", "2.01", 512),
    "udf-1024": ("hd", "1.50", 1024),
    "udf-2048": ("hd", "1.02", 2048),
    "udf-sparing": ("dvdrw", "2.01", 2048),
}


def udf_alone(folder: Path) -> Made:
    """A disc of files without its ISO 9660: these descriptors become such as nobody reads."""
    (image,), trees = iso(*ISO["iso-udf"], folder)
    image.write_bytes(image.read_bytes().replace(b"CD001\1", b"CDW02\1"))
    return Made([image], trees)


def udf(media: str, revision: str, block: int, folder: Path) -> Made:
    """An empty volume: nothing here fills one but an appliance."""
    need("mkudffs", "udftools")
    image = blank(folder / "disk.img", 4 * MIB)
    run("mkudffs", f"--media-type={media}", f"--udfrev={revision}", f"--blocksize={block}", image)
    return one(image, {})


SQUASHFS = {
    **{f"squashfs-{name}": f"-comp {name} -b 16k" for name in ("gzip", "lzma", "lzo", "lz4", "xz", "zstd")},
    "squashfs-stored": "-noI -noD -noF -noX",
    "squashfs-no-fragments": "-no-fragments -no-exports -comp gzip",
}


def squashfs(options: str, folder: Path) -> Made:
    image, source = folder / "disk.img", tree(folder)
    run(
        need("mksquashfs", "squashfs-tools"),
        source,
        image,
        "-noappend",
        "-no-progress",
        "-quiet",
        *options.split(),
    )
    return one(image, seen(source))


EROFS = {
    "erofs": "",
    "erofs-extended": "-x1 -Eforce-inode-extended",
    "erofs-lz4": "-zlz4",
    "erofs-lz4hc": "-zlz4hc -C16384",
    "erofs-fragments": "-zlz4 -Efragments,ztailpacking,dedupe",
    "erofs-legacy": "-zlz4 -Elegacy-compress",
}


def erofs(options: str, folder: Path) -> Made:
    image, source = folder / "disk.img", plain_tree(folder)
    for path in ("n" * 255, "sparse"):  # mkfs.erofs 1.5 stops at either
        (source / path).unlink()
    run(need("mkfs.erofs", "erofs-utils"), "--quiet", *options.split(), image, source)
    return one(image, seen(source))


RECIPES: dict[str, Recipe] = {
    **{name: partial(iso, *how) for name, how in ISO.items()},
    "iso-zisofs": iso_zisofs,
    "iso-sessions": iso_sessions,
    "udf-files": udf_alone,
    **{name: partial(udf, *how) for name, how in UDF.items()},
    **{name: partial(squashfs, how) for name, how in SQUASHFS.items()},
    **{name: partial(erofs, how) for name, how in EROFS.items()},
}
