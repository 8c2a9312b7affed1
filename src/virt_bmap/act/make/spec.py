"""What is to be made, as text: TYPE[:PARAMETER]..., the types and parameters of `guestfish -N`, and three
more (md, luks, thin).

Source: guestfish(1), PREPARED DISK IMAGES (libguestfs 1.48).
"""

from collections.abc import Mapping
from typing import NamedTuple

from virt_bmap.act.make.filesystems import FILESYSTEMS
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import UsageError

TABLES = {"mbr": "dos", "msdos": "dos", "dos": "dos", "gpt": "gpt", "efi": "gpt"}
"""Partition tables, by libguestfs's names for them: sfdisk's."""
LEVELS = {"raid0": 2, "raid1": 2, "raid4": 3, "raid5": 3, "raid6": 4, "raid10": 2}
"""RAID levels, and how many members one needs at least."""
MAX_MEMBERS = 100
"""The numbers of partitions that stay readable; GPT holds 128."""
SUFFIXES = {"": 1, "b": 1, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
MAX_SIZE = 1 << 60


class Kind(NamedTuple):
    """A type: what it makes, and its parameters in order with their defaults.

    The name of a parameter says what may stand there.
    """

    about: str
    parameters: Mapping[str, str]


SIZE, PARTITION, NAME = {"size": "1G"}, {"partition": "mbr"}, {"name": "/dev/VG/LV"}
FILESYSTEM = {"filesystem": "ext2"}
BOOT = {"bootfs": "ext2", "rootfs": "ext2", **SIZE, "bootsize": "128M", **PARTITION}
KINDS = {
    "disk": Kind("a blank disk", SIZE),
    "part": Kind("a disk with one partition", SIZE | PARTITION),
    "fs": Kind("a filesystem in a partition", FILESYSTEM | SIZE | PARTITION),
    "lv": Kind("a logical volume in a partition", NAME | SIZE | PARTITION),
    "lvfs": Kind("a filesystem in a logical volume", NAME | FILESYSTEM | SIZE | PARTITION),
    "bootroot": Kind("two partitions with the filesystems of /boot and /", BOOT),
    "bootrootlv": Kind("the same, the root filesystem in a logical volume", NAME | BOOT),
    "md": Kind("a filesystem in an array of partitions",
        {"level": "raid1", **FILESYSTEM, "members": "2", **SIZE, **PARTITION}),
    "luks": Kind("a filesystem in an encrypted partition", FILESYSTEM | SIZE | PARTITION),
    "thin": Kind("a filesystem in a thin logical volume", NAME | FILESYSTEM | SIZE | PARTITION),
}  # fmt: skip


class Spec(NamedTuple):
    """A parsed SPEC: the type and all of its parameters. Sizes are bytes."""

    kind: str
    values: Mapping[str, str]

    @property
    def size(self) -> int:
        """Of the whole disk."""
        return bytes_of(self.values["size"])

    @property
    def bootsize(self) -> int:
        """Of the partition for /boot."""
        return bytes_of(self.values["bootsize"])

    @property
    def table(self) -> str:
        """sfdisk's name of the partition table."""
        return TABLES[self.values["partition"]]

    @property
    def volume(self) -> tuple[str, str]:
        """Names of the volume group and the logical volume."""
        _, _, group, name = self.values["name"].split("/")
        return group, name

    def filesystem(self, parameter: str = "filesystem") -> str:
        """The type of filesystem that a parameter asks for."""
        return self.values[parameter]


def usage(name: str) -> str:
    """How a type is written, as guestfish's manual does: fs[:filesystem[:size[:partition]]]."""
    parameters = KINDS[name].parameters
    return name + "".join(f"[:{parameter}" for parameter in parameters) + "]" * len(parameters)


def parse(text: str) -> Spec:
    """The parsed SPEC. Raises UsageError that says what may stand there."""
    name, *given = text.split(":")
    if name not in KINDS:
        raise UsageError(f"unknown SPEC {name!r}; there are: {', '.join(usage(kind) for kind in KINDS)}")
    parameters = KINDS[name].parameters
    if len(given) > len(parameters):
        raise UsageError(
            f"{text}: {name} takes at most {plural(len(parameters), 'parameter')}: {usage(name)}"
        )
    values = dict(parameters) | {
        parameter: value for parameter, value in zip(parameters, given, strict=False) if value
    }
    for parameter, value in values.items():
        if reason := _wrong(parameter, value, values):
            raise UsageError(f"{text}: {parameter} {value!r}: {reason}")
    return Spec(name, values)


def _wrong(parameter: str, value: str, values: Mapping[str, str]) -> str | None:
    """Why a parameter can't be that; None where it can."""
    if parameter == "partition" and value not in TABLES:
        return f"no partition table of this name; there are: {', '.join(TABLES)}"
    if parameter in ("filesystem", "bootfs", "rootfs") and value not in FILESYSTEMS:
        return f"no filesystem of this name can be made; there are: {', '.join(FILESYSTEMS)}"
    if parameter == "level" and value not in LEVELS:
        return f"no RAID level of this name; there are: {', '.join(LEVELS)}"
    if parameter == "members":
        least = LEVELS.get(values["level"], 2)
        if not value.isascii() or not value.isdigit() or not least <= int(value[:4]) <= MAX_MEMBERS:
            return f"{values['level']} is made of {least} to {MAX_MEMBERS} partitions"
    if parameter == "name":
        return _wrong_name(value)
    if parameter in ("size", "bootsize"):
        try:
            bytes_of(value)
        except UsageError as error:
            return str(error)
    return None


def _wrong_name(value: str) -> str | None:
    """Names of LVM: letters, digits and + _ . -, and no hyphen first (lvm(8))."""
    parts = value.split("/")
    good = len(parts) == 4 and parts[:2] == ["", "dev"] and all(
        part not in ("", ".", "..") and part[0] != "-" and len(part) < 128
        and all(letter.isascii() and (letter.isalnum() or letter in "+_.-") for letter in part)
        for part in parts[2:]
    )  # fmt: skip
    return (
        None
        if good
        else "a logical volume is named /dev/VG/LV, with letters, digits and + _ . - in the two names"
    )


def bytes_of(text: str) -> int:
    """A size: decimal, in bytes or with k, M, G, T, P (of 1024) or s (sectors) after it.

    Raises UsageError.
    """
    number = text.lower().rstrip("bskmgtpi")
    unit = text.lower()[len(number) :]
    unit = unit.removesuffix("ib") if len(unit) == 3 else unit[:1] if unit[1:] == "b" else unit
    if not number.isascii() or not number.isdigit() or unit not in SUFFIXES or len(number) > 18:
        raise UsageError(
            "is not a size: give a number of bytes, or with k, M, G, T, P or s (sectors) after it"
        )
    size = int(number) * SUFFIXES[unit]
    if not 0 < size <= MAX_SIZE:
        raise UsageError(f"is not a size between 1 byte and {MAX_SIZE:,}")
    return size
