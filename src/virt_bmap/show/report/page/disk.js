"use strict";
// The disk as a picture: cells along a Hilbert curve or
// line by line, from the whole disk down to single blocks.

const GRID = 128; // cells a side that are drawn at most: more are hard to tell apart
const LEAST = 16; // cells a side of the closest view
// Codes of colours with room for all kinds below them: every second file, and the file that was chosen.
const OTHER = 30,
  MARK = 31;
const view = { low: 0, side: GRID, cursor: 0, chosen: null, cells: null };

// Where along the curve each place of a square of `side` lies; the classic transformation of bits.
const curves = new Map();
function hilbert(side) {
  if (!curves.has(side)) {
    const place = new Int32Array(side * side);
    for (let at = 0; at < side * side; at += 1) {
      let x = 0,
        y = 0,
        left = at;
      for (let size = 1; size < side; size *= 2) {
        const rx = 1 & (left / 2),
          ry = 1 & (left ^ rx);
        if (ry === 0) {
          if (rx === 1) {
            x = size - 1 - x;
            y = size - 1 - y;
          }
          [x, y] = [y, x];
        }
        x += size * rx;
        y += size * ry;
        left = Math.floor(left / 4);
      }
      place[y * side + x] = at;
    }
    curves.set(side, place);
  }
  return curves.get(side);
}

// The cells of a disk, unpacked once: owner of each, and what the chosen trace did to it.
function openDisk() {
  const packed = report.data.disks[report.disk].cells;
  const all = packed.lengths.reduce((sum, length) => sum + length, 0);
  const owner = new Int32Array(all);
  let at = 0;
  packed.lengths.forEach((length, run) => {
    owner.fill(packed.owners[run], at, at + length);
    at += length;
  });
  view.cells = {
    owner,
    count: all,
    size: packed.cell,
    objects: packed.objects,
    whole: 4 ** packed.power,
    how: null,
    when: null,
  };
  openRun();
  view.low = 0;
  view.cursor = 0;
  view.chosen = null;
  view.span = view.cells.whole;
}

function openRun() {
  const run = report.data.runs[report.run];
  if (!run) return;
  const cells = view.cells,
    touched = run.cells[report.disk + 1];
  cells.how = new Uint8Array(cells.count);
  cells.when = new Float64Array(cells.count).fill(NaN);
  if (!touched) return;
  touched.at.forEach((at, row) => {
    cells.how.fill(touched.how[row], at, at + touched.length[row]);
    cells.when.fill(touched.ms[row] / 1000, at, at + touched.length[row]);
  });
}

const side = () => Math.min(GRID, Math.sqrt(view.span));
const place = (square) => ($("curve").value === "hilbert" ? hilbert(square) : null);

// The most frequent kind among some cells, and the first cell that is of it.
function dominant(low, high) {
  const { owner, objects } = view.cells,
    counts = new Map();
  let best = -1,
    most = 0;
  for (let cell = low; cell < high; cell += 1) {
    const kind = objects.kind[owner[cell]],
      n = (counts.get(kind) || 0) + 1;
    counts.set(kind, n);
    if (n > most) {
      most = n;
      best = kind;
    }
  }
  for (let cell = low; cell < high; cell += 1) if (objects.kind[owner[cell]] === best) return [best, cell];
  return [-1, low];
}

// The first use of some cells in seconds, Infinity where there is none.
const earliest = (low, high) =>
  view.cells.when.subarray(low, high).reduce((least, when) => (when < least ? when : least), Infinity);

// Times in a few steps of colour behind the codes of all others.
const STEPS = 64;
const whenCode = (seconds) =>
  seconds === Infinity
    ? 0
    : MARK + 1 + Math.min(STEPS - 1, Math.floor((STEPS * seconds) / report.data.runs[report.run].seconds));

// Content of files comes in two shades, so that one ends where the next begins.
const shade = (kind, cell) => (kind === 0 && view.cells.owner[cell] % 2 ? OTHER : kind);

function chosenCells() {
  if (!view.chosen) return null;
  const marked = new Uint8Array(view.cells.count);
  for (let row = 0; row < view.chosen.ranges.length; row += 2)
    marked.fill(1, view.chosen.ranges[row], view.chosen.ranges[row + 1]);
  return marked;
}

