// The page of conditions: the clock, faults, platforms and their vendor.

import {call, get, part} from "./api.js";
import {alertBox, attempt, choice, labelled, make, scrolling, tied, unseenStatus, whole} from "./dom.js";
import {allowed, changeForm, properties} from "./fields.js";
import {Scenarios} from "./scenarios.js";

const LEAPS = [["An hour on", "1h"], ["A day on", "1d"], ["30 days on", "30d"], ["A year on", "365d"]];
const EVERY = 3_000;  // milliseconds between two looks at clock and faults
const READY_MADE = [
  ["A webhook that decides the opposite, once", {service: "auth-src", call: "/bootAuth/*", kind: "decision", times: 1}],
  ["A KMS that resets one connection", {service: "kms-src", call: "GetAppKey", kind: "reset", times: 1}],
];

export async function show(content) {
  const clock = new Clock(), faults = new Faults(), platforms = make("div");
  const scenarios = new Scenarios(() => Promise.all([clock.look(), faults.look(), conditions(platforms)]));
  content.append(make("h2", {}, "Clock"), clock.element, make("h2", {}, "Scenarios"), scenarios.element,
    make("h2", {}, "Faults"), faults.element, make("h2", {}, "Platforms and their vendor"), platforms);
  await Promise.all([clock.look(), scenarios.look(), faults.start(), conditions(platforms)]);
  const timer = setInterval(() => {
    if (document.visibilityState !== "visible") return;
    clock.look();
    scenarios.look();
    faults.look();
  }, EVERY);
  return () => clearInterval(timer);
}

class Clock {
  constructor() {
    this._now = make("p");
    this._changed = unseenStatus();  // the time itself moves, and is not announced
    this._alert = alertBox();
    this._value = make("input", {type: "text", autocomplete: "off", placeholder: "2026-06-01T12:00:00Z or 30d"});
    const button = (label, body) => make("button", {onclick: (event) => attempt(this._alert, event.currentTarget, async () => {
      this._tell(await call("POST", "/clock", body()));
      this._changed.textContent = this._now.textContent;
    })}, label);
    const value = () => this._value.value.trim();
    tied(this._alert, {clock: this._value});
    this.element = make("div", {}, this._now, this._changed, make("div", {class: "row"}, labelled("Time or duration", "clock-value", this._value),
      button("Set the time", () => ({set: value()})), button("Advance by the duration", () => ({advance: value()})),
      button("Freeze", () => ({freeze: value() || true})), button("Resume", () => ({resume: true})),
      button("Follow the system clock", () => ({follow_the_wall: true}))),
    make("div", {class: "row"}, LEAPS.map(([label, advance]) => button(label, () => ({advance})))), this._alert);
  }

  async look() {
    await attempt(this._alert, null, async () => this._tell(await get("/clock")));
  }

  _tell({time, frozen, touched}) {
    const text = `${time}, ${frozen ? "frozen" : touched ? "running, changed" : "as the system clock"}`;
    if (this._now.textContent !== text) this._now.textContent = text;
  }
}

class Faults {
  constructor() {
    this._alert = alertBox();
    this._rows = make("tbody");
    this._shown = "";
    this._form = make("div");
    const names = ["fault", "what it does", "calls seen", "calls met", "what can be done"];
    this.element = make("div", {},
      make("div", {class: "row"}, READY_MADE.map(([label, rule]) =>
        make("button", {onclick: (event) => this._act(event, () => call("POST", "/faults", rule))}, label))),
      this._form, this._alert,
      scrolling("Faults in force", make("table", {}, make("caption", {}, "Faults in force"),
        make("thead", {}, make("tr", {}, names.map((name) => make("th", {scope: "col"}, name)))), this._rows)),
      make("button", {onclick: (event) => this._act(event, () => call("DELETE", "/faults"))}, "Lift all faults"));
  }

  async start() {
    const [stack, rule] = await Promise.all([get("/stack"), properties("FaultRule")]);
    this._form.replaceChildren(this._rule(Object.keys(stack.services).filter((name) => name !== "control"), allowed(rule.kind)));
    await this.look();
  }

