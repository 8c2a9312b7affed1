"use strict";
// The data, and small helpers. What comes from a disk reaches the page as text nodes only.

const report = { data: null, disk: 0, run: 0 };

report.load = async function () {
  const packed = atob(document.getElementById("data").textContent.trim());
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  report.data = JSON.parse(await new Response(stream).text());
};

const $ = (id) => document.getElementById(id);

// An element with text and attributes; children are elements or strings.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function human(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let value = Math.abs(bytes),
    unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${bytes < 0 ? "-" : ""}${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

const count = (number) => number.toLocaleString("en-US");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "");
const hex = (number) => `0x${number.toString(16)}`;

// Charts know a little markup in their texts: a name is shown as it is.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Ticks for an axis of bytes: powers of two, not of ten.
function byteTicks(most, wanted = 5) {
  let step = 1;
  while (most / step > wanted) step *= 2;
  const values = [];
  for (let at = 0; at <= most; at += step) values.push(at);
  return { tickvals: values, ticktext: values.map(human) };
}
