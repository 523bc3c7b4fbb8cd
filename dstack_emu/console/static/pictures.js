// A call's picture to keep: as a file (SVG), and as a text for a pull request (Mermaid). The stack draws both, as
// `dstack-emu ctl trace` does.

import {text} from "./api.js";
import {alertBox, attempt, make} from "./dom.js";

const FENCE = "```";

// Buttons for the call of this id.
export function toKeep(id) {
  const alert = alertBox(), done = make("p", {role: "status"}), shown = make("div", {hidden: true});
  const area = make("textarea", {readonly: true, rows: 8, "aria-label": `Call ${id} in Mermaid`});
  shown.append(make("p", {class: "note"}, "This page may not write to the clipboard: copy the text from here."), area);
  const act = (action) => (event) => attempt(alert, event.currentTarget, async () => {
    done.textContent = "";
    shown.hidden = true;
    await action();
  });

  async function save() {
    const name = `call-${id}.svg`;
    const url = URL.createObjectURL(new Blob([await text(`/journal/${id}/svg`)], {type: "image/svg+xml"}));
    make("a", {href: url, download: name}).click();
    URL.revokeObjectURL(url);
    done.textContent = `Saved as ${name}.`;
  }

  // A browser has no clipboard for pages of another host by HTTP.
  async function copy() {
    const fenced = `${FENCE}mermaid\n${await text(`/journal/${id}/mermaid`)}${FENCE}\n`;
    const copied = await navigator.clipboard?.writeText(fenced).then(() => true, () => false);
    if (copied) done.textContent = "Copied: paste it into a text in Markdown.";
    else {
      area.value = fenced;
      shown.hidden = false;
      area.select();
    }
  }

  return make("div", {class: "noprint"}, make("div", {class: "row"}, make("button", {onclick: act(save)}, "Save the picture (SVG)"),
    make("button", {onclick: act(copy)}, "Copy as Mermaid")), alert, done, shown);
}
