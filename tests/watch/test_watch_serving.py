"""Serving outlives naming: whatever fails in a watch, or ends it, the client's disk stays, and nothing is
left behind when the client has gone."""

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from test_watch import disk, in_use, place, private_folders  # noqa: F401

from support import need, run
from virt_bmap.watch import plugin

PATCHED = """
import sys
from virt_bmap import cli
from virt_bmap.commands import COMMANDS
cli.import_libraries("long")
cli.import_libraries = lambda process: None
count = 0
def faulty(owner, name, error, first, last):
    old = getattr(owner, name)
    def new(*arguments, **options):
        global count
        count += 1
        if first <= count <= last:
            raise error("injected")
        return old(*arguments, **options)
    setattr(owner, name, new)
{faults}
sys.argv[0] = "virt-bmap"
cli.main()
"""
EVER = 10**9
FAULTS = {
    # where it strikes: (what is patched, words that are said)
    "a batch once": (("from virt_bmap.accesses.resolve import Resolver as R; faulty(R, 'touched', "
        "RuntimeError, 2, 2)"), "started again"),
    "every batch": (("from virt_bmap.accesses.resolve import Resolver as R; faulty(R, 'touched', "
        f"RuntimeError, 2, {EVER})"), "given up"),
    "no memory": (("from virt_bmap.accesses.resolve import Resolver as R; faulty(R, 'touched', MemoryError, "
        f"2, {EVER})"), "not enough memory (given up)"),
    "the log's lines": (("from virt_bmap.accesses.accesses import LogParser as L; faulty(L, 'feed', "
        f"ValueError, 2, {EVER})"), "given up"),
    "the log's file": ("from virt_bmap.serve.serve import Follower as F; faulty(F, 'read', OSError, 2, 3)",
        "started again"),
    "the clock": (f"from virt_bmap.watch.naming import Naming as N; faulty(N, 'tick', KeyError, 2, {EVER})",
        "given up"),
    "the end": ("from virt_bmap.watch.naming import Naming as N; faulty(N, 'finish', RuntimeError, 1, 1)",
        "started again"),
    "asking for a map": (("from virt_bmap.watch.refresh import Refresher as R; faulty(R, 'begin', "
        f"OSError, 1, {EVER})"), "given up"),
    "taking a map": (f"import virt_bmap.watch.refresh as r; faulty(r, 'load', OSError, 1, {EVER})",
        "can't be taken over"),
    "the trace": (("from virt_bmap.accesses.trace import Trace as T; faulty(T, 'add', RuntimeError, 1, "
        f"{EVER})"),
        "the trace is not complete"),
    "the trace's file": (("from virt_bmap.accesses.stream import Part as P; faulty(P, 'write', OSError, 1, "
        f"{EVER})"), "the trace is not complete"),
    "the live log": (("from virt_bmap.watch.lines import LineLog as L; faulty(L, 'add', RuntimeError, 1, "
        f"{EVER})"), "the live log ended early"),
    "the live log's end": (("from virt_bmap.watch.lines import LineLog as L; faulty(L, 'flush', "
        "RuntimeError, 1, 1)"), ""),
    "the summary": (("from virt_bmap.watch.summary import Summary as S; faulty(S, 'add', RuntimeError, 1, "
        f"{EVER})"), "the summary ended early"),
    "printing": (("import io; from virt_bmap.watch import session; faulty(session.LogParser, 'feed', "
        f"RuntimeError, {EVER}, {EVER})"), ""),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tools() -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")


@pytest.fixture
def image(disk: SimpleNamespace, tmp_path: Path) -> Path:
    """A disk of one's own, that may be written."""
    copy = tmp_path / "disk.img"
    copy.write_bytes(disk.data)
    return copy


def client(disk: SimpleNamespace, seconds: float) -> list[str]:
    """Reads and writes that compare what they read, among them the superblock, for some time; exit status 5
    when all was right."""
    kernel, initrd = place(disk, "/boot/vmlinuz"), place(disk, "/boot/initrd")
    steps = []
    for number in range(int(seconds * 5)):
        steps += [f"write -q -P {number + 1} {initrd} 64k", f"read -q -P {number + 1} {initrd} 64k",
            f"read -q {kernel} 64k",
                  "read -q 0x100400 1k", "write -q -P 0 0x100800 1k", "sleep 200"]  # fmt: skip
    words = " ".join(f"-c '{step}'" for step in steps)
    return [
        "--",
        "sh",
        "-c",
        f'out=$(qemu-io -f raw {words} "$uri" 2>&1); echo "$out" >&2; test -z "$out" && exit 5',
    ]


def patched(faults: str, *arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run a watch with faults in it."""
    words = [sys.executable, "-c", PATCHED.format(faults=faults), "watch", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_in_naming_is_none_of_the_disk(
    disk: SimpleNamespace, image: Path, tmp_path: Path, where: str
) -> None:
    fault, words = FAULTS[where]
    before = private_folders()
    done = patched(fault, "--write", "-o", tmp_path / "trace.parquet", image, *client(disk, 1.2))
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert "Of the disk's 32.0 MiB" in done.stdout  # the summary
    assert not [name for name in private_folders() - before if not in_use(f"/dev/shm/{name}")]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_a_fault_of_the_screen_leaves_the_watch(disk: SimpleNamespace, image: Path) -> None:
    pytest.importorskip("textual")
    fault = f"from virt_bmap.watch.screen import Watching as W; faulty(W, '_look', RuntimeError, 2, {EVER})"
    words = [
        sys.executable,
        "-c",
        PATCHED.format(faults=fault),
        "watch",
        "--tui",
        str(image),
        *client(disk, 1.2),
    ]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(words[0], words, {**os.environ, "TERM": "xterm-256color"})
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            seen += data
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5, seen[-2000:]
    assert b"the screen failed" in seen
    assert b"Of the disk's 32.0 MiB" in seen


# ---- whoever is killed -------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
sys.path.insert(0, {tests!r})
from virt_bmap.open.nbd_writer import NbdWriter
import numpy as np
link, end, count = NbdWriter(sys.argv[1]), time.monotonic() + float(sys.argv[3]), 0
print("up", flush=True)
while time.monotonic() < end:
    data = np.full(65536, count % 251, np.uint8)
    link.write(int(sys.argv[4]), data)
    assert (link._fetch(np.array([int(sys.argv[4])]), np.array([65536])) == data).all()
    count += 1
link.flush()
link.close()
open(sys.argv[2], "w").write(str(count))
"""


@contextlib.contextmanager
def working(image: Path, folder: Path, seconds: float, *options: object) -> "Iterator[subprocess.Popen[str]]":
    """A watch with a client that works for some seconds, and says in `done` that all went well."""
    script = folder / "client.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))
    command = [
        Path(sys.executable).parent / "virt-bmap",
        "watch",
        "--write",
        "-q",
        *options,
        image,
        "--",
        sys.executable,
        script,
        "$uri",
        folder / "done",
        seconds,
        3 << 20,
    ]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        assert process.stderr
        process.stderr.close()


def wait_for(path: Path, seconds: float = 30) -> str:
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return path.read_text()


def processes_with(words: str) -> list[int]:
    """Those that have these words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


class Seen(NamedTuple):
    """A watch's folder, and the processes that know it. Other runs at the same time take names that are
    free, and remove what a dead one left."""

    folder: str
    about: os.stat_result | None
    processes: set[int]

    def is_there(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.about is not None and os.path.samestat(os.stat(self.folder), self.about)
        return False

    def lives(self) -> bool:
        return bool(self.processes & _knowing(self.folder))


def seen(folder: str) -> Seen:
    """The folder as it is now."""
    about = os.stat(folder) if os.path.exists(folder) else None
    return Seen(folder, about, _knowing(folder))


def _knowing(folder: str) -> set[int]:
    """Not those of a folder whose name only begins the same."""
    return {*processes_with(f"{folder}/"), *processes_with(f"\0{folder}\0")}


def gone(one: Seen, seconds: float = 15) -> bool:
    """Do the folder and the processes that know it go away?"""
    until = time.monotonic() + seconds
    while one.is_there() or one.lives():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def folder_of(process: "subprocess.Popen[str]") -> str:
    """The private folder of a watch, by its server's command line."""
    for number in processes_with("virt-bmap-"):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"--unix" in words:
                return os.path.dirname(words[words.index(b"--unix") + 1].decode())
    raise AssertionError("the watch has no server")


@pytest.mark.parametrize("victims", ["watch", "watch and caretaker"])
def test_a_killed_watch_leaves_its_client_the_disk(image: Path, tmp_path: Path, victims: str) -> None:
    with working(image, tmp_path, 3) as process:
        folder = folder_of(process)
        known = seen(folder)
        if "caretaker" in victims:
            for number in processes_with("caretaker.py"):
                if folder.encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                    os.kill(number, signal.SIGKILL)
        process.kill()
        process.wait()
        time.sleep(1.5)
        lock = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # so no other watch takes it for a dead one's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        assert not (tmp_path / "done").exists()
        if "caretaker" not in victims:
            assert os.stat(f"{folder}/log").st_blocks * 512 < 32 << 20  # somebody empties it
        assert int(wait_for(tmp_path / "done")) > 10
    if "caretaker" not in victims:
        assert gone(known)
        return
    # nobody is left who could remove the folder: the next watch does
    until = time.monotonic() + 30
    while known.lives() and time.monotonic() < until:
        time.sleep(0.1)
    assert not known.lives()
    run(Path(sys.executable).parent / "virt-bmap", "watch", "-q", image, "--", "true")
    assert not known.is_there()


def test_the_server_stays_between_clients_and_ends_with_the_watch(image: Path) -> None:
    twice = "qemu-io -f raw -c 'read -q 0 512' $uri; sleep 0.5; qemu-io -f raw -c 'read -q 0 512' $uri"
    out = run(Path(sys.executable).parent / "virt-bmap", "watch", "-q", image, "--", "sh", "-c", twice)
    assert b"2 reads" in out


def test_the_reader_of_the_map_is_started_again(image: Path, tmp_path: Path) -> None:
    """Killed between two maps, it is there for the next one."""
    kill = f"pkill -9 -P $PPID -f '[w]atch.refresh' && date +%s%N > {tmp_path}/killed"
    write = "qemu-io -f raw -c 'write -q -P 0 0x100800 1k' $uri"
    command = f"{write}; sleep 2; {kill}; {write}"
    done = patched("", "--write", "-o", tmp_path / "trace.parquet", image, "--", "sh", "-c", command)
    assert done.returncode == 0, done.stderr
    maps = json.loads(pq.read_metadata(tmp_path / "trace.parquet").metadata[b"virt-bmap-maps"])
    assert maps[-1]["begun_ns"] > int((tmp_path / "killed").read_text())


def test_a_dead_server_is_said_and_summed_up(image: Path, tmp_path: Path) -> None:
    kill = "kill -9 $(cat $(dirname $unixsocket)/pid); sleep 0.2; exit 3"
    done = patched(
        "",
        "-o",
        tmp_path / "trace.parquet",
        image,
        "--",
        "sh",
        "-c",
        f"qemu-io -f raw -c 'read -q 0 512' $uri; {kill}",
    )
    assert done.returncode == 3, done.stderr
    assert "server ended before the command did" in done.stderr
    assert "1 read (512 B)" in done.stdout
    assert (tmp_path / "trace.parquet").exists()


def test_a_log_that_nobody_reads_on_costs_no_summary(image: Path) -> None:
    words = [
        sys.executable,
        "-c",
        PATCHED.format(faults=""),
        "watch",
        str(image),
        "--",
        "sh",
        "-c",
        "sleep 0.5; qemu-io -f raw -c 'read -q 0 4M' $uri; sleep 1; exit 4",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert "1 read (4.0 MiB)" in said
    assert "Traceback" not in said


# ---- the brother -------------------------------------------------------------------------------------------


def test_telling_never_fails_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in nbdkit's Python is an I/O error to the guest."""
    for error in (OSError("full"), BrokenPipeError("gone"), ValueError("closed"), MemoryError()):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(plugin.os, "write", fail)
        before = plugin._dropped
        plugin.tell(1, plugin.READ, 0, 512)
        assert plugin._dropped == before + 1
        plugin.cleanup()


def test_bmaplogger_goes_on_where_naming_fails(disk: SimpleNamespace, image: Path) -> None:
    if subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
        pytest.skip("nbdkit's Python plugin is not installed (apt-get install nbdkit-plugin-python)")
    use = PATCHED.replace("cli.main()", "from virt_bmap.bmaplogger import main; main()").format(
        faults=FAULTS["every batch"][0]
    )
    command = client(disk, 1.2)[3].replace('"$uri"', "$uri")
    done = subprocess.run(
        [sys.executable, "-c", use, f"file={image}", "--run", command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5, done.stderr
    assert "naming failed" in done.stderr
    assert "given up" in done.stderr


def test_a_killed_bmaplogger_leaves_its_client_the_disk(image: Path, tmp_path: Path) -> None:
    if subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
        pytest.skip("nbdkit's Python plugin is not installed (apt-get install nbdkit-plugin-python)")
    socket = tmp_path / "socket"
    logger = subprocess.Popen(
        [Path(sys.executable).parent / "bmaplogger", "-U", socket, f"file={image}"], stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < until:
        time.sleep(0.05)
    script = tmp_path / "client.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))
    worker = subprocess.Popen(
        [sys.executable, script, f"nbd+unix:///?socket={socket}", tmp_path / "done", "2", str(3 << 20)],
        stdout=subprocess.PIPE,
    )
    assert worker.stdout
    assert worker.stdout.readline() == b"up\n"
    logger.kill()
    logger.wait()
    assert worker.wait(30) == 0
    worker.stdout.close()
    assert int(wait_for(tmp_path / "done")) > 10
    until = time.monotonic() + 15
    while processes_with(str(socket)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_with(str(socket))  # it went with its last client


def test_a_watch_that_is_told_to_end_leaves_nothing(image: Path, tmp_path: Path) -> None:
    """TERM, HUP and INT at random moments, from before the map to the end."""
    chooser = random.Random(3)
    for number in range(9):
        sent = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[number % 3]
        before = private_folders()
        process = subprocess.Popen(
            [
                Path(sys.executable).parent / "virt-bmap",
                "watch",
                "-q",
                "-o",
                tmp_path / "trace.parquet",
                image,
                "--",
                "sleep",
                "1.5",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        time.sleep(chooser.random() * 2.5)
        process.send_signal(sent)
        _, words = process.communicate(timeout=30)
        if b"Traceback" in words:  # Python's own start is out of our hands
            assert sent == signal.SIGINT, words
            assert b"virt_bmap/cli.py" not in words, words
        else:
            assert process.returncode in (0, -sent, 128 + sent), words
        left = sorted(name for name in os.listdir(tmp_path) if name not in ("disk.img", "trace.parquet"))
        assert not left, (sent, left)
        assert not [name for name in private_folders() - before if not in_use(f"/dev/shm/{name}")]
        assert not processes_with(str(image))
