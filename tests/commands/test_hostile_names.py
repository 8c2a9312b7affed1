"""Names of streams come from the disk as those of files do: no output lets one end a line or command a
terminal."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from support import need, run
from virt_bmap.accesses.profile.summary import names
from virt_bmap.cli import run as cli
from virt_bmap.core.errors import UsageError, one_line
from virt_bmap.core.escape import escape
from virt_bmap.survey.maps import load, map_disks

EVIL = "a\\b\x1b[31m\n1 0 200 f /dev/sda /etc/shadow\u202e"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkntfs", "ntfs-3g"), need("ntfscp", "ntfs-3g")
    path = tmp_path_factory.mktemp("evil") / "disk"
    with path.open("wb") as file:
        file.truncate(20 << 20)
    run("mkntfs", "-F", "-q", "-f", path)
    (path.parent / "data").write_bytes(b"x" * 300_000)
    for options in ([], ["-N", EVIL]):
        run("ntfscp", "-f", *options, path, path.parent / "data", "/file", env={"LC_ALL": "C.UTF-8"})
    return path


def test_the_text_map(disk: Path, tmp_path: Path) -> None:
    """One line a row, and read back the stream has its name again."""
    bmap = map_disks([str(disk)])
    part = f"stream:{EVIL}"
    assert part in bmap.extents.column("part").to_pylist()
    assert cli(["map", "-q", "-o", str(tmp_path / "map"), str(disk)]) == 0
    text = (tmp_path / "map").read_text()
    assert not set("\x1b\u202e") & set(text)
    assert all(line.split()[0] == "1" and line.split()[4] == "/dev/sda" for line in text.splitlines())
    assert not any(line.endswith(" /etc/shadow") for line in text.splitlines())
    assert f"/file:[{escape(part.encode())}]" in text
    mine = [row for row in load(str(tmp_path / "map")).extents.to_pylist() if row["part"] == part]
    wanted = [row for row in bmap.extents.to_pylist() if row["part"] == part]
    assert [(row["volume_offset"], row["length"]) for row in mine] == [
        (row["volume_offset"], row["length"]) for row in wanted
    ]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_locate(disk: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["locate", *options, str(disk), "/dev/sda", "/file"]) == 0
    text = capsys.readouterr().out
    assert not set("\x1b\u202e") & set(text)
    lines = text.splitlines()
    if options:
        assert [json.loads(line)["part"] for line in lines] == [None, escape(f"stream:{EVIL}".encode())]
    else:
        assert len(lines) == 2
        assert escape(EVIL.encode()) in lines[1]


def test_the_names_of_a_profile() -> None:
    table = pa.table(
        {"path": pa.array([b"/file"], pa.large_binary()), "part": [EVIL], "inode": [1], "kind": ["data"]}
    )
    assert names(table) == [f"/file:[{escape(EVIL.encode())}]"]


def test_an_error_that_lists_names(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume group may be called anything; the error that lists what there is stays one line that only
    prints."""
    bmap = map_disks([str(disk)])
    bmap.volumes = bmap.volumes.set_column(
        bmap.volumes.schema.get_field_index("name"), "name", pa.array([f"/dev/{EVIL}"])
    )
    monkeypatch.setattr("virt_bmap.commands.locate.map_or_disks", lambda args, given: bmap)
    with pytest.raises(UsageError) as raised:
        cli(["locate", str(disk), "/dev/sdb", "/file"])
    text = one_line(raised.value)  # as the program prints it
    assert text.startswith("no device /dev/sdb in this map; there are: /dev/a\\b")
    assert not set("\n\x1b\u202e") & set(text)
