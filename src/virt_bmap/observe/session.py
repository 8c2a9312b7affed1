"""One appliance over the disks of one machine: the map of what it shows, or a judgement of the direct map."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import union
from virt_bmap.core.errors import BmapError, UsageError
from virt_bmap.core.reader import Reader
from virt_bmap.host.leftovers import private_folder
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.observe import build, engine
from virt_bmap.observe.appliance import Appliance, CallFailed, launched
from virt_bmap.observe.climb import climb
from virt_bmap.observe.disks import ServedDisks, watched
from virt_bmap.observe.engine import Observed, ObservedVolume, Observer
from virt_bmap.observe.files import ListedName, Listing, listed
from virt_bmap.observe.journal import Journal
from virt_bmap.open.disks import NOTHING, Disks
from virt_bmap.serve.serve import Source
from virt_bmap.survey.maps import opened

DIRECTORY_BATCH = 256
"""Directories whose blocks are read between two times of forgetting what was read."""
Tell = Callable[[str, int, int], None]
"""Called with what is being done, and how many bytes of how many are."""


class Session(NamedTuple):
    """A running appliance, the map of the disks as it is read directly, and a reader for each volume."""

    appliance: Appliance
    disks: ServedDisks
    bmap: BlockMap
    readers: list[Reader]
    folder: str
    kernel: str
    targets: list[ObservedVolume]
    left: dict[str, str]
    """Devices with filesystems that can't be observed, and why."""


@contextlib.contextmanager
def session(sources: Sequence[Source], said: Disks, tell: Tell = lambda *_: None) -> Iterator[Session]:
    """Serve the disks, of which this is said, and launch an appliance over them, until the block ends.

    Raises MissingTool, and ImageError where it does not start.
    """
    with contextlib.ExitStack() as stack:
        disks = stack.enter_context(watched(sources))
        # what the appliance writes when it recovers a journal is in these readers, too
        bmap, volumes = stack.enter_context(opened(replace(said, images=disks.uris, nested=NOTHING)))
        disks.appliance_comes()
        folder = stack.enter_context(private_folder())
        tell("launching the appliance", 0, 0)
        appliance = stack.enter_context(launched(disks.sockets, folder))
        engine.quiet(appliance)  # before anything is opened: an open device keeps its readahead
        kernel = appliance.call("utsname")
        targets, left = engine.targets(appliance, bmap, volumes)
        yield Session(
            appliance,
            disks,
            bmap,
            volumes,
            folder,
            f"{kernel['uts_sysname']} {kernel['uts_release']}",
            targets,
            left,
        )


@contextlib.contextmanager
def mounted(session: Session, target: ObservedVolume) -> Iterator[tuple[Listing, Observer, build.Ranges]]:
    """Mount a filesystem, and list it: its files, what observes them, and what of the volume was read until
    then. Raises CallFailed."""
    session.disks.since()
    session.appliance.call("mount_options", target.options, target.device, "/")
    try:
        engine.quiet(session.appliance)
        listing = listed(session.appliance, session.folder)
        observer = Observer(session.appliance, session.disks, session.bmap, target)
        yield listing, observer, union(*climb(session.bmap, target.volume, session.disks.since()))
    finally:
        # an appliance that died has unmounted, too; why it died is said elsewhere
        with contextlib.suppress(BmapError):
            session.appliance.call("umount_all")


def observed_map(session: Session, journal: Journal, tell: Tell = lambda *_: None) -> BlockMap:
    """Observe every filesystem that the appliance can mount; what the journal holds is not read again."""
    if not session.targets:
        raise UsageError(
            f"the appliance finds no filesystem that can be observed on these disks{_reasons(session)}"
        )
    seen = []
    for target in session.targets:
        try:
            with mounted(session, target) as (listing, observer, touched):
                seen.append(_observe(session, target, listing, observer, touched, journal, tell))
        except CallFailed as error:
            session.left[target.device] = str(error)
    if not seen:
        raise UsageError(f"the appliance can mount none of the filesystems on these disks{_reasons(session)}")
    return build.block_map(session.bmap, seen)


def _reasons(session: Session) -> str:
    return "".join(f"; {device}: {why}" for device, why in session.left.items())


def _observe(
    session: Session,
    target: ObservedVolume,
    listing: Listing,
    observer: Observer,
    touched: build.Ranges,
    journal: Journal,
    tell: Tell,
) -> build.ObservedFilesystem:
    files = listing.once(tables.T_FILE)
    known = {
        entry.inode: journal.seen[target.device, entry.inode]
        for entry in files
        if (target.device, entry.inode) in journal.seen
    }
    for seen in observe_files(observer, target, [entry for entry in files if entry.inode not in known], tell):
        journal.add(target.device, seen)
        known[seen.inode] = seen
    directories = list(_directories(session, observer, listing))
    call = session.appliance.call
    return build.ObservedFilesystem(
        target.volume, target.device, call("vfs_type", target.device),
        call("vfs_uuid", target.device) or None, call("vfs_label", target.device) or None,
        call("statvfs", "/")["bsize"], session.kernel, listing, [known[entry.inode] for entry in files],
        directories, touched,
    )  # fmt: skip


def observe_files(
    observer: Observer, target: ObservedVolume, files: Sequence[ListedName], tell: Tell
) -> Iterator[Observed]:
    """Observe files, and tell how far it is: in bytes, each file for a page more than it has."""
    cost = {entry.inode: entry.size + engine.PAGE for entry in files}
    total, done = sum(cost.values()), 0
    for seen in observer.files(files):
        done += cost[seen.inode]
        tell(f"reading files of {target.device}", done, total)
        yield seen


def _directories(
    session: Session, observer: Observer, listing: Listing
) -> Iterator[tuple[int, build.Ranges]]:
    """What listing each directory reads, once its inode is in memory: its own blocks, on filesystems that
    keep them in the page cache."""
    entries = listing.once(tables.T_DIRECTORY)
    for low in range(0, len(entries), DIRECTORY_BATCH):
        observer.drop_caches()
        for entry in entries[low : low + DIRECTORY_BATCH]:
            try:
                ranges = observer.during("ls", entry.path)
            except CallFailed:
                continue
            yield entry.inode, union(*ranges)


def sample(entries: Sequence[ListedName], count: int | None, seed: int = 0) -> list[ListedName]:
    """`count` of the files, the same ones for the same seed, in their order; all where there are no more, or
    count is None."""
    if count is None or count >= len(entries):
        return list(entries)
    chosen = np.sort(np.random.default_rng(seed).choice(len(entries), count, replace=False))
    return [entries[at] for at in chosen.tolist()]