function drawMap() {
  const cells = view.cells,
    square = side(),
    step = view.span / (square * square),
    mode = $("colour").value,
    curve = place(square),
    marked = chosenCells();
  const z = Array.from({ length: square }, () => new Array(square).fill(null));
  const index = new Int32Array(square * square);
  for (let y = 0; y < square; y += 1) {
    for (let x = 0; x < square; x += 1) {
      const at = curve ? curve[y * square + x] : y * square + x;
      const low = view.low + at * step,
        high = Math.min(low + step, cells.count);
      index[y * square + x] = at;
      if (low >= cells.count) continue;
      if (marked && marked.subarray(low, high).includes(1)) z[y][x] = MARK;
      else if (mode === "kind") z[y][x] = shade(...dominant(low, high));
      else if (mode === "how") z[y][x] = cells.how.subarray(low, high).reduce((bits, bit) => bits | bit, 0);
      else z[y][x] = whenCode(earliest(low, high));
    }
  }
  view.index = index;
  const trace = {
    type: "heatmap",
    z,
    hoverinfo: "none",
    xgap: square <= 64 ? 1 : 0,
    ygap: square <= 64 ? 1 : 0,
    ...scale(mode),
  };
  const [x, y] = cursorPlace(square);
  const cursor = {
    type: "scatter",
    mode: "markers",
    x: [x],
    y: [y],
    hoverinfo: "skip",
    showlegend: false,
    marker: {
      symbol: "square-open",
      size: Math.max(9, 520 / square + 3),
      color: colour("text"),
      line: { width: 2 },
    },
  };
  const hidden = { visible: false, fixedrange: true, range: [-0.5, square - 0.5] };
  draw(
    "map",
    [trace, cursor],
    {
      margin: { l: 0, r: 0, t: 0, b: 0 },
      xaxis: hidden,
      yaxis: { ...hidden, range: [square - 0.5, -0.5], scaleanchor: "x" },
      dragmode: false,
      showlegend: false,
    },
    BARE,
  );
  tellWhere();
  tellCursor();
}

// Discrete colours, one step for each code; for times, a scale above them.
function scale(mode) {
  const colours =
    mode === "kind" ? kindColours() : [colour("k9"), colour("read"), colour("write"), colour("both")];
  colours[OTHER] = colour("k0b");
  colours[MARK] = colour("mark");
  if (mode === "when") for (let step = 0; step < STEPS; step += 1) colours.push(mixed(step / (STEPS - 1)));
  const n = colours.length;
  return {
    zmin: -0.5,
    zmax: n - 0.5,
    showscale: false,
    colorscale: Array.from(colours, (value, at) => [
      [at / n, value || colour("k9")],
      [(at + 1) / n, value || colour("k9")],
    ]).flat(),
  };
}

// From the first to the last: a scale that tells steps apart by lightness, too, on both backgrounds.
const TIMES = ["when0", "when1", "when2", "when3"];
function mixed(share) {
  const at = Math.min(TIMES.length - 2, Math.floor(share * (TIMES.length - 1))),
    part = share * (TIMES.length - 1) - at;
  const [from, to] = [colour(TIMES[at]), colour(TIMES[at + 1])].map((value) =>
    [1, 3, 5].map((digit) => parseInt(value.slice(digit, digit + 2), 16)),
  );
  return `rgb(${from.map((value, n) => Math.round(value + (to[n] - value) * part)).join(",")})`;
}

function cursorPlace(square) {
  const at = view.index.indexOf(view.cursor);
  return [at % square, Math.floor(at / square)];
}

function bytesOf(at) {
  const square = side(),
    step = view.span / (square * square),
    low = view.low + at * step;
  return [low, Math.min(low + step, view.cells.count)];
}

function tellWhere() {
  const cells = view.cells,
    disk = report.data.disks[report.disk];
  const low = view.low * cells.size,
    high = Math.min((view.low + view.span) * cells.size, disk.size);
  $("where").textContent =
    `${hex(low)} – ${hex(high)}, ${human(high - low)}` + (view.chosen ? `; marked: ${view.chosen.name}` : "");
  $("strip").replaceChildren(
    make("i", { style: `left:${(100 * low) / disk.size}%;width:${(100 * (high - low)) / disk.size}%` }),
  );
  $("zoom-out").disabled = $("zoom-all").disabled = view.span === cells.whole;
  $("zoom-in").disabled = view.span <= LEAST * LEAST;
  $("before").disabled = view.low === 0;
  $("after").disabled = view.low + view.span >= cells.count;
}

// What lies below the cursor, in words.
function tellCursor() {
  const cells = view.cells,
    disk = report.data.disks[report.disk],
    [low, high] = bytesOf(view.cursor);
  if (low >= cells.count) {
    $("detail").replaceChildren("beyond the end of the disk");
    return;
  }
  const owners = [...new Set(cells.owner.subarray(low, high))],
    [kind, cell] = dominant(low, high),
    owner = cells.owner[cell],
    end = Math.min(high * cells.size, disk.size);
  const lines = [
    make("b", {}, `${cells.objects.device[owner]} ${cells.objects.name[owner]}`.trim()),
    `${report.data.kinds[kind].name}; bytes ${hex(low * cells.size)} – ${hex(end)}`,
  ];
  if (owners.length > 1)
    lines.push(
      make("br"),
      `and ${count(owners.length - 1)} more here: ${owners
        .filter((o) => o !== owner)
        .slice(0, 3)
        .map((o) => cells.objects.name[o] || report.data.kinds[cells.objects.kind[o]].name)
        .join(", ")}`,
    );
  if (cells.how) {
    const how = cells.how.subarray(low, high).reduce((bits, bit) => bits | bit, 0);
    lines.push(
      make("br"),
      ["not touched in this trace", "read", "written", "read and written"][how]
        + (how ? `, first after ${earliest(low, high).toFixed(2)} s` : ""),
    );
  }
  $("detail").replaceChildren(...lines);
}

