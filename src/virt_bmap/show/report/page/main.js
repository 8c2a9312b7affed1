"use strict";
// Everything put together, and drawn again where the disk, the trace or the colours change.

function drawTiles() {
  const disk = report.data.disks[report.disk],
    bytes = (kind) =>
      disk.kinds
        .filter((row) => report.data.kinds[row.kind].name === kind)
        .reduce((sum, row) => sum + row.bytes, 0);
  const files = disk.fragments.files.reduce((sum, n) => sum + n, 0),
    whole = disk.fragments.files[0] && disk.fragments.high[0] === 1 ? disk.fragments.files[0] : 0;
  const tiles = [
    ["size", human(disk.size), disk.name],
    ["content of files", human(bytes("data")), percent(bytes("data"), disk.size)],
    ["free", human(bytes("free")), percent(bytes("free"), disk.size)],
    ["files with blocks", count(files), files ? `${percent(whole, files)} in one piece` : ""],
  ];
  const run = report.data.runs[report.run];
  if (run) {
    tiles.push([
      "needed in this trace",
      human(run.growth.needed.at(-1)),
      `${percent(run.growth.needed.at(-1), disk.size)} of the disk`,
    ]);
    tiles.push(["requests", count(run.requests), `in ${run.seconds.toFixed(1)} s`]);
  }
  $("tiles").replaceChildren(
    ...tiles.map(([name, value, more]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, more))),
    ),
  );
}

function drawRun() {
  const run = report.data.runs[report.run];
  if (!run) return;
  const moved = `${human(run.read)} read, ${human(run.written)} written`;
  $("run-facts").textContent = `${count(run.requests)} requests in ${run.seconds.toFixed(1)} s, ${moved}`;
  drawOverTime(run);
  drawPlaces(run);
  drawLanes(run);
  drawGrowth();
  drawObjects(run);
}

function drawCharts() {
  drawMap();
  drawTreemap();
  drawFragments();
  drawFreeRuns();
  const run = report.data.runs[report.run];
  if (run) {
    drawOverTime(run);
    drawPlaces(run);
    drawLanes(run);
    drawGrowth();
  }
}

function drawDisk() {
  openDisk();
  drawTiles();
  drawLegend();
  drawMap();
  drawTreemap();
  drawGains();
  drawFragments();
  drawFreeRuns();
  drawFiles();
}

function choices(id, words, change) {
  $(id).replaceChildren(...words.map((word, at) => make("option", { value: at }, word)));
  $(id).onchange = () => change(Number($(id).value));
}

function listen() {
  listenToMap();
  choices(
    "disk-select",
    report.data.disks.map((disk) => `${disk.name}, ${human(disk.size)}`),
    (disk) => {
      report.disk = disk;
      drawDisk();
      drawRun();
    },
  );
  choices(
    "run-select",
    report.data.runs.map((run) => run.name),
    (run) => {
      report.run = run;
      openRun();
      drawTiles();
      drawMap();
      drawRun();
    },
  );
  $("disk-choice").hidden = report.data.disks.length < 2;
  $("places-way").onchange = () => drawPlaces(report.data.runs[report.run]);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  addEventListener("beforeprint", drawCharts);
  addEventListener("afterprint", drawCharts);
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(INPUT|SELECT)$/.test(document.activeElement.tagName)) return;
    event.preventDefault();
    document.querySelector("#files-table input").focus();
  });
}

async function start() {
  await report.load();
  document.title = `${report.data.title}: virt-bmap report`;
  $("title").textContent = report.data.title;
  document.body.classList.toggle("without-runs", !report.data.runs.length);
  $("problems").hidden = !report.data.problems.length;
  $("problems").append(
    ...report.data.problems.map((row) => make("li", {}, `${row.severity}: ${row.device}: ${row.detail}`)),
  );
  drawDisk();
  drawRun();
  listen();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  $("failed").textContent = `This page could not be drawn: ${error.message}`;
  $("failed").hidden = false;
});
