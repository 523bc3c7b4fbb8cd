// Why a webhook denied a boot: the rule, what it compared, the line of the policy, and the change that allows it.

import {call, get, part} from "./api.js";
import {alertBox, attempt, clipped, make, whole, worded} from "./dom.js";
import {aligned, diff, same} from "./diff.js";
import {outcome} from "./proposal.js";

const TITLE = 300;  // characters of a reason in a heading

export function compared(refusal) {
  const nowhere = refusal.contract ? `It looks at ${refusal.place}.` : "No line of the policy decides this.";
  const place = refusal.line === null ? nowhere : `Line ${refusal.line} of the policy: `;
  return make("div", {},
    make("h3", {}, `The rule ${worded(refusal.rule)}: ${refusal.member}`),
    make("p", {}, place, refusal.line_text === null ? "" : make("code", {}, refusal.line_text)),
    refusal.got.map((got) => aligned(got, refusal.wanted)));
}

// Changes the policy, unless somebody has changed it since; resolves to what is said of that.
async function changePolicy({kms, change}) {
  const path = `/policies/${part(kms)}`;
  if (!same(await get(path), change.before)) throw new Error("The policy has changed since: look again.");
  await call("PUT", path, change.after);
  return ["The policy allows it now: the next request reads it."];
}

// Sends the transactions, unless there are others since; resolves to what came of each.
async function sendActs({change}) {
  if ((await get("/chain")).block !== change.block) throw new Error("The chain has other transactions since: look again.");
  const done = [];
  for (const {act, body} of change.acts) done.push(await call("POST", `/chain/${act}`, body));
  return ["The contracts allow it now: the next request asks them.",
    done.map((each) => make("div", {}, outcome(each), make("p", {class: "mono"}, `block ${each.block}, ${each.transaction}`)))];
}

export function allowing(each) {
  const {kms, change} = each, alert = alertBox(), done = make("div", {role: "status"}), preview = make("div", {hidden: true});
  const sent = change.acts?.length === 1 ? "Send the transaction" : `Send the ${change.acts?.length} transactions`;
  const make_it = make("button", {onclick: (event) => attempt(alert, event.currentTarget, async () => {
    done.replaceChildren(...(await (change.acts ? sendActs : changePolicy)(each)).flat());
    preview.hidden = true;
    first.hidden = true;
  })}, change.acts ? sent : `Change the policy of kms-${kms}`);
  preview.append(diff(change.diff), make_it);
  const first = make("button", {"aria-expanded": "false", onclick: () => {
    preview.hidden = !preview.hidden;
    first.setAttribute("aria-expanded", String(!preview.hidden));
  }}, "Allow this…");
  return make("div", {class: "allowing"}, first, preview, alert, done);
}

export function denial(each) {
  const {decision} = each, reason = decision.reason || "no reason given";
  const shown = [make("h3", {class: "denied"}, `${each.service} denied it: ${clipped(reason, TITLE)}`)];
  if (reason.length > TITLE) shown.push(make("p", {}, whole(reason)));
  if (decision.mismatch && !each.refusals?.length) {
    const {field, got, allowed} = decision.mismatch;
    shown.push(make("p", {}, `It compared ${field}, as the policy was then:`), ...[got].flat().map((value) => aligned(value, allowed)));
  }
  if (each.problem) shown.push(make("p", {}, each.problem));
  else if (!each.refusals.length) shown.push(make("p", {class: "ok"}, each.chain ? "The contracts allow it now." : "The present policy allows it."));
  else {
    const decider = each.chain ? `By what the contracts hold now, ${each.policy}:` : `By the present policy, ${each.policy} (contract ${each.contract}):`;
    shown.push(make("p", {}, decider), ...each.refusals.map(compared));
    const what = each.chain ? "transaction" : "change of the policy";
    shown.push(each.change ? allowing(each) : make("p", {}, `No ${what} allows it: ${each.no_change_because}.`));
  }
  return make("div", {class: "denial"}, shown);
}
