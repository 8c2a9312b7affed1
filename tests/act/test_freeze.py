"""freeze: what is copied meanwhile is consistent, and everything is thawed, whoever dies when."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import agent_guest
from support import mapped, mounted, need, need_root, run
from virt_bmap.act.freeze import Frozen, Guest, HostMounts
from virt_bmap.act.freeze import agent as agents
from virt_bmap.act.freeze.mounts import Mount, chosen
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import BmapError, FreezeError

MAKE = {
    "ext4": (["mke2fs", "-q", "-t", "ext4"], "e2fsprogs", "noload"),
    "xfs": (["mkfs.xfs", "-q"], "xfsprogs", "norecovery,nouuid"),
    "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs", "rescue=nologreplay"),
}
LAST = {"timeout": 60}


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "virt_bmap", "freeze", *map(str, arguments)]


def image(folder: Path, kind: str = "ext4", size: str = "64M") -> Path:
    command, package, _ = MAKE[kind]
    need(command[0], package)
    made = folder / f"{kind}.img"
    run("truncate", "-s", size, made)
    run(*command, made)
    return made


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A small ext4, mounted."""
    with mounted(image(tmp_path)) as root:
        yield root


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """A thread that changes the filesystem all the time."""
    end = threading.Event()

    def write() -> None:
        number = 0
        while not end.is_set():
            number = (number + 1) % 20
            folder = root / f"folder{number}"
            folder.mkdir(exist_ok=True)
            with open(folder / "new", "wb") as file:
                file.write(os.urandom(30000))
                os.fsync(file.fileno())
            (folder / "new").rename(folder / "file")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        time.sleep(0.5)
        yield
    finally:
        end.set()
        thread.join()


def assert_thawed(root: Path, within: float = 10) -> None:
    """Somebody else can write there."""
    subprocess.run(["sh", "-c", f"echo written > {root}/after"], check=True, timeout=within)


def state(disk: Path) -> str:
    (found,) = mapped(disk).filesystems.column("state").to_pylist()
    return str(found)


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# ---- this host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_made_meanwhile_is_consistent_and_one_made_without_needs_recovery(
    kind: str, tmp_path: Path
) -> None:
    """The copy, mounted without recovery, has the very files that the frozen filesystem had."""
    disk, copy = image(tmp_path, kind, "320M"), tmp_path / "copy.img"
    with mounted(disk) as root, writing(root):
        run("cp", "--sparse=always", disk, copy)
        assert state(copy) == "recovered"
        with Frozen(HostMounts((str(root),))) as held:
            before = hashes(root)
            run("cp", "--sparse=always", disk, copy)
            assert hashes(root) == before
        assert held.filesystems == str(root)
        assert_thawed(root)
    assert state(copy) == ("frozen" if kind == "xfs" else "clean")
    if kind == "ext4":
        run("e2fsck", "-fn", copy)
    with mounted(copy, f"ro,{MAKE[kind][2]}") as again:
        assert hashes(again) == before
        assert len(before) >= 8
    assert state(disk) == "clean"


def test_a_file_deleted_while_it_is_open_tells_frozen_from_unmounted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, copy = image(tmp_path), tmp_path / "copy.img"
    with mounted(disk) as root, open(root / "gone", "wb") as file:
        file.write(b"x" * 5000)
        (root / "gone").unlink()
        run(*program("--mount", root, "--", "cp", disk, copy))
    assert state(copy) == "frozen"
    bmap(["info", str(copy)])
    assert "frozen (consistent); " in capsys.readouterr().out
    bmap(["info", "--json", str(copy)])
    assert json.loads(capsys.readouterr().out)["filesystem"]["consistent"] is True
    run("e2fsck", "-fp", copy)
    assert state(copy) == "clean"


