"""Ended at any moment, by any signal: nothing half-written under a final name, and nothing left behind but
after SIGKILL, what the next run removes.

A few moments of each command here; BMAP_MOMENTS=20 asks for more of them.
"""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from support import mounted, need, need_root, run
from virt_bmap.act.freeze.mounts import FITHAW

PROGRAM = [sys.executable, "-m", "virt_bmap"]
MOMENTS = int(os.environ.get("BMAP_MOMENTS", "1"))
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
PATIENCE = 30
MIB = 1 << 20


@dataclass
class Case:
    """A command, run in a folder of its own; `outputs` are the names that it makes there, `changes` what it
    may change, which `sound` looks at."""

    arguments: list[object]
    outputs: list[str] = field(default_factory=list)
    changes: list[Path] = field(default_factory=list)
    sound: Callable[[], None] = lambda: None
    random: bool = False
    """Two whole outputs differ: UUIDs, times."""
    stdin: Path | None = None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A disk of 64 MiB with ext4 in a partition and 300 files, the same as qcow2, an older state of it, a
    map, traces, a profile, a log."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk"), need("qemu-img", "qemu-utils")
    folder = tmp_path_factory.mktemp("files")
    tree = folder / "tree"
    for number in range(300):
        (tree / f"{number % 20}").mkdir(parents=True, exist_ok=True)
        (tree / f"{number % 20}/{number}").write_bytes(random.Random(number).randbytes(20_000))
    made = {"tree": tree, "folder": folder}
    old, disk = made["old"], made["disk"] = folder / "old.img", folder / "disk.img"
    old.write_bytes(bytes(64 * MIB))
    run("sfdisk", "-q", "--no-tell-kernel", old, stdin=b"label: gpt\nstart=2048, size=120000\n")
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={MIB}", old, "50M")
    data = bytearray(old.read_bytes())
    data[50 * MIB : 51 * MIB] = b"x" * MIB  # free blocks that are not empty
    disk.write_bytes(data)
    made["qcow2"], made["map"] = folder / "disk.qcow2", folder / "disk.parquet"
    run("qemu-img", "convert", "-O", "qcow2", made["disk"], made["qcow2"])
    run(*PROGRAM, "-q", "-o", made["map"], made["disk"])
    made["log"] = folder / "fio.log"
    made["log"].write_text(
        "fio version 2 iolog\nf add\nf open\n"
        + "".join(f"f read {4096 * (n * 7 % 12000)} 4096\n" for n in range(20_000))
    )
    made["trace"], made["profile"] = folder / "trace.parquet", folder / "profile.parquet"
    run(*PROGRAM, "trace", "import", made["log"], "-o", made["trace"], "--map", made["map"])
    run(*PROGRAM, "profile", made["trace"], "-o", made["profile"])
    return made


def cases(files: dict[str, Path], folder: Path) -> dict[str, Case]:
    """All commands that write, and some that hold something meanwhile."""
    disk, qcow2, saved = files["disk"], files["qcow2"], files["map"]
    copy, qcopy = folder.parent / "copy.img", folder.parent / "copy.qcow2"
    made = {
        "map": Case(["-o", "out", disk], ["out"]),
        "map-parquet": Case(["-o", "out.parquet", qcow2], ["out.parquet"], random=True),
        "lookup": Case(["lookup", disk, "0+32M", "-o", "out.csv"], ["out.csv"]),
        "ranges": Case(["lookup", disk, "--ranges", files["log"], "-o", "out.jsonl"], ["out.jsonl"]),
        "locate": Case(["locate", disk, "/dev/sda1", "/1/21", "-o", "out.csv"], ["out.csv"]),
        "info": Case(["info", disk, "-o", "out.parquet"], ["out.parquet"]),
        "sql": Case(["sql", "select * from extents", saved, "-o", "out.parquet"], ["out.parquet"]),
        "diff": Case(["diff", files["old"], disk, "-o", "out.csv"], ["out.csv"]),
        "trace": Case(
            ["trace", "import", files["log"], "-o", "out.parquet", "--map", saved], ["out.parquet"]
        ),
        "profile": Case(["profile", files["trace"], "-o", "out.profile", "--map", saved], ["out.profile"]),
        "report": Case(["report", saved, "-o", "out.html"], ["out.html"]),
        "dump": Case(["dump", disk, "/dev/sda1", "out.img"], ["out.img"]),
        "dump-qcow2": Case(["dump", "--skip-free", qcow2, "/dev/sda", "out.img"], ["out.img"]),
        "extract": Case(["extract", disk, "/dev/sda1", "/3", "/4"], ["3", "4"]),
        "sparsify": Case(["sparsify", qcow2, "out.img", "--convert", "raw"], ["out.img"]),
        "sparsify-qcow2": Case(["sparsify", qcow2, "out.qcow2"], ["out.qcow2"], random=True),
        "in-place": Case(
            ["sparsify", "--in-place", copy], changes=[copy], sound=lambda: same_or_empty(copy, disk)
        ),
        "in-place-qcow2": Case(
            ["sparsify", "--in-place", qcopy], changes=[qcopy], sound=lambda: sound_qcow2(qcopy, disk)
        ),
        "make": Case(["make", "fs:ext4:32M", "out.img", "--tree", files["tree"]], ["out.img"], random=True),
        "make-qcow2": Case(
            ["make", "lvfs:/dev/vg/lv:ext4:48M", "out.qcow2", "--tree", files["tree"]],
            ["out.qcow2"],
            random=True,
        ),
        "replay": Case(["replay", files["profile"], qcow2]),
    }
    if os.geteuid() == 0:
        made["make-mount"] = Case(
            ["make", "fs:xfs:360M", "out.img", "--tree", files["tree"]], ["out.img"], random=True
        )
    return made


