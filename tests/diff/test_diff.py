"""Known changes on real filesystems are reported as what they were, through two images, an overlay and a
dirty bitmap: bytes add up, nobody else is blamed."""

import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diff_images import APPENDED, CHANGED, CREATED, DIRECTORIES, FILESYSTEMS, FILLED, Changed, make
from support import need, run
from virt_bmap.accesses.ranges import parse
from virt_bmap.diff import Answer, Question, diff
from virt_bmap.open.disks import Disks

SECTOR = 512


def overlay(made: Changed) -> Disks:
    return Disks([str(made.overlay)], references=True)


WAYS: dict[str, Callable[[Changed], Question]] = {
    "images": lambda made: Question(str(made.old), Disks([str(made.new)])),
    "image and overlay": lambda made: Question(str(made.old), overlay(made)),
    "overlay": lambda made: Question(None, overlay(made)),
    "overlay, verified": lambda made: Question(None, overlay(made), verify=True),
    "bitmap": lambda made: Question(str(made.old), overlay(made), bitmap="b0"),
    "bitmap, verified": lambda made: Question(str(made.old), overlay(made), bitmap="b0", verify=True),
    "ranges": lambda made: Question(
        str(made.old), Disks([str(made.new)]), ranges=parse(changed_blocks(made), "list")
    ),
}
EXACT = ("images", "overlay, verified", "bitmap, verified")


