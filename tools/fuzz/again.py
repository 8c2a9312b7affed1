"""One mutation again: by seed and number, or a fault that was kept; the damaged image itself; a smaller
damage with the same fault."""

import json
import tempfile
from collections.abc import Callable
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
    return (
        found["name"],
        found["number"],
        [(size, [(at, data) for at, data in patch]) for size, patch in found["patches"] or []],
    )


def again(seeds: dict[str, Seed], folder: Path) -> Outcome:
    """A kept fault's damage, and what becomes of it now; where the worker died with it, the number's."""
    name, number, patches = kept(folder)
    if not patches:
        return one(seeds, name, number)
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
        return subject.copy(out)

    return with_subject(seeds, name, write)  # type: ignore[no-any-return]


def smaller(seeds: dict[str, Seed], folder: Path) -> tuple[str, int, int]:
    """Take away from a kept fault's damage what it does not need: (the fault, bytes before, bytes after).
    Written to small.json beside it."""
    name, number, patches = kept(folder)

    def minimise(subject: Subject) -> tuple[str, int, int]:
        wanted = _with(subject, number, patches).fault
        if not wanted:
            raise SystemExit(f"fuzz: {folder}: this does not happen any more")
        best = patches
        found = True
        while found:
            found = False
            for less in subject.smaller(best):
                if _with(subject, number, less).fault == wanted:
                    best, found = less, True
                    break
        (folder / "small.json").write_text(
            json.dumps({"name": name, "number": number, "fault": wanted, "patches": best})
        )
        return wanted, _bytes(patches), _bytes(best)

    return with_subject(seeds, name, minimise)  # type: ignore[no-any-return]


def _bytes(patches: Patches) -> int:
    return sum(len(data) // 2 for _, patch in patches for _, data in patch)
