"use strict";
// Space, fragmentation, and what a trace did.

function drawTreemap() {
  const nodes = report.data.disks[report.disk].treemap,
    colours = kindColours();
  draw(
    "treemap",
    [
      {
        type: "treemap",
        ids: nodes.id,
        parents: nodes.parent,
        labels: nodes.label.map(plain),
        values: nodes.bytes,
        branchvalues: "total",
        maxdepth: 5,
        marker: {
          colors: nodes.kind.map((kind) => (kind < 0 ? colour("page") : colours[kind])),
          line: { width: 1, color: colour("panel") },
        },
        text: nodes.bytes.map(human),
        texttemplate: "%{label}<br>%{text}",
        hovertemplate: "%{label}<br>%{text}<br>%{percentRoot:.1%} of the disk<extra></extra>",
        pathbar: { thickness: 24 },
        tiling: { pad: 2 },
      },
    ],
    { margin: { l: 0, r: 0, t: 0, b: 0 } },
    BARE,
  );
}

function drawGains() {
  const disk = report.data.disks[report.disk],
    given = disk.gains.filter((row) => row.given_back),
    kept = disk.gains.filter((row) => !row.given_back);
  const all = given.reduce((sum, row) => sum + row.bytes, 0);
  const rows = given.map((row) =>
    make(
      "tr",
      {},
      make("td", {}, row.what),
      make("td", { class: "name" }, row.device),
      make("td", { class: "number" }, human(row.bytes)),
      make("td", { class: "number" }, percent(row.bytes, disk.size)),
    ),
  );
  rows.push(
    make(
      "tr",
      {},
      make("th", { scope: "row" }, "in all"),
      make("td"),
      make("td", { class: "number" }, human(all)),
      make("td", { class: "number" }, percent(all, disk.size)),
    ),
  );
  const parts = [make("table", {}, make("tbody", {}, ...rows))];
  const note = (what, lines) => parts.push(make("p", { class: "note" }, `${what}: ${lines.join("; ")}`));
  const keeps = kept.map((row) => `${human(row.bytes)} ${row.what} of ${row.device}`);
  if (keeps.length) note("Kept, though nobody owns it", keeps);
  const leaves = disk.left.map((row) => `${row.device}: ${row.reason}`);
  if (leaves.length) note("Left as it is", leaves);
  $("gains").replaceChildren(...parts);
}

const fewer = (low, high) => (low === high ? count(low) : `${count(low)}–${count(high)}`);

function drawFragments() {
  const bins = report.data.disks[report.disk].fragments,
    names = bins.low.map((low, at) => fewer(low, bins.high[at]));
  if (!names.length) {
    nothing("fragments", "No files are known on this disk.");
    return;
  }
  draw(
    "fragments",
    [
      {
        type: "bar",
        x: names,
        y: bins.files,
        marker: { color: colour("k0") },
        customdata: bins.bytes.map(human),
        text: bins.files.map(count),
        textposition: "outside",
        cliponaxis: false,
        hovertemplate: "%{x} fragments: %{y:,} files, %{customdata}<extra></extra>",
      },
    ],
    {
      xaxis: { type: "category", title: { text: "fragments" } },
      yaxis: { title: { text: "files" }, type: "log", dtick: 1 },
      margin: { l: 60, r: 16, t: 26, b: 48 },
    },
  );
}

function drawFreeRuns() {
  const bins = report.data.disks[report.disk].free_runs;
  if (!bins.power.length) {
    nothing("free-runs", "No free space is known on this disk.");
    return;
  }
  draw(
    "free-runs",
    [
      {
        type: "bar",
        x: bins.power.map((power) => human(2 ** power)),
        y: bins.bytes,
        marker: { color: colour("k10") },
        customdata: bins.runs,
        text: bins.bytes.map(human),
        textposition: "outside",
        cliponaxis: false,
        hovertemplate: "runs from %{x}: %{customdata:,}, %{text}<extra></extra>",
      },
    ],
    {
      xaxis: { type: "category", title: { text: "length of a run, from" } },
      yaxis: { ...byteTicks(Math.max(...bins.bytes)) },
      margin: { l: 60, r: 16, t: 26, b: 48 },
    },
  );
}

// ---- traces -----------------------------------------------------------------------------------------------

// The charts over time lie below each other: one margin for all makes their seconds line up.
const OVER_TIME = { l: 200, r: 84, t: 30, b: 44 };
const LONGEST = 28; // letters of a name that fit there

const times = (run) =>
  Array.from(
    { length: report.data.steps.times },
    (_, step) => (run.seconds * (step + 0.5)) / report.data.steps.times,
  );

