"""Our verdict beside that of the format's own checker, over small damages with checksums put right: what does
the checker know that `check` calls proven?

One operation a mutation, so that what was missed has one cause. A miss is no fault by itself: checkers also
count things that no owner depends on (link counts, free counts), which docs/verification.md names as never
looked at.
"""

import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from virt_bmap.ask.check import check
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import BmapError
from virt_bmap.model.contract import Asks
from virt_bmap.open import open_disks
from virt_bmap.open.disks import Opening
from virt_bmap.survey.survey import survey

from .damage import Damage
from .images import Image
from .seeds import Seed

PATIENCE = 60
"""Seconds that a checker gets for a small image."""


class Judge(NamedTuple):
    """A checker's command, to which the image is added; where its exit status says nothing, what it prints
    when all is well."""

    command: tuple[str, ...]
    well: str | None = None


JUDGES = {
    "ext": Judge(("e2fsck", "-fn")),
    "xfs": Judge(("xfs_repair", "-n", "-f", "-o", "force_geometry")),
    "btrfs": Judge(("btrfs", "check", "--readonly")),
    "fat": Judge(("fsck.fat", "-n")),
    "exfat": Judge(("fsck.exfat", "-n")),
    "f2fs": Judge(("fsck.f2fs", "--dry-run"), r"\[FSCK\] other corrupted bugs\s+\[Ok"),
    "ntfs": Judge(("ntfsfix", "-n"), "was processed successfully"),
    "qcow2": Judge(("qemu-img", "check", "-f", "qcow2")),
    "vdi": Judge(("qemu-img", "check", "-f", "vdi")),
    "vhdx": Judge(("qemu-img", "check", "-f", "vhdx")),
    "vmdk": Judge(("qemu-img", "check", "-f", "vmdk")),
    "gpt": Judge(("sgdisk", "-v"), "No problems found"),
}
"""By the beginning of a seed's name; only seeds of one disk without partitions are judged."""


class Missed(NamedTuple):
    """A damage that only the checker saw."""

    number: int
    what: str
    said: str


def judge_of(seed: Seed) -> Judge | None:
    """The checker for a seed, where it has one."""
    if len(seed.paths) != 1:
        return None
    return next((judge for name, judge in JUDGES.items() if seed.name.startswith(name)), None)


def compare(seed: Seed, work: Path, mutations: int, tell: Callable[[str], None]) -> list[Missed]:
    """Damage a seed so many times; tells one line of counts, and returns what was missed."""
    judge = judge_of(seed)
    if judge is None:
        return []
    image = Image(seed, work)
    counts: Counter[str] = Counter()
    missed = []
    try:
        if _complaint(judge, image.paths[0]) or not _proven(image):
            tell(f"{seed.name}: its own checker, or check, complains of the seed itself: not compared")
            return []
        for number in range(mutations):
            rng = random.Random(f"{seed.name}/judge/{number}")
            what = Damage(rng, image.disks, image.classes).hurt()
            image.sealer.seal()
            theirs, ours = _complaint(judge, image.paths[0]), not _proven(image)
            counts[
                {
                    (True, True): "both",
                    (False, True): "only we",
                    (True, False): "only the checker",
                    (False, False): "neither",
                }[bool(theirs), ours]
            ] += 1
            if theirs and not ours:
                missed.append(Missed(number, f"{what} ({_owner(image, what)})", theirs))
            image.restore()
    finally:
        image.close()
    tell(
        f"{seed.name}: {mutations} damages, "
        + ", ".join(f"{counts[word]} {word}" for word in ("both", "only we", "only the checker", "neither"))
    )
    return missed


def _complaint(judge: Judge, path: str) -> str:
    """What the checker says; empty where it finds nothing."""
    try:
        done = subprocess.run(
            [*judge.command, path],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return "did not end"
    said = done.stdout + done.stderr
    well = re.search(judge.well, said) is not None if judge.well else done.returncode == 0
    return "" if well else _telling(said) or f"status {done.returncode}"


def _telling(said: str) -> str:
    """The first lines that are no greeting and no heading, without their numbers."""
    lines = [line.strip() for line in said.splitlines()]
    heading = re.compile(
        r"Pass \d|Phase \d|e2fsck |fsck\.|Opening|Checking|Info:|\[\d/\d\]|UUID|- "
        r"|exfatprogs|Mounting|Processing|Reading|Warning|No modify|Cannot get host|Repair may "
        r"fail|the filesystem and the host|Only one AG|would"
    )
    lines = [line for line in lines if line and not heading.match(line)]
    return re.sub(r"\d+", "N", " / ".join(lines[:2]))[:150]


def _proven(image: Image) -> bool:
    """Does check find nothing?"""
    try:
        if image.host:
            with image.opened() as (bmap, _):
                return not check(bmap).disagreements
        with open_disks(image.paths, Opening(format="raw")) as disks:
            return not check(survey(disks, asks=Asks.PROOFS)).disagreements
    except BmapError:
        return False


def _owner(image: Image, what: str) -> str:
    """What lies at the damaged byte, by the map of the whole disk."""
    disk, at = (int(number, 0) for number in what.split()[-1].split(":"))
    image.restore()
    with image.opened() as (bmap, _):
        found = bmap.owners(disk + 1, ints(at), ints(at + 1))
        rows = [
            (int(extent), int(volume))
            for extent, volume in zip(found.extent, found.volume, strict=True)
            if extent >= 0
        ]
        if not rows:
            return "no extent"
        extent = bmap.extents.slice(rows[-1][0], 1).to_pylist()[0]
        return f"{extent['kind']} {extent['part'] or ''}+{at - extent['volume_offset']:#x}"
