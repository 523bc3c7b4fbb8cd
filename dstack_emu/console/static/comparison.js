// What differs between two states of a stack, part by part: policies as diffs, everything else as values.

import {diff} from "./diff.js";
import {make, scrolling, whole, worded} from "./dom.js";

// A table below a heading, which is its name.
function table(label, heads, rows) {
  return scrolling(label, make("table", {"aria-label": label}, make("thead", {}, make("tr", {},
    heads.map((each) => make("th", {scope: "col"}, each)))), make("tbody", {}, rows)));
}

function values({part, changes}) {
  const rows = changes.map(({what, before, after}) => make("tr", {}, make("th", {scope: "row"}, worded(what)),
    make("td", {class: "mono"}, whole(before)), make("td", {class: "mono"}, whole(after))));
  return table(part, ["what", "before", "after"], rows);
}

// Both answers of the stack about the same two states: by part, and place by place.
export function comparison({parts, unseen}, places) {
  if (!places.length) return [make("p", {}, "Nothing differs.")];
  const rows = places.map(({path, before, after}) => make("tr", {}, make("th", {scope: "row"}, path),
    make("td", {class: "mono"}, whole(before)), make("td", {class: "mono"}, whole(after))));
  return [
    make("p", {}, `${parts.length} parts differ: ${parts.map(({part}) => part).join(", ") || "none that is shown"}.`),
    ...parts.map((each) => make("section", {class: "card"}, make("h3", {}, each.part),
      each.diff ? diff(each.diff) : null, each.changes.length ? values(each) : null)),
    unseen.length ? make("p", {class: "note"}, `These differ, too, and are not shown, because they hold keys, tokens or positions of random streams: ${unseen.join(", ")}.`) : null,
    make("details", {}, make("summary", {}, "Place by place"), table("Every place that differs", ["place", "before", "after"], rows)),
  ].filter(Boolean);
}
