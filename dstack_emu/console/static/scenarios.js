// Scenarios: what the recipes of the documents do, by one button each, with what is to be expected, and undone by the
// same button. Whether one is in force is read from the stack, so it can be undone whoever began it.

import {call, get, part} from "./api.js";
import {alertBox, attempt, make} from "./dom.js";
import {same} from "./diff.js";

const APP = "host of app", KMS = "host of kms-src", WEBHOOK = "/bootAuth/*", DAY = 86_400;
const OUTDATED = {tcb_status: "OutOfDate", advisory_ids: ["INTEL-SA-00837"]}, CURRENT = {tcb_status: "UpToDate", advisory_ids: []};
const before = new Map();  // what a scenario replaced, by its title

// Whether an object has these values.
function has(state, values) {
  return Boolean(state) && Object.entries(values).every(([name, value]) => same(state[name], value));
}

// Changes values at a path of the API, which are then again what they were, or `normal`.
function changed(title, expect, says, of, path, values, normal, then = () => {}) {
  return {
    title, expect, says, isOn: (state) => has(of(state), values),
    async begin(state) {
      before.set(title, Object.fromEntries(Object.keys(values).map((name) => [name, of(state)[name]])));
      await call("PATCH", path, values);
      await then();
    },
    async undo() {
      await call("PATCH", path, before.get(title) ?? normal);
      await then();
    },
  };
}

function platform(title, expect, says, name, values, normal, then) {
  return changed(title, expect, says, (state) => state.platforms[name], `/platforms/${part(name)}`, values, normal, then);
}

function fault(title, expect, says, rule) {
  const met = ({faults}) => faults.filter((each) => has(each, rule));
  return {
    title, expect, says, isOn: (state) => met(state).length > 0,
    begin: () => call("POST", "/faults", rule),
    undo: (state) => Promise.all(met(state).map(({id}) => call("DELETE", `/faults/${part(id)}`))),
  };
}

// Denies a trust domain by what decides for kms-src, its policy or contracts. `listed` is what of it they list, as a
// member of the domain. `byPolicy` and `byContract` are what to expect.
function denied(title, byPolicy, byContract, guest, listed) {
  return {
    title, expected: ({isByContract}) => isByContract ? byContract : byPolicy, isPossible: (state) => state.policy !== null,
    isOn: (state) => !JSON.stringify(state.policy).toLowerCase().includes(state.guests[guest][listed]),
    async begin(state) {
      await call("POST", "/policies/src/deny", {guest});
      before.set(title, {was: state.policy, left: await get("/policies/src")});
    },
    // The policy is what it was, unless somebody has changed it meanwhile.
    async undo(state) {
      const {was, left} = before.get(title) ?? {};
      if (was && !state.isByContract && same(state.policy, left)) await call("PUT", "/policies/src", was);
      else await call("POST", "/policies/src/allow", {guest});
    },
  };
}

// The collateral expires in a day, and two days go by.
const unrefreshed = {
  title: "Nobody refreshes the PCCS for two days",
  expect: "The documents expire a day from now, and the clock moves by two days. No evidence can be verified any more, neither of apps nor of KMS:",
  says: "CrlExpired",
  isOn: ({vendor, clock}) => Date.parse(vendor.pck_crl_dating?.next_update ?? "9999") < clock.now * 1000 && clock.touched,
  async begin({clock}) {
    before.set(this.title, clock.touched);
    await call("PATCH", "/vendor", {collateral_until: new Date((Math.floor(clock.now) + DAY) * 1000).toISOString()});
    await call("POST", "/clock", {advance: "2d"});
  },
  async undo() {
    await call("PATCH", "/vendor", {collateral: "current"});
    await call("POST", "/clock", before.get(this.title) === false ? {follow_the_wall: true} : {advance: "-2d"});
  },
};

// Documents of Intel name a platform as out of date, first only for those who ask early.
const recovered = {
  title: "Intel's TCB recovery, and a platform that was not updated",
  expect: "The standard documents are the new ones, which call the platform of the app out of date. Its boot is denied:",
  says: "TCB status is not allowed",
  isOn: ({platforms, vendor}) => vendor.tcb_recovery === "standard" && has(platforms[APP], {recovery_status: "OutOfDate"}),
  async begin() {
    await call("PATCH", `/platforms/${part(APP)}`, {recovery_status: "OutOfDate", recovery_advisory_ids: ["INTEL-SA-01036"]});
    await call("PATCH", "/vendor", {tcb_recovery: "standard"});
  },
  async undo() {
    await call("PATCH", "/vendor", {tcb_recovery: "none"});
    await call("PATCH", `/platforms/${part(APP)}`, {recovery_status: "UpToDate", recovery_advisory_ids: []});
  },
};

