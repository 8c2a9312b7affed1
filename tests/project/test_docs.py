"""Pages and program don't drift apart: options, commands, tables, formats, links."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from support import need
from virt_bmap.cli import parser
from virt_bmap.commands import COMMANDS
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables

TOP = Path(__file__).resolve().parents[2]
PAGES = {command: TOP / "docs/man" / f"virt-bmap-{command}.1" for command in COMMANDS}
SECTIONS = [
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "EXAMPLES",
    "OPTIONS",
    "EXIT STATUS",
    "SEE ALSO",
    "AUTHORS",
    "COPYRIGHT",
]


def options_of_page(page: Path) -> set[str]:
    """The options that the page explains: the tags of .TP in OPTIONS."""
    text = page.read_text().split(".SH OPTIONS")[1].split("\n.SH ")[0]
    tags = re.findall(r"^\.TP\n(.*)$", text, re.MULTILINE)
    return {
        option
        for tag in tags
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", tag.replace("\\-", "-"), re.IGNORECASE)
    }


def options_of_program(command: str) -> set[str]:
    return {option for action in parser(command)._actions for option in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_manual_and_the_other_way_round(command):
    assert options_of_page(PAGES[command]) == options_of_program(command)


@pytest.mark.parametrize("page", sorted((TOP / "docs/man").glob("*.1")), ids=lambda page: page.name)
def test_manual_pages_have_their_sections_in_order(page):
    found = [name for name in re.findall(r"^\.SH (.*)$", page.read_text(), re.MULTILINE) if name in SECTIONS]
    assert found == [name for name in SECTIONS if name in found]
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"} <= set(found)


@pytest.mark.parametrize("page", sorted((TOP / "docs/man").glob("*.1")), ids=lambda page: page.name)
def test_manual_pages_are_well_formed(page):
    need("mandoc", "mandoc")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True)
    assert done.stdout == ""


def test_every_command_is_in_the_main_manual_page_and_the_readme():
    manual = (TOP / "docs/man/virt-bmap.1").read_text().replace("\\-", "-")
    readme = (TOP / "README.md").read_text()
    for command in COMMANDS:
        assert f".TP\n.B {command}\n" in manual
        assert f"virt-bmap {command}" in readme or command == "map"


def test_pages_made_from_the_code_are_up_to_date():
    spec = importlib.util.spec_from_file_location("document", TOP / "tools/document.py")
    document = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(document)
    for name, make in document.PAGES.items():
        assert (TOP / "docs" / name).read_text() == make(), (
            f"run tools/document.py: docs/{name} is out of date"
        )


@pytest.mark.parametrize(("name", "format"), [*formats.every()], ids=[name for name, _ in formats.every()])
def test_every_format_says_what_it_reads_and_was_checked_with(name, format):
    docs = format.docs
    for words in docs:
        assert isinstance(words, tuple)
        assert all(
            isinstance(word, str) and word == word.strip() and not word.endswith(".") for word in words
        )
    assert docs.features
    assert docs.oracles
    assert format.allocator is None or format.allocator == format.allocator.strip(" .") != ""
    module = importlib.import_module(name)
    documentation = [module.__doc__ or ""]
    if module.__file__.endswith("__init__.py"):
        documentation += [path.read_text() for path in Path(module.__file__).parent.glob("*.py")]
    assert any("Sources:" in text for text in documentation), "a reader names its sources"


def test_every_column_has_a_meaning():
    for name, schema in tables.SCHEMAS.items():
        for field in schema:
            assert field.metadata[b"meaning"], f"{name}.{field.name}"


def test_links_between_pages_lead_somewhere():
    for page in [TOP / "README.md", TOP / "CONTRIBUTING.md", *(TOP / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_architecture_exist():
    text = (TOP / "docs/architecture.md").read_text()
    for name in re.findall(r"`([a-z_/]+\.py)`", text):
        assert (TOP / "src/virt_bmap" / name).exists() or (TOP / name).exists(), name
