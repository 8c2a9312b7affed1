"""The house: imports fall downwards, from wing to wing, and every wing says what it holds."""

import ast
from pathlib import Path

import pytest

import virt_bmap

HOUSE = Path(virt_bmap.__file__).parent
ORDER = (
    "core", "host", "model", "formats", "open", "saved", "survey", "ask", "act", "accesses", "serve", "show",
    "watch", "observe", "diff", "commands", "startup", "cli", "bmaplogger", "__main__",
)  # fmt: skip
"""A wing imports those before it. `__init__`, the public names, imports them when they are asked for."""
WIDTH = 110
UPWARD = {("cli", "__init__"), ("__main__", "__init__")}
"""The version, which lies with the public names."""


def wing(module: str) -> str:
    """virt_bmap.core.arrays -> core; virt_bmap -> __init__"""
    return [*module.split("."), "__init__"][1]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = ["virt_bmap", *path.relative_to(HOUSE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports, wherever in it; not those for a type checker alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {name for name in found if name.split(".")[0] == "virt_bmap"}


def upward(known: dict[str, Path]) -> list[str]:
    found = []
    for module, path in known.items():
        for other in imported(path, known):
            ours, theirs = wing(module), wing(other)
            if ours == theirs or (ours, theirs) in UPWARD or ours == "__init__":
                continue
            if theirs == "__init__" or ORDER.index(theirs) > ORDER.index(ours):
                found.append(f"{module} imports {other}")
    return sorted(found)


def test_imports_fall_downwards() -> None:
    assert upward(modules()) == []


def test_an_import_upwards_is_seen(tmp_path: Path) -> None:
    low = tmp_path / "low.py"
    low.write_text("def late():\n    from virt_bmap.commands import common\n")
    known = {**modules(), "virt_bmap.core.low": low}
    assert upward(known) == ["virt_bmap.core.low imports virt_bmap.commands.common"]


@pytest.mark.parametrize("folder", sorted(path.parent for path in HOUSE.rglob("__init__.py")), ids=str)
def test_every_wing_and_room_says_what_it_holds(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_nothing_lies_outside_the_wings() -> None:
    assert {wing(module) for module in modules()} - set(ORDER) == {"__init__"}


@pytest.mark.parametrize(
    "path",
    sorted(path for path in HOUSE.rglob("*") if path.suffix in (".js", ".css", ".html")),
    ids=lambda path: path.name,
)
def test_pages_are_as_wide_as_the_rest(path: Path) -> None:
    """JavaScript, CSS and HTML; ruff looks at Python only."""
    assert [line for line in path.read_text().splitlines() if len(line) > WIDTH] == []


ROLES = {
    "Extents", "Geometry", "Groups", "Header", "Inodes", "Log", "Names", "Parser", "DeadParser", "Superblock",
}  # fmt: skip
"""What several formats have: one name in all of them."""


def test_a_class_has_a_name_of_its_own() -> None:
    """Names of the mapping (Row, Rows, Side, Pieces, Place) mean the mapping's, and so on."""
    found: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in ROLES} == {}


@pytest.mark.parametrize(
    "path", sorted(HOUSE.glob("formats/[fiv]*/*/__init__.py")), ids=lambda path: path.parent.name
)
def test_a_format_begins_with_a_table_of_contents(path: Path) -> None:
    """What a format is, and the stages of `read` or `assemble`; each stage lies in the module of its role."""
    assert len(path.read_text().splitlines()) <= 120


DISK_OPTIONS = {"references", "force_share", "key", "nested", "host_offsets"}
"""Options of every command that opens disks; --format has a second meaning for `trace`."""


def test_what_is_said_of_disks_is_read_from_the_command_line_in_one_place() -> None:
    """All others get it as a `Disks`."""
    readers = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in DISK_OPTIONS
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }
    assert readers == {"virt_bmap.commands.common"}
