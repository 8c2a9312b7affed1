"""The page: its parts put into one HTML file that asks nobody for anything.

Names from a disk are hostile. They travel as data only, compressed and in base64, where no markup survives;
the page puts them into text nodes, and into charts with `<` and `&` as entities. Should one get through all
the same, the page's policy runs no script but its own, which are named by their hashes, and fetches nothing.
"""

import base64
import gzip
import hashlib
import json
from importlib import resources
from typing import Any

from virt_bmap.accesses.resolve import Resolver
from virt_bmap.accesses.traces import Traces
from virt_bmap.core.errors import MissingTool
from virt_bmap.core.escape import escape
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.show.report import activity, disk, files, space

SCRIPTS = ("start.js", "theme.js", "disk.js", "charts.js", "tables.js", "main.js")
"""In the order in which the page runs them, after the plotting library."""


def page(bmap: BlockMap, traces: Traces | None = None, title: str = "") -> bytes:
    """The report on a map, and on traces of its disks, as HTML.

    Raises MissingTool without the plotting library.
    """
    scripts = [_plotly(), *(_part(name) for name in SCRIPTS)]
    data = json.dumps(collect(bmap, traces, title), ensure_ascii=False, separators=(",", ":")).encode()
    packed = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    text = _part("page.html")
    for mark, value in (
        ("HASHES", hashes), ("STYLE", _part("page.css")),
        ("SCRIPTS", "\n".join(f"<script>{script}</script>" for script in scripts)), ("DATA", packed),
    ):  # fmt: skip
        text = text.replace(f"{{{{{mark}}}}}", value, 1)
    return text.encode()


def collect(bmap: BlockMap, traces: Traces | None, title: str) -> dict[str, Any]:
    """All that the page shows, as plain lists and numbers."""
    resolver = Resolver(bmap)
    volumes = bmap.volumes.to_pylist()
    disks, cells = [], {}
    for number, volume in enumerate(bmap.disks, 1):
        pieces = disk.pieces_of(resolver, number)
        cells[number] = disk.cells_of(pieces, volumes[volume]["size"])
        disks.append(_disk(resolver, number, volumes[volume], pieces, cells[number]))
    return {
        "title": title, "kinds": [{"name": kind,
                "meaning": tables.KIND_MEANING[kind]} for kind in tables.KINDS], "disks": disks,
        "runs": activity.activity(traces, cells) if traces else [], "problems": _problems(bmap),
        "steps": {"times": activity.TIMES, "places": activity.PLACES},
    }  # fmt: skip


def _disk(
    resolver: Resolver, number: int, volume: dict[str, Any], pieces: Any, cells: disk.Cells
) -> dict[str, Any]:
    name = escape(volume["name"].encode())
    by_kind = space.kinds(resolver, pieces)
    found = files.layout(resolver, pieces)
    return {
        "name": name, "size": volume["size"], "cells": disk.drawn(resolver, cells), "kinds": by_kind,
        "free_runs": space.free_runs(resolver, pieces),
        "treemap": space.treemap(resolver.bmap, name, volume["size"], by_kind),
        "fragments": files.fragments(found), "files": files.table(resolver, found, cells),
        **space.gains(resolver.bmap, number),
    }  # fmt: skip


def _problems(bmap: BlockMap) -> list[dict[str, str]]:
    """The first problems of the map: a report must not hide that a disk is damaged."""
    names = bmap.volumes.column("name").to_pylist()
    rows = [row for row in bmap.problems.slice(0, 1000).to_pylist() if row["severity"] != "note"]
    return [
        {
            "severity": row["severity"],
            "device": escape(names[row["volume"]].encode()),
            "detail": escape(row["detail"].encode()),
        }
        for row in rows[:20]
    ]


def _part(name: str) -> str:
    return resources.files("virt_bmap.show.report").joinpath("page", name).read_text("utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingTool(
            "the report needs the package plotly, which is not installed (pip install 'virt-bmap[report]')"
        ) from None
    library: str = get_plotlyjs()
    return library.replace("</script", "<\\/script")