  // The form for any rule; fields that are empty are left out.
  _rule(services, kinds) {
    const input = (attributes = {}) => make("input", {type: "text", autocomplete: "off", ...attributes});
    const fields = {
      service: choice(["*", ...services], "*"), call: input({placeholder: "GetAppKey, /bootAuth/*"}), caller: input({placeholder: "kms-src, outside"}),
      kind: choice(kinds, "status"), times: input({inputmode: "numeric"}), after: input({inputmode: "numeric"}),
      seconds: input({inputmode: "decimal"}), status: input({inputmode: "numeric"}), body: input(), allow: choice(["", "true", "false"], "", "the opposite"), reason: input(),
    };
    tied(this._alert, fields);
    const labels = {call: "call (RPC or path)", times: "times (at most)", after: "after (calls)", seconds: "seconds (delay, slow)",
                    status: "status", body: "body (status)", allow: "allow (decision)", reason: "reason (decision)"};
    const numbers = new Set(["times", "after", "seconds", "status"]);
    const read = (name, value) => numbers.has(name) ? Number(value) : name === "allow" ? value === "true" : value;
    return make("form", {"aria-label": "A new fault", onsubmit: (event) => {
      event.preventDefault();
      const given = Object.entries(fields).map(([name, {value}]) => [name, value.trim()]).filter(([, value]) => value !== "");
      this._act({currentTarget: event.submitter}, () => call("POST", "/faults", Object.fromEntries(given.map(([name, value]) => [name, read(name, value)]))));
    }}, make("div", {class: "row"}, Object.entries(fields).map(([name, field]) => labelled(labels[name] ?? name, `fault-${name}`, field)),
      make("button", {}, "Put in force")));
  }

  async _act(event, action) {
    await attempt(this._alert, event.currentTarget, async () => {
      await action();
      await this.look();
    });
  }

  async look() {
    const faults = await get("/faults").catch(() => null);
    if (faults === null || JSON.stringify(faults) === this._shown) return;
    this._shown = JSON.stringify(faults);
    this._rows.replaceChildren(...faults.map(({id, seen, met, spent, ...rule}) => make("tr", {},
      make("td", {}, id), make("td", {}, whole(Object.entries(rule).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", "))),
      make("td", {}, String(seen)), make("td", {}, spent ? `${met}, spent` : String(met)),
      make("td", {}, make("button", {"aria-label": `Lift fault ${id}`, onclick: (event) =>
        this._act(event, () => call("DELETE", `/faults/${part(id)}`))}, "Lift")))));
  }
}

async function conditions(place) {
  const [platforms, vendor, kms, of, all] = await Promise.all(
    [get("/platforms"), get("/vendor"), get("/kms"), properties("PlatformChange"), properties("VendorChange")]);
  const note = (answer) => answer.note ?? "Changed: the next quotes and documents have it.";
  const restarts = make("div", {class: "row"}, Object.keys(kms).map((name) => restart(name)));
  place.replaceChildren(
    ...Object.entries(platforms).map(([name, state], index) => make("section", {class: "card"}, make("h3", {}, name),
      make("p", {class: "note mono"}, `device ${state.device_id}`),
      changeForm(`platform ${index}`, of, state, async (changes) => note(await call("PATCH", `/platforms/${part(name)}`, changes))))),
    make("section", {class: "card"}, make("h3", {}, "The vendor, for all platforms"),
      changeForm("vendor", all, vendor, async (changes) => note(await call("PATCH", "/vendor", changes)))),
    make("p", {class: "note"}, "A KMS verifies its own evidence once in the life of its process; started anew, it verifies the present state."),
    restarts);
}

function restart(name) {
  const alert = alertBox(), done = make("span", {role: "status"});
  return make("div", {}, make("button", {onclick: (event) => attempt(alert, event.currentTarget, async () => {
    await call("POST", `/kms/${part(name)}/restart`, {});
    done.textContent = " Started anew.";
  })}, `Start kms-${name} anew`), done, alert);
}