def sound_qcow2(image: Path, original: Path) -> None:
    run("qemu-img", "check", "-q", image, ok=(0, 3))  # 3: leaked clusters, which cost only space
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", image, raw)
    same_or_empty(raw, original)


def same_or_empty(image: Path, original: Path) -> None:
    """Each block is what it was, or empty; and those of files are what they were."""
    before, now = (np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 4096) for path in (original, image))
    assert ((before == now).all(axis=1) | ~now.any(axis=1)).all()
    out = image.parent / "part"
    run(*PROGRAM, "dump", "-q", "--force", image, "/dev/sda1", out)
    run("e2fsck", "-fn", out)
    out.unlink()


NAMES = [
    "map",
    "map-parquet",
    "lookup",
    "ranges",
    "locate",
    "info",
    "sql",
    "diff",
    "trace",
    "profile",
    "report",
    "dump",
    "dump-qcow2",
    "extract",
    "sparsify",
    "sparsify-qcow2",
    "in-place",
    "in-place-qcow2",
    "make",
    "make-qcow2",
    "replay",
    "make-mount",
]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """For TMPDIR: a short name, since sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="bmap", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_any_signal_at_any_moment(name: str, files: dict[str, Path], temporary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    case = cases(files, folder).get(name)
    if case is None:
        need_root()
    assert case
    if name == "report":
        pytest.importorskip("plotly")

    def renew() -> None:
        for change, source in zip(
            case.changes, (files["disk"] if name == "in-place" else files["qcow2"],), strict=False
        ):
            shutil.copyfile(source, change)
        clear(folder)

    took = 1e9
    for _ in range(2):  # the first time is longer
        renew()
        done = Run(case, folder, temporary)
        done.begins()
        began = time.monotonic()
        assert done.end() == 0, done.words
        took = min(took, time.monotonic() - began)
        done.children_end("it ends well")
        assert not done.left(), "it ends well, and leaves something behind"
    whole = contents(folder)
    assert sorted(whole) == sorted(case.outputs)
    rng = random.Random(name)
    for number in SIGNALS:
        for _ in range(MOMENTS):
            renew()
            moment = rng.uniform(0, 1.05) * took
            one = Run(case, folder, temporary)
            one.begins()
            time.sleep(moment)
            one.process.send_signal(number)
            status = one.end()
            told = f"{name}: {number.name} after {moment:.3f} of {took:.3f} s: status {status}: {one.words}"
            assert status in (0, -number if number == signal.SIGKILL else 128 + number), told
            assert "Traceback" not in one.words, told
            found = contents(folder)
            for output in case.outputs:
                if output in found and not case.random:
                    assert found[output] == whole[output], f"{told}: {output} is not whole"
            one.children_end(told)
            if number != signal.SIGKILL:
                assert not one.left(), f"{told}: {one.left()}"
                assert set(found) <= set(case.outputs), told
            case.sound()
            if number == signal.SIGKILL or case.random:
                for output in case.outputs:  # a next run has nothing in its way
                    remove(folder / output)
                again = Run(case, folder, temporary)
                assert again.end() == 0, f"{told}, then {again.words}"
                again.children_end(told)
                assert not again.left(), f"{told}, then {again.left()}"
                case.sound()


class Run:
    """A running command; its descendants are known by a variable of their environment."""

    def __init__(self, case: Case, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary, self.case = folder, temporary, case
        self.mark = f"BMAP_RUN={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, case.arguments)], cwd=folder,
            env={**os.environ, name: value, "TMPDIR": str(temporary)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, restore_signals=True,
            # tests in the background of a shell ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        self.words = ""

    def begins(self) -> None:
        """Until its work has begun: SIGTERM has a handler then. Before that there is nothing to undo, and any
        signal just ends it."""
        until = time.monotonic() + PATIENCE
        while not self._handles(signal.SIGTERM) and self.process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.001)

    def _handles(self, number: int) -> bool:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False

    def end(self) -> int:
        try:
            self.words, _ = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode

    def children(self) -> list[str]:
        """Descendants that live."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def children_end(self, told: str) -> None:
        until = time.monotonic() + PATIENCE
        while self.children():
            assert time.monotonic() < until, f"{told}: lives on: {self.children()}"
            time.sleep(0.01)

    def left(self) -> list[str]:
        """What it has left behind, beside its outputs."""
        names = [str(path) for path in self.folder.iterdir() if path.name not in self.case.outputs]
        names += map(str, self.temporary.iterdir())
        loops = Path("/sys/block").glob("loop*/loop/backing_file")
        for place in (*loops, Path("/proc/mounts")):
            with contextlib.suppress(OSError):
                names += [line for line in place.read_text().splitlines() if str(self.folder.parent) in line]
        return names + self.children()


