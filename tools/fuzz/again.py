"""One mutation again: by seed and number, or a fault that was kept; the damaged image itself; a smaller damage with the same fault."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .disk import Patch, scratch
from .seeds import Seed
from .worker import Outcome, Subject, attempt, judge, prepare, subjects

Patches = list[tuple[int, Patch]]


def with_subject(seeds: dict[str, Seed], name: str, act: Callable[[Subject], Any]) -> Any:
    """Call `act` with the subject of this name, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="virt-bmap-fuzz-", dir=scratch()) as work:
        prepare()
        makers = subjects(seeds, Path(work))
        if name not in makers:
            raise SystemExit(f"fuzz: no seed {name!r}; there are: {', '.join(makers)}")
        subject = makers[name]()
        try:
            return act(subject)
        finally:
            subject.close()


def one(seeds: dict[str, Seed], name: str, number: int) -> Outcome:
    """The mutation with this number."""
    return with_subject(seeds, name, lambda subject: attempt(subject, number))  # type: ignore[no-any-return]


def kept(folder: Path) -> tuple[str, int, Patches]:
    """(seed, number, damage) of a fault that a campaign kept; the smaller damage where there is one."""
    path = folder / "small.json" if (folder / "small.json").exists() else folder / "fault.json"
    found = json.loads(path.read_text())
    return found["name"], found["number"], [(size, [(at, data) for at, data in patch]) for size, patch in found["patches"] or []]


def again(seeds: dict[str, Seed], folder: Path) -> Outcome:
    """A kept fault's damage, and what becomes of it now."""
    name, number, patches = kept(folder)
    return with_subject(seeds, name, lambda subject: _with(subject, number, patches))  # type: ignore[no-any-return]


def _with(subject: Subject, number: int, patches: Patches) -> Outcome:
    try:
        subject.apply(patches)
        return judge(subject, number, ["patched"], [])
    finally:
        subject.restore()


def image(seeds: dict[str, Seed], folder: Path, out: Path) -> list[Path]:
    """The damaged files themselves: OUT, or OUT.1, OUT.2, ... for several disks."""
    name, _, patches = kept(folder)

    def write(subject: Subject) -> list[Path]:
        subject.apply(patches)
        paths = [disk.path for disk in subject.disks] if hasattr(subject, "disks") else []
        result = [out if len(paths) == 1 else out.with_name(f"{out.name}.{number}") for number in range(1, len(paths) + 1)]
        for path, target in zip(paths, result, strict=True):
            shutil.copyfile(path, target) if path.stat().st_size < 1 << 30 else _sparse(path, target)
        if not paths:
            out.write_bytes(bytes.fromhex(patches[0][1][0][1]))
        return result or [out]

    return with_subject(seeds, name, write)  # type: ignore[no-any-return]


def _sparse(path: Path, target: Path) -> None:
    import subprocess

    subprocess.run(["cp", "--sparse=always", path, target], check=True)


def smaller(seeds: dict[str, Seed], folder: Path) -> tuple[str, int, int]:
    """Take away from a kept fault's damage what it does not need: (the fault, bytes before, bytes after). Written to small.json beside it."""
    name, number, patches = kept(folder)

    def minimise(subject: Subject) -> tuple[str, int, int]:
        wanted = _with(subject, number, patches).fault
        if not wanted:
            raise SystemExit(f"fuzz: {folder}: this does not happen any more")
        best = patches
        found = True
        while found:
            found = False
            for less in _less(best, [disk._whole for disk in subject.disks] if hasattr(subject, "disks") else None):
                if _with(subject, number, less).fault == wanted:
                    best, found = less, True
                    break
        (folder / "small.json").write_text(json.dumps({"name": name, "number": number, "fault": wanted, "patches": best}))
        return wanted, _bytes(patches), _bytes(best)

    return with_subject(seeds, name, minimise)  # type: ignore[no-any-return]


def _bytes(patches: Patches) -> int:
    return sum(len(data) // 2 for _, patch in patches for _, data in patch)


def _less(patches: Patches, sizes: list[int] | None) -> Iterator[Patches]:
    """Smaller damages to try: the size as it was, a half of the pieces, one piece less, half of one piece."""
    if sizes is None:
        return
    for disk, (size, patch) in enumerate(patches):

        def instead(size: int, patch: Patch, disk: int = disk) -> Patches:
            return [*patches[:disk], (size, patch), *patches[disk + 1 :]]

        if size != sizes[disk]:
            yield instead(sizes[disk], patch)
        if len(patch) > 3:
            yield instead(size, patch[: len(patch) // 2])
            yield instead(size, patch[len(patch) // 2 :])
        for row in range(len(patch)):
            yield instead(size, patch[:row] + patch[row + 1 :])
        for row, (at, data) in enumerate(patch):
            half = len(data) // 4 * 2
            if half:
                yield instead(size, [*patch[:row], (at, data[:half]), *patch[row + 1 :]])
                yield instead(size, [*patch[:row], (at + half // 2, data[half:]), *patch[row + 1 :]])
