"use strict";
// Tables that are sorted by their headings and searched; only the first rows are in the page at a time.

const SHOWN = 200;

// columns: {title, key, number, show, about}; rows: how many; get(column key, row)
// gives a value; pick(row), if any, is called for a row that is chosen.
function table(id, { columns, rows, get, pick, search, label }) {
  const order = Array.from({ length: rows }, (_, row) => row);
  const state = { key: null, down: false, words: "", shown: SHOWN };
  const box = make("input", {
    type: "search",
    class: "search",
    placeholder: `Search ${label}`,
    "aria-label": `Search ${label}`,
    spellcheck: "false",
  });
  const told = make("span", { class: "where", "aria-live": "polite" });
  const body = make("tbody"),
    head = make("tr"),
    more = make("button", { class: "controls" }, "Show more");
  const text = Array.from({ length: rows }, (_, row) =>
    search
      .map((key) => String(get(key, row)))
      .join(" ")
      .toLowerCase(),
  );

  for (const column of columns) {
    const button = make("button", { title: column.about || "" }, column.title);
    const cell = make("th", { scope: "col", ...(column.number ? { class: "number" } : {}) }, button);
    button.onclick = () => {
      state.down = state.key === column.key ? !state.down : Boolean(column.number) && column.key !== "first";
      state.key = column.key;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      fill();
    };
    head.append(cell);
  }

  function line(row) {
    const cells = columns.map((column) =>
      make(
        "td",
        { class: column.number ? "number" : "name" },
        column.show ? column.show(get(column.key, row), row) : String(get(column.key, row)),
      ),
    );
    if (!pick) return make("tr", {}, ...cells);
    const made = make("tr", { tabindex: "0" }, ...cells);
    made.onclick = () => pick(row);
    made.onkeydown = (event) => {
      if (event.key === "Enter") pick(row);
    };
    return made;
  }

  function fill() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = order.filter((row) => words.every((word) => text[row].includes(word)));
    if (state.key) {
      const way = state.down ? -1 : 1,
        value = (row) => get(state.key, row);
      found.sort((a, b) => way * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    }
    body.replaceChildren(...found.slice(0, state.shown).map(line));
    more.hidden = found.length <= state.shown;
    told.textContent = words.length ? `${count(found.length)} of ${count(rows)} rows` : `${count(rows)} rows`;
  }

  box.oninput = () => {
    state.words = box.value;
    state.shown = SHOWN;
    fill();
  };
  more.onclick = () => {
    state.shown += 5 * SHOWN;
    fill();
  };
  $(id).replaceChildren(
    make("div", { class: "bar controls" }, box, told),
    make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), body)),
    more,
  );
  fill();
}

function drawFiles() {
  const files = report.data.disks[report.disk].files,
    rows = files.name.length;
  $("files-note").textContent =
    rows < files.all
      ? `The largest and the most fragmented of ${count(files.all)} files. Choose one to see where it lies.`
      : "Choose a file to see where it lies on the disk.";
  table("files-table", {
    rows,
    label: "files",
    search: ["name", "device"],
    get: (key, row) => files[key][row],
    pick: (row) => showFile(files.name[row], files.ranges[row]),
    columns: [
      { title: "bytes on disk", key: "bytes", number: true, show: human },
      { title: "fragments", key: "fragments", number: true, show: count },
      { title: "device", key: "device" },
      { title: "name", key: "name" },
    ],
  });
}

function drawObjects(run) {
  const objects = run.objects,
    rows = objects.name.length,
    empty = (bytes) => (bytes ? human(bytes) : "");
  $("objects-note").textContent =
    rows < objects.all
      ? `The first ${count(rows)} of ${count(objects.all)} files and pieces of metadata.`
      : "";
  const places = objects.name.map((_, row) => row + 1);
  table("objects-table", {
    rows,
    label: "what was touched",
    search: ["name", "device", "kind"],
    get: (key, row) => (key === "place" ? places[row] : (objects[key][row] ?? -1)),
    columns: [
      { title: "#", key: "place", number: true },
      { title: "after s", key: "first", number: true, show: (value) => value.toFixed(3) },
      { title: "read", key: "read", number: true, show: empty },
      { title: "written", key: "written", number: true, show: empty },
      { title: "requests", key: "requests", number: true, show: count },
      { title: "size", key: "size", number: true, show: (value) => (value < 0 ? "" : human(value)) },
      { title: "kind", key: "kind" },
      { title: "device", key: "device" },
      { title: "name", key: "name" },
    ],
  });
}
