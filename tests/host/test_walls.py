"""What keeps a disk image from its host: the first wall (QEMU is told of nothing that was not accounted for),
the second (it can open nothing else), and what stands between a folder of evidence and our own programs. A
victim's file is watched by the kernel: that nothing opened it is seen, not concluded."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hostile_images import IMAGES, SECRET, SIZE, Victim, empty_sparse, qcow2, qed, secret, text, with_text
from support import need, need_root, run, wait_for_socket
from virt_bmap.cli import parser
from virt_bmap.cli import run as bmap
from virt_bmap.commands import COMMANDS
from virt_bmap.core.errors import BmapError, ImageError
from virt_bmap.host import confine
from virt_bmap.open import open_image, qemu
from virt_bmap.open.disks import Opening
from virt_bmap.open.graph import Graph
from virt_bmap.open.magic import recognise
from virt_bmap.open.nbd import NbdReader
from virt_bmap.open.nbd_writer import NbdWriter
from virt_bmap.open.raw import RawReader

PROGRAM = str(Path(sys.executable).parent / "virt-bmap")
LOGGER = str(Path(sys.executable).parent / "bmaplogger")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """The secret, and a VMDK of which it is the extent."""
    path, second = secret(tmp_path), tmp_path / "second.vmdk"
    second.write_text(text(f'RW {SIZE // 512} FLAT "{path}" 0'))
    with contextlib.closing(Victim(path, second)) as found:
        yield found


def made(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A hostile image, as a raw disk of a guest could be, and the options to force its format."""
    hostile = IMAGES[name]
    image = folder / "guest.img"
    image.write_bytes(hostile.make(folder, folder / "secret.raw", folder / "second.vmdk"))
    return image, ["--format", hostile.format] if hostile.format else []


# ---- the first wall ----------------------------------------------------------------------------------------


def test_these_images_do_reach_into_the_host(victim: Victim, tmp_path: Path) -> None:
    """QEMU by itself follows most of them: else this page proves nothing."""
    need("qemu-img", "qemu-utils")
    followed = []
    for name in IMAGES:
        image, _ = made(name, tmp_path)
        with contextlib.closing(RawReader(str(image))) as reader:
            format = IMAGES[name].format or recognise(reader)
        assert format
        victim.touched()
        run(
            "qemu-img",
            "dd",
            "-U",
            "-f",
            format,
            "-O",
            "raw",
            f"if={image}",
            f"of={tmp_path}/out",
            "bs=512",
            "count=1",
            ok=(0, 1),
        )
        if victim.touched():
            followed.append(name)
    assert len(followed) >= 20, followed
    assert {
        "extent behind a blank",
        "capacity 0, a text of size 0",
        "parent in a comment",
        "COWD with a parent",
    } <= set(followed)
    assert {"qcow2, data file behind a long header", "qed, backing file", "text, format forced"} <= set(
        followed
    )


