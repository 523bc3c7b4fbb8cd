// Runs the script of the KMS's set-up page in node, over as much of a document as it uses: elements with an id, the
// kinds of children that it looks for, events, a clipboard. It reads one action a line, and answers with what the page
// shows once nothing is under way any more. Requests go to the KMS whose URL is the first argument; its query is
// that of the page's address.

"use strict";
const fs = require("fs"), readline = require("readline"), vm = require("vm");
const [base, page] = process.argv.slice(2);
const script = fs.readFileSync(page, "utf8").match(/<script>([^]*)<\/script>/)[1];

class Element {
  constructor(tag) {
    Object.assign(this, {tag, children: [], listeners: {}, text: "", hidden: tag === "div", disabled: false});
  }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join(""); }
  set textContent(value) { this.text = String(value); this.children = []; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; this.text = ""; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  fire(kind) { return this.listeners[kind]({preventDefault() {}, target: this}); }
}

// The page's sections, as the HTML has them.
const byId = {}, named = (id, tag) => (byId[id] = new Element(tag));
const sections = {};
for (const id of ["measured", "bootstrap", "onboard", "finish"]) {
  const section = named(id, "section");
  const parts = {"dl": new Element("dl"), "form": new Element("form"), "[role=alert]": new Element("p"),
                 "div": new Element("div"), "button": new Element("button"), "[name=domain]": new Element("input")};
  section.querySelector = (selector) => selector.startsWith("#") ? byId[selector.slice(1)] : parts[selector];
  section.querySelectorAll = () => [parts.button];
  sections[id] = parts;
}
for (const id of ["measure", "copy-policy", "policy", "finished"]) named(id, "p");

let clipboard = "", asked = 0, answer = true, fields = {}, underWay = [];
const context = {
  document: {getElementById: (id) => byId[id], createElement: (tag) => new Element(tag)},
  window: {confirm() { asked += 1; return answer; }},
  navigator: {clipboard: {async writeText(text) { clipboard = text; }}},
  location: {host: new URL(base).host, hostname: new URL(base).hostname, search: new URL(base).search},
  FormData: class { get(name) { return fields[name]; } },
  fetch: (path, options) => fetch(new URL(path, new URL("/", base)), options),
  Error, JSON, URLSearchParams,
};
vm.createContext(context);
underWay.push(vm.runInContext(script, context));  // the value of its last statement: the first measurement

function shown() {
  const out = {clipboard, asked, finished: byId.finished.textContent};
  for (const [id, parts] of Object.entries(sections)) {
    const rows = parts.dl.children, values = [];
    for (let i = 0; i < rows.length; i += 2) values.push([rows[i].textContent, rows[i + 1].children[0].textContent]);
    out[id] = {values, error: parts["[role=alert]"].textContent, domain: parts["[name=domain]"].value};
  }
  out.measured.policy = byId.policy.textContent;
  return out;
}

function act(action) {
  switch (action.action) {
    case "loaded": return null;
    case "copy": {
      const rows = sections[action.section].dl.children;
      return rows[rows.findIndex((row) => row.tag === "dt" && row.textContent === action.name) + 1].children[1].fire("click");
    }
    case "copy-policy": return byId["copy-policy"].fire("click");
    case "submit":
      fields = action.fields;
      return sections[action.section].form.fire("submit");
    case "finish":
      answer = action.confirm ?? true;
      return sections.finish.button.fire("click");
  }
}

(async () => {
  for await (const line of readline.createInterface({input: process.stdin})) {
    await Promise.all(underWay.splice(0));
    await act(JSON.parse(line));
    console.log(JSON.stringify(shown()));
  }
})();
