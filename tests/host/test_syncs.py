"""Nothing of ours waits for more than the files that it wrote: sync(2) waits for every disk of the host, and
on a hung one for ever."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import need, run

PROGRAM = [sys.executable, "-m", "virt_bmap"]
MIB = 1 << 20
CALLS = "sync,syncfs,fsync,fdatasync,sync_file_range"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    need("mke2fs", "e2fsprogs"), need("qemu-img", "qemu-utils")
    folder = tmp_path_factory.mktemp("files")
    made = {name: folder / name for name in ("tree", "disk", "qcow2", "map", "log", "trace", "key")}
    made["tree"].mkdir()
    (made["tree"] / "file").write_bytes(b"content" * 1000)
    made["disk"].write_bytes(bytes(8 * MIB))
    run("mke2fs", "-q", "-t", "ext4", "-d", made["tree"], made["disk"])
    run("qemu-img", "convert", "-O", "qcow2", made["disk"], made["qcow2"])
    run(*PROGRAM, "-q", "-o", folder / "m.parquet", made["disk"])
    os.rename(folder / "m.parquet", made["map"])
    made["log"].write_text("fio version 2 iolog\nf add\nf open\nf read 0 4096\n")
    run(*PROGRAM, "trace", "import", made["log"], "--map", made["map"], "-o", made["trace"])
    made["key"].write_text("secret")
    return made


COMMANDS = [
    "-o out {disk}", "-o out.parquet {qcow2}", "info {disk} -o out.csv",
    "diff {disk} {qcow2} --force -o out.jsonl", "report {map} {trace} -o out", "trace import {log} -o out",
    "profile {trace} -o out", "dump {disk} /dev/sda out", "dump {qcow2} /dev/sda out",
    "extract {disk} /dev/sda /file", "sparsify {disk} out", "sparsify {disk} out --convert qcow2",
    "sparsify --in-place copy", "sparsify --in-place copy.qcow2",
    "watch -q {disk} -o out --summary summary -- true", "make disk:8M out", "make part:8M:gpt out",
    "make fs:ext4:16M:mbr out --tree {tree}", "make fs:btrfs:160M out --tree {tree}",
    "make fs:vfat:16M out --tree {tree}", "make fs:swap:16M out", "make bootroot:ext2:ext4:64M:16M out.qcow2",
    "make luks:ext4:64M out --key-file {key}",
]  # fmt: skip
OF_ROOT = [
    "make fs:xfs:360M out --tree {tree}",
    "make fs:ntfs:16M out --tree {tree}",
    "make lvfs:/dev/vg/lv:ext4:32M out --tree {tree}",
]


@pytest.mark.parametrize("command", COMMANDS + (OF_ROOT if os.geteuid() == 0 else []))
def test_only_its_own_files_are_waited_for(command: str, files: dict[str, Path], tmp_path: Path) -> None:
    need("strace", "strace")
    if command.startswith("watch"):
        need("nbdkit", "nbdkit")
    if command.startswith("report"):
        pytest.importorskip("plotly")
    for name, source in (("copy", "disk"), ("copy.qcow2", "qcow2")):
        (tmp_path / name).write_bytes(files[source].read_bytes())
    log = tmp_path / "calls"
    words = command.format(**files).split()
    done = subprocess.run(
        ["strace", "-f", "-y", "-o", log, "-e", f"trace={CALLS}", *PROGRAM, *words],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    calls = re.findall(r"^\d+ +(\w+)\((?:\d+<(.*?)>)?", log.read_text(), re.MULTILINE)
    assert not [call for call, _ in calls if call in ("sync", "syncfs")]
    others = {path for _, path in calls if not path.startswith((str(tmp_path), "/dev/loop"))}
    assert not others
