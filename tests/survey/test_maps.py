"""Disks as a person names them, mapped and kept open."""

import inspect
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

import virt_bmap
from support import need, run
from virt_bmap.core.keys import parse
from virt_bmap.core.reader import DiscSession
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks, nested
from virt_bmap.survey import maps

MIB = 1 << 20


def test_disks_are_kept_open_in_bytes_of_the_disks_or_of_their_files(tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils")
    raw, image = tmp_path / "disk", tmp_path / "disk.qcow2"
    run("mke2fs", "-q", "-F", raw, "4m")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    disks = virt_bmap.Disks([str(image)])
    with virt_bmap.opened(disks) as (bmap, readers):
        assert not bmap.on_files
        assert readers[bmap.disk(1)].read(0, 4 * MIB) == raw.read_bytes()
    with virt_bmap.opened(replace(disks, host_offsets=True)) as (bmap, readers):
        assert bmap.on_files
        assert readers[bmap.disk(1)].read(0, image.stat().st_size) == image.read_bytes()
        assert readers[bmap.volume_named("/dev/sda")].read(0, 4 * MIB) == raw.read_bytes()
        assert virt_bmap.map_disks([str(image)], host_offsets=True).extents.equals(bmap.extents)


def test_the_short_form_says_all_that_disks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Disks] = []
    monkeypatch.setattr(maps, "mapped", lambda disks: asked.append(disks) or BlockMap)
    words = {"format": "qcow2", "references": True, "force_share": True, "keys": parse(["all:key:secret"]),
             "nested": nested(["all"]), "host_offsets": True, "blocksize": 4096,
             "session": DiscSession(2), "machines": True}  # fmt: skip
    defaults = {field.name: field.default for field in fields(Disks) if field.default is not MISSING}
    short = inspect.signature(maps.map_disks).parameters.values()
    assert {one.name: one.default for one in short if one.name != "images"} == defaults
    assert words.keys() == defaults.keys()
    for word, value in words.items():
        assert value != defaults[word]
        maps.map_disks(["disk"], **{word: value})
        assert asked.pop() == Disks(["disk"], **{word: value})


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Disks(["disk"], keys=parse(["all:key:secret"])))
