"""What can be said of disks can be said to every command that maps some, and reaches the disks, however these
are opened."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import need, run
from virt_bmap import cli
from virt_bmap.act.sparsify.in_place import kept
from virt_bmap.commands import COMMANDS
from virt_bmap.commands.common import add_mapping_options, add_trust_options
from virt_bmap.core.layers import layers
from virt_bmap.core.reader import DiscSession, Reader
from virt_bmap.diff.sides import Question, Telling, open_sides
from virt_bmap.open import open_disks, open_image
from virt_bmap.open.disks import Disks
from virt_bmap.open.host import open_host

MIB = 1 << 20


def options(add) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add(parser.add_argument_group())
    return {option for action in parser._actions for option in action.option_strings}


def of_command(command: str) -> set[str]:
    return {option for action in cli.parser(command)._actions for option in action.option_strings}


def test_commands_that_map_disks_take_the_same_options() -> None:
    trust, mapping = options(add_trust_options), options(add_mapping_options)
    assert trust < mapping
    taken = {command: of_command(command) & mapping for command in COMMANDS}
    some = {command: found for command, found in taken.items() if found}
    assert some.pop("replay") == trust  # it reads bytes, and maps nothing
    assert {command: mapping - found for command, found in some.items() if found != mapping} == {}
    assert {"map", "diff", "watch", "verify", "report", "sparsify", "info", "cat"} <= set(some)


def test_what_a_map_can_be_of_a_report_can_be_of() -> None:
    """A saved map is drawn whatever it counts in, so disks are."""
    assert {"--nested", "--host-offsets"} <= of_command("map") & of_command("report")


def test_a_report_of_image_files_and_of_images_in_them(tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils")
    (tmp_path / "files").mkdir()
    run("mke2fs", "-q", "-F", tmp_path / "files" / "inner.raw", "2m")
    run("mke2fs", "-q", "-F", "-d", tmp_path / "files", tmp_path / "disk", "8m")
    words = ["report", str(tmp_path / "disk"), "--nested", "all", "--host-offsets"]
    assert cli.run([*words, "-o", str(tmp_path / "now.html")]) == 0
    saved = str(tmp_path / "map.parquet")
    assert cli.run(["map", "-q", *words[1:], "-o", saved]) == 0
    assert cli.run(["report", saved, "--title", "disk", "-o", str(tmp_path / "saved.html")]) == 0
    assert (tmp_path / "now.html").read_bytes() == (tmp_path / "saved.html").read_bytes()


@contextlib.contextmanager
def by_diff(disks: Disks) -> Iterator[Reader]:
    with contextlib.ExitStack() as stack:
        _, old, new = open_sides(Question(disks.images[0], disks), stack, Telling())
        assert old
        assert old.reader
        assert new.reader
        assert told(old.reader)
        yield new.reader


@contextlib.contextmanager
def by_host(disks: Disks) -> Iterator[Reader]:
    with open_host(disks.images, disks) as host:
        yield host.files[0]


@contextlib.contextmanager
def in_place(disks: Disks) -> Iterator[Reader]:
    with kept(disks.images[0], disks) as disk:
        yield disk.reader


@contextlib.contextmanager
def alone(disks: Disks) -> Iterator[Reader]:
    with contextlib.closing(open_image(disks.images[0], disks)) as reader:
        yield reader


@contextlib.contextmanager
def together(disks: Disks) -> Iterator[Reader]:
    with open_disks(disks.images, disks) as readers:
        yield readers[0]


def told(reader: Reader) -> tuple[set[int], set[DiscSession]]:
    below = layers(reader)
    sure = {one.sector for one in below if one.sector and one.is_sector_sure}
    return sure, {one.session for one in below if one.session}


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("way", [alone, together, by_host, in_place, by_diff])
def test_it_reaches_the_disk(way, format: str, tmp_path: Path) -> None:
    need("genisoimage", "genisoimage"), need("qemu-img", "qemu-utils")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one").write_bytes(b"one" * 1000)
    run("genisoimage", "-quiet", "-o", tmp_path / "raw", tmp_path / "files")
    run("qemu-img", "convert", "-f", "raw", "-O", format, tmp_path / "raw", tmp_path / "disk")
    disks = Disks([str(tmp_path / "disk")], blocksize=4096, session=DiscSession(1))
    with way(disks) as reader:
        assert told(reader) == ({4096}, {DiscSession(1)})
