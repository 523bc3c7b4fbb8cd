// The frame of the console: the pages by the fragment of the address, and the state of the connection.

import {make} from "./dom.js";
import {journal} from "./journal.js";
import * as calls from "./calls.js";
import * as conditions from "./conditions.js";
import * as evidence from "./evidence.js";
import * as policies from "./policies.js";
import * as snapshots from "./snapshots.js";
import * as stack from "./stack.js";

const PAGES = {
  stack: ["Stack", stack.show],
  calls: ["Calls", calls.show],
  policies: ["Policies", policies.show],
  evidence: ["Evidence", evidence.show],
  conditions: ["Faults, clock, platforms", conditions.show],
  snapshots: ["Snapshots", snapshots.show],
};
let leave = () => {};
let shown = 0;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {  // a person may have typed it
    return text;
  }
}

function chosen() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decoded);
  return Object.hasOwn(PAGES, name) ? [name, rest] : ["stack", []];
}

async function show() {
  const [name, rest] = chosen(), turn = ++shown;
  leave();
  leave = () => {};
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const [title, open] = PAGES[name], heading = make("h1", {tabindex: -1}, title), content = make("div");
  document.title = `${title} – dstack-emu console`;
  document.getElementById("main").replaceChildren(heading, content);
  if (turn > 1) heading.focus();  // at first, the skip link comes first
  try {
    const left = await open(content, rest);
    if (turn === shown) leave = left;
    else left();
  } catch (error) {
    content.append(make("p", {class: "alert", role: "alert"}, error.message));
  }
}

document.getElementById("pages").append(...Object.entries(PAGES).map(([name, [title]]) =>
  make("li", {}, make("a", {href: `#/${name}`, "data-page": name}, title))));
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
addEventListener("hashchange", show);
journal.onConnection((text) => { document.getElementById("connection").textContent = text; });
journal.start();
show();
