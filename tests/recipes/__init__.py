"""One small image of every format and layout, made by real tools: what tests/formats/test_every_format.py
goes through, and tools/fuzz damages.

A recipe makes its files in a folder and returns them (`made.Made`): the disks of one machine, in order, and
what went into their filesystems. Sizes are the smallest that the tools take, since the time of a map follows
them. Recipes say what they need, and are skipped where it is missing.
"""

import shutil
from pathlib import Path

import pytest

from recipes import discs, images, linux, tables, volumes, windows
from recipes.images import ENDINGS
from recipes.made import Made, Recipe
from support import run

RECIPES: dict[str, Recipe] = {
    **linux.RECIPES,
    **windows.RECIPES,
    **discs.RECIPES,
    **tables.RECIPES,
    **volumes.RECIPES,
    **images.RECIPES,
}
"""By name; the part before the first hyphen is the format."""


class Left(Exception):
    """A recipe that can't be followed here; the message says why."""


def make(name: str, folder: Path) -> Made:
    """The images of one recipe: NAME.img, or NAME.1.img, NAME.2.img, ... for the disks of one machine;
    nothing else is left in the folder."""
    work = folder / f".{name}"
    work.mkdir(parents=True)
    try:
        made, result = RECIPES[name](work), []
        for number, path in enumerate(made.disks, 1):
            ending = path.suffix if path.suffix in ENDINGS.values() else ".img"
            several = f".{number}" if len(made.disks) > 1 else ""
            result.append(folder / f"{name}{several}{ending}")
            run("cp", "--sparse=always", path, result[-1])
        return made._replace(disks=result)
    except pytest.skip.Exception as reason:
        raise Left(str(reason)) from reason
    finally:
        shutil.rmtree(work)
