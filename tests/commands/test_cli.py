"""The commands as a person calls them: what they print, where they write, and what they say of bad input."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from support import need, run, unmount, wait_for_socket

PROGRAM = [sys.executable, "-m", "virt_bmap"]


def bmap(*arguments: object, cwd: Path | None = None, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, **more)


def fails(*arguments: object, cwd: Path | None = None) -> str:
    """The one line that a failing command says; it exits with 1 and prints nothing else."""
    done = bmap(*arguments, cwd=cwd)
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("virt-bmap: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """GPT; an ext4 with a file, a hard link, a hole and names that are hard to print."""
    need("mke2fs", "e2fsprogs")
    need("sfdisk", "fdisk")
    folder = tmp_path_factory.mktemp("disk")
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_bytes(b"root:x:0:0\n" * 1000)
    os.link(tree / "etc/passwd", tree / "hard")
    with open(tree / "sparse", "wb") as file:
        file.seek(100_000)
        file.write(b"end")
    (tree / "line\nbreak\x1b[31m").write_bytes(b"x" * 5000)
    (tree / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"y" * 5000)
    path = folder / "disk.img"
    with open(path, "wb") as file:
        file.truncate(40 << 20)
    run("sfdisk", "-q", path, stdin=b"label: gpt\nsize=30M,name=system\n")
    run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", tree, "-E", f"offset={1 << 20}", path, "30M")
    return path


def test_mapping_as_the_original_was_called(disk, tmp_path):
    done = bmap("--format", "raw", disk, cwd=tmp_path)
    assert done.returncode == 0, done
    assert re.search(
        r"1 disk, 1 partition, 0 logical volumes, 1 filesystem, 3 directories, 4 files", done.stdout
    )
    lines = (tmp_path / "bmap").read_text().splitlines()
    assert "1 0 1be v /dev/sda" in lines
    assert any(re.fullmatch(r"1 [0-9a-f]+ [0-9a-f]+ f /dev/sda1 /etc/passwd", line) for line in lines)
    assert any(line.endswith(" f /dev/sda1 /line\\x0abreak\\x1b[31m") for line in lines)
    assert any(line.endswith(" f /dev/sda1 /not-utf8-\\xff") for line in lines)
    assert list(tmp_path.iterdir()) == [tmp_path / "bmap"]


def test_map_to_standard_output_keeps_it_clean(disk):
    done = bmap("-o", "-", disk)
    assert all(line.startswith("1 ") for line in done.stdout.splitlines())
    assert "1 filesystem" in done.stderr


def test_saved_maps_answer_like_the_disk(disk, tmp_path):
    assert bmap("map", "-q", "-o", "m.parquet", disk, cwd=tmp_path).stdout == ""
    for command in (
        ["lookup", "--json", None, "0x100000+1M"],
        ["locate", "--json", None, "/dev/sda1", "/etc/passwd"],
        ["info", "--json", None],
    ):
        answers = [
            bmap(*(where if word is None else word for word in command), cwd=tmp_path).stdout
            for where in (disk, "m.parquet")
        ]
        assert answers[0] == answers[1] != ""


def test_lookup_of_every_piece_that_locate_names(disk):
    pieces = [
        json.loads(line)
        for line in bmap("locate", "--json", disk, "/dev/sda1", "/etc/passwd").stdout.splitlines()
    ]
    data = b""
    for piece in pieces:
        owners = [
            json.loads(line)
            for line in bmap("lookup", "--json", disk, f"{piece['start']}-{piece['end']}").stdout.splitlines()
        ]
        owner = next(row for row in owners if row["path"] == "/etc/passwd")
        assert (owner["path"], owner["file_offset"], owner["device"], owner["kind"]) == (
            "/etc/passwd",
            piece["file_offset"],
            "/dev/sda1",
            "data",
        )
        with open(disk, "rb") as file:
            file.seek(piece["start"])
            data += file.read(piece["end"] - piece["start"])
    assert data[:11000] == b"root:x:0:0\n" * 1000
    both = [
        json.loads(line)["path"]
        for line in bmap("lookup", "--json", disk, pieces[0]["start"]).stdout.splitlines()
    ]
    assert {"/etc/passwd", "/hard"} <= set(both)


def test_locate_shows_holes(disk):
    kinds = [
        (p["kind"], p["file_offset"])
        for p in map(json.loads, bmap("locate", "--json", disk, "/dev/sda1", "/sparse").stdout.splitlines())
    ]
    assert kinds == [("hole", 0), ("data", 100_000 // 1024 * 1024)], "blocks of 1 KiB"


def test_info_and_check_say_what_is_there(disk):
    shown = bmap("info", disk).stdout
    for word in ("/dev/sda1", "ext4", "'root'", "'system'", "clean", "30.0 MiB", "gpt"):
        assert word in shown
    checked = bmap("check", disk)
    assert checked.returncode == 0
    proven, unseen = checked.stdout.splitlines()[-2:]
    assert proven == "proven: 2 volumes: owners (2), structure (2), checksums (2), allocator (1)"
    assert unseen == "not looked at: files of /dev/sda1"


def test_check_exits_1_on_a_disagreement(disk, tmp_path):
    """A block of a file marked free in the filesystem's own bitmap, by the filesystem's own tool."""
    broken = tmp_path / "broken.img"
    broken.write_bytes(disk.read_bytes()[1 << 20 : 31 << 20])
    block = int(run("debugfs", "-R", "bmap /etc/passwd 0", broken).split()[-1])
    run("debugfs", "-w", "-R", f"freeb {block}", broken)
    done = bmap("check", broken)
    assert done.returncode == 1
    assert "owned-but-free" in done.stdout
    size = int(re.search(rb"Block size:\s+(\d+)", run("dumpe2fs", "-h", broken))[1])
    assert f"{block * size:#x}-{(block + 1) * size:#x}" in done.stdout


def test_several_disks(disk, tmp_path):
    rows = [json.loads(line) for line in bmap("info", "--json", "-a", disk, "-a", disk).stdout.splitlines()]
    assert [row["device"] for row in rows] == ["/dev/sda", "/dev/sdb", "/dev/sda1", "/dev/sdb1"]
    done = bmap("-o", "-", disk, disk)
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"1", "2"}
    assert "/dev/sdb1" in bmap("lookup", "-a", disk, "-a", disk, "2:0x100000").stdout


# ---- bad input ---------------------------------------------------------------------------------------------


def test_bad_images(tmp_path, disk):
    (tmp_path / "empty").touch()
    (tmp_path / "zeroes").write_bytes(bytes(1 << 20))
    (tmp_path / "noise").write_bytes(os.urandom(1 << 20))
    assert "No such file" in fails("nonexistent", cwd=tmp_path)
    assert "is empty" in fails("empty", cwd=tmp_path)
    assert "nothing known is on this disk" in fails("zeroes", cwd=tmp_path)
    assert "nothing known is on this disk" in fails("noise", cwd=tmp_path)
    assert "is a directory" in fails(".", cwd=tmp_path)
    assert "qemu-nbd can't open it as qcow2" in fails("--format", "qcow2", disk, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "noise", "zeroes"], (
        "nothing half-written"
    )


def test_a_truncated_disk_is_mapped_and_said(disk, tmp_path):
    (tmp_path / "cut").write_bytes(disk.read_bytes()[: 10 << 20])
    done = bmap("cut", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(
        r"error: /dev/sda: /dev/sda1 ends at byte 0x1f00000, but the disk ends at 0xa00000: the "
        r"image is truncated",
        done.stderr,
    )
    assert bmap("check", "cut", cwd=tmp_path).returncode == 1


@pytest.fixture(scope="module")
def encrypted(disk, tmp_path_factory) -> Path:
    """The filesystem of `disk`, encrypted in place by cryptsetup; the passphrase is `secret`."""
    need("cryptsetup", "cryptsetup-bin")
    path = tmp_path_factory.mktemp("luks") / "luks"
    path.write_bytes(disk.read_bytes()[1 << 20 : 31 << 20] + bytes(32 << 20))
    (path.parent / "secret").write_text("secret")
    options = [
        "--key-file",
        path.parent / "secret",
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--resilience",
        "checksum",
    ]
    run(
        "cryptsetup",
        "reencrypt",
        "-q",
        "--encrypt",
        "--reduce-device-size",
        "32M",
        "--hotzone-size",
        "1M",
        *options,
        path,
    )
    return path


def test_encrypted_without_a_key_is_named(encrypted):
    assert "crypto_LUKS" in bmap("info", encrypted).stdout
    checked = bmap("check", encrypted)
    assert checked.returncode == 0
    assert checked.stdout.splitlines()[-1] == "not looked at: content of /dev/sda"
    assert bmap("check", "--strict", encrypted).returncode == 1


def test_encrypted_with_a_key_is_read(encrypted, tmp_path):
    (tmp_path / "key").write_bytes(b"secret\n")
    for words, given in (
        (["--keys-from-stdin"], "wrong\nsecret\n"),
        (["--key", f"all:file:{tmp_path}/key"], ""),
        (["--key", "/dev/sda:key:secret"], ""),
    ):
        done = bmap("info", *words, encrypted, input=given)
        assert "ext4" in done.stdout
        assert "4 files" in done.stdout
    assert bmap("check", "--key", "all:key:secret", encrypted).returncode == 0


def test_a_wrong_key_is_said(encrypted):
    done = bmap("info", "--key", "all:key:wrong", encrypted)
    assert "none of the given keys opens it" in done.stdout
    assert bmap("check", "--key", "all:key:wrong", encrypted).returncode == 1
    assert "a key is given as SELECTOR" in fails("info", "--key", "nonsense", encrypted)
    assert "No such file" in fails("info", "--key", "all:file:/nonexistent", encrypted)


def test_bad_words(disk, tmp_path):
    assert "no disk given" in fails("map")
    assert "unrecognized arguments: --wrong" in fails("--wrong", disk)
    assert "invalid choice" in fails("--format", "nonsense", disk)
    assert "no device /dev/sdq in this map; there are: /dev/sda, /dev/sda1" in fails(
        "locate", disk, "/dev/sdq", "/x"
    )
    assert "no file '/etc/shadow' on /dev/sda1" in fails("locate", disk, "/dev/sda1", "/etc/shadow")
    assert "beyond the end of disk 1" in fails("lookup", disk, "1T")
    assert "there is no disk 2" in fails("lookup", disk, "2:0")
    assert "is not a number of bytes" in fails("lookup", disk, "zzz")
    assert "the range is empty" in fails("lookup", disk, "100-50")
    (tmp_path / "m.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    assert "can't be read as a block map" in fails("lookup", tmp_path / "m.parquet", "0")
    (tmp_path / "text").write_text("1 0 400 v /dev/sda\n1 zz 400 v\n")
    assert "line 2 is not a line of a block map" in fails("lookup", tmp_path / "text", "0")


def test_outputs_that_cant_be_written(disk, tmp_path):
    assert "can't be written: No such file" in fails("-o", tmp_path / "no/such/bmap", disk)
    assert "is a directory" in fails("-o", tmp_path, disk)
    done = subprocess.run(
        f"{' '.join(PROGRAM)} -o - {disk} > /dev/full", shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) or "No space left" in done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small filesystem")
def test_a_full_disk_leaves_nothing_behind(disk, tmp_path):
    run("mount", "-t", "tmpfs", "-o", "size=8k", "none", tmp_path)
    try:
        (tmp_path / "bmap").write_text("1 0 200 b /dev/sda the old map")
        with contextlib.suppress(OSError):
            (tmp_path / "full").write_bytes(bytes(8192))
        for name in ("bmap", "m.parquet"):
            assert "No space left" in fails("-o", tmp_path / name, disk)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bmap", "full"]
        assert (tmp_path / "bmap").read_text().endswith("the old map")
    finally:
        unmount(tmp_path)


def test_a_reader_that_goes_away(disk):
    done = subprocess.run(
        f"{' '.join(PROGRAM)} -o - {disk} | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "1 0 1be b /dev/sda [boot code]\n"
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_interrupted_by_the_user(disk, tmp_path):
    """A server that never answers, and Ctrl-C."""
    need("nbdkit", "nbdkit")
    path = tmp_path / "s"
    log = tmp_path / "log"
    filters = ["--filter=log", "--filter=delay"]
    server = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-U", path, *filters, "file", disk, "delay-read=30", f"logfile={log}"]
    )
    try:
        wait_for_socket(path)
        client = subprocess.Popen(
            [*PROGRAM, "-o", tmp_path / "bmap", f"nbd+unix:///?socket={path}"], stderr=subprocess.PIPE,
            text=True,
            # tests in the background of a shell ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        until = time.monotonic() + 30
        while " Read id" not in log.read_text():  # it waits for its first read, and imports nothing any more
            assert time.monotonic() < until
            time.sleep(0.05)
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=10)
        assert (client.returncode, said) == (130, "virt-bmap: interrupted\n")
        assert not (tmp_path / "bmap").exists()
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("command", ["lookup", "ranges", "locate", "info"])
def test_results_in_files_are_what_json_prints(command, ending, disk, tmp_path):
    """The same rows: Parquet by its own reader, CSV with lists as JSON text."""
    (tmp_path / "list").write_text("1048576,2000000\n4000000,5\n")
    arguments = {
        "lookup": ["lookup", disk, "1M+2000000"], "ranges": ["lookup", disk, "--ranges", tmp_path / "list"],
        "locate": ["locate", disk, "/dev/sda1", "/sparse"], "info": ["info", disk],
    }[command]  # fmt: skip
    path = tmp_path / f"result.{ending}"
    expected = [json.loads(line) for line in bmap(*arguments, "--json").stdout.splitlines()]
    done = bmap(*arguments, "-o", path)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert expected
    if ending == "csv":
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
        assert [set(row) for row in found] == [set(row) for row in expected]
        for row, other in zip(found, expected, strict=True):
            for name, value in other.items():
                assert (
                    row[name]
                    == ("" if value is None else value if isinstance(value, str) else json.dumps(value))
                    or json.loads(row[name]) == value
                )
    else:
        found = (
            pq.read_table(path).to_pylist()
            if ending == "parquet"
            else [json.loads(line) for line in path.read_text().splitlines()]
        )
        assert found == expected
    done = bmap(*arguments, "-o", tmp_path / "nowhere" / f"result.{ending}")
    assert (done.returncode, "No such file" in done.stderr) == (1, True)
    assert ".csv, .parquet or .jsonl" in fails(*arguments, "-o", tmp_path / "result.txt")
