// Forms made of the API's own description: a schema's properties as fields, and what of them was changed.

import {get} from "./api.js";
import {alertBox, attempt, choice, labelled, make, tied, worded} from "./dom.js";

let described = null;

// The properties of a request's body, by the name of its schema in the OpenAPI document, which is requested once.
export async function properties(name) {
  described ??= get("/openapi.json");
  try {
    return (await described).components.schemas[name].properties;
  } catch (error) {
    described = null;
    throw error;
  }
}

// The values that a property allows; none if it is of another kind.
export function allowed(property) {
  return [property, ...property.anyOf ?? []].find((each) => each.enum)?.enum ?? [];
}

function typed(property) {
  return new Set([property.type, ...(property.anyOf ?? []).map((each) => each.type)]);
}

function shown(value) {
  if (Array.isArray(value)) return value.join(", ");
  return value !== null && typeof value === "object" ? JSON.stringify(value) : String(value ?? "");
}

function list(text) {
  return text.split(",").map((each) => each.trim()).filter(Boolean);
}

// One field: its element, and what reads it as a value of the API.
function field(property, value) {
  const types = typed(property), choices = allowed(property);
  if (types.has("boolean")) {
    const element = choice(["true", "false"], String(value ?? false));
    return {element, read: () => element.value === "true"};
  }
  if (choices.length) {
    const own = shown(value), element = choice([...new Set([own, ...choices])], own, "as before");
    return {element, read: () => element.value};
  }
  const element = make("input", {type: "text", autocomplete: "off", spellcheck: "false", value: shown(value)});
  if (types.has("array")) return {element, read: () => list(element.value)};
  return {element, read: () => element.value};
}

// A form over some values, which sends only what was changed in it. `send` resolves to what is shown when it is done.
export function changeForm(prefix, schema, values, send) {
  const alert = alertBox(), done = make("p", {role: "status"});
  const fields = Object.entries(schema).map(([name, property]) => ({name, ...field(property, values[name])}));
  tied(alert, Object.fromEntries(fields.map(({name, element}) => [name, element])));
  const first = new Map(fields.map(({name, read}) => [name, JSON.stringify(read())]));
  const changed = () => Object.fromEntries(fields.filter(({name, read}) => JSON.stringify(read()) !== first.get(name))
    .map(({name, read}) => [name, read()]));
  const button = make("button", {}, "Change");
  const form = make("form", {onsubmit: (event) => {
    event.preventDefault();
    attempt(alert, button, async () => {
      const changes = changed();
      if (!Object.keys(changes).length) throw new Error("Nothing was changed here.");
      done.textContent = await send(changes);
      for (const {name, read} of fields) first.set(name, JSON.stringify(read()));
    });
  }}, make("div", {class: "row"}, fields.map(({name, element}) => labelled(worded(name), `${prefix} ${name}`, element)), button), alert, done);
  return form;
}
