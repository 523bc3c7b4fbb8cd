// Links to the page of evidence: what the parts of a call have now.

import {get, part} from "./api.js";
import {make} from "./dom.js";
import {flattened} from "./journal.js";

export function evidenceLink(guest, text = guest) {
  return make("a", {href: `#/evidence/guest/${part(guest)}`}, text);
}

// `of` is the path of its certificates in the API.
export function certificateLink(of, name) {
  const kms = /^\/kms\/([^/]+)\//.exec(of);
  return make("a", {href: `#/evidence/${kms ? `kms/${kms[1]}` : "certificate"}/${part(name)}`}, "Decode and verify it");
}

// The trust domains that took part in a record; empty until the stack has said which there are.
export function evidenceOf(record) {
  const shown = make("p", {});
  const names = new Set([...flattened(record)].filter((each) => each.call).flatMap(({caller, service}) => [caller, service])
    .map((name) => name.replace(/^agent-/, "")));
  get("/guests").then((guests) => {
    const known = [...names].filter((name) => Object.hasOwn(guests, name)).sort();
    if (known.length) shown.append("Evidence as it is now: ", ...known.flatMap((name, index) => [index ? ", " : "", evidenceLink(name)]),
      make("span", {class: "note"}, " (the journal keeps no quotes, so it may not be what this call verified)"));
  }).catch(() => {});  // the call itself is shown all the same
  return shown;
}
