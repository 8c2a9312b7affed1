"""The report: its figures against plain sums, its page in a real browser, and names that try to be more than
names."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import mapped, need, run
from virt_bmap.accesses import traces
from virt_bmap.accesses.resolve import Resolver
from virt_bmap.cli import run as cli
from virt_bmap.core.arrays import total
from virt_bmap.core.errors import MapError, MissingTool, UsageError
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.show.report import disk as disk_module
from virt_bmap.show.report.disk import Cells, cells_of, pieces_of
from virt_bmap.show.report.page import SCRIPTS, collect, page

pytest.importorskip("plotly", reason="the package plotly is not installed (pip install 'virt-bmap[report]')")

ATTACK = "document.body.dataset.hacked='yes'"
HOSTILE = (
    f"<script>{ATTACK}<", f"<img src=x onerror={ATTACK}>", f'"onmouseover={ATTACK} x="', "<b>bold<b>",
    "{{DATA}}", "&lt;b&gt;", "tab\tnewline\nend", "right\u202eto left", "not utf-8 \udcff",
    "'`${" + ATTACK + "}`", "]]>-->", "<a href=javascript:" + ATTACK.replace("/", "") + ">link",
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(map, trace) of a disk whose names are attacks; the trace reads all of it, and writes a little."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("hostile")
    tree, image = folder / "tree", folder / "disk.img"
    (tree / "end of script<").mkdir(parents=True)
    (tree / "end of script<" / f"script><script>{ATTACK}<").write_bytes(os.urandom(9000))
    for number, name in enumerate(HOSTILE):
        (tree / name).write_bytes(os.urandom(5000 + 3000 * number))
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-L", "<i>label", image, "16M")
    assert cli(["map", "-q", "-o", f"{folder}/map.parquet", str(image)]) == 0
    rows = [f"{n},read,{n << 16},65536" for n in range(256)] + [
        f"{300 + n},write,{n << 12},4096" for n in range(20)
    ]
    (folder / "<script>.csv").write_text("time_ms,op,offset,length\n" + "\n".join(rows) + "\n")
    assert (
        cli(
            [
                "trace",
                "import",
                f"{folder}/<script>.csv",
                "--map",
                f"{folder}/map.parquet",
                "-o",
                f"{folder}/<script>.parquet",
            ]
        )
        == 0
    )
    return folder / "map.parquet", folder / "<script>.parquet"


def load(paths: tuple[Path, Path]) -> tuple[BlockMap, traces.Traces]:
    from virt_bmap.survey.maps import load as load_map

    bmap = load_map(str(paths[0]))
    return bmap, traces.load([str(paths[1])], bmap)


# ---- the figures -------------------------------------------------------------------------------------------


def test_cells_are_painted_as_a_loop_would(hostile: tuple[Path, Path]) -> None:
    """Each cell belongs to the longest piece that touches it."""
    bmap, _ = load(hostile)
    pieces = pieces_of(Resolver(bmap), 1)
    for power in (5, 7):
        cells: Cells = disk_module._cells(pieces, 16 << 20, power)
        for cell in range(0, len(cells.owner), 7):
            low, high = cell * cells.size, (cell + 1) * cells.size
            touching = np.flatnonzero((pieces.start < high) & (pieces.end > low))
            length = (pieces.end - pieces.start)[touching]
            assert cells.owner[cell] in pieces.object[touching[length == length.max()]]


def test_sums_are_those_of_the_map(hostile: tuple[Path, Path]) -> None:
    """Bytes by kind fill the disk; files, fragments and the treemap add up to the extents of the map; the
    trace's bytes to its rows."""
    bmap, found = load(hostile)
    data = collect(bmap, found, "")
    disk, ran = data["disks"][0], data["runs"][0]
    assert sum(row["bytes"] for row in disk["kinds"]) == disk["size"] == 16 << 20
    assert sum(disk["cells"]["lengths"]) * disk["cells"]["cell"] >= disk["size"]
    kind = tables.codes(bmap.extents, "kind")
    start, length = tables.integers(bmap.extents, "volume_offset"), tables.integers(bmap.extents, "length")
    content = total(start[kind == tables.DATA], (start + length)[kind == tables.DATA])
    assert sum(disk["fragments"]["bytes"]) == sum(disk["files"]["bytes"]) == content
    assert sum(disk["free_runs"]["bytes"]) == total(
        start[kind == tables.FREE], (start + length)[kind == tables.FREE]
    )
    nodes = disk["treemap"]
    below = dict.fromkeys(nodes["id"], 0)
    for parent, size in zip(nodes["parent"][1:], nodes["bytes"][1:], strict=True):
        below[parent] += size
    assert all(below[id] <= size for id, size in zip(nodes["id"], nodes["bytes"], strict=True))
    files = [
        size
        for id, size, parent in zip(nodes["id"], nodes["bytes"], nodes["parent"], strict=True)
        if "n" in id and not below[id]
    ]
    assert sum(files) == content
    assert (sum(ran["over_time"]["read"]), sum(ran["over_time"]["written"])) == (256 << 16, 20 << 12)
    assert sum(ran["places"]["1"]["read"]) == 256 << 16
    assert ran["growth"]["needed"][-1] == ran["growth"]["read"][-1] == 256 << 16
    assert sum(ran["over_time"]["requests"]) == 276