const restart = () => call("POST", "/kms/src/restart", {});
const SCENARIOS = [
  denied("The app is revoked",
    ["The policy of kms-src lists it no more. It keeps the keys that it has, and gets none when it boots again:", "Boot denied: app not registered"],
    ["A transaction removes its compose hash. It keeps the keys that it has, and gets none when it boots again:", "Boot denied: Compose hash not allowed"],
    "app", "compose_hash"),
  denied("kms-src is revoked",
    ["The policy of kms-src lists its own measurement no more. It keeps running, and releases nothing:",
     "KMS self authorization failed: KMS is not allowed: aggregated MR not allowed"],
    ["A transaction removes its measurement. It keeps running, and releases nothing:",
     "KMS self authorization failed: KMS is not allowed: Aggregated MR not allowed"],
    "kms-src", "mr_aggregated"),
  platform("The platform of the app becomes out of date", "Its quotes have the TCB status OutOfDate. The app gets no keys when it boots again:",
    "App not allowed: Boot denied: TCB status is not allowed", APP, OUTDATED, CURRENT),
  platform("The platform of kms-src becomes out of date", "kms-src is started anew, because it verifies itself once in its life. It releases nothing:",
    "KMS is not allowed: TCB status is not allowed", KMS, OUTDATED, CURRENT, restart),
  platform("The PCK certificate of the app's platform is revoked", "The CRL of the PCK certificates lists it. No quote of the platform can be verified:",
    "CertRevoked", APP, {pck_revoked: true}, {pck_revoked: false}),
  platform("The app quotes under another root", "Its quotes lead to a root that nobody trusts, as those of a forger do:",
    "InvalidSignatureForPublicKey", APP, {other_root: true}, {other_root: false}),
  recovered,
  unrefreshed,
  fault("The PCCS has documents that have expired", "It answers, but nothing can be verified with what it answers:", "CrlExpired", {service: "pccs", kind: "stale"}),
  fault("The PCCS is down", "It answers each request with status 503. No new evidence can be verified:", "HTTP 503", {service: "pccs", kind: "status", status: 503}),
  fault("The PCCS is slow", "Each document takes two seconds. A boot that needs new documents takes some seconds longer, and succeeds.", "", {service: "pccs", kind: "delay", seconds: 2}),
  fault("The webhook of kms-src is down", "It answers with status 503, which allows nobody:", "returned 503 Service Unavailable",
    {service: "auth-src", call: WEBHOOK, kind: "status", status: 503}),
  fault("The webhook of kms-src hangs", "kms-src waits for it as long as it may, ten seconds, and then refuses:", "no answer within 10 s",
    {service: "auth-src", call: WEBHOOK, kind: "hang"}),
  fault("The webhook of kms-src answers with what is no JSON", "An answer that cannot be read allows nobody:", "failed to decode response",
    {service: "auth-src", call: WEBHOOK, kind: "malformed"}),
];

async function present() {
  const [platforms, vendor, faults, clock, guests, kms, policy] = await Promise.all([
    ...["platforms", "vendor", "faults", "clock", "guests", "kms"].map((name) => get(`/${name}`)), get("/policies/src").catch(() => null)]);
  return {platforms, vendor, faults, clock, guests, policy, isByContract: kms.src?.policy === null};
}

// The section; `onChange` is called when a scenario has begun or was undone. `look` reads which are in force.
export class Scenarios {
  constructor(onChange) {
    this._alert = alertBox();
    this._done = make("p", {role: "status"});
    this._cards = SCENARIOS.map((scenario) => this._card(scenario, onChange));
    this.element = make("div", {}, this._boot(), this._alert, this._done, make("ul", {class: "scenarios"}, this._cards.map(({card}) => card)));
  }

  async look() {
    const state = await present().catch(() => null);
    if (state !== null) for (const {show} of this._cards) show(state);
  }

  _card(scenario, onChange) {
    const {title} = scenario, text = make("p"), inForce = make("strong", {class: "unanswered"}, "in force");
    const button = make("button", {onclick: () => attempt(this._alert, button, async () => {
      this._done.textContent = "";
      const state = await present(), isOn = scenario.isOn(state);
      await (isOn ? scenario.undo(state) : scenario.begin(state));
      await Promise.all([this.look(), onChange()]);
      this._done.textContent = `${isOn ? "Undone" : "In force"}: ${title}.`;
    })});
    const card = make("li", {class: "card"}, make("h3", {}, title), text,
      make("p", {class: "row"}, button, inForce));
    const show = (state) => {
      card.hidden = !(scenario.isPossible?.(state) ?? true);
      if (!text.firstChild) {
        const [expect, says] = scenario.expected?.(state) ?? [scenario.expect, scenario.says];
        text.append(expect, says ? " " : "", says ? make("code", {}, says) : "");
      }
      const isOn = !card.hidden && scenario.isOn(state), act = isOn ? "Undo" : "Begin";
      if (button.textContent !== act) button.textContent = act;
      button.setAttribute("aria-label", `${act}: ${title}`);
      inForce.hidden = !isOn;
    };
    card.hidden = true;
    return {card, show};
  }

  // Boots the app, and says what came of it, with a link to the call.
  _boot() {
    const said = make("p", {role: "status"});
    const button = make("button", {onclick: () => attempt(this._alert, button, async () => {
      said.replaceChildren("The app boots…");
      const text = await call("POST", "/guests/app/boot", {}).then(() => "The app has keys.", (error) => error.message);
      const {records} = await get("/journal?call=Boot&service=app&limit=1").catch(() => ({records: []}));
      said.replaceChildren(text, ...records.map(({id}) => make("a", {href: `#/calls/${id}`}, ` What happened in call ${id}`)));
    })}, "Boot the app by kms-src");
    return make("div", {}, make("p", {class: "note"}, "Begin one, boot the app, and look at the call. The same button undoes it."), button, said);
  }
}