def test_the_commands_exit_status_is_passed_on_and_all_is_thawed(mount: Path) -> None:
    done = subprocess.run(
        program("--mount", mount, "--", "sh", "-c", "echo hello; exit 7"),
        capture_output=True,
        text=True,
        **LAST,
    )
    assert (done.returncode, done.stdout) == (7, "hello\n")
    assert done.stderr.startswith("virt-bmap: frozen for ")
    assert_thawed(mount)
    done = subprocess.run(
        program("-q", "--mount", mount, "--", "sh", "-c", "kill -9 $$"),
        capture_output=True,
        text=True,
        **LAST,
    )
    assert (done.returncode, done.stderr) == (128 + 9, "")
    assert_thawed(mount)


def test_nobody_writes_meanwhile(mount: Path) -> None:
    command = f"(echo x > {mount}/file; echo written) & sleep 1; echo end"
    done = subprocess.run(
        program("--mount", mount, "--", "sh", "-c", command), capture_output=True, text=True, **LAST
    )
    assert done.stdout == "end\nwritten\n"


def test_the_time_limit_thaws_and_ends_the_command(mount: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        program("--timeout", "0.7", "--mount", mount, "--", "sleep", "50"),
        capture_output=True,
        text=True,
        **LAST,
    )
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    assert (
        done.stderr == "virt-bmap: the limit of 0.7 seconds was over and the filesystems were thawed: "
        "what was copied is not consistent\n"
    )
    assert_thawed(mount)


