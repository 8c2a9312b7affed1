"""Errors name the culprit: the program, the disk, the file or the stream that failed, and nobody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import need, run
from virt_bmap import cli
from virt_bmap.core.errors import ImageError, MissingTool, refused
from virt_bmap.host import programs
from virt_bmap.open import open_image


def program(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "virt_bmap", *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "8M")
    return tmp_path / "a.qcow2"


@pytest.mark.parametrize("content", [b"\x7fELF no program at all", b"#!/no/such/interpreter\n"])
def test_a_program_that_cant_be_run_is_named(
    qcow2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    broken = tmp_path / "bin" / "qemu-nbd"
    broken.parent.mkdir()
    broken.write_bytes(content)
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(MissingTool, match=f"^{broken}: can't be run: .*apt-get install qemu-utils"):
        open_image(str(qcow2))
    done = program("info", qcow2)
    assert done.returncode == 1
    assert b"standard output" not in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_standard_output_is_named_where_it_is_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with open("/dev/full", "wb") as full:
        done = program("info", disk, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"virt-bmap: standard output can't be written: No space left on device\n"


def test_nobody_reads_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    end, pipe = os.pipe()
    os.close(end)
    done = program("info", disk, stdout=pipe)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/tmp/x"), "/tmp/x: No space left on device"),
        (OSError(5, "Input/output error", b"/dev/sd\xff"), "/dev/sd"),
        (OSError(5, "Input/output error"), "the system refused what virt-bmap asked for at "),
    ],
)
def test_what_nobody_expected_names_its_file(error: OSError, words: str) -> None:
    def system() -> None:
        raise error

    with pytest.raises(OSError, match=r"left|output") as raised:
        system()
    assert refused(raised.value).startswith(words)
    assert "standard output" not in refused(raised.value)


def test_no_room_for_temporary_files(
    qcow2: Path,
) -> None:
    """A file system that takes no more stands where TMPDIR does: the line names the place."""
    code = (
        "import errno, os, tempfile\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/full/tmp')\n"
        "tempfile.TemporaryFile = tempfile.mkdtemp = full\n"
        "import sys; from virt_bmap import cli; sys.argv[1:] = ['info', sys.argv[1]]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(qcow2)], capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"virt-bmap: /full/tmp: No space left on device\n"


def test_a_device_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    reader = open_image(str(disk))
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(ImageError, match=f"^{disk}: can't be read at byte 0x80000: Input/output error"):
        reader.read(1 << 19, 512)
    reader.close()


def test_what_is_not_installed_is_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not issubclass(MissingTool, ImageError)
    monkeypatch.setattr(programs, "find", lambda *_: None)
    with pytest.raises(MissingTool, match="needs qemu-nbd, which is not installed"):
        programs.required("qemu-nbd", "a.qcow2: a qcow2 image", "apt-get install qemu-utils")


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from virt_bmap.show import sql

    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingTool, match=r"pip install 'virt-bmap\[sql\]'"):
        sql.connect([])


def test_the_in_process_door_raises_what_it_raises() -> None:
    with pytest.raises(ImageError, match="/no/such/disk"):
        cli.run(["info", "/no/such/disk"])
