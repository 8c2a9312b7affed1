"""Temporary files and folders, and signals between two steps: what must not stay, does not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_bmap.host import children, leftovers, signals

HOLD = """
import sys, time
from virt_bmap.host import leftovers
with (
    leftovers.hidden_file(sys.argv[1]) as (file, _),
    leftovers.hidden_folder(sys.argv[2]) as folder,
    leftovers.private_folder(sys.argv[3]) as private,
):
    open(folder + "/inside", "w").close()
    print(file, folder, private, flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> tuple["subprocess.Popen[str]", list[Path]]:
    """A process that holds a hidden file, a hidden folder and a private folder, and their names."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / "a", folder / "b", folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, [Path(word) for word in process.stdout.readline().split()]


def test_what_a_killed_process_left_the_next_one_removes(tmp_path: Path) -> None:
    one, names = holder(tmp_path)
    other, others = holder(tmp_path)
    assert not set(names) & set(others)
    assert all(path.exists() for path in (*names, *others)), "both live"
    for process in (other, one):
        process.kill()
        process.communicate()
    assert all(path.exists() for path in (*names, *others))
    again, third = holder(tmp_path)
    assert third == names
    assert not any(path.exists() for path in others)
    assert sorted(os.listdir(third[1])) == ["inside"]
    again.kill()
    again.communicate()


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".out.virt-bmap").symlink_to(precious)
    (tmp_path / ".out.virt-bmap-1").mkdir()
    os.mkfifo(tmp_path / ".out.virt-bmap-2")
    if os.geteuid() == 0:
        (tmp_path / ".out.virt-bmap-3").write_text("somebody else's")
        os.chown(tmp_path / ".out.virt-bmap-3", 12345, -1)
    with leftovers.hidden_file(str(tmp_path / "out")) as (name, _):
        assert Path(name).name == ".out.virt-bmap-1", (
            "an empty folder of ours that nobody holds counts as left"
        )
    assert precious.read_text() == "mine"
    with leftovers.hidden_folder(str(tmp_path / "out")):
        (tmp_path / ".out.virt-bmap-1/x").touch()
        with leftovers.hidden_file(str(tmp_path / "out")) as (name, _):
            assert Path(name).name == f".out.virt-bmap-{4 if os.geteuid() == 0 else 3}"
    assert (tmp_path / ".out.virt-bmap").is_symlink()
    assert (tmp_path / ".out.virt-bmap-2").exists()


def test_folders_that_nobody_may_write_to(tmp_path: Path) -> None:
    with leftovers.hidden_folder(str(tmp_path / "x")) as name:
        deep = Path(name) / "a/b"
        deep.mkdir(parents=True)
        (deep / "file").touch()
        (deep / "link").symlink_to(tmp_path)
        deep.chmod(0o500)
        deep.parent.chmod(0)
    assert os.listdir(tmp_path) == []


def test_what_was_renamed_stays_and_errors_undo(tmp_path: Path) -> None:
    with leftovers.hidden_file(str(tmp_path / "x")) as (name, _):
        os.rename(name, tmp_path / "x")
        Path(name).write_text("another run's, by now")
    assert sorted(os.listdir(tmp_path)) == [".x.virt-bmap", "x"]
    Path(name).unlink()
    with (
        pytest.raises(ZeroDivisionError),
        leftovers.hidden_folder(str(tmp_path / "y")),
        leftovers.hidden_file(str(tmp_path / "z")),
    ):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def exceptions() -> Iterator[None]:
    """Signals are exceptions, in this process."""
    before = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signal.SIGALRM)}
    hook = sys.unraisablehook
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signals.become_exceptions()
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("exceptions")
def test_a_held_signal_comes_at_the_end_of_the_block() -> None:
    done = []

    def work() -> None:
        with signals.held():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

    with pytest.raises(signals.Signalled) as raised:
        work()
    assert (done, raised.value.status) == ([1], 143)


@pytest.mark.usefixtures("exceptions")
def test_a_signal_is_not_lost_where_no_exception_can_leave() -> None:
    class Ends:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGHUP)

    def work() -> None:
        Ends()
        time.sleep(5)

    with pytest.raises(signals.Signalled) as raised:
        work()
    assert raised.value.status == 129


@pytest.mark.usefixtures("exceptions")
def test_a_child_ends_with_its_block() -> None:
    with pytest.raises(signals.Signalled), children.running(["sleep", "60"]) as process:
        signal.raise_signal(signal.SIGINT)
    assert process.poll() == -signal.SIGTERM
    assert children.run(["cat"], b"words").stdout == b"words"
    with pytest.raises(subprocess.TimeoutExpired):
        children.run(["sleep", "60"], timeout=0.1)


def test_a_child_ends_with_a_killed_parent() -> None:
    code = (
        "from virt_bmap.host import children\nwith children.running(['sleep', '60']) as p: print(p.pid, "
        "flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_new_folder_that_another_process_reaps_is_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mkdir and its lock a folder looks like a dead process's."""
    made: list[str] = []
    mkdir = os.mkdir

    def reaped(name: str, mode: int) -> None:
        mkdir(name, mode)
        made.append(name)
        if len(made) == 1:
            os.rmdir(name)

    monkeypatch.setattr(os, "mkdir", reaped)
    with leftovers.private_folder(str(tmp_path)) as folder:
        assert made == [folder, folder]
    assert not os.listdir(tmp_path)
    with pytest.raises(FileNotFoundError), leftovers.private_folder(str(tmp_path / "absent")):
        pass


def test_a_child_is_asked_again() -> None:
    """As qemu-nbd does: a signal that comes before its main loop is lost."""
    forgets = "n=0; trap 'n=$((n + 1)); [ $n -gt 1 ] && exit 7' TERM; echo; while :; do sleep 0.02; done"
    with children.running(["sh", "-c", forgets], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert children.ended(process, 20) == 7


def test_a_child_that_will_not_is_killed() -> None:
    with children.running(["sh", "-c", "trap '' TERM; echo; sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert children.ended(process, 0.2) == -signal.SIGKILL


def test_nothing_is_written_to_find_where_temporary_files_lie(tmp_path: Path) -> None:
    """tempfile tries a folder by a file of a random name: what a SIGKILL left of it nobody would know."""
    code = (
        "import os, sys; seen = []; sys.addaudithook(lambda event, words: seen.append(str(words[0])) "
        "if event in ('open', 'os.mkdir') else None)\n"
        "from virt_bmap.host import leftovers\n"
        "with leftovers.private_folder() as folder: pass\n"
        "print(*(name for name in seen if name.startswith(os.environ['TMPDIR'])), sep='\\n')"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {f"{tmp_path}/virt-bmap-{os.geteuid()}"}
    assert not os.listdir(tmp_path)