def test_fragments_are_counted_as_filefrag_would(tmp_path: Path) -> None:
    """Two files written in turn, block by block, and one written whole, on a disk with room for nothing
    cleverer."""
    need("debugfs", "e2fsprogs")
    image = tmp_path / "disk.img"
    run("mke2fs", "-q", "-t", "ext2", "-b", "1024", "-N", "16", image, "2M")
    whole = tmp_path / "whole"
    whole.write_bytes(os.urandom(40 << 10))
    run("debugfs", "-w", "-R", f"write {whole} whole", image)
    blocks = [int(block) for block in run("debugfs", "-R", "blocks /whole", image).split()]
    bmap = mapped(image)
    data = collect(bmap, None, "")
    files = data["disks"][0]["files"]
    extents = bmap.extents.filter(np.array(tables.codes(bmap.extents, "kind") == tables.DATA))
    owned = sorted(block for start,
        length in zip(tables.integers(extents, "volume_offset") // 1024,
            tables.integers(extents, "length") // 1024, strict=True)
                   for block in range(start, start + length))  # fmt: skip
    assert set(owned) <= set(blocks)
    breaks = 1 + sum(b - a != 1 for a, b in itertools.pairwise(owned))
    assert files["fragments"][files["name"].index("/whole")] == breaks


def test_a_page_asks_nobody_for_anything_and_holds_no_name_as_markup(hostile: tuple[Path, Path]) -> None:
    text = page(*load(hostile), "<script>title").decode()
    own = text[: text.index('<script type="application/gzip')] + text[text.rindex("</script>") :]
    assert "hacked" not in text
    assert "<script>title" not in text
    for word in ("http:", "https:", "src=", "@import", "url("):
        assert word not in own
    assert "default-src 'none'" in text
    assert text.count("<script>") == len(SCRIPTS) + 1
    assert len(text) < 10 << 20


def test_a_page_is_the_same_each_time(hostile: tuple[Path, Path]) -> None:
    assert page(*load(hostile), "a") == page(*load(hostile), "a")


def test_coarser_pictures_stay_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, hostile: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(disk_module, "MOST_RUNS", 60)
    cells = cells_of(pieces_of(Resolver(load(hostile)[0]), 1), 16 << 20)
    assert len(cells.runs()[0]) <= 60


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_or_says_why_not(
    tmp_path: Path, hostile: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bmap, trace = map(str, hostile)
    assert cli(["report", bmap, trace, "-o", f"{tmp_path}/r.html"]) == 0
    assert (tmp_path / "r.html").stat().st_size > 1 << 20
    with pytest.raises(UsageError, match="needs -o PAGE"):
        cli(["report", bmap])
    (tmp_path / "cut").write_bytes(Path(trace).read_bytes()[:5000])
    with pytest.raises(MapError, match="cut: can't be read as a trace"):
        cli(["report", bmap, f"{tmp_path}/cut", "-o", f"{tmp_path}/no.html"])
    need("mke2fs", "e2fsprogs")
    for size, words in (
        ("8M", "is a trace of a disk of 16,777,216 bytes, but the map is of a disk of 8,388,608"),
        ("16M", "it is a trace of another disk"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "file").write_bytes(bytes(10000))
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "other", tmp_path / "other.img", size)
        with pytest.raises(MapError, match=words):
            cli(["report", f"{tmp_path}/other.img", trace, "-o", f"{tmp_path}/no.html"])
        os.unlink(tmp_path / "other.img")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(
        MissingTool, match=r"plotly, which is not installed \(pip install 'virt-bmap\[report\]'\)"
    ):
        cli(["report", bmap, "-o", f"{tmp_path}/no.html"])
    assert not (tmp_path / "no.html").exists()


# ---- in a browser ------------------------------------------------------------------------------------------

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--window-size=1360,900")  # fmt: skip
PATIENCE = 120


@pytest.fixture(scope="module")
def browser(hostile: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with the report on the hostile disk."""
    selenium = pytest.importorskip(
        "selenium", reason="the package selenium is not installed (pip install selenium)"
    )
    chromium, driver = need("chromium", "chromium"), need("chromedriver", "chromium-driver")
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    assert selenium
    folder = tmp_path_factory.mktemp("browser")
    (folder / "r.html").write_bytes(page(*load(hostile), f"<script>{ATTACK}</script>"))
    options = Options()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = Chrome(options=options, service=Service(driver, log_output=subprocess.DEVNULL))
    try:
        made.set_page_load_timeout(PATIENCE)
        made.get(f"file://{folder}/r.html")
        until(made, "return document.body.dataset.ready || !document.getElementById('failed').hidden")
        yield made
    finally:
        made.quit()


def until(browser: Any, script: str) -> None:
    """Wait until a script says yes."""
    end = time.monotonic() + PATIENCE
    while not browser.execute_script(script):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.1)


def test_all_charts_are_drawn(browser: Any) -> None:
    assert browser.execute_script("return document.getElementById('failed').textContent") == ""
    drawn = browser.execute_script("""return \
Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) =>
        [chart.id, chart.querySelectorAll('.heatmaplayer image, .barlayer .point, .treemaplayer .slice, \
.scatterlayer .js-line').length]))""")
    assert set(drawn) == {
        "map",
        "treemap",
        "fragments",
        "free-runs",
        "over-time",
        "places",
        "lanes",
        "growth",
    }
    assert all(drawn.values()), drawn
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)"
    )
    assert set(buttons) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}, (
        "none that sends data anywhere"
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_no_name_becomes_more_than_text(browser: Any, hostile: tuple[Path, Path]) -> None:
    """No attack has run, the names stand in the page as they are, and no element was made of them."""
    found = collect(*load(hostile), "")["disks"][0]["files"]["name"]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#files-table tbody td:last-child')].map((cell) => "
        "cell.textContent)"
    )
    assert sorted(shown) == sorted(found)
    assert f"/end of script</script><script>{ATTACK}<" in shown
    browser.execute_script(
        "for (const row of document.querySelectorAll('#files-table tbody tr')) row.click()"
    )
    browser.execute_script(
        "for (const id of ['map', 'treemap', 'lanes']) Plotly.Fx && Plotly.Fx.hover(id, "
        "[{pointNumber: [0, 0]}])"
    )
    assert browser.execute_script("return document.body.dataset.hacked") is None
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main b:not(.detail b), main a, main img, main script').length"
        )
        == 0
    )
    assert (
        browser.execute_script("return document.getElementById('title').textContent")
        == f"<script>{ATTACK}</script>"
    )


def test_the_policy_runs_no_script_but_the_pages_own(browser: Any) -> None:
    """Even markup that got into the page does nothing."""
    browser.execute_script(
        "document.querySelector('footer').innerHTML = '<img src=x "
        f'onerror="{ATTACK.replace(chr(39), chr(92) + chr(39))}">\''
    )
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = arguments[0]; document.body.append(s)",
        ATTACK,
    )
    time.sleep(0.5)
    assert browser.execute_script("return document.body.dataset.hacked") is None


def test_search_and_sort(browser: Any) -> None:
    rows = "[...document.querySelectorAll('#files-table tbody tr')].map((row) => row.lastChild.textContent)"
    browser.execute_script(
        "const box = document.querySelector('#files-table input'); box.value = 'ONERROR img'; "
        "box.dispatchEvent(new Event('input'))"
    )
    assert browser.execute_script(f"return {rows}") == [f"/<img src=x onerror={ATTACK}>"]
    browser.execute_script(
        "const box = document.querySelector('#files-table input'); box.value = ''; "
        "box.dispatchEvent(new Event('input'))"
    )
    browser.execute_script("document.querySelectorAll('#files-table thead button')[3].click()")
    names = browser.execute_script(f"return {rows}")
    assert len(names) == len(HOSTILE) + 1
    assert (
        browser.execute_script(
            "return document.querySelectorAll('#files-table th')[3].getAttribute('aria-sort')"
        )
        == "ascending"
    )
    script = f"const found = {rows}; return found.every((name, at) => !at || found[at - 1] <= name)"
    assert browser.execute_script(script)


def test_the_disk_answers_to_the_keyboard(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    where = "return document.getElementById('where').textContent"
    picture = browser.find_element("id", "map")
    picture.send_keys("0")
    whole = browser.execute_script(where)
    assert whole.startswith("0x0 – 0x1000000, 16.0 MiB")
    first = browser.execute_script("return document.getElementById('detail').textContent")
    picture.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert browser.execute_script("return document.getElementById('detail').textContent") != first
    picture.send_keys(Keys.ENTER)
    assert browser.execute_script(where) != whole
    picture.send_keys("0")
    assert browser.execute_script(where) == whole


def test_a_chosen_file_is_marked_where_it_lies(browser: Any, hostile: tuple[Path, Path]) -> None:
    """The cells that the page marks are those of the file's blocks, as the map has them."""
    bmap, _ = load(hostile)
    path = f"/<img src=x onerror={ATTACK}>"
    inode = bmap.inode_of(0, path.encode())
    mine = tables.integers(bmap.extents, "inode") == inode
    mine &= tables.codes(bmap.extents, "kind") == tables.DATA
    low = int(tables.integers(bmap.extents, "volume_offset")[mine].min())
    browser.execute_script(
        """for (const row of document.querySelectorAll('#files-table tbody tr')) if \
(row.lastChild.textContent === arguments[0]) row.click()""",
        path,
    )
    assert "marked: " + path in browser.execute_script("return document.getElementById('where').textContent")
    marked = browser.execute_script(
        "const found = chosenCells(); return [found.indexOf(1), found.lastIndexOf(1), view.cells.size]"
    )
    size = int(tables.integers(bmap.extents, "length")[mine].sum())
    assert marked[0] == low // marked[2]
    assert marked[1] == (low + size - 1) // marked[2]
    assert path in browser.execute_script("return document.getElementById('detail').textContent")


def test_dark_light_and_print_have_their_own_colours(browser: Any) -> None:
    seen = {}
    for name, features, media in (("light", "light", ""), ("dark", "dark", ""), ("print", "dark", "print")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"media": media, "features": [{"name": "prefers-color-scheme", "value": features}]},
        )
        time.sleep(0.5)
        seen[name] = json.loads(
            browser.execute_script(
                "return JSON.stringify([getComputedStyle(document.body).backgroundColor, "
                "getComputedStyle(document.querySelector('nav')).display])"
            )
        )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert seen["dark"][0] != seen["light"][0]
    assert seen["print"] == ["rgb(255, 255, 255)", "none"]