def contents(folder: Path) -> dict[str, object]:
    """What lies in a folder, but for hidden names."""
    return {path.name: tree(path) for path in folder.iterdir() if not path.name.startswith(".")}


def tree(path: Path) -> object:
    if path.is_dir():
        return (
            {name.name: tree(name) for name in path.iterdir()},
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
    return path.read_bytes()


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        remove(path)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_before_the_work_begins_a_signal_just_ends_it(
    files: dict[str, Path], temporary: Path, tmp_path: Path
) -> None:
    for number in SIGNALS:
        for moment in range(2 * MOMENTS):
            one = Run(Case(["-o", "out", files["disk"]], ["out"]), tmp_path, temporary)
            time.sleep(0.08 * (moment + 1) / (2 * MOMENTS))
            one.process.send_signal(number)
            assert one.end() in (-number, 128 + number, 1)
            # Python's own start is out of our hands
            assert "Traceback" not in one.words or (
                number == signal.SIGINT and "virt_bmap/cli.py" not in one.words
            ), one.words
            assert not one.left()
            assert not (tmp_path / "out").exists()


def test_a_frozen_filesystem_is_thawed(temporary: Path, tmp_path: Path) -> None:
    need_root(), need("mke2fs", "e2fsprogs")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    run("mke2fs", "-q", "-t", "ext4", image)
    folder = tmp_path / "out"
    folder.mkdir()
    with mounted(image) as root, thawed(root):
        case = Case(["freeze", "--mount", root, "--", "sleep", "0.3"])
        one = Run(case, folder, temporary)
        one.begins()
        began = time.monotonic()
        assert one.end() == 0
        took = time.monotonic() - began
        for number in SIGNALS:
            for moment in range(MOMENTS):
                one = Run(case, folder, temporary)
                one.begins()
                time.sleep(random.Random(moment).uniform(0, 1) * took)
                one.process.send_signal(number)
                one.end()
                assert "Traceback" not in one.words
                until = time.monotonic() + PATIENCE
                while is_frozen(root) or one.children():
                    assert time.monotonic() < until, (number, one.children())
                    time.sleep(0.02)


def is_frozen(root: Path) -> bool:
    """A file is made by another process, which can be given up."""
    writer = subprocess.Popen(["touch", root / "file"])
    try:
        return writer.wait(2) != 0
    except subprocess.TimeoutExpired:
        return True


@contextlib.contextmanager
def thawed(root: Path) -> Iterator[None]:
    """Nothing of this test stays frozen, or it could not be unmounted."""
    file = os.open(root, os.O_RDONLY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was not frozen
            fcntl.ioctl(file, FITHAW, 0)
        os.close(file)
