"""No output destroys what is read, or what is none of ours: every command, every option that writes."""

import argparse
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import need, need_root, run, unmount, wait_for_socket
from virt_bmap.cli import parser
from virt_bmap.cli import run as bmap
from virt_bmap.commands import COMMANDS
from virt_bmap.commands.paths import Input, Output
from virt_bmap.core.errors import BmapError, ImageError, OutputError, UsageError
from virt_bmap.host import devices
from virt_bmap.survey.maps import map_disks

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "virt_bmap"]
LOGGER = [sys.executable, "-m", "virt_bmap.bmaplogger"]

NO_FILES = {
    "nested": "a path inside a guest", "session": "a number, or where it begins",
    "range": "bytes", "status": "letters", "block_size": "bytes",
    "device": "a volume's name", "sample": "a number", "seed": "a number", "bitmap": "a bitmap's name",
    "depth": "a number", "limit": "a number", "command": "run, not read", "top": "a number",
    "stream": "a name", "title": "text", "agent": "a socket", "mountpoint": "inside a guest",
    "timeout": "seconds", "spec": "words", "mount": "a folder, frozen and not written",
    "directory": "a folder, in which nothing is replaced", "port": "a number",
    "socket": "made anew, or in the place of a socket that nobody listens at",
}  # fmt: skip
"""Arguments that name no file on this host, or none that could be overwritten."""
BY_ITSELF = {("dump", "arguments"), ("sparsify", "disk")}
"""Arguments of several kinds, the last of which is an output: the command looks at them itself."""
NUMBERS = (int, float)

TEMPLATES: dict[tuple[str, str], list[str]] = {
    ("map", "output"): ["map", "-q", "{disk}", "-o", "{out}"],
    ("lookup", "output"): ["lookup", "{disk}", "0", "--ranges", "{ranges}", "-o", "{out}"],
    ("locate", "output"): ["locate", "{disk}", "/dev/sda", "/file", "-o", "{out}"],
    ("info", "output"): ["info", "{disk}", "-o", "{out}"],
    ("check", "output"): ["check", "{disk}", "-o", "{out}"],
    ("diff", "output"): ["diff", "{old}", "{disk}", "--force", "-o", "{out}"],
    ("watch", "output"): ["watch", "-q", "{disk}", "--map", "{map}", "-o", "{out}", "--", "true"],
    ("watch", "log"): ["watch", "{disk}", "--map", "{map}", "--log", "{out}", "--", "true"],
    ("watch", "summary"): ["watch", "-q", "{disk}", "--map", "{map}", "--summary", "{out}", "--", "true"],
    ("trace", "output"): ["trace", "import", "{log}", "--map", "{map}", "-o", "{out}"],
    ("profile", "output"): ["profile", "{trace}", "--map", "{map}", "-o", "{out}"],
    ("report", "output"): ["report", "{map}", "{trace}", "-o", "{out}"],
    ("sql", "output"): ["sql", "select 1 as one", "given={map}", "-o", "{out}"],
    ("make", "out"): ["make", "disk:4M", "{out}", "--tree", "{tree}", "--key-file", "{log}"],
    ("dump", "arguments"): ["dump", "-q", "{disk}", "/dev/sda", "{out}"],
    ("sparsify", "disk"): ["sparsify", "-q", "{disk}", "{out}"],
}
"""How each output is asked for; what stands in braces and is not `out` is read."""
ENDINGS = {
    "lookup": ".csv",
    "locate": ".jsonl",
    "info": ".parquet",
    "check": ".csv",
    "diff": ".csv",
    "sql": ".parquet",
}
FULL = {("lookup", "output"): ["lookup", "{disk}", "--ranges", "{ranges}", "-o", "{out}"],
    ("make", "out"): ["make", "disk:4M", "{out}"],
        ("report", "output"): ["report", "{map}", "-o", "{out}"]}  # fmt: skip
