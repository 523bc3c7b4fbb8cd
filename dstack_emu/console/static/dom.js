// Makes elements. Every text becomes a text node: nothing that a stack says can become markup.

const SVG = "http://www.w3.org/2000/svg";

const LONGEST = 1_000;  // characters of a text that are shown at once
// Characters that are not seen, or that turn the order of those around them.
const UNSEEN = /[\0-\x08\v\f\r\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

// A text with a name in place of each character that would not be seen.
export function visible(text) {
  return text.replace(UNSEEN, (each) => `‹U+${each.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
}

export function clipped(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// A text of any length: of a long one the beginning, and the whole on request.
export function whole(text) {
  if (text.length <= LONGEST) return text;
  return [clipped(text, LONGEST), make("details", {}, make("summary", {}, `All ${text.length} characters`),
    make("pre", {class: "long", tabindex: 0, role: "group", "aria-label": "The whole text"}, text))];
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (name === "aria-label") element.setAttribute(name, visible(value));
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  const filled = children.flat().filter((child) => child !== null && child !== undefined);
  element.append(...filled.map((child) => typeof child === "string" ? visible(child) : child));
  return element;
}

// An element with attributes (`onclick` is a listener; false and null are left out) and children, which may be text.
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function labelled(text, id, field) {
  field.id = id;
  return make("div", {}, make("label", {for: id}, text), field);
}

// Says of fields that an alert is about them; the keys are what the stack calls them in a refusal.
export function tied(alert, fields) {
  for (const [name, field] of Object.entries(fields)) {
    field.dataset.named = name;
    field.setAttribute("aria-describedby", [field.getAttribute("aria-describedby"), alert.id].filter(Boolean).join(" "));
  }
}

function mark(alert, text) {
  const fields = [...document.querySelectorAll(`[aria-describedby~="${alert.id}"]`)];
  for (const field of fields) {
    const isWrong = text && (fields.length === 1 || text.startsWith(`${field.dataset.named}:`));
    if (isWrong) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }
}

// What may be wider than the page: it scrolls for itself, also by the keyboard if that is needed.
export function scrolling(label, ...children) {
  const element = make("div", {class: "scroll", role: "group", "aria-label": label}, ...children);
  const watch = new ResizeObserver(() => {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
    else element.removeAttribute("tabindex");
  });
  for (const each of [element, ...element.children]) watch.observe(each);
  return element;
}

// A choice of values; `empty` is what the empty one is called.
export function choice(values, chosen, empty = "any") {
  return make("select", {}, values.map((value) => make("option", {value, selected: value === chosen}, value || empty)));
}

// A JSON value as facts: objects become lists of terms, within one another; what is empty is left out. The `app_url` of an
// instance is a link, unless it is something else than a page.
export function facts(value) {
  if (Array.isArray(value)) {
    if (!value.length) return "none";
    if (value.every((each) => typeof each !== "object" || each === null)) return whole(value.join(", "));
    return make("ol", {}, value.map((each) => make("li", {}, facts(each))));
  }
  if (value === null || value === "") return "none";
  if (typeof value !== "object") return make("span", {class: isHex(value) ? "mono" : null}, whole(String(value)));
  const rows = Object.entries(value).map(([name, each]) =>
    [make("dt", {}, worded(name)), make("dd", {}, name === "app_url" && isPage(each) ? link(each) : facts(each))]);
  return make("dl", {class: "facts"}, rows.flat());
}

function isPage(value) {
  return typeof value === "string" && /^https?:\/\//i.test(value);
}

function link(url) {
  return make("a", {href: url, target: "_blank", rel: "noreferrer"}, url);
}

function isHex(value) {
  return typeof value === "string" && /^(0x)?[0-9a-f]{16,}$/i.test(value);
}

export function worded(name) {
  return name.replaceAll("_", " ");
}

// Runs an action of a button or form, shows its refusal in an alert, and keeps the button from a second press.
export async function attempt(alert, button, action) {
  alert.textContent = "";
  mark(alert, "");
  if (button) button.disabled = true;
  try {
    return await action();
  } catch (error) {
    alert.textContent = visible(clipped(error.message, LONGEST));
    mark(alert, error.message);
    return undefined;
  } finally {
    if (button) button.disabled = false;
  }
}

let alerts = 0;

export function alertBox() {
  return make("p", {class: "alert", role: "alert", id: `alert-${++alerts}`});
}

// Tells a screen reader what everyone else sees elsewhere.
export function unseenStatus() {
  return make("p", {class: "unseen", role: "status"});
}
