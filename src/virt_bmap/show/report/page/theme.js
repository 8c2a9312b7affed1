"use strict";
// Colours come from the style sheet, so that charts follow the light, dark and printed page.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const kindColours = () => report.data.kinds.map((_, kind) => colour(`k${kind}`));

function layout(more = {}) {
  const axis = {
    gridcolor: colour("line"),
    zerolinecolor: colour("line"),
    linecolor: colour("line"),
    automargin: "height",
  };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 16, t: 12, b: 44 },
    font: {
      color: colour("text"),
      family: "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
      size: 12,
    },
    hoverlabel: {
      bgcolor: colour("panel"),
      bordercolor: colour("line"),
      font: { color: colour("text") },
      align: "left",
      namelength: -1,
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
    legend: { orientation: "h", y: 1.12, x: 0 },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}

// Nothing of a page may be sent anywhere: the library's button for
// its maker's cloud is left out, and its address as well.
const CONFIG = {
  displaylogo: false,
  responsive: true,
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};
const BARE = { ...CONFIG, displayModeBar: false };

function draw(id, traces, more, config = CONFIG) {
  return Plotly.react($(id), traces, layout(more), config);
}

function nothing(id, why) {
  Plotly.purge($(id));
  $(id).replaceChildren(make("p", { class: "note" }, why));
}
