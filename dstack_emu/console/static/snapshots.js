// The page of snapshots: take one, go back to one, delete one.

import {call, get, part} from "./api.js";
import {alertBox, attempt, labelled, make} from "./dom.js";

const READY = "ready";  // the snapshot that the stack takes of itself

export async function show(content) {
  const alert = alertBox(), done = make("p", {role: "status"}), rows = make("tbody");
  const name = make("input", {type: "text", autocomplete: "off", required: true, maxlength: 100});

  async function look() {
    const names = await get("/snapshots");
    rows.replaceChildren(...names.map((each) => make("tr", {}, make("th", {scope: "row"}, each),
      make("td", {}, make("div", {class: "row"},
        button(`Go back to ${each}`, "Go back", () => call("POST", `/snapshots/${part(each)}/revert`, {}), `The stack is as it was in ${each}.`),
        each === READY ? null : button(`Delete ${each}`, "Delete", () => call("DELETE", `/snapshots/${part(each)}`), `${each} is deleted.`))))));
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
    alert, done, make("table", {}, make("caption", {}, "Snapshots"), rows));
  await look();
  return () => {};
}
