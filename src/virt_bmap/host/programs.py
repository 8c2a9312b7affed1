"""The programs that we start: found in folders of the search path that have full names, and Python without
the folder that we happen to stand in.

People work in folders of extracted evidence, often as root. There an empty or relative entry of PATH would
run a program of the evidence, and `python -m` would import its `json.py`. What a user's own environment does
to our own interpreter (PYTHONPATH) or to the command that `watch` runs is not our business.

Sources: environ(7); Python's documentation of -I and of `sys.path`.
"""

import os
import shutil
import sys
from collections.abc import Mapping

from virt_bmap.core.errors import MissingTool

SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Folders of system tools, which are not on every user's path."""


def search_path(*more: str) -> str:
    """PATH without the entries that mean the current folder or lie in it."""
    entries = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *more]
    return os.pathsep.join(dict.fromkeys(entry for entry in entries if os.path.isabs(entry)))


def find(name: str, *more: str) -> str | None:
    """The path of a program, looked for in `more` folders, too; None where there is none."""
    return shutil.which(name, path=search_path(*more))


def required(name: str, why: str, packages: str) -> str:
    """The path of a program. Raises MissingTool, which says what it is needed for and how to install it."""
    found = find(name)
    if not found:
        raise MissingTool(f"{why} needs {name}, which is not installed ({packages})")
    return found


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For programs that look for further programs: ours, with the search path above."""
    return {**os.environ, "PATH": search_path(), **(more or {})}


def python(module: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs `main` of one of our modules in a Python of its own, which imports from
    where we do, but not from the current folder."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [place for place in sys.path if os.path.isabs(place) and place != os.getcwd()]
    code = (
        f"import sys; sys.path[:] = {[*places, *([] if ours in places else [ours])]!r}; "
        f"from {module} import main; main()"
    )
    return [sys.executable, "-I", *options, "-c", code, *arguments]