function moveTo(low, span, cursor = 0) {
  view.span = Math.max(LEAST * LEAST, Math.min(span, view.cells.whole));
  view.low = Math.max(
    0,
    Math.min(
      Math.floor(low / view.span) * view.span,
      Math.floor((view.cells.count - 1) / view.span) * view.span,
    ),
  );
  view.cursor = cursor;
  drawMap();
}

// Zoom by a factor of four in bytes, two in length; the cell at the cursor stays in view.
function zoom(way) {
  const [cell] = bytesOf(view.cursor),
    span = way > 0 ? view.span / 4 : view.span * 4;
  if (span > view.cells.whole || span < LEAST * LEAST) return;
  moveTo(cell, span);
  const square = side();
  view.cursor = Math.max(
    0,
    Math.min(square * square - 1, Math.floor((cell - view.low) / (view.span / (square * square)))),
  );
  drawMap();
}

function showFile(name, ranges) {
  view.chosen = { name, ranges };
  let span = LEAST * LEAST;
  const low = Math.min(...ranges.filter((_, at) => at % 2 === 0)),
    high = Math.max(...ranges.filter((_, at) => at % 2 === 1));
  while (span < view.cells.whole && Math.floor(low / span) !== Math.floor((high - 1) / span)) span *= 4;
  moveTo(low, span);
  const square = side();
  view.cursor = Math.floor((low - view.low) / (view.span / (square * square)));
  drawMap();
  $("disk").scrollIntoView();
}

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function listenToMap() {
  $("map").on("plotly_hover", (event) => {
    hoverAt(event.points[0]);
  });
  $("map").on("plotly_unhover", tellCursor);
  $("map").on("plotly_click", (event) => {
    const point = event.points[0];
    view.cursor = view.index[point.y * side() + point.x];
    zoom(1);
  });
  $("map").addEventListener("keydown", (event) => {
    const square = side(),
      [x, y] = cursorPlace(square),
      move = KEYS[event.key];
    if (move) {
      const to = [
        Math.max(0, Math.min(square - 1, x + move[0])),
        Math.max(0, Math.min(square - 1, y + move[1])),
      ];
      view.cursor = view.index[to[1] * square + to[0]];
      Plotly.restyle($("map"), { x: [[to[0]]], y: [[to[1]]] }, [1]);
      tellCursor();
    } else if (event.key === "Enter" || event.key === "+" || event.key === "=") zoom(1);
    else if (event.key === "-" || event.key === "Backspace") zoom(-1);
    else if (event.key === "0" || event.key === "Escape") {
      view.chosen = null;
      moveTo(0, view.cells.whole);
    } else if (event.key === ",") moveTo(view.low - view.span, view.span);
    else if (event.key === ".") moveTo(view.low + view.span, view.span);
    else return;
    event.preventDefault();
  });
  $("zoom-in").onclick = () => zoom(1);
  $("zoom-out").onclick = () => zoom(-1);
  $("zoom-all").onclick = () => {
    view.chosen = null;
    moveTo(0, view.cells.whole);
  };
  $("before").onclick = () => moveTo(view.low - view.span, view.span);
  $("after").onclick = () => moveTo(view.low + view.span, view.span);
  $("curve").onchange = drawMap;
  $("colour").onchange = () => {
    drawMap();
    drawLegend();
  };
}

function hoverAt(point) {
  if (point.curveNumber !== 0) return;
  const kept = view.cursor;
  view.cursor = view.index[point.y * side() + point.x];
  tellCursor();
  view.cursor = kept;
}

// What the colours mean, with how much there is of each where they are kinds.
function drawLegend() {
  const disk = report.data.disks[report.disk],
    sums = new Map(),
    mode = $("colour").value,
    run = report.data.runs[report.run];
  const swatch = (fill) => make("span", { class: "swatch", style: `background:${fill}` });
  $("key").replaceChildren();
  if (mode === "how") {
    for (const [fill, word] of [
      ["read", "read"],
      ["write", "written"],
      ["both", "both"],
      ["k9", "not touched"],
    ])
      $("key").append(swatch(`var(--${fill})`), `${word}  `);
  } else if (mode === "when") {
    $("key").append(
      "0 s ",
      make("span", {
        class: "ramp",
        style: `background:linear-gradient(90deg, ${TIMES.map((name) => `var(--${name})`).join(", ")})`,
      }),
      ` ${run.seconds.toFixed(1)} s; grey: not touched`,
    );
  }
  for (const row of disk.kinds) sums.set(row.kind, (sums.get(row.kind) || 0) + row.bytes);
  const rows = [...sums]
    .sort((a, b) => b[1] - a[1])
    .map(([kind, bytes]) => {
      const name = make(
        "td",
        { title: report.data.kinds[kind].meaning },
        swatch(`var(--k${kind})`),
        report.data.kinds[kind].name,
      );
      if (kind === 0) name.insertBefore(swatch("var(--k0b)"), name.lastChild);
      return make(
        "tr",
        {},
        name,
        make("td", { class: "number" }, human(bytes)),
        make("td", { class: "number" }, percent(bytes, disk.size)),
      );
    });
  $("legend").replaceChildren(...rows);
}
