// Why a webhook denied a boot: the rule, what it compared, the line of the policy, and the change that allows it.

import {call, get, part} from "./api.js";
import {alertBox, attempt, make, worded} from "./dom.js";
import {aligned, diff, same} from "./diff.js";

function compared(refusal) {
  const place = refusal.line === null ? "No line of the policy decides this." : `Line ${refusal.line} of the policy: `;
  return make("div", {},
    make("h3", {}, `The rule ${worded(refusal.rule)}: ${refusal.member}`),
    make("p", {}, place, refusal.line_text === null ? "" : make("code", {}, refusal.line_text)),
    refusal.got.map((got) => aligned(got, refusal.wanted)));
}

function allowing({kms, change}) {
  const alert = alertBox(), done = make("p", {role: "status"}), preview = make("div", {hidden: true});
  const path = `/policies/${part(kms)}`;
  const make_it = make("button", {onclick: (event) => attempt(alert, event.currentTarget, async () => {
    if (!same(await get(path), change.before)) throw new Error("The policy has changed since: open the call again.");
    await call("PUT", path, change.after);
    preview.hidden = true;
    first.hidden = true;
    done.textContent = "The policy allows it now: the next request reads it.";
  })}, `Change the policy of kms-${kms}`);
  preview.append(diff(change.diff), make_it);
  const first = make("button", {"aria-expanded": "false", onclick: () => {
    preview.hidden = !preview.hidden;
    first.setAttribute("aria-expanded", String(!preview.hidden));
  }}, "Allow this…");
  return make("div", {}, first, preview, alert, done);
}

export function denial(each) {
  const {decision} = each, title = `${each.service} denied it: ${decision.reason || "no reason given"}`;
  const shown = [make("h3", {class: "denied"}, title)];
  if (decision.mismatch && !each.refusals?.length) {
    const {field, got, allowed} = decision.mismatch;
    shown.push(make("p", {}, `It compared ${field}, as the policy was then:`), ...[got].flat().map((value) => aligned(value, allowed)));
  }
  if (each.problem) shown.push(make("p", {}, each.problem));
  else if (!each.refusals.length) shown.push(make("p", {class: "ok"}, "The present policy allows it."));
  else {
    shown.push(make("p", {}, `By the present policy, ${each.policy} (contract ${each.contract}):`), ...each.refusals.map(compared));
    shown.push(each.change ? allowing(each) : make("p", {}, `No change of the policy allows it: ${each.no_change_because}.`));
  }
  return make("div", {class: "denial"}, shown);
}