"""Where the template is only for being refused: how it would work."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A disk and what belongs to it."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("source")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 1000)
    made = {name: folder / name for name in ("disk", "old", "ranges", "map", "log", "trace", "tree")}
    made["disk"].write_bytes(bytes(8 * MIB))
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, made["disk"])
    shutil.copyfile(made["disk"], made["old"])
    made["ranges"].write_text("0,4096\n4096,4096\n")
    made["log"].write_text("fio version 2 iolog\nf add\nf open\nf read 0 4096\nf read 4096 4096\n")
    bmap(["-q", "-o", str(made["map"]) + ".parquet", str(made["disk"])])
    os.rename(str(made["map"]) + ".parquet", made["map"])
    bmap(["trace", "import", str(made["log"]), "--map", str(made["map"]), "-o", str(made["trace"])])
    return made


@pytest.fixture
def files(source: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that may be destroyed."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, path in source.items():
        shutil.copytree(path, folder / name) if path.is_dir() else shutil.copyfile(path, folder / name)
    return {name: folder / name for name in source}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def filled(template: list[str], files: dict[str, Path], out: object) -> list[str]:
    return [word.format(**files, out=out) for word in template]


def takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0 and not action.choices


# ---- the parsers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_says_what_it_is(command: str) -> None:
    for action in parser(command)._actions:
        known = (
            isinstance(action.type, (Input, Output))
            or action.type in NUMBERS
            or (command, action.dest) in BY_ITSELF
        )
        assert not takes_value(action) or known or action.dest in NO_FILES, (
            f"{command}: does {action.dest} name a file that is read, or written?"
        )


def test_every_output_is_tried_here() -> None:
    found = {
        (command, action.dest)
        for command in COMMANDS
        for action in parser(command)._actions
        if isinstance(action.type, Output)
    }
    assert found | BY_ITSELF == set(TEMPLATES)


@pytest.mark.parametrize("command", sorted({command for command, _ in TEMPLATES}))
def test_every_command_that_writes_can_be_told_to(command: str) -> None:
    assert "--force" in {option for action in parser(command)._actions for option in action.option_strings}


# ---- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link", "forced"])
@pytest.mark.parametrize(("command", "option"), TEMPLATES)
def test_what_is_read_is_not_overwritten(
    command: str, option: str, way: str, files: dict[str, Path], tmp_path: Path
) -> None:
    template = TEMPLATES[command, option]
    read = [
        word.partition("{")[2].rstrip("}")
        for word in template
        if "{" in word and word != "{out}" and word != "{tree}"
    ]
    assert read
    for name in read:
        for path in files.values():  # endings say what is written
            if path.is_file():
                path.chmod(0o640)
        out = tmp_path / f"{name}-out{ENDINGS.get(command, '')}"
        os.link(files[name], out) if way != "symbolic link" else out.symlink_to(files[name])
        if way == "itself" and command not in ENDINGS:
            out = files[name]
        before = {name: digest(path) for name, path in files.items() if path.is_file()}
        with pytest.raises(UsageError, match="would overwrite"):
            bmap(
                [
                    *filled(template[:1], files, out),
                    *(["--force"] if way == "forced" else []),
                    *filled(template[1:], files, out),
                ]
            )
        assert {name: digest(path) for name, path in files.items() if path.is_file()} == before
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_files_that_images_refer_to(files: dict[str, Path], tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils")
    base, data, top = tmp_path / "base.qcow2", tmp_path / "data.raw", tmp_path / "top.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", "-o", f"data_file={data}", files["disk"], base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    for name in (base, data):
        before = digest(name)
        for arguments in (
            ["-q", "-o", name, top],
            ["--host-offsets", "-q", "-o", name, top],
            ["dump", top, "/dev/sda", name],
            ["sparsify", top, name],
        ):
            # a qemu-nbd of the command before may still be about to let go of it
            with pytest.raises(BmapError, match=r"would overwrite|is in use"):
                bmap([*map(str, arguments), "--references", "--force"])
            assert digest(name) == before


def test_a_tree_is_not_put_into_itself(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="lies in the tree"):
        bmap(["make", "fs:ext4:16M", str(files["tree"] / "sub.img"), "--tree", str(files["tree"])])
    assert os.listdir(files["tree"]) == ["file"]


def test_what_a_killed_run_left_may_be_read(files: dict[str, Path], tmp_path: Path) -> None:
    """Its hidden name is the one that the next run takes; not when it is what that run reads."""
    left = tmp_path / ".disk.img.virt-bmap"
    shutil.copyfile(files["disk"], left)
    assert bmap(["-q", "-o", str(tmp_path / "disk.img"), str(left)]) == 0
    assert digest(left) == digest(files["disk"])
    assert bmap(["-q", "-o", str(tmp_path / "disk.img"), str(files["disk"])]) == 0
    assert not left.exists()


def test_keys(files: dict[str, Path], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    for kind in ("file", "header"):
        with pytest.raises(UsageError, match="would overwrite"):
            bmap(["-q", "-o", str(key), "--key", f"all:{kind}:{key}", str(files["disk"])])


def test_standard_output_and_input(files: dict[str, Path]) -> None:
    before = digest(files["disk"])
    done = subprocess.run(
        f"{' '.join(PROGRAM)} -q -o - {files['disk']} >> {files['disk']}",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "standard output: would overwrite" in done.stderr
    done = subprocess.run(
        f"{' '.join(PROGRAM)} trace import - -o {files['log']} --force < {files['log']}",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "would overwrite standard input" in done.stderr
    assert digest(files["disk"]) == before


def test_one_file_for_two_results(files: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UsageError, match="is named for two results"):
        bmap(["watch", str(files["disk"]), "--log", out, "--summary", out, "--", "true"])


def test_bmaplogger(files: dict[str, Path], tmp_path: Path) -> None:
    need("nbdkit", "nbdkit")
    before = digest(files["disk"])
    for log in (files["disk"], tmp_path / "link"):
        if log != files["disk"]:
            log.symlink_to(files["disk"])
        done = subprocess.run(
            [*LOGGER, f"file={files['disk']}", f"logfile={log}", "force=true", "--run", "true"],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, digest(files["disk"])) == (1, before)
        assert "would overwrite" in done.stderr
    mine = tmp_path / "mine"
    mine.write_text("dear diary\n")
    command = [*LOGGER, "-r", f"file={files['disk']}", f"logfile={mine}", "--run", "true"]
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert mine.read_text() == "dear diary\n"
    assert subprocess.run([*command, "force=true"], capture_output=True).returncode == 0


# ---- what is none of ours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "option"), TEMPLATES)
def test_what_is_none_of_ours_is_replaced_with_force_only(
    command: str, option: str, files: dict[str, Path], tmp_path: Path
) -> None:
    if command == "watch":
        need("nbdkit", "nbdkit")
    if command == "report":
        pytest.importorskip("plotly")
    if command == "sql":
        pytest.importorskip("duckdb")
    template = [
        word
        for word in FULL.get((command, option), TEMPLATES[command, option])
        if word != "--force" or command != "diff"
    ]
    out = tmp_path / f"out{ENDINGS.get(command, '')}"
    arguments = filled(template, files, out)
    for foreign in (
        b"dear diary\nsecond page\n",
        b"PAR1" + bytes(100) + b"PAR1",
        b"a,b\n1,2\n",
        b'{"a": 1}\n',
        b"<!doctype html><title>mine</title>",
    ):
        out.write_bytes(foreign)
        with pytest.raises(UsageError, match="--force replaces it"):
            bmap(arguments)
        assert out.read_bytes() == foreign
    assert bmap([arguments[0], "--force", *arguments[1:]]) == 0
    assert out.read_bytes() != foreign
    whole = TEMPLATES[command, option][-1] != "true" and (command, option) not in {
        ("make", "out"),
        *BY_ITSELF,
    }
    if whole:  # its own result is replaced without a word
        assert bmap(arguments) == 0
        out.write_bytes(b"")  # and so is nothing at all
        assert bmap(arguments) == 0


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_older_results_are_known(ending: str, files: dict[str, Path], tmp_path: Path) -> None:
    out, disk, trace = tmp_path / f"out.{ending}", str(files["disk"]), str(files["trace"])
    for arguments in (
        ["lookup", disk, "0"], ["lookup", disk, "--ranges", str(files["ranges"])],
        ["locate", disk, "/dev/sda", "/file"], ["info", disk],
        *(["diff", str(files["old"]), disk, "--by", by] for by in ("file", "directory", "change", "kind",
                "filesystem")),
        ["profile", "--compare", trace, trace],
        ["profile", "--never-read", "--map", str(files["map"]), trace],
    ):  # fmt: skip
        out.unlink(missing_ok=True)
        for _ in range(2):
            assert bmap([*arguments, "-o", str(out)]) == 0
        other = tmp_path / f"other.{ending}"
        other.write_text("x,y\n1,2\n")
        with pytest.raises(UsageError):
            bmap([*arguments, "-o", str(other)])


def test_logs_and_summaries_of_a_watch_are_known(files: dict[str, Path], tmp_path: Path) -> None:
    need("nbdkit", "nbdkit"), need("nbdcopy", "libnbd-bin")
    log, summary, trace = (str(tmp_path / name) for name in ("log", "summary", "trace"))
    for _ in range(2):
        arguments = ["watch", str(files["disk"]), "--log", log, "--summary", summary, "-o", trace]
        assert bmap([*arguments, "--", "sh", "-c", "nbdcopy $uri null:"]) == 0
        assert min(map(os.path.getsize, (log, summary, trace))) > 0


def test_modes_owners_and_links_are_kept(files: dict[str, Path], tmp_path: Path) -> None:
    target, link = tmp_path / "map", tmp_path / "link"
    target.write_bytes(b"")
    target.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(target, 12345, 54321)
    link.symlink_to(target)
    before = target.stat()
    assert bmap(["-q", "-o", str(link), str(files["disk"])]) == 0
    after = target.stat()
    assert link.is_symlink()
    assert after.st_size
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "new")
    assert bmap(["-q", "-o", str(dangling), str(files["disk"])]) == 0
    assert (tmp_path / "new").stat().st_size
    assert bmap(["-q", "-o", "/dev/null", str(files["disk"])]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- devices -----------------------------------------------------------------------------------------------


@pytest.fixture
def loop(files: dict[str, Path]) -> Iterator[str]:
    """A loop device of the disk."""
    need_root()
    device = run("losetup", "-f", "--show", files["disk"]).decode().strip()
    yield device
    run("losetup", "-d", device)


def test_a_loop_device_and_its_file(loop: str, files: dict[str, Path]) -> None:
    before = digest(files["disk"])
    for read, out in ((files["disk"], loop), (loop, files["disk"])):
        for arguments in (
            ["-q", "-o", out, read],
            ["dump", read, "/dev/sda", out],
            ["report", read, "-o", out],
        ):
            with pytest.raises(BmapError, match="would overwrite"):
                bmap([*map(str, arguments), "--force"])
    run("blockdev", "--flushbufs", loop)
    assert digest(files["disk"]) == before


def test_a_block_device_needs_force_and_must_not_be_used(
    loop: str, files: dict[str, Path], tmp_path: Path
) -> None:
    before = digest(files["disk"])
    arguments = ["-q", "-o", loop, str(files["old"])]
    with pytest.raises(UsageError, match="is a block device; --force"):
        bmap(arguments)
    root = tmp_path / "root"
    root.mkdir()
    run("mount", "-o", "ro", loop, root)
    try:
        with pytest.raises(OutputError, match="is in use"):
            bmap([*arguments, "--force"])
    finally:
        unmount(root)
    assert digest(files["disk"]) == before
    assert bmap([*arguments, "--force"]) == 0
    assert Path(loop).read_bytes()[:2] == b"1 "


def test_partitions_loops_and_mapped_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a folder that looks like sysfs: sda with two partitions, dm-0 and dm-1 on the second, loop0 on a
    file from its second MiB on."""
    monkeypatch.setattr(devices, "SYSFS", str(tmp_path))
    file = tmp_path / "file"
    file.write_bytes(b"")

    def device(folder: str, number: str, **more: str) -> None:
        place = tmp_path / "devices" / folder
        place.mkdir(parents=True)
        (place / "dev").write_text(number + "\n")
        for name, text in more.items():
            path = place / name.replace("_", "/", 1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        (tmp_path / "dev/block").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev/block" / number).symlink_to(place)

    device("sda", "8:0", size="4000")
    device("sda/sda1", "8:1", partition="1", start="100", size="100")
    device("sda/sda2", "8:2", partition="2", start="200", size="3000")
    for name, number in (("dm-0", "253:0"), ("dm-1", "253:1")):
        device(name, number)
        (tmp_path / "devices" / name / "slaves").mkdir()
        (tmp_path / "devices" / name / "slaves/sda2").symlink_to(tmp_path / "devices/sda/sda2")
    device("loop0", "7:0", loop_backing_file=str(file), loop_offset=str(MIB))

    def about(major: int, minor: int) -> os.stat_result:
        return os.stat_result(
            (stat.S_IFBLK, 0, 0, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": os.makedev(major, minor)}
        )

    sda, sda1, sda2, dm0, dm1, loop = (
        about(*numbers) for numbers in ((8, 0), (8, 1), (8, 2), (253, 0), (253, 1), (7, 0))
    )
    expected = {
        (0, 1): True,
        (0, 2): True,
        (1, 2): False,
        (2, 3): True,
        (0, 3): True,
        (1, 3): False,
        (3, 4): False,
        (0, 5): False,
    }
    found = [sda, sda1, sda2, dm0, dm1, loop]
    for (one, other), want in expected.items():
        assert devices.overlap(found[one], found[other]) is want, (one, other)
        assert devices.overlap(found[other], found[one]) is want, (other, one)
    assert devices.overlap(loop, os.stat(file))
    assert not devices.overlap(sda, os.stat(file))


# ---- in use ------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(files: dict[str, Path]) -> Iterator[Path]:
    """A disk that QEMU has open for writing, as that of a running guest."""
    need("qemu-nbd", "qemu-utils")
    place = files["disk"].parent / "s"
    server = subprocess.Popen(["qemu-nbd", "--persistent", "-f", "raw", "-k", place, files["disk"]])
    wait_for_socket(place)
    yield files["disk"]
    server.kill()
    server.wait()


def test_who_writes_asks(guest: Path, files: dict[str, Path], tmp_path: Path) -> None:
    need("nbdkit", "nbdkit")
    before = digest(guest)
    done = subprocess.run([*LOGGER, f"file={guest}", "--run", "true"], capture_output=True, text=True)
    assert (done.returncode, "is in use: QEMU" in done.stderr) == (1, True)
    assert subprocess.run([*LOGGER, "-r", f"file={guest}", "--run", "true"]).returncode == 0
    with pytest.raises(ImageError, match="is in use: QEMU"):
        bmap(["watch", "--write", "-q", str(guest), "--", "true"])
    assert bmap(["watch", "-q", str(guest), "--summary", str(tmp_path / "s"), "--", "true"]) == 0
    with pytest.raises(ImageError, match="is in use: QEMU"):
        bmap(["sparsify", "--in-place", str(guest)])
    for arguments in (
        ["make", "disk:4M", guest],
        ["dump", files["old"], "/dev/sda", guest],
        ["sparsify", files["old"], guest],
        ["-o", guest, files["old"]],
    ):
        with pytest.raises(OutputError, match="is in use: QEMU"):
            bmap([*map(str, arguments), "--force"])
    assert digest(guest) == before


def test_what_is_watched_for_writing_is_locked(files: dict[str, Path], tmp_path: Path) -> None:
    """Meanwhile QEMU does not open it."""
    need("nbdkit", "nbdkit"), need("qemu-io", "qemu-utils")
    command = ["sh", "-c", f"! qemu-io -f raw -c 'write 0 512' {files['disk']} 2> {tmp_path / 'said'}"]
    assert (
        bmap(["watch", "--write", "-q", str(files["disk"]), "--summary", str(tmp_path / "s"), "--", *command])
        == 0
    )
    assert "lock" in (tmp_path / "said").read_text()


def test_who_reads_says_so(guest: Path, tmp_path: Path) -> None:
    for arguments in (
        ["-o", tmp_path / "map", guest],
        ["info", guest],
        ["lookup", guest, "0"],
        ["dump", guest, "/dev/sda", tmp_path / "copy"],
        ["cat", guest, "/dev/sda", "/file"],
        ["explain", guest, "0"],
        ["--host-offsets", "-o", tmp_path / "map", guest],
    ):
        done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True)
        said = [
            line
            for line in done.stderr.decode().splitlines()
            if "is in use: QEMU has it open for writing" in line
        ]
        assert (done.returncode, len(said)) == (0, 1), done.stderr
    done = subprocess.run([*PROGRAM, "-q", "-o", tmp_path / "map", guest], capture_output=True, text=True)
    assert done.stderr == ""
    notes = [row for row in map_disks([str(guest)]).problems.to_pylist() if row["code"] == "in-use"]
    assert [row["severity"] for row in notes] == ["note"]
    assert "QEMU has it open for writing" in notes[0]["detail"]


def test_what_is_not_in_use_is_read_without_a_word(files: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "info", files["disk"]], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_mounted_device_is_in_use(loop: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for option, count in (("rw", 1), ("ro", 0)):
        run("mount", "-o", option, loop, root)
        try:
            done = subprocess.run([*PROGRAM, "info", loop], capture_output=True, text=True)
        finally:
            unmount(root)
        assert done.stderr.count(f"{root} is mounted from it") == count
