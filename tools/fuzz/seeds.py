"""The images that are damaged: the tests' small images, made once and kept in a folder until a recipe
changes."""

import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "tests"
LIST = "seeds.json"
PASSPHRASE = b"correct horse battery staple"
"""Opens what is encrypted among them."""


class Seed(NamedTuple):
    """The disks of one machine, in order.

    `host`: image files whose own layer is looked at (--host-offsets).
    """

    name: str
    paths: tuple[Path, ...]
    host: bool


def format_of(name: str) -> str:
    """What counts are kept by: ext4-flex is ext4, beside-map-lvm.parquet is beside-map."""
    return "-".join(name.split("-")[: 2 if name.startswith("beside") else 1])


def default_folder() -> Path:
    """A folder of temporary files whose name tells this version of the recipes from others."""
    digest = hashlib.sha256()
    for path in sorted([*RECIPES.glob("*_images.py"), *RECIPES.glob("recipes/*.py"), RECIPES / "support.py"]):
        digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"virt-bmap-fuzz-{os.getuid()}" / f"seeds-{digest.hexdigest()[:12]}"


def seeds(folder: Path | None = None) -> tuple[dict[str, Seed], dict[str, str]]:
    """The seeds by name, made now where they were not yet; and why others could not be made."""
    folder = folder or default_folder()
    if not (folder / LIST).exists():
        _make(folder)
    listed = json.loads((folder / LIST).read_text())
    found = {name: tuple(folder / path for path in paths) for name, paths in listed["made"].items()}
    return {name: Seed(name, paths, paths[0].suffix != ".img") for name, paths in found.items()}, listed[
        "left"
    ]


def _make(folder: Path) -> None:
    """In a folder beside it that gets its name when all is there: two runs do not meet."""
    sys.path.insert(0, str(RECIPES))
    recipes = importlib.import_module("recipes")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    made, left = {}, {}
    try:
        for name in recipes.RECIPES:
            try:
                made[name] = [path.name for path in recipes.make(name, work).disks]
            except recipes.Left as reason:
                left[name] = str(reason)
        (work / LIST).write_text(json.dumps({"made": made, "left": left}))
        work.chmod(0o700)
        try:
            work.rename(folder)
        except OSError:  # another run was quicker
            if not (folder / LIST).exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