@pytest.mark.parametrize("name", IMAGES)
def test_no_command_opens_what_an_image_names(
    victim: Victim, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    need("qemu-nbd", "qemu-utils")
    image, force = made(name, tmp_path)
    victim.touched()
    for words in (
        ("map", "-q", "-o", "-"), ("map", "-q", "--host-offsets", "-o", "-"), ("info",), ("explain", "0"),
        ("explain", "--host-offsets", "0"), ("lookup", "0"), ("check",), ("sparsify", "--estimate"),
        ("dump", "-q", "/dev/sda", "-"), ("sparsify", "-q", tmp_path / "copy.img"),
        ("sparsify", "--in-place"), ("diff", "-q"),
    ):  # fmt: skip
        command, *rest = map(str, words)
        options = [word for word in rest if word.startswith("-") and word != "-"]
        with contextlib.suppress(BmapError, SystemExit):
            bmap(
                [
                    command,
                    *options,
                    *(force if command != "diff" else []),
                    str(image),
                    *(word for word in rest if word not in options),
                ]
            )
        assert not victim.touched(), command
    assert SECRET.decode()[:10] not in capfd.readouterr().out
    assert not (tmp_path / "copy.img").exists() or SECRET not in (tmp_path / "copy.img").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "extent behind a blank",
        "capacity 0, a text of size 0",
        "parent in a comment",
        "qcow2, data file behind a long header",
    ],
)
def test_a_watched_guest_writes_into_no_file_that_its_disk_names(
    victim: Victim, tmp_path: Path, name: str
) -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    image, force = made(name, tmp_path)
    victim.touched()
    done = subprocess.run(
        [PROGRAM, "watch", "-q", "--write", *force, image, "--", "qemu-io", "-f", "raw", "$uri", "-c",
            "write -P 0x41 0 512"],
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert not victim.touched()
    assert done.returncode == 1
    assert b"virt-bmap: " in done.stderr
    assert b"Traceback" not in done.stderr
    assert victim.unharmed()


def test_nobody_is_called_for_a_parent(tmp_path: Path) -> None:
    """A server on this host waits in vain for what the image names."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        hint = f'parentFileNameHint="nbd://127.0.0.1:{server.getsockname()[1]}/"\n'
        data = with_text(empty_sparse(tmp_path), hint.encode())
        for number, content in enumerate(
            (data, data.replace(b"parentCID=ffffffff", b"parentCID=00000001"), qcow2(hint[20:-2], "raw"))
        ):
            (tmp_path / f"{number}.img").write_bytes(content)
            for references in (False, True):
                with pytest.raises(ImageError):
                    open_image(str(tmp_path / f"{number}.img"), Opening(references=references))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_diff_does_not_look_at_a_backing_file_unasked(victim: Victim, tmp_path: Path) -> None:
    (tmp_path / "top.qcow2").write_bytes(qcow2(str(victim.path), "raw"))
    (tmp_path / "old.img").write_bytes(bytes(SIZE))
    victim.touched()
    for old in ([], [str(tmp_path / "old.img")]):
        with pytest.raises(ImageError, match="--references"):
            bmap(["diff", *old, str(tmp_path / "top.qcow2")])
    assert not victim.touched()


def test_the_file_that_was_looked_at_is_the_file_that_is_opened(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and QEMU's somebody puts another file in the place of the image."""
    need("qemu-img", "qemu-utils")
    image, real = tmp_path / "disk.qcow2", qemu.Server.__init__
    (tmp_path / "good.raw").write_bytes(b"good".ljust(SIZE, b"g"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "good.raw", image)

    def swapped(*args: object, **named: object) -> None:
        image.unlink()
        image.symlink_to(victim.path)
        real(*args, **named)

    monkeypatch.setattr(qemu.Server, "__init__", swapped)
    victim.touched()
    with contextlib.closing(open_image(str(image))) as reader:
        assert reader.read(0, SIZE) == (tmp_path / "good.raw").read_bytes()
    assert not victim.touched()


# ---- VMDKs that are what they seem -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subformat",
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"],
)
def test_vmdks_are_read_as_before(tmp_path: Path, subformat: str) -> None:
    need("qemu-img", "qemu-utils")
    data = b"".join(number.to_bytes(8, "big") * 64 for number in range(SIZE // 512))
    (tmp_path / "disk.raw").write_bytes(data)
    run(
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        f"subformat={subformat}",
        tmp_path / "disk.raw",
        tmp_path / "disk.vmdk",
    )
    with contextlib.closing(open_image(str(tmp_path / "disk.vmdk"), Opening(references=True))) as reader:
        assert reader.read(0, reader.size) == data


def test_a_vmdk_of_many_pieces(tmp_path: Path) -> None:
    """Extents in one file and in several, of zeroes, read-only ones; then a write through the same
    description."""
    need("qemu-nbd", "qemu-utils")
    one, two = bytes(range(256)) * 16, bytes(range(255, -1, -1)) * 16
    (tmp_path / "one").write_bytes(bytes(512) + one)
    (tmp_path / "two").write_bytes(two)
    lines = ('RW 4 FLAT "one" 1', "RW 8 ZERO", 'RDONLY 8 FLAT "two" 0', 'RW 4 FLAT "one" 5')
    (tmp_path / "disk.vmdk").write_text(text(*lines, kind="twoGbMaxExtentFlat"))
    with contextlib.closing(open_image(str(tmp_path / "disk.vmdk"), Opening(references=True))) as reader:
        assert reader.read(0, reader.size) == one[:2048] + bytes(4096) + two + one[2048:]
    with contextlib.closing(RawReader(str(tmp_path / "disk.vmdk"))) as image:
        with pytest.raises(ImageError, match="some of its extents are read-only"):
            Graph(image, "vmdk", Opening(references=True), write=True)
        (tmp_path / "disk.vmdk").write_text(text(lines[0], 'RW 8 FLAT "two" 0', kind="twoGbMaxExtentFlat"))
    with (
        contextlib.closing(RawReader(str(tmp_path / "disk.vmdk"))) as image,
        contextlib.closing(Graph(image, "vmdk", Opening(references=True), write=True)) as graph,
    ):
        writer = qemu.connected(NbdWriter, "this test", graph, [])
    with contextlib.closing(writer):
        writer.write(2048, np.frombuffer(b"x" * 512, np.uint8))
        writer.flush()
    assert (tmp_path / "two").read_bytes() == b"x" * 512 + two[512:]
    assert (tmp_path / "one").read_bytes() == bytes(512) + one


# ---- the second wall ---------------------------------------------------------------------------------------


class Trusting(Graph):
    """No first wall: QEMU gets the image as it is."""

    def _image(
        self, image: RawReader, format: str, opening: Opening, write: bool, depth: int
    ) -> dict[str, object]:
        return {"driver": format, "file": self._file(image.fileno(), image.name, write)}


def opened(image: Path, format: str, write: bool = False) -> NbdReader:
    with (
        contextlib.closing(RawReader(str(image))) as reader,
        contextlib.closing(Trusting(reader, format, Opening(references=True), write)) as graph,
    ):
        return qemu.connected(
            NbdWriter if write else NbdReader, "this test", graph, [] if write else ["--read-only"]
        )


def passing(victim: Victim, folder: Path) -> dict[str, tuple[bytes, str]]:
    """Images that would pass, if there were no first wall."""
    hint = f'# parentFileNameHint="{folder}/second.vmdk"\n'.encode()
    return {
        "extent": (text(f'RW 2048 FLAT "{victim.path}" 0').encode(), "vmdk"),
        "parent": (bytes(with_text(empty_sparse(folder), hint)), "vmdk"),
        "backing": (qcow2(str(victim.path), "raw"), "qcow2"),
        "json": (
            qcow2(f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{victim.path}"}}}}', "raw"),
            "qcow2",
        ),
        "data": (qcow2(data=str(victim.path)), "qcow2"),
        "qed": (qed(str(victim.path)), "qed"),
    }


def need_landlock() -> None:
    if not confine.walls().landlock:
        pytest.skip("this kernel has no Landlock")


@pytest.mark.parametrize("name", ["extent", "parent", "backing", "json", "data", "qed"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_what_passes_the_first_wall_is_stopped_by_the_second(
    victim: Victim, tmp_path: Path, name: str, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-nbd", "qemu-utils")
    need_landlock()
    content, format = passing(victim, tmp_path)[name]
    image = tmp_path / "hostile"
    image.write_bytes(content)
    victim.touched()
    with pytest.raises(ImageError, match="Permission denied"):
        opened(image, format, write)
    assert not victim.touched()
    monkeypatch.setattr(confine, "popen", confine.popen_outside)
    with contextlib.closing(opened(image, format, write)):
        assert victim.touched(), "without it the same image reaches the file, or this test shows nothing"


def test_the_second_wall_has_no_door_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP, and Unix sockets, which Landlock alone lets pass."""
    need("qemu-nbd", "qemu-utils")
    if not confine.walls().seccomp:
        pytest.skip("no seccomp filter is known for this machine")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        for server, uri in (
            (tcp, f"nbd://127.0.0.1:{tcp.getsockname()[1]}/"),
            (unix, f"nbd+unix:///?socket={tmp_path}/s"),
        ):
            server.settimeout(0)
            (tmp_path / "hostile").write_bytes(qcow2(uri, "raw"))
            with pytest.raises(ImageError, match="Permission denied"):
                opened(tmp_path / "hostile", "qcow2")
            with pytest.raises(BlockingIOError):
                server.accept()
            with monkeypatch.context() as patch:
                patch.setattr(confine, "popen", confine.popen_outside)
                patch.setattr(qemu, "TIMEOUT", 0.5)
                patch.setattr(qemu, "LAST_WORDS", 0.1)
                with pytest.raises(ImageError):
                    opened(tmp_path / "hostile", "qcow2")
                server.accept()[0].close()


def test_a_program_behind_the_wall(tmp_path: Path) -> None:
    """It reads and writes what it was handed, and nothing else; we ourselves are as free as before."""
    need_landlock()
    files = {name: tmp_path / name for name in ("read", "write", "other")}
    for path in files.values():
        path.write_text("before")
    script = f"""
cat /proc/self/fd/$1; echo after > /proc/self/fd/$2 && cat /proc/self/fd/$2
for bad in 'cat {files["other"]}' 'echo x > /proc/self/fd/'$1 'echo x > {files["other"]}' 'echo x > \
{tmp_path}/new' 'ls {tmp_path}' 'rm {files["other"]}' 'cat /etc/passwd' 'kill -0 {os.getpid()}'
do sh -c "$bad" 2> /dev/null && echo "$bad"; done; echo end"""
    with open(files["read"]) as read, open(files["write"], "r+") as write:
        process = confine.popen(
            shutil.which("sh") or "",
            ["sh", "-c", script, "sh", str(read.fileno()), str(write.fileno())],
            [read.fileno()],
            [write.fileno()],
            stdout=subprocess.PIPE,
        )
        said = process.communicate()[0].decode()
    allowed = [f"kill -0 {os.getpid()}"] if confine.walls().landlock < 6 else []
    assert said.splitlines() == ["beforeafter", *allowed, "end"]
    assert files["other"].read_text() == "before"
    (tmp_path / "ours").write_text("x")
    socket.socket().close()


def test_a_block_device_is_opened_behind_the_wall(tmp_path: Path) -> None:
    need_root()
    need("qemu-nbd", "qemu-utils")
    (tmp_path / "a.qcow2").write_bytes(qcow2().ljust(1 << 20, b"\0"))
    device = run("losetup", "-f", "--show", tmp_path / "a.qcow2").decode().strip()
    try:
        with contextlib.closing(open_image(device)) as reader:
            assert reader.read(0, SIZE) == bytes(SIZE)
        with contextlib.closing(opened(Path(device), "qcow2", write=True)) as writer:
            assert isinstance(writer, NbdWriter)
            writer.write(4096, np.frombuffer(b"x" * 512, np.uint8))
            writer.flush()
        with contextlib.closing(open_image(device)) as reader:
            assert reader.read(4096, 512) == b"x" * 512
    finally:
        run("losetup", "-d", device)


def test_the_second_wall_holds_for_ordinary_users() -> None:
    need("qemu-nbd", "qemu-utils")
    need_landlock()
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else: all other tests show it for this user")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name)
        path = secret(folder)
        (folder / "hostile").write_bytes(text(f'RW 2048 FLAT "{path}" 0').encode())
        (folder / "good").write_bytes(qcow2())
        with contextlib.closing(Victim(path)) as watched:
            script = f"""
import sys; sys.path[:] = {[str(Path(__file__).parent), *sys.path]!r}
from test_walls import opened
from pathlib import Path
from virt_bmap.open import open_image
print(open_image({str(folder / "good")!r}).size)
try: opened(Path({str(folder / "hostile")!r}), "vmdk")
except Exception as error: print(error)
"""
            done = subprocess.run(
                [sys.executable, "-B", "-c", script],
                user=65534,
                group=65534,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                text=True,
                env={**os.environ, "HOME": "/", "TMPDIR": "/tmp"},
            )
            if "PermissionError" in done.stderr and "site-packages" in done.stderr:
                pytest.skip("other users can't read this Python")
            assert done.stdout.startswith(f"{SIZE}\n"), done.stderr
            assert "Permission denied" in done.stdout
            assert not watched.touched()


def test_without_walls_everything_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has neither, and a program whose libraries lie where the wall does not let it look."""
    need("qemu-nbd", "qemu-utils")
    (tmp_path / "a.qcow2").write_bytes(qcow2())
    monkeypatch.setattr(confine, "walls", lambda: confine.Walls(0, False))
    with contextlib.closing(open_image(str(tmp_path / "a.qcow2"))) as reader:
        assert reader.read(0, 512) == bytes(512)
    monkeypatch.undo()
    odd = tmp_path / "odd/place/qemu-nbd"
    odd.parent.mkdir(parents=True)
    (tmp_path / "library").write_text("it is needed\n")
    odd.write_text(
        f'#!/bin/sh\nread -r line < {tmp_path}/library || exit 127\nexec {shutil.which("qemu-nbd")} "$@"\n'
    )
    odd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{odd.parent}:{os.environ['PATH']}")
    with contextlib.closing(open_image(str(tmp_path / "a.qcow2"))) as reader:
        assert reader.read(0, 512) == bytes(512)
    assert not confine.walls().landlock or not confine.bears(str(odd))


def test_it_can_be_asked_which_walls_stand() -> None:
    done = run(sys.executable, "-P", "-m", "virt_bmap.host.confine").decode().splitlines()
    assert [line.split(":")[0] for line in done] == ["files", "sockets"]
    assert "Landlock" in done[0]
    assert ("no wall" in done[0]) == (not confine.walls().landlock)


# ---- what is no disk ---------------------------------------------------------------------------------------


def test_what_is_no_disk_is_named_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as link:
        link.bind(str(tmp_path / "socket"))
    master, slave = os.openpty()
    try:
        kinds = {
            "fifo": "a FIFO",
            "socket": "a socket",
            ".": "a directory",
            "/dev/null": "a character device",
            os.ttyname(slave): "a character device",
        }
        for name, words in kinds.items():
            with pytest.raises(ImageError, match=f"is {words}, not a disk image"):
                RawReader(str(tmp_path / name))
    finally:
        os.close(master)
        os.close(slave)
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(ImageError, match="is a FIFO"):
        RawReader(str(tmp_path / "link"))
    with pytest.raises(ImageError, match="NUL"):
        RawReader("a\0b")


@pytest.mark.parametrize("name", ["fifo", "/dev/tty", "/dev/zero"])
def test_no_command_waits_for_what_is_no_disk(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    for words in ("map", "info", "check", "explain {} 0", "lookup {} 0", "locate {} /dev/sda /x",
        "cat {} /dev/sda /x", "dump {} /dev/sda out", "sparsify {} out",
                  "sparsify --in-place {}", "sparsify --estimate {}", "diff {}", "diff {} {}",
                  "watch {} -- true", "watch --map {} {} -- true", "report {} -o x.html", "verify {}",
                  "extract {} /dev/sda /x"):  # fmt: skip
        command = (words if "{}" in words else f"{words} {{}}").replace("{}", name).split()
        signal.alarm(20)
        with pytest.raises((BmapError, SystemExit)):
            bmap(command)
        signal.alarm(0)


def test_a_backing_file_that_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "top.qcow2").write_bytes(qcow2("fifo", "raw"))
    with pytest.raises(ImageError, match="fifo: is a FIFO"):
        open_image(str(tmp_path / "top.qcow2"), Opening(references=True))


# ---- images in use -----------------------------------------------------------------------------------------


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Path]:
    """An overlay that somebody has open for writing."""
    need("qemu-nbd", "qemu-utils")
    need("mke2fs", "e2fsprogs")
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    run("mke2fs", "-q", "-F", tmp_path / "base.raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "top.qcow2")
    server = subprocess.Popen(
        ["qemu-nbd", "--persistent", "-f", "qcow2", "-k", tmp_path / "s", tmp_path / "top.qcow2"]
    )
    wait_for_socket(tmp_path / "s")
    yield tmp_path / "top.qcow2"
    server.terminate()
    server.wait()


def test_an_image_in_use_is_read_when_that_is_asked_for(used: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is in use: .*-U \(--force-share\)"):
        open_image(str(used), Opening(references=True))
    with contextlib.closing(open_image(str(used), Opening(references=True, force_share=True))) as reader:
        assert reader.read(0, 4096) == (tmp_path / "base.raw").read_bytes()[:4096]
    for words in ("info", "map -q -o -", "explain {} 0", "sparsify --estimate"):
        command, *rest = words.split()
        shared = [
            "-U",
            "--references",
            *(str(used) if word == "{}" else word for word in rest),
            *([] if "{}" in words else [str(used)]),
        ]
        assert bmap([command, *shared]) == 0
    for words in ("sparsify --in-place", "watch --write"):
        with pytest.raises(BmapError, match="-U is for reading"):
            bmap(
                [
                    *words.split(),
                    "-U",
                    "--references",
                    str(used),
                    *(["--", "true"] if "watch" in words else []),
                ]
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_opens_disks_can_share_them(command: str) -> None:
    options = {option for action in parser(command)._actions for option in action.option_strings}
    assert ("--references" in options) == ({"-U", "--force-share"} <= options)


# ---- a folder of evidence ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module for each name that could be imported, and a program for each that could be
    called; all leave a mark."""
    folder = tmp_path_factory.mktemp("evidence")
    names = {*sys.stdlib_module_names, "numpy", "pyarrow", "rich", "duckdb", "plotly", "textual", "qemu",
        "guestfs", "cryptography", "virt_bmap", "nbdkit",
             "sitecustomize", "usercustomize"} - {"__main__"}  # fmt: skip
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'PWNED')!r}, 'a').write('module {name}\\n')\n"
        )
    for name in (
        "qemu-nbd",
        "qemu-img",
        "nbdkit",
        "sh",
        "python3",
        "qemu-system-x86_64",
        "guestfish",
        "sfdisk",
        "mke2fs",
        "tar",
        "cp",
        "losetup",
        "mount",
        "mkswap",
    ):
        (folder / name).write_text(f"#!/bin/sh\necho program {name} >> {folder}/PWNED\nexit 1\n")
        (folder / name).chmod(0o755)
    (folder / "empty").mkdir()
    run("mke2fs", "-q", "-t", "ext4", "-d", folder / "empty", folder / "fs.img", "4M")
    need("qemu-img", "qemu-utils")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "fs.img", folder / "fs.qcow2")
    run(PROGRAM, "map", "-q", "-o", folder / "map.parquet", folder / "fs.img")
    return folder


RUNS = {
    "map": "map -q -o - {d}/fs.qcow2", "lookup": "lookup {d}/fs.qcow2 1024",
    "explain": "explain {d}/fs.qcow2 1024", "locate": "locate {d}/fs.qcow2 /dev/sda /lost+found",
    "info": "info {d}/fs.qcow2", "check": "check {d}/fs.qcow2", "verify": "verify --sample 1 {d}/none",
    "watch": "watch -q -o {d}/t.parquet {d}/fs.qcow2 -- /bin/true",
    "trace": "trace import {d}/none --map {d}/map.parquet -o {d}/x.parquet",
    "profile": "profile {d}/t.parquet -o {d}/p", "replay": "replay {d}/p {d}/fs.img",
    "report": "report {d}/map.parquet -o {d}/r.html", "dump": "dump -q {d}/fs.qcow2 /dev/sda {d}/out.img",
    "cat": "cat {d}/fs.qcow2 /dev/sda /lost+found", "extract": "extract {d}/fs.qcow2 /dev/sda / -C {d}/empty",
    "sparsify": "sparsify -q --format qcow2 -o qcow2 {d}/fs.qcow2 {d}/copy.qcow2",
    "make": "make fs:ext4:8M {d}/made.qcow2", "sql": "sql {d}/map.parquet",
    "diff": "diff {d}/fs.img {d}/fs.qcow2", "freeze": "freeze --mount {d}/empty -- /bin/true",
}  # fmt: skip


@pytest.mark.parametrize("command", [*RUNS, "bmaplogger", "sparsify --in-place", "watch a raw disk"])
def test_nothing_of_the_current_folder_is_run(evidence: Path, command: str) -> None:
    """With the search path that some have: an empty entry at its end, and one in it that is relative."""
    words = {
        "bmaplogger": f"file={evidence}/fs.img logfile={evidence}/log --run /bin/true",
        "sparsify --in-place": f"sparsify -q --in-place {evidence}/fs.qcow2",
        "watch a raw disk": f"watch -q {evidence}/fs.img -- /bin/true",
    }.get(command) or RUNS[command].format(d=evidence)  # fmt: skip
    program = LOGGER if command == "bmaplogger" else PROGRAM
    (evidence / "PWNED").unlink(missing_ok=True)
    env = {**os.environ, "PATH": f".:{os.environ['PATH']}::/usr/sbin:/sbin:"}
    subprocess.run([program, *words.split()], cwd=evidence, env=env, capture_output=True, timeout=120)
    assert not (evidence / "PWNED").exists(), (evidence / "PWNED").read_text()


def test_every_command_was_tried() -> None:
    assert set(RUNS) == set(COMMANDS)
