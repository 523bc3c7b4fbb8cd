// The contracts on the stack's chain: what they hold, with a button to remove each entry, a form per act, and what was sent.

import {actForms} from "./acts.js";
import {get} from "./api.js";
import {same} from "./diff.js";
import {alertBox, attempt, facts, make, scrolling} from "./dom.js";
import {Proposal} from "./proposal.js";

const EVERY = 5_000;   // milliseconds between two looks at the chain
const SHOWN = 50;      // transactions in the table
const OF_KMS = [["os_images", "os-image", "OS images"], ["kms_measurements", "kms-mr", "Measurements of KMS"], ["kms_devices", "kms-device", "Devices of KMS"]];
const OF_APP = [["compose_hashes", "compose-hash", "Compose hashes"], ["devices", "device", "Devices"]];

// What trust domains of the stack the values of lists are of, by the value.
function owners(guests) {
  const known = new Map();
  for (const [name, guest] of Object.entries(guests))
    for (const key of ["os_image_hash", "mr_aggregated", "device_id", "compose_hash", "app_id"])
      known.set(`0x${guest[key]}`, [...known.get(`0x${guest[key]}`) ?? [], name]);
  return known;
}

export class Contracts {
  constructor(guests, decidesFor) {
    this._known = owners(guests);
    this._app = `0x${guests.app?.app_id ?? ""}`;
    this._held = null;
    this._alert = alertBox();
    this._heading = make("p", {class: "note"});
    this._decisions = make("div");
    this._lists = make("div");
    this._forms = make("div");
    this._sent = make("div");
    this._proposal = new Proposal(() => this.look());
    this._decidesFor = decidesFor.map((name) => `kms-${name}`).join(" and ");
    this.element = make("div", {}, this._heading, this._alert, this._proposal.element, this._decisions, this._lists,
      make("h2", {}, "Send a transaction"), this._forms, make("h2", {}, "Transactions"), this._sent);
  }

  async start() {
    await this.look();
    await attempt(this._alert, null, async () => this._forms.append(...await actForms(this._held, this._proposal)));
    this._timer = setInterval(() => { if (document.visibilityState === "visible") this.look(); }, EVERY);
  }

  stop() {
    clearInterval(this._timer);
  }

  // Reads the chain, and shows it if it has changed.
  async look() {
    await attempt(this._alert, null, async () => {
      const [held, sent] = await Promise.all([get("/chain"), get(`/chain/transactions?limit=${SHOWN}`)]);
      if (same(held, this._held)) return;
      this._held = held;
      this._show(held, sent);
    });
  }

  _show(held, sent) {
    const {kms, apps, block, chain_id: id} = held;
    this._heading.textContent = `The contract ${kms.address} on the stack's chain decides for ${this._decidesFor}: block ${block} of chain ${id}. Both KMS ask the same contract.`;
    this._decisions.replaceChildren(make("h2", {}, "What it decides"), make("ul", {}, Object.entries(held.decisions).map(([name, {allowed, reason}]) =>
      make("li", {class: allowed ? "ok" : "denied"}, `${name}: ${allowed ? "allowed" : `denied, ${reason}`}`))),
    make("p", {class: "note"}, "On a platform whose TCB status is UpToDate."));
    this._lists.replaceChildren(this._contract("DstackKms", kms, OF_KMS, {}),
      ...Object.values(apps).map((app) => this._contract(`App ${app.address}${this._of(app.address)}`, app, OF_APP, {app: app.address})));
    this._sent.replaceChildren(transactions(sent));
  }

  _of(value) {
    const names = this._known.get(value.toLowerCase());
    return names ? ` (${names.join(", ")})` : "";
  }

  _contract(title, contract, lists, fields) {
    const {info, ...rest} = contract, own = Object.entries(rest).filter(([name]) => !lists.some(([list]) => list === name));
    return make("section", {class: "card", "aria-label": title}, make("h2", {}, title), facts(Object.fromEntries(own)),
      info ? make("details", {}, make("summary", {}, "What a KMS publishes"), facts(info)) : null,
      contract.problem ? null : lists.flatMap(([name, kind, text]) => this._list(text, kind, contract[name], fields)));
  }

  _list(title, kind, values, fields) {
    const entry = (value) => make("li", {}, make("code", {}, value), this._of(value), " ",
      make("button", {"aria-label": `Remove ${kind} ${value}`, onclick: () => this._proposal.show("remove", {kind, value, ...fields})}, "Remove…"));
    return [make("h3", {}, title), values.length ? make("ul", {}, values.map(entry)) : make("p", {class: "dim"}, "None.")];
  }
}

function called({function: name, args, created}) {
  if (created) return `creates ${created}`;
  return `${name ?? "a call of another contract"}(${Object.entries(args).map(([key, value]) => `${key} ${JSON.stringify(value)}`).join(", ")})`;
}

function event({name, args, address, topics}) {
  return name === null ? `an event of ${address}: ${topics.join(", ")}` : `${name} ${Object.values(args).join(" ")}`;
}

function transactions(sent) {
  if (!sent.length) return make("p", {class: "dim"}, "None.");
  const row = (each) => make("tr", {class: each.succeeded ? null : "refused"}, make("td", {}, String(each.block)),
    make("td", {class: "mono"}, called(each), each.succeeded ? "" : " failed"), make("td", {class: "mono"}, `${each.from} → ${each.to ?? "a new contract"}`),
    make("td", {}, each.events.length ? make("ul", {}, each.events.map((one) => make("li", {class: "mono"}, event(one)))) : "none"));
  const heads = ["Block", "Call", "From and to", "Events"].map((text) => make("th", {scope: "col"}, text));
  return scrolling("Transactions",
    make("table", {}, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, [...sent].reverse().map(row))));
}
