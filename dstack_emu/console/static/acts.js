// A form for each act on the chain, made of the API's own description; what is wrong with its fields, the stack says.

import {alertBox, choice, labelled, make, tied, worded} from "./dom.js";
import {allowed, properties} from "./fields.js";

const ACTS = [
  ["allow", "ListEntry", "Allow an entry of a list"],
  ["remove", "ListEntry", "Remove an entry of a list"],
  ["app-deploy", "NewApp", "Create and register an app"],
  ["app-register", "RegisteredApp", "Register a contract as an app"],
  ["app-set", "AppSetting", "Change a setting of an app"],
  ["kms-set", "KmsSetting", "Change a setting of DstackKms"],
  ["kms-info", "PublishedInfo", "Publish what a KMS says of itself"],
  ["transfer-ownership", "NewOwner", "Hand a contract over"],
  ["accept-ownership", "AcceptedOwner", "Accept a contract"],
  ["upgrade", "Upgrade", "Replace an implementation"],
];
const DEFAULT_APP = {"transfer-ownership": "DstackKms", "accept-ownership": "DstackKms", "upgrade": "DstackKms"};

// A field of a property: its element, and what reads it; undefined if nothing was chosen.
function field(act, name, property, {accounts, apps}) {
  if (property.type === "boolean") {
    const element = choice(["true", "false"], String(property.default ?? false));
    return {element, read: () => element.value === "true"};
  }
  const offered = name === "sender" ? accounts : name === "app" ? Object.keys(apps) : allowed(property);
  const none = name === "sender" ? "the first account" : name === "app" ? DEFAULT_APP[act] ?? "the stack's app" : "choose one";
  const free = make("input", {type: "text", autocomplete: "off", spellcheck: "false", size: 40});
  const element = offered.length ? choice(["", ...offered], "", none) : free;
  return {element, read: () => element.value.trim() || undefined};
}

function described(name, property) {
  const text = [property, ...property.anyOf ?? []].find((each) => each.description)?.description;
  return text ? `${worded(name)} (${text})` : worded(name);
}

async function form([act, schema, title], held, proposal) {
  const {sender, preview: _, ...own} = await properties(schema);
  const made = Object.entries({...own, sender}).map(([name, property]) => ({name, property, ...field(act, name, property, held)}));
  const alert = alertBox(), labels = made.map(({name, property, element}) => labelled(described(name, property), `${act} ${name}`, element));
  tied(alert, Object.fromEntries(made.map(({name, element}) => [name, element])));
  const preview = (event) => {
    event.preventDefault();
    return proposal.show(act, Object.fromEntries(made.map(({name, read}) => [name, read()]).filter(([, value]) => value !== undefined)), alert);
  };
  return make("details", {}, make("summary", {}, title),
    make("form", {"aria-label": title, onsubmit: preview}, make("div", {class: "row"}, labels, make("button", {}, "What would it do?")), alert));
}

export function actForms(held, proposal) {
  return Promise.all(ACTS.map((each) => form(each, held, proposal)));
}