@pytest.fixture(scope="module", params=list(FILESYSTEMS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    for tool, package in (("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils")):
        need(tool, package)
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def answers(made: Changed) -> dict[str, Answer]:
    return {way: diff(ask(made)) for way, ask in WAYS.items()}


@functools.cache
def sectors(made: Changed) -> np.ndarray:
    """Brute force: a flag for every sector of the disk that differs."""
    flags = []
    with open(made.old, "rb") as old, open(made.new, "rb") as new:
        while block := old.read(1 << 20):
            here, there = (
                np.frombuffer(data, np.uint8).reshape(-1, SECTOR) for data in (block, new.read(1 << 20))
            )
            flags.append(
                (here != there).any(axis=1) if not np.array_equal(here, there) else np.zeros(len(here), bool)
            )
    return np.concatenate(flags)


def changed_blocks(made: Changed) -> bytes:
    """A list of changed blocks of 64 KiB, as CBT gives it."""
    blocks = sectors(made).reshape(-1, 65536 // SECTOR).any(axis=1)
    return b"offset,length\n" + b"".join(
        b"%d,65536\n" % (at * 65536) for at in np.flatnonzero(blocks).tolist()
    )


def by_path(answer: Answer) -> dict[str, dict[str, int]]:
    """Bytes by path and change, of files, directories and links."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for row in answer.rows.to_pylist():
        if row["inode"] is not None and row["kind"] in ("file", "directory", "symlink"):
            found[row["path"]][row["change"]] = row["bytes"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_add_up_to_the_delta(answers: dict[str, Answer], way: str) -> None:
    assert sum(answers[way].rows.column("bytes").to_pylist()) == answers[way].size > 0


def test_two_images_differ_in_the_sectors_that_brute_force_finds(
    made: Changed, answers: dict[str, Answer]
) -> None:
    assert answers["images"].size == int(sectors(made).sum()) * SECTOR


def test_verified_deltas_are_the_clusters_with_a_difference(
    made: Changed, answers: dict[str, Answer]
) -> None:
    for way, cluster in (("overlay, verified", 65536), ("bitmap, verified", 65536)):
        different = sectors(made).reshape(-1, cluster // SECTOR).any(axis=1)
        assert answers[way].size <= int(different.sum()) * cluster
        same = sum(row["bytes"] for row in answers[way].rows.to_pylist() if row["change"] == "unchanged")
        idle = sum(row["bytes"] for row in answers[way].rows.to_pylist() if row["change"] == "free")
        assert answers[way].size - same - idle <= answers["images"].size


@pytest.mark.parametrize("way", WAYS)
def test_each_change_is_reported_as_what_it_was(made: Changed, answers: dict[str, Answer], way: str) -> None:
    found = by_path(answers[way])
    for path, change in CHANGED.items():
        if way not in EXACT and path == "/d/touch" and "rewritten" in found[path]:
            # its time is new and it lies in a changed cluster: without reading that can't be told from
            # content written anew
            continue
        assert change in found[path], f"{path}: {found[path]}"
        # beside it at most what lies in its cluster, or moved with the block that it is inside of
        if way in EXACT:
            assert set(found[path]) - {change} <= {
                "unchanged",
                "moved",
                *({"freed"} if made.kind == "btrfs" else ()),
            }, path
    assert set(found["/d2"]) <= {"rewritten", "unchanged"}


@pytest.mark.parametrize("way", WAYS)
def test_nobody_else_is_blamed(made: Changed, answers: dict[str, Answer], way: str) -> None:
    changed = {
        *CHANGED,
        *DIRECTORIES,
        *({"/"} if made.kind == "ntfs" else ()),
    }  # there a directory's entries hold the times of what they name
    for path, changes in by_path(answers[way]).items():
        if set(changes) - {"unchanged", "moved"}:
            assert path in changed, f"{path}: {changes}"


@pytest.mark.parametrize("way", EXACT)
def test_the_bytes_of_each_change_are_those_that_were_written(
    made: Changed, answers: dict[str, Answer], way: str
) -> None:
    rows = {(row["path"], row["change"]): row for row in answers[way].rows.to_pylist()}

    def content(path: str) -> int:
        return rows[path, CHANGED[path]]["content"]

    slack = 4096 + SECTOR
    assert APPENDED <= content("/d/append") <= APPENDED + slack
    assert CREATED <= content("/d/create") <= CREATED + slack
    assert FILLED <= content("/d/holey") <= FILLED + slack
    assert FILLED <= content("/d/sparse") <= FILLED + slack
    assert content("/d/overwrite") == 16384
    assert content("/d/touch") == content("/d2/renamed") == 0
    assert rows["/d2/renamed", "renamed"]["old_path"] == "/d/rename"
    assert rows["/d/truncate", "truncated"]["size"] == 1000
    assert rows["/d/delete", "deleted"]["size"] is None
    assert rows["/d/delete", "deleted"]["old_size"] == 100_000


def walk(top: Path) -> dict[str, tuple[object, ...]]:
    """What a mount shows: for each path the facts that a change would touch."""
    found = {}
    for folder, names, files in os.walk(top):
        for name in names + files:
            path = Path(folder) / name
            about = path.lstat()
            digest = None
            if path.is_file():
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read(2 << 20)).digest()
            found["/" + str(path.relative_to(top))] = (
                about.st_size if digest else 0,
                about.st_mtime_ns,
                about.st_mode,
                about.st_ino,
                digest,
            )
    return found


def test_the_files_reported_are_those_that_two_mounts_show_to_differ(
    made: Changed, answers: dict[str, Answer]
) -> None:
    """An oracle that knows nothing of blocks: the kernel's (or ntfs-3g's) own view of both disks."""
    mount = FILESYSTEMS[made.kind][3]
    copies = [path.with_suffix(".copy") for path in (made.old, made.new)]
    trees = []
    for source, copy in zip((made.old, made.new), copies, strict=True):
        run("cp", "--sparse=always", source, copy)
        with mount(copy) as top:
            trees.append(walk(top))
        copy.unlink()
    old, new = trees
    expected = {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)} - {"/d/rename"}
    reported = {
        path
        for path, changes in by_path(answers["images"]).items()
        if set(changes) - {"moved", "unchanged"} and path != "/"
    }
    assert reported == expected


@pytest.mark.parametrize("way", WAYS)
def test_metadata_that_is_blamed_did_change(made: Changed, answers: dict[str, Answer], way: str) -> None:
    """No kind of metadata has more bytes than lie in sectors that differ, unless nobody looked."""
    if way in EXACT:
        total = sum(
            row["bytes"] for row in answers[way].rows.to_pylist() if row["change"] in ("metadata", "journal")
        )
        assert 0 < total <= int(sectors(made).sum()) * SECTOR


def test_a_delta_without_an_older_side_tells_whose_the_bytes_are(made: Changed) -> None:
    answer = diff(Question(None, overlay(made), bitmap="b0"))
    found = by_path(answer)
    assert sum(answer.rows.column("bytes").to_pylist()) == answer.size
    assert {path for path in CHANGED if found[path].get("changed")} >= {
        "/d/append",
        "/d/create",
        "/d/overwrite",
        "/d/replace",
        "/d/sparse",
        "/d/holey",
    }
    assert set(answer.rows.column("change").to_pylist()) <= {"changed", "metadata", "journal", "free"}


def test_nothing_changed_is_an_empty_result(made: Changed) -> None:
    answer = diff(Question(str(made.old), Disks([str(made.old)])))
    assert (answer.size, answer.rows.num_rows, answer.count) == (0, 0, 0)


def test_a_delta_backwards_is_as_large(made: Changed, answers: dict[str, Answer]) -> None:
    answer = diff(Question(str(made.new), Disks([str(made.old)])))
    assert answer.size == answers["images"].size == sum(answer.rows.column("bytes").to_pylist())
    found = by_path(answer)
    for path, change in (
        ("/d/append", "truncated"),
        ("/d/delete", "added"),
        ("/d/create", "deleted"),
        ("/d/truncate", "grown"),
        ("/d/rename", "renamed"),
    ):
        assert change in found[path]


def test_rows_have_the_schema(answers: dict[str, Answer]) -> None:
    from virt_bmap.diff.report import SCHEMA

    for answer in answers.values():
        assert answer.rows.schema.equals(SCHEMA)
        assert isinstance(answer.rows, pa.Table)
