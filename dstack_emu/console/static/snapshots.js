// The page of snapshots: take one, compare it, go back to it, delete it.

import {call, get, part} from "./api.js";
import {comparison} from "./comparison.js";
import {alertBox, attempt, labelled, make, tied} from "./dom.js";

const READY = "ready";  // the snapshot that the stack takes of itself

export async function show(content) {
  const alert = alertBox(), done = make("p", {role: "status"}), rows = make("tbody");
  const compared = make("section", {"aria-label": "What differs"});
  const to = make("select", {});
  const name = make("input", {type: "text", autocomplete: "off", required: true, maxlength: 100});

  tied(alert, {name});

  async function look() {
    const names = await get("/snapshots");
    to.replaceChildren(...["", ...names].map((each) => make("option", {value: each}, each || "the present state")));
    rows.replaceChildren(...names.map((each) => make("tr", {}, make("th", {scope: "row"}, each),
      make("td", {}, make("div", {class: "row"},
        button(`Go back to ${each}`, "Go back", () => call("POST", `/snapshots/${part(each)}/revert`, {}), `The stack is as it was in ${each}.`),
        make("button", {"aria-label": `Compare ${each}`, onclick: (event) => compare(event, each)}, "Compare"),
        each === READY ? null : button(`Delete ${each}`, "Delete", () => call("DELETE", `/snapshots/${part(each)}`), `${each} is deleted.`))))));
  }

  async function compare(event, one) {
    await attempt(alert, event.currentTarget, async () => {
      const query = to.value ? `?to=${part(to.value)}` : "";
      const [parts, places] = await Promise.all(["comparison", "differences"].map((each) => get(`/snapshots/${part(one)}/${each}${query}`)));
      const heading = make("h2", {tabindex: -1}, `From ${one} to ${to.value || "the present state"}`);
      compared.replaceChildren(heading, ...comparison(parts, places));
      heading.focus();
    });
  }

  function act(event, action, said) {
    return attempt(alert, event.currentTarget, async () => {
      done.textContent = "";
      await action();
      await look();
      done.textContent = said;
    });
  }

  function button(label, text, action, said) {
    return make("button", {"aria-label": label, onclick: (event) => act(event, action, said)}, text);
  }

  content.append(
    make("p", {class: "note"}, "A snapshot has everything that changes in a stack: policies, platforms, clock, faults, trust domains, KMS, machines. " +
      `The stack took “${READY}” when it became ready.`),
    make("form", {class: "row", onsubmit: (event) => {
      event.preventDefault();
      const taken = name.value.trim();
      act({currentTarget: event.submitter}, () => call("POST", "/snapshots", {name: taken}), `${taken} is taken.`);
    }}, labelled("Name", "snapshot-name", name), make("button", {}, "Take a snapshot")),
    alert, done, make("table", {}, make("caption", {}, "Snapshots"),
      make("thead", {}, make("tr", {}, ["name", "what can be done"].map((each) => make("th", {scope: "col"}, each)))), rows),
    labelled("Compare with", "snapshot-other", to), compared);
  await look();
  return () => {};
}