function drawOverTime(run) {
  const x = times(run),
    { read, written, requests } = run.over_time,
    seconds = run.seconds / report.data.steps.times;
  const speed = (bytes) => bytes.map((value) => value / seconds);
  const most = Math.max(...read, ...written) / seconds;
  const bars = (name, y, fill) => ({
    type: "bar",
    name,
    x,
    y: speed(y),
    marker: { color: fill, line: { width: 0 } },
    customdata: y.map(human),
    hovertemplate: `%{x:.2f} s: %{customdata} ${name}<extra></extra>`,
  });
  const ticks = byteTicks(most);
  draw(
    "over-time",
    [
      bars("read", read, colour("read")),
      bars("written", written, colour("write")),
      {
        type: "scatter",
        name: "requests a second",
        mode: "lines",
        x,
        y: speed(requests),
        yaxis: "y2",
        line: { color: colour("soft"), width: 1 },
        hovertemplate: "%{y:.0f} requests a second<extra></extra>",
      },
    ],
    {
      barmode: "stack",
      bargap: 0,
      xaxis: { title: { text: "seconds" }, range: [0, run.seconds] },
      yaxis: { tickvals: ticks.tickvals, ticktext: ticks.ticktext.map((word) => `${word}/s`) },
      yaxis2: {
        overlaying: "y",
        side: "right",
        showgrid: false,
        rangemode: "tozero",
        tickmode: "auto",
        nticks: 5,
        title: { text: "requests/s" },
      },
      margin: OVER_TIME,
    },
  );
}

// Bytes differ by orders of magnitude: colours follow their logarithm.
const logarithm = (value) => (value > 0 ? Math.log2(value) : null);

function heat(id, x, y, z, words, { fill, ...more }) {
  const top = Math.max(1, ...z.flat().filter((value) => value !== null));
  const least = Math.max(0, top - 14),
    ticks = [0, 0.5, 1].map((share) => Math.round(least + (top - least) * share));
  draw(
    id,
    [
      {
        type: "heatmap",
        x,
        y,
        z,
        zmin: least,
        zmax: top,
        hoverongaps: false,
        hovertemplate: "%{x:.2f} s<br>%{customdata}<extra></extra>",
        customdata: z.map((row, at) =>
          row.map((value) => (value === null ? "" : words(at, Math.round(2 ** value)))),
        ),
        colorscale: [
          [0, colour("line")],
          [1, colour(fill)],
        ],
        colorbar: {
          tickvals: ticks,
          ticktext: ticks.map((value) => human(2 ** value)),
          thickness: 12,
          outlinewidth: 0,
        },
      },
    ],
    { margin: OVER_TIME, ...more },
  );
}

function drawPlaces(run) {
  const { times: steps, places } = report.data.steps,
    disk = report.data.disks[report.disk],
    way = $("places-way").value,
    found = run.places[report.disk + 1];
  if (!found || !found[`${way}_at`].length) {
    nothing("places", `Nothing of this disk was ${way} in this trace.`);
    return;
  }
  const z = Array.from({ length: places }, () => new Array(steps).fill(null));
  found[`${way}_at`].forEach((at, row) => {
    z[at % places][Math.floor(at / places)] = logarithm(found[way][row]);
  });
  const y = z.map((_, row) => (disk.size * (row + 0.5)) / places);
  heat("places", times(run), y, z, (at, bytes) => `${human(bytes)} ${way} at ${human(y[at])}`, {
    fill: way === "read" ? "read" : "write",
    xaxis: { title: { text: "seconds" }, range: [0, run.seconds] },
    yaxis: { ...byteTicks(disk.size, 8), range: [0, disk.size] },
  });
}

function drawLanes(run) {
  if (!run.lanes.name.length) {
    nothing("lanes", "Nothing was read or written in this trace.");
    return;
  }
  const y = run.lanes.name.map(
    (name, row) => `${row + 1}. ${plain(name.length > LONGEST ? `…${name.slice(1 - LONGEST)}` : name)}`,
  );
  heat(
    "lanes",
    times(run),
    y,
    run.lanes.bytes.map((row) => row.map(logarithm)),
    (at, bytes) => `${human(bytes)} of ${plain(run.lanes.name[at])}`,
    {
      fill: "both",
      xaxis: { title: { text: "seconds" }, range: [0, run.seconds] },
      yaxis: { type: "category", autorange: "reversed", dtick: 1, tickfont: { size: 11 } },
    },
  );
}

const LINES = ["solid", "dash", "dot", "dashdot"];

function drawGrowth() {
  const most = Math.max(
    ...report.data.runs.flatMap((run) => [run.growth.needed.at(-1), run.growth.read.at(-1)]),
  );
  const lines = report.data.runs.flatMap((run, number) => {
    const name = report.data.runs.length > 1 ? `${plain(run.name)}: ` : "",
      dash = LINES[number % LINES.length];
    return [
      ["needed, each byte counted once", "needed", colour("accent")],
      ["read", "read", colour("soft")],
    ].map(([what, key, fill]) => ({
      type: "scatter",
      mode: "lines",
      name: name + what,
      x: run.growth.seconds,
      y: run.growth[key],
      line: { color: fill, dash, width: 2, shape: "hv" },
      customdata: run.growth[key].map(human),
      hovertemplate: `%{x:.2f} s: %{customdata} ${what}<extra></extra>`,
    }));
  });
  draw("growth", lines, {
    xaxis: { title: { text: "seconds" } },
    yaxis: { ...byteTicks(most), rangemode: "tozero" },
    margin: OVER_TIME,
  });
}
