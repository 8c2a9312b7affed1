"""What `check` asks beyond what a map needs."""

from virt_bmap.formats.common.proving import check_names, check_targets
from virt_bmap.model.contract import PROVEN, Filesystem, Proof
from virt_bmap.model.damage import Damage


def prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Names and targets; all checksums are verified whenever a volume is read."""
    check_names(found, damage)
    check_targets(found, damage)
    features = (found.features or "").split()
    with_sums = [
        what
        for feature, what in (("sb_checksum", "superblock"), ("inode_checksum", "inodes"))
        if feature in features
    ]
    return [Proof("checksums", PROVEN, ", ".join(["checkpoints", *with_sums]))]
