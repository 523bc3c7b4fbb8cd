// Shows unified diffs, and texts byte by byte under one another.

import {make, scrolling} from "./dom.js";

export function diff(text) {
  const kinds = {"+": "added", "-": "removed", "@": "dim"};
  const lines = text.split("\n").filter((line) => !/^(\+\+\+|---) /.test(line)).map((line) =>
    make("span", {class: `line ${kinds[line[0]] ?? ""}`}, line));
  return make("pre", {class: "diff", tabindex: 0, "aria-label": "What changes"}, lines);
}

const HEX = /^(0x)?([0-9a-f]*)$/i;

const MOST = 1_000;  // bytes or characters of a value that are compared

function pieces(text) {
  const hex = HEX.exec(text);
  const all = hex && hex[2].length % 2 === 0 && hex[2] ? hex[2].toLowerCase().match(/../g) : [...text];
  return all.length > MOST ? [...all.slice(0, MOST), `… and ${all.length - MOST} more`] : all;
}

// How many pieces two texts have in common, place by place.
function alike(one, other) {
  return one.filter((piece, index) => piece === other[index]).length;
}

function row(name, own, other) {
  const cells = own.map((piece, index) =>
    make(piece === other?.[index] ? "span" : "mark", {class: index % 4 === 3 ? "byte fourth" : "byte"}, piece));
  return make("tr", {}, make("th", {scope: "row"}, name), make("td", {class: "mono"}, cells.length ? cells : "none"));
}

// What was sent, and below it what is accepted, the most alike first: bytes that differ are marked.
export function aligned(got, wanted) {
  const own = pieces(got);
  const accepted = wanted.map(pieces).sort((one, other) => alike(other, own) - alike(one, own));
  const rows = accepted.slice(0, 5).map((each) => row("wanted", each, own));
  if (accepted.length > 5) rows.push(make("tr", {}, make("th"), make("td", {}, `and ${accepted.length - 5} more`)));
  return scrolling("What was sent and what is wanted", make("table", {class: "aligned"}, make("tbody", {},
    row("got", own, accepted[0]), rows.length ? rows : make("tr", {}, make("th", {scope: "row"}, "wanted"), make("td", {}, "none")))));
}

// A copy with sorted keys, so that the order of keys does not matter.
function sorted(value) {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

// Whether two values are the same JSON.
export function same(one, other) {
  return JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));
}
