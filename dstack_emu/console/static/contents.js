// The contents of evidence, as the stack describes them: groups that open, tables, and texts. Whatever was pasted stays
// text: there are no links in it. A group is filled when it is opened, because evidence may have thousands of events.

import {make, scrolling, worded} from "./dom.js";

const ROWS = 200;      // of a table, until all of them are asked for
const COLUMNS = 12;
const LONGEST = 1_000; // characters of a text, until all of it is asked for
const HEX = /^(0x)?[0-9a-f]{16,}$/i;

function isNested(value) {
  return typeof value === "object" && value !== null && !isNamed(value);
}

// A number of the protocol, with its name.
function isNamed(value) {
  return typeof value === "object" && value !== null && Object.keys(value).join() === "value,name";
}

function text(name, value) {
  if (isNamed(value)) return `${value.value} (${value.name})`;
  if (name === "emulated" && value === true) return "yes: EMULATED, it proves nothing";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (value === null || value === "") return "–";
  return String(value);
}

function simple(name, value) {
  const shown = text(name, value), mono = HEX.test(shown) ? "mono" : null;
  if (shown.length <= LONGEST) return make("span", {class: mono}, shown);
  const whole = make("span", {class: mono}, `${shown.slice(0, LONGEST)}…`);
  return make("div", {}, whole, " ", make("button", {class: "plain", onclick: (event) => {
    whole.textContent = shown;
    event.currentTarget.remove();
  }}, `Show all ${shown.length} characters`));
}

function list(name, values) {
  if (!values.length) return make("span", {}, "none");
  return simple(name, values.map((each) => text(name, each)).join(", "));
}

function table(name, rows) {
  const columns = [...new Set(rows.slice(0, ROWS).flatMap((row) => Object.keys(row)))].slice(0, COLUMNS);
  const cell = (row, column) => {
    const value = row[column];
    if (value === undefined) return make("td");
    return make("td", {class: value === "differs" ? "denied" : value === "equal" ? "ok" : null},
      Array.isArray(value) ? list(column, value) : simple(column, value));
  };
  const line = (row) => make("tr", {}, columns.map((column) => cell(row, column)));
  const body = make("tbody", {}, rows.slice(0, ROWS).map(line));
  const more = rows.length > ROWS ? make("button", {onclick: (event) => {
    body.append(...rows.slice(ROWS).map(line));
    event.currentTarget.remove();
  }}, `Show all ${rows.length} rows`) : null;
  return make("div", {}, scrolling(worded(name), make("table", {class: "compact"},
    make("thead", {}, make("tr", {}, columns.map((column) => make("th", {scope: "col"}, worded(column))))), body)), more);
}

function group(title, fill) {
  const details = make("details", {}, make("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(make("div", {class: "inner"}, fill()));
  });
  return details;
}

function array(name, values) {
  if (!values.some(isNested)) return list(name, values);
  if (values.length === 1) return contents(values[0], name);
  const isFlat = values.every((each) => isNested(each) && !Array.isArray(each) &&
    Object.values(each).every((inner) => !isNested(inner) || (Array.isArray(inner) && !inner.some(isNested))));
  if (isFlat) return table(name, values);
  return make("div", {}, values.slice(0, ROWS).map((each, index) => {
    const said = each?.what ?? each?.kind ?? each?.id;
    return group(`${worded(name)} ${index + 1} of ${values.length}${typeof said === "string" ? `: ${said}` : ""}`, () => contents(each, name));
  }), values.length > ROWS ? make("p", {class: "note"}, `and ${values.length - ROWS} more`) : null);
}

// Everything in a description; `name` is that of its key.
export function contents(value, name = "") {
  if (!isNested(value)) return simple(name, value);
  if (Array.isArray(value)) return array(name, value);
  const entries = Object.entries(value), isInner = (each) => isNested(each) && !(Array.isArray(each) && !each.some(isNested));
  const facts = entries.filter(([, each]) => !isInner(each)).flatMap(([key, each]) =>
    [make("dt", {}, worded(key)), make("dd", {}, Array.isArray(each) ? list(key, each) : simple(key, each))]);
  const inner = entries.filter(([, each]) => isInner(each)).map(([key, each]) =>
    group(Array.isArray(each) ? `${worded(key)} (${each.length})` : worded(key), () => contents(each, key)));
  if (inner.length === 1) inner[0].open = true;
  return make("div", {}, facts.length ? make("dl", {class: "facts"}, facts) : null, inner);
}
