"""The direct map of disks, judged by what a kernel reads of the same disks."""

from collections.abc import Sequence

from virt_bmap.core.errors import UsageError
from virt_bmap.model import tables
from virt_bmap.observe.appliance import CallFailed
from virt_bmap.observe.judge import Agreement, Judge
from virt_bmap.observe.session import Session, Tell, mounted, observe_files, sample, session
from virt_bmap.open.disks import Disks
from virt_bmap.serve.serve import Source


def verify(
    sources: Sequence[Source], said: Disks, count: int | None, seed: int, tell: Tell
) -> tuple[list[tuple[str, Agreement]], dict[str, str]]:
    """Compare `count` files (all where it is None) of each filesystem that has a reader: (device, verdict) of
    each, and the devices left out with the reason.

    Raises UsageError where nothing can be compared, MissingTool and ImageError where no appliance can be had.
    """
    with session(sources, said, tell) as found:
        direct = set(found.bmap.filesystems.column("volume").to_pylist())
        result = []
        for target in found.targets:
            if target.volume not in direct:
                found.left[target.device] = (
                    f"{target.type} has no reader: there is no direct map to compare with"
                )
                continue
            try:
                with mounted(found, target) as (listing, observer, _):
                    judge = Judge(found.bmap, target.volume)
                    judge.verdict.type, judge.verdict.kernel = target.type, found.kernel
                    files = listing.once(tables.T_FILE)
                    judge.verdict.of = len(files)
                    judge.listed(listing)
                    chosen = sample(files, count, seed)
                    entries = {entry.inode: entry for entry in chosen}
                    for seen in observe_files(observer, target, chosen, tell):
                        judge.hear(entries[seen.inode].path, entries[seen.inode].size, seen)
            except CallFailed as error:
                found.left[target.device] = str(error)
                continue
            result.append((target.device, judge.verdict))
        if not result:
            raise UsageError(f"nothing can be compared: {_why(found)}")
        return result, found.left


def _why(found: Session) -> str:
    reasons = "; ".join(f"{device}: {why}" for device, why in found.left.items())
    return reasons or "the appliance finds no filesystem on these disks"
