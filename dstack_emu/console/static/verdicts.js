// What came of evidence: each check of it, and what each KMS of the stack would decide, with the change that admits it.

import {make, scrolling, worded} from "./dom.js";
import {allowing, compared} from "./denial.js";
import {contents} from "./contents.js";
import {aligned} from "./diff.js";

const HEX = /^[0-9a-f]{16,}$/i;
const STATES = new Map([[true, ["holds", "ok"]], [false, ["FAILED", "denied"]], [null, ["not made", "dim"]]]);

function found({ok, got, expected, detail}) {
  const shown = [detail].filter(Boolean);
  if (ok !== false) return make("td", {}, [...ok ? [got].filter(Boolean) : [], ...shown].join("; "));
  if (HEX.test(got) && HEX.test(expected)) return make("td", {}, shown.join(), aligned(got, [expected]));
  return make("td", {}, make("div", {}, shown.join()), make("div", {}, `got: ${got}`),
    expected ? make("div", {}, `expected: ${expected}`) : null);
}

function row(check) {
  const [word, kind] = STATES.get(check.ok);
  return make("tr", {}, make("td", {class: kind}, word), make("th", {scope: "row"}, worded(check.name)), found(check));
}

// The checks, as `dstack-emu verify` makes them.
export function checked({ok, root, time, collateral, other_root: other, checks}) {
  const failed = checks.filter((check) => check.ok === false).length, skipped = checks.filter((check) => check.ok === null).length;
  const isProven = checks.some((check) => check.name === "quote" && check.ok);
  return [
    make("p", {class: ok ? "ok" : "denied"}, ok ? `All ${checks.length - skipped} checks that could be made hold.` :
      `${failed} of ${checks.length} checks failed.`),
    other === null ? null : make("p", {class: "denied"}, other),
    make("p", {}, `Verified at ${new Date(time * 1000).toISOString().replace(".000Z", "Z")} under ${root}, with the collateral of its PCCS ${collateral}. `,
      isProven ? "Under an emulated root that proves nothing: anybody can make such evidence." :
        "The quote is not proven: what holds beside it proves nothing."),
    scrolling("Checks", make("table", {}, make("thead", {}, make("tr", {}, ["result", "check", "what was found"].map((name) =>
      make("th", {scope: "col"}, name)))), make("tbody", {}, checks.map(row)))),
  ];
}

function steps(texts) {
  return make("details", {}, make("summary", {}, "What to do"), make("ol", {}, texts.map((text) => make("li", {}, text))));
}

function one(kms, found) {
  if (found.problem) return make("div", {class: "card"}, make("h3", {}, `kms-${kms}: no decision`), make("p", {}, found.problem));
  const {verdict, decider, refusals, warnings, evidence} = found, contract = decider.contract ? `, contract ${decider.contract}` : "";
  const isClaim = evidence.verifies === null;
  return make("div", {class: "card"},
    make("h3", {class: verdict === "allowed" ? "ok" : "denied"}, `kms-${kms}: ${verdict}`),
    make("p", {}, found.sentence),
    isClaim ? make("p", {class: "note"}, `A claim, in which nothing was verified: ${evidence.what}.`) : null,
    verdict !== "denied" ? null : make("p", {class: "note"}, `Decided by ${decider.where} (${decider.kind}${contract}), as dstack ${found.release} asks it.`),
    refusals.map(compared),
    found.change ? allowing({kms: found.policy_of, change: found.change}) : null,
    found.no_change_because ? make("p", {}, `No change of the policy admits it: ${found.no_change_because}.`) : null,
    warnings.map((text) => make("p", {class: "note"}, text)),
    steps(found.next_steps),
    found.boot_info ? make("details", {}, make("summary", {}, "What the webhook is asked"), contents(found.boot_info)) : null);
}

// What each KMS would decide, as `dstack-emu why` explains it.
export function decisions({kms}) {
  return Object.entries(kms).map(([name, found]) => one(name, found));
}
