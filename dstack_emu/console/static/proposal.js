// What would come of transactions, and the button that sends them: nothing is sent before a person has seen that.

import {call} from "./api.js";
import {alertBox, attempt, make} from "./dom.js";

function said({allowed, reason}) {
  return allowed ? "allowed" : `denied: ${reason}`;
}

// The answer of an act as text: what it changes, and which trust domains it allows or denies.
export function outcome({what, before, after, decisions}) {
  const plain = (value) => typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
  const changed = Object.entries(decisions).filter(([, each]) => said(each.before) !== said(each.after));
  return [make("p", {}, `${what}: ${before === null ? "" : `${plain(before)} before, `}${plain(after)} after it.`),
    changed.length ? make("ul", {}, changed.map(([name, each]) =>
      make("li", {class: each.after.allowed ? "ok" : "denied"}, `${name}: ${said(each.before)} before, ${said(each.after)} after it`)))
      : make("p", {}, "It changes the decision on no trust domain of the stack.")];
}

export class Proposal {
  constructor(sent) {
    this._sent = sent;
    this._alert = alertBox();
    this._done = make("p", {role: "status"});
    this._shown = make("div");
    this.element = make("section", {"aria-label": "Transaction"}, this._shown, this._alert, this._done);
  }

  // Asks what an act would change, and shows it with the button that sends it.
  async show(act, body, alert = this._alert) {
    this._done.textContent = "";
    this._shown.replaceChildren();
    await attempt(alert, null, async () => this._propose(act, body, await call("POST", `/chain/${act}`, {...body, preview: true})));
  }

  _propose(act, body, planned) {
    const cancel = () => this._shown.replaceChildren();
    const heading = make("h2", {tabindex: -1}, `What ${act} would do`);
    const send = make("button", {onclick: (event) => attempt(this._alert, event.currentTarget, async () => {
      const done = await call("POST", `/chain/${act}`, body);
      this._shown.replaceChildren();
      this._done.textContent = `Sent: ${done.what}, block ${done.block}, ${done.transaction}`;
      await this._sent();
    })}, "Send the transaction");
    this._shown.replaceChildren(make("div", {class: "card"}, heading, outcome(planned), make("p", {class: "note"}, `${planned.sender} sends it.`),
      make("div", {class: "row"}, send, make("button", {onclick: cancel}, "Cancel"))));
    heading.focus();
  }
}
