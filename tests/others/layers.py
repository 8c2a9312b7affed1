"""What lies below filesystems as programs of other projects see it: the disk in an image, as one SHA-256, and
the partitions of a table, as places."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from others.readers import DFVFS, Refused, run

Places = set[tuple[int, int]]
"""(first byte, bytes)."""
SECONDS = 600


class ImageReader(NamedTuple):
    name: str
    program: str
    write: Callable[[Path, Path], None]
    """The disk in an image to a file."""


class TableReader(NamedTuple):
    name: str
    program: str
    read: Callable[[Path], Places]


# ---- images ------------------------------------------------------------------------------------------------

LIBYAL = """
import importlib, sys
name, image, target = sys.argv[1:]
module = importlib.import_module(name)
disk = (module.file if hasattr(module, "file") else module.handle)()
disk.open(module.glob(image) if name == "pyewf" else image)
if name == "pyvmdk":
    disk.open_extent_data_files()
with open(target, "wb") as out:
    left = disk.get_media_size()
    while left:
        piece = disk.read_buffer(min(left, 1 << 20))
        left -= len(piece)
        out.seek(len(piece), 1) if not piece.strip(bytes(1)) else out.write(piece)
    out.truncate()
"""


def _qemu(format: str) -> ImageReader:
    def write(image: Path, target: Path) -> None:
        run("qemu-img", "convert", "-f", format, "-O", "raw", image, target)

    return ImageReader("QEMU", "qemu-img", write)


def _seven(kind: str) -> ImageReader:
    def write(image: Path, target: Path) -> None:
        folder = target.with_suffix(".7z")
        run("7zz", "x", "-y", f"-t{kind}", f"-o{folder}", image)
        found = [one for one in folder.rglob("*") if one.is_file()]
        if len(found) != 1:
            raise Refused("sees files in it")
        found[0].rename(target)

    return ImageReader("7-Zip", "7zz", write)


def _img_cat(image: Path, target: Path) -> None:
    target.write_bytes(run("img_cat", "-i", "ewf", image))


def _libyal(module: str) -> ImageReader:
    def write(image: Path, target: Path) -> None:
        run(os.environ[DFVFS], "-c", LIBYAL, module, image, target)

    return ImageReader(f"libyal ({module})", os.environ.get(DFVFS, "-"), write)


IMAGES: dict[str, tuple[ImageReader, ...]] = {
    "qcow2": (_qemu("qcow2"), _seven("QCOW"), _libyal("pyqcow")),
    "vmdk": (_qemu("vmdk"), _seven("VMDK"), _libyal("pyvmdk")),
    "vpc": (_qemu("vpc"), _seven("VHD"), _libyal("pyvhdi")),
    "vhdx": (_qemu("vhdx"), _seven("VHDX"), _libyal("pyvhdi")),
    "vdi": (_qemu("vdi"), _seven("VDI")),
    "dmg": (_seven("Dmg"), _libyal("pymodi")),
    "ewf": (ImageReader("The Sleuth Kit", "img_cat", _img_cat), _libyal("pyewf")),
}
"""QEMU is no reader of its own where it is what opens the image for us."""


# ---- tables of partitions ----------------------------------------------------------------------------------


def _sfdisk(disk: Path) -> Places:
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    sector = table.get("sectorsize", 512)
    return {
        (row["start"] * sector, row["size"] * sector)
        for row in table.get("partitions", [])
        if row["type"] not in ("5", "f", "85")
    }


MMLS = re.compile(rb"\d+:  [\d:]+ +(\d+)   (\d+)   (\d+)   (.*)")
"""A line of mmls with a slot of the table: first, last, sectors, what it is."""
UNITS = re.compile(rb"Units are in (\d+)-byte sectors")


def _mmls(kind: str) -> Callable[[Path], Places]:
    def read(disk: Path) -> Places:
        said = run("mmls", "-t", kind, disk)
        unit = UNITS.search(said)
        if not unit:
            raise Refused("no units")
        lines = (MMLS.fullmatch(line) for line in said.split(b"\n"))
        return {(int(line[1]) * int(unit[1]), int(line[3]) * int(unit[1])) for line in lines if line}

    return read


SFDISK = TableReader("sfdisk", "sfdisk", _sfdisk)
TABLES: dict[str, tuple[TableReader, ...]] = {
    "dos": (SFDISK, TableReader("The Sleuth Kit", "mmls", _mmls("dos"))),
    "gpt": (SFDISK, TableReader("The Sleuth Kit", "mmls", _mmls("gpt"))),
    "mac": (TableReader("The Sleuth Kit", "mmls", _mmls("mac")),),
    "sun": (SFDISK, TableReader("The Sleuth Kit", "mmls", _mmls("sun"))),
    "sgi": (SFDISK,),
}


# ---- arrays, groups, encryption ----------------------------------------------------------------------------


class DiskSet(NamedTuple):
    """Disks that belong together, as the corpus has them, and what opens them (published with them)."""

    type: str
    kind: str
    """A key of `appliance_reader.OPEN`."""
    files: tuple[str, ...]
    secret: str = ""


MD = {"md-90-raid1": 2, "md-linear": 2, "md-raid1": 2, "md-raid10": 2, "md-raid5": 3}
VOLUME = "images/fox-it+dissect.volume/tests/_data"
FVE = "images/fox-it+dissect.fve/tests/_data"
BITLOCKER = ("aes_128", "aes_256", "aes_128_diffuser", "aes_256_diffuser")
RECOVERY = "284867-596541-514998-422114-660297-261613-215424-199408"
SETS = (
    *(
        DiskSet(
            "linux_raid_member", "md", tuple(f"{VOLUME}/md/{name}-{at + 1}.bin.gz" for at in range(count))
        )
        for name, count in MD.items()
    ),
    DiskSet("LVM2_member", "lv", (f"{VOLUME}/lvm/lvm.bin.gz",)),
    DiskSet("LVM2_member", "lv", (f"{VOLUME}/lvm/lvm-thin.bin.gz",)),
    DiskSet("crypto_LUKS", "crypt", (f"{FVE}/luks1/sha1.bin.gz",), "password"),
    DiskSet("crypto_LUKS", "crypt", (f"{FVE}/luks2/aes-cbc-plain.bin.gz",), "password"),
    DiskSet("crypto_LUKS", "crypt", (f"{FVE}/luks2/aes-ecb.bin.gz",), "password"),
    DiskSet("crypto_LUKS", "crypt", ("images/mbroz+cryptsetup/tests/compatv10image.img.xz",), "compatkey"),
    *(DiskSet("BitLocker", "bitlk", (f"{FVE}/bde/{name}.bin.gz",), "password12!@") for name in BITLOCKER),
    DiskSet("BitLocker", "bitlk", (f"{FVE}/bde/recovery_password.bin.gz",), RECOVERY),
)