def started(mount: Path) -> "subprocess.Popen[str]":
    """A freeze whose command says that it runs."""
    process = subprocess.Popen(program("--mount", mount, "--", "sh", "-c", "echo frozen; exec sleep 30"),
        text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "frozen\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_thaws_and_reaches_the_command(mount: Path, number: signal.Signals) -> None:
    process = started(mount)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert_thawed(mount)


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_killed_with_sigkill_it_is_thawed(mount: Path, group: bool) -> None:
    process = started(mount)
    writer = subprocess.Popen(["touch", mount / "file"])
    time.sleep(0.5)
    assert writer.poll() is None
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert writer.wait(5) == 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_where_the_keeper_is_killed_the_other_process_thaws(mount: Path) -> None:
    held = Frozen(HostMounts((str(mount),)))
    with pytest.raises(FreezeError, match="was killed"), held:
        held._keeper.kill()
    assert_thawed(mount)


def test_thawed_by_someone_else_is_said(mount: Path) -> None:
    done = subprocess.run(
        program("--mount", mount, "--", "fsfreeze", "-u", mount), capture_output=True, text=True, **LAST
    )
    assert (done.returncode, done.stderr) == (
        1,
        "virt-bmap: someone else has thawed the filesystems meanwhile: what was copied is not consistent\n",
    )


def test_frozen_by_someone_else_is_left_so(mount: Path) -> None:
    run("fsfreeze", "-f", mount)
    try:
        with pytest.raises(FreezeError, match="is frozen already"), Frozen(HostMounts((str(mount),))):
            pass
    finally:
        run("fsfreeze", "-u", mount)  # fails where it is not frozen any more


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_filesystem_in_a_file_on_another_is_frozen_first(mount: Path, inner_first: bool) -> None:
    (mount / "inner").mkdir()
    with mounted(image(mount / "inner", size="24M")) as inner:
        (inner / "dirty").write_bytes(os.urandom(1_000_000))
        folders = [inner, mount] if inner_first else [mount, inner]
        options = [part for folder in folders for part in ("--mount", folder)]
        done = subprocess.run(
            program("--timeout", "20", *options, "--", "true"), capture_output=True, text=True, **LAST
        )
        assert done.returncode == 0, done.stderr
        assert_thawed(inner)
        assert_thawed(mount)


def test_mounts_are_chosen_once_each_the_newest_filesystem_first(tmp_path: Path) -> None:
    """However often a filesystem is mounted; what lies on top of a mount point hides what is below."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for folder in (one, two):
        os.mkdir(folder)
    old, new, again = Mount(one, "8:2", "ext4"), Mount(two, "8:3", "xfs"), Mount("/mnt", "8:2", "ext4")
    table = [Mount("/", "8:1", "ext4"), old, new, again]
    assert chosen([one, two], table) == chosen([two, one], table) == [new, old]
    assert chosen([one, one], table) == [old]
    hides = Mount(two, "8:2", "ext4")
    assert chosen([one, two], [*table, hides]) == [hides]


def test_bad_input_is_one_clear_line(mount: Path, tmp_path: Path) -> None:
    (mount / "folder").mkdir()

    def said(*arguments: object) -> str:
        with pytest.raises(BmapError) as caught:
            bmap(["freeze", *map(str, arguments)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert (
        said("--mount", tmp_path / "nothing", "--", "true")
        == f"{tmp_path}/nothing: there is no such directory"
    )
    assert (
        said("--mount", "/proc", "--", "true")
        == "/proc (proc): can't be frozen: a filesystem of its type can't be frozen"
    )
    assert said("--mount", mount, "--mount", "/proc", "--", "true").startswith("/proc")
    assert_thawed(mount)
    assert said("--mount", mount, "--", "no-such-command") == "no-such-command: no such command"
    assert said("--mount", mount, "--timeout", "0", "--", "true") == "--timeout: a number of seconds above 0"
    assert (
        said("--mount", mount, "--timeout", "nan", "--", "true") == "--timeout: a number of seconds above 0"
    )
    assert "--agent SOCKET" in said("true")
    assert "--agent" in said("--mount", mount, "--mountpoint", "/", "--", "true")
    with open(mount / "out", "w") as file:
        done = subprocess.run(
            program("--mount", mount, "--", "true"), stdout=file, stderr=subprocess.PIPE, text=True, **LAST
        )
    assert done.returncode == 1
    assert (
        done.stderr
        == f"virt-bmap: standard output goes to a file on {mount}, which is to be frozen: send it "
        "somewhere else\n"
    )
    assert (
        said("--agent", tmp_path / "nothing", "--", "true")
        == f"{tmp_path}/nothing: can't be connected to: No such file or directory"
    )
    (tmp_path / "file").touch()
    assert "can't be connected to: " in said("--agent", tmp_path / "file", "--", "true")


def test_without_root_it_says_so(tmp_path: Path) -> None:
    need_root()
    need("setpriv", "util-linux")
    with mounted(image(tmp_path)) as root:
        root.chmod(0o755)
        code = f"from virt_bmap.act.freeze.mounts import Mounts\nMounts(['{root}']).freeze(9)"
        if subprocess.run(
            ["setpriv", "--reuid", "65534", sys.executable, "-c", "import virt_bmap.core.errors"],
            capture_output=True,
        ).returncode:
            pytest.skip("the tests lie where another user can't read them")
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", sys.executable, "-c", code], capture_output=True, text=True
        )
        assert done.stderr.splitlines()[-1].endswith("can't be frozen: freezing needs root")


# ---- a guest's agent, played -------------------------------------------------------------------------------


def objects(link: socket.socket) -> Iterator[dict]:
    """The JSON objects that a client sends: nothing separates them."""
    text, decoder = "", json.JSONDecoder()
    while data := link.recv(65536):
        text += data.decode()
        while text:
            found, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            yield found


@contextlib.contextmanager
def played(path: Path, answer: Callable[[dict, int], object]) -> Iterator[list[str]]:
    """An agent that serves one client after the other; `answer` is given each command and the connection's
    number, and returns what to send, an exception to hang up, or None to keep silent. Yields the commands
    so far."""
    commands: list[str] = []
    links: list[socket.socket] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        number = 0
        while True:
            try:
                link, _ = server.accept()
            except OSError:  # closed: the end
                return
            links.append(link)
            number += 1
            with link:
                for command in objects(link):
                    commands.append(command["execute"])
                    reply = answer(command, number)
                    if isinstance(reply, Exception):
                        break
                    if isinstance(reply, bytes):
                        link.sendall(reply)
                    elif reply is not None:
                        link.sendall(json.dumps({**reply, "id": command["id"]}).encode() + b"\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield commands
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for link in links:
            with contextlib.suppress(OSError):  # closed already
                link.shutdown(socket.SHUT_RDWR)
        thread.join(10)


class Model:
    """What an agent does with one guest."""

    def __init__(self) -> None:
        self.frozen = False

    def __call__(self, command: dict, connection: int) -> object:
        name = command["execute"]
        if name == "guest-sync":
            return {"return": command["arguments"]["id"]}
        if name == "guest-fsfreeze-status":
            return {"return": "frozen" if self.frozen else "thawed"}
        if name == "guest-fsfreeze-thaw":
            was, self.frozen = self.frozen, False
            return {"return": 2 if was else 0}
        self.frozen = True
        return {"return": 2}


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[agents.Agent]:
    monkeypatch.setattr(agents, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(agents, "THAW_PATIENCE", 3.0)
    with contextlib.closing(agents.Agent(str(tmp_path / "agent"))) as made:
        yield made


def test_an_agent_that_is_silent_is_named(agent: agents.Agent, tmp_path: Path) -> None:
    with (
        played(tmp_path / "agent", lambda *_: None) as commands,
        pytest.raises(FreezeError, match="no agent answers within"),
    ):
        agent.freeze(5)
    assert commands == ["guest-sync"]


@pytest.mark.parametrize(
    "noise",
    [
        b"220 mail.example.org ESMTP\n",
        b"\xff\xfe\n",
        b"[]\n",
        b'{"return": 1}\n',
        b'{"error": {}}\n',
        b"x" * 100000 + b"\n",
    ],
)
def test_what_is_no_agent_is_named(agent: agents.Agent, tmp_path: Path, noise: bytes) -> None:
    with (
        played(tmp_path / "agent", lambda *_: noise),
        pytest.raises(BmapError, match=r"is not a guest agent|no agent answers"),
    ):
        agent.freeze(5)


def test_an_agent_with_stale_answers_is_synchronised(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()

    def late(command: dict, connection: int) -> object:
        if connection < 3 and command["execute"] == "guest-sync":
            return {"return": 12345}  # to an earlier client with the same id
        return model(command, connection)

    with played(tmp_path / "agent", late):
        assert agent.freeze(5) == "2 filesystems of the guest"
        assert agent.thaw()


def test_a_refused_freeze_is_thawed_and_has_the_agents_words(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()

    def refuses(command: dict, connection: int) -> object:
        if command["execute"] == "guest-fsfreeze-freeze":
            model.frozen = True
            return {"error": {"class": "GenericError", "desc": "failed to freeze /mnt: Input/output error"}}
        return model(command, connection)

    with (
        played(tmp_path / "agent", refuses) as commands,
        pytest.raises(FreezeError, match="failed to freeze /mnt"),
    ):
        agent.freeze(5)
    assert commands[-1] == "guest-fsfreeze-thaw"
    assert not model.frozen


def test_a_freeze_that_takes_too_long_is_thawed(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()

    def slow(command: dict, connection: int) -> object:
        reply = model(command, connection)
        return None if command["execute"] == "guest-fsfreeze-freeze" else reply

    with (
        played(tmp_path / "agent", slow) as commands,
        pytest.raises(FreezeError, match=r"did not answer guest-fsfreeze-freeze within 0\.3 s"),
    ):
        agent.freeze(0.3)
    assert commands[-1] == "guest-fsfreeze-thaw"
    assert not model.frozen


def test_a_lost_connection_does_not_keep_it_from_thawing(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()

    def hangs_up(command: dict, connection: int) -> object:
        if command["execute"] == "guest-fsfreeze-thaw" and connection == 1:
            return OSError()
        return model(command, connection)

    with played(tmp_path / "agent", hangs_up) as commands:
        agent.freeze(5)
        assert model.frozen
        assert agent.thaw()
    assert not model.frozen
    assert commands.count("guest-sync") == 2


def test_a_guest_that_does_not_confirm_the_thaw_is_named(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()

    def dies(command: dict, connection: int) -> object:
        return OSError() if model.frozen else model(command, connection)

    with played(tmp_path / "agent", dies):
        agent.freeze(5)
        with pytest.raises(FreezeError, match="PERHAPS STILL FROZEN"):
            agent.thaw()


def test_a_guest_frozen_by_someone_else_is_left_so(agent: agents.Agent, tmp_path: Path) -> None:
    model = Model()
    model.frozen = True
    with played(tmp_path / "agent", model) as commands, pytest.raises(FreezeError, match="frozen already"):
        agent.freeze(5)
    assert "guest-fsfreeze-thaw" not in commands


def test_only_the_mount_points_that_are_named_are_frozen(tmp_path: Path) -> None:
    asked = []
    model = Model()

    def notes(command: dict, connection: int) -> object:
        if command["execute"] == "guest-fsfreeze-freeze-list":
            asked.append(command["arguments"]["mountpoints"])
        return model(command, connection)

    with played(tmp_path / "agent", notes), Frozen(Guest(str(tmp_path / "agent"), ("/a", "/b"))):
        assert model.frozen
    assert asked == [["/a", "/b"]]
    assert not model.frozen


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['qemu.qmp'] = None; from virt_bmap.cli import main; main()"
    done = subprocess.run([sys.executable, "-c",
            code.replace("from", "from virt_bmap.act.freeze.keeper import freezer_of\nfrom "
                "virt_bmap.act.freeze "
                "import Guest\n"
                           "freezer_of(Guest('x'))\nfrom")], capture_output=True, text=True)  # fmt: skip
    assert "pip install 'virt-bmap[agent]'" in done.stderr.splitlines()[-1]


# ---- a real guest ------------------------------------------------------------------------------------------


@pytest.mark.guest
def test_a_guest_that_writes_hard(tmp_path: Path) -> None:
    """Copied while frozen its disks are consistent, copied without they need recovery; killed with SIGKILL it
    is thawed."""
    with agent_guest.running(tmp_path) as guest:
        copies = {name: tmp_path / name for name in ("live", "frozen")}
        for folder in copies.values():
            folder.mkdir()
        time.sleep(2)
        run("cp", "--sparse=always", *guest.disks, copies["live"])
        done = subprocess.run(program("--agent", guest.socket, "--", "cp", "--sparse=always", *guest.disks,
                copies["frozen"]),
                              capture_output=True, text=True, **LAST)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip().endswith(": 2 filesystems of the guest")
        killed = subprocess.Popen(program("--agent", guest.socket, "--", "sh", "-c",
                "echo frozen; exec sleep 20"), stdout=subprocess.PIPE,
                                  start_new_session=True)  # fmt: skip
        assert killed.stdout
        assert killed.stdout.readline() == b"frozen\n"
        still = [disk.read_bytes() for disk in guest.disks]
        time.sleep(1)
        assert [disk.read_bytes() for disk in guest.disks] == still, "nothing is written while it is frozen"
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        until = time.monotonic() + 20
        while [disk.read_bytes() for disk in guest.disks] == still:
            assert time.monotonic() < until, "it writes again"
            time.sleep(0.5)
        with Frozen(Guest(str(guest.socket), ("/b",))) as held:
            assert held.filesystems == "1 filesystem of the guest"
    assert [state(copies["live"] / disk.name) for disk in guest.disks] == ["recovered"] * 2
    assert [state(copies["frozen"] / disk.name) for disk in guest.disks] == ["clean", "frozen"]
    run("e2fsck", "-fn", copies["frozen"] / "ext4.img")
    for folder in copies.values():
        shutil.rmtree(folder)
