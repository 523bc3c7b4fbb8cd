// The page of the stack: its picture, alive, and what each part is.

import {call, get, part} from "./api.js";
import {alertBox, attempt, facts, make, scrolling, visible} from "./dom.js";
import {journal} from "./journal.js";
import {certificateLink, evidenceLink} from "./links.js";
import {picture, place} from "./topology.js";

const EVERY = 5_000;  // milliseconds between two looks at the stack, while the page is visible
const COLUMNS = ["caller", "service", "call", "result", "time"];

// Calls that every stack is built for; an arrow without a call yet is drawn for each.
function usual(kms, guests) {
  const pairs = kms.flatMap((name) => [
    [`kms-${name}`, `auth-${name}`], [`kms-${name}`, `agent-${name}`], [`kms-${name}`, "pccs"]]);
  if (kms.includes("src") && kms.includes("dst")) pairs.push(["kms-dst", "kms-src"]);
  if (guests.includes("app")) pairs.push(["app", "kms-src"]);
  return pairs.map(([caller, service]) => ({caller, service}));
}

async function look() {
  const [stack, kms, platforms] = await Promise.all([get("/stack"), get("/kms"), get("/platforms")]);
  return {stack, kms, platforms};
}

function stateOf(name, {stack, kms}, health) {
  const said = health[name];
  if (said !== undefined && said !== "ok") return "does not answer";
  if (name.startsWith("kms-")) return `${kms[name.slice(4)]?.phase ?? "unknown"} phase`;
  if (Object.hasOwn(stack.guests, name)) return stack.guests[name].has_keys ? "has keys" : "has no keys";
  if (name.startsWith("auth-") && Object.hasOwn(stack.webhooks, name.slice(5))) return "your webhook";
  return said === undefined ? "" : "answers";
}

export async function show(content) {
  const alert = alertBox(), summary = make("p", {class: "note"}), canvas = make("div", {class: "scroll"});
  const calls = make("tbody"), details = make("section", {"aria-live": "off"});
  content.append(alert, summary, canvas, make("p", {}, make("button", {onclick: ask}, "Ask every service whether it answers")),
    details, make("h2", {}, "Last calls"),
    scrolling("Last calls", make("table", {},
      make("thead", {}, make("tr", {}, COLUMNS.map((name) => make("th", {scope: "col"}, name)))), calls)));
  let seen = await look(), health = {}, drawn = "", opened = null;

  function redraw() {
    const {stack, kms} = seen, names = Object.keys(kms), guests = Object.keys(stack.guests);
    const boxes = place(Object.keys(stack.services), Object.keys(stack.webhooks), guests, names);
    const states = new Map([...boxes.keys()].map((name) => [name, stateOf(name, seen, health)]));
    const edges = new Map(usual(names, guests).map((edge) => [`${edge.caller} ${edge.service}`, edge]));
    for (const [key, edge] of journal.edges) edges.set(key, edge);
    const now = JSON.stringify([[...boxes], [...states], [...edges]]);
    if (now === drawn) return;
    drawn = now;
    const focused = document.activeElement?.dataset?.key;
    canvas.replaceChildren(picture(boxes, [...edges.values()], states, open));
    if (focused) [...canvas.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused)?.focus();
    const last = [...journal.edges.values()].sort((one, other) => other.number - one.number);
    calls.replaceChildren(...last.map((edge) => make("tr", {}, make("td", {}, edge.caller), make("td", {}, edge.service),
      make("td", {}, make("a", {href: `#/calls/${edge.number}`}, edge.call)), make("td", {class: edge.outcome}, edge.text),
      make("td", {}, edge.time.slice(11, 23)))));
    summary.textContent = visible(`dstack ${stack.release}, seed “${stack.seed}”, ${stack.fresh ? "started fresh" : "started ready"}; ` +
      `state in ${stack.state}`);
  }

  async function refresh() {
    if (document.visibilityState !== "visible") return;
    await attempt(alert, null, async () => {
      seen = await look();
      redraw();
    });
  }

  // Only on request: the journal records what webhooks are asked for it.
  async function ask(event) {
    await attempt(alert, event.currentTarget, async () => {
      health = await get("/stack/health");
      redraw();
    });
  }

  async function open(name) {
    opened = name;
    const heading = make("h2", {tabindex: -1}, name), body = make("div"), problem = alertBox();
    details.replaceChildren(make("div", {class: "card"}, heading, problem, body));
    heading.focus();
    await attempt(problem, null, async () => {
      const shown = await describe(name, seen, health, refresh);
      if (opened === name) body.replaceChildren(...shown);
    });
  }

  redraw();
  const unfollow = journal.onChange(redraw), timer = setInterval(refresh, EVERY);
  return () => {
    unfollow();
    clearInterval(timer);
  };
}

// What a part is: elements.
async function describe(name, {stack, kms, platforms}, health, refresh) {
  const [kind, of] = [name.split("-")[0], name.slice(name.indexOf("-") + 1)];
  const known = {url: stack.services[name] ?? stack.webhooks[of], grpc: stack.grpc[name], health: health[name]};
  const shown = [facts(Object.fromEntries(Object.entries(known).filter(([, value]) => value !== undefined)))];
  if (kind === "kms" && Object.hasOwn(kms, of)) {
    const {guest, url: _, ...own} = kms[of];
    shown.push(facts(own), ...domain(guest, platforms), ...await certificates(`/kms/${part(of)}/certificates`));
  } else if (kind === "agent" && Object.hasOwn(kms, of)) {
    shown.push(...domain(kms[of].guest, platforms));
  } else if (kind === "agent" && Object.hasOwn(stack.guests, of)) {
    shown.push(...domain(stack.guests[of], platforms));
  } else if (kind === "auth") {
    shown.push(make("p", {}, make("a", {href: `#/policies/${part(of)}`}, "Its policy")));
  } else if (Object.hasOwn(stack.guests, name)) {
    shown.push(bootForm(name, Object.keys(kms), refresh), ...domain(stack.guests[name], platforms));
  } else if (name === "pccs") {
    shown.push(make("h3", {}, "The vendor"), facts(await get("/vendor")), ...await certificates("/certificates"));
  } else if (name === "vmm") {
    const machines = await get("/machines");
    shown.push(make("h3", {}, "Machines"), Object.keys(machines).length ? facts(machines) : make("p", {}, "There is none."));
  }
  if (name === "gateway" || name === "ingress") shown.push(make("h3", {}, "What is registered"), facts(await get("/gateway")));
  return shown;
}

function domain(guest, platforms) {
  return [make("h3", {}, "What it measures, and where it is"), facts(guest),
    make("p", {}, evidenceLink(guest.name, "Its evidence, decoded and verified")),
    make("h3", {}, "Its platform"), facts(platforms[guest.platform] ?? {})];
}

async function certificates(path) {
  const found = await get(path);
  return Object.entries(found).map(([name, certificate]) =>
    make("details", {}, make("summary", {}, `Certificate: ${name}`),
      make("p", {}, certificateLink(path, name.split(", ")[0])), facts(certificate)));
}

function bootForm(name, kms, refresh) {
  const alert = alertBox(), done = make("p", {role: "status"});
  return make("div", {}, make("div", {class: "row"}, kms.map((source) => make("button", {
    onclick: (event) => attempt(alert, event.currentTarget, async () => {
      done.textContent = "";
      await call("POST", `/guests/${part(name)}/boot`, {kms: source});
      done.textContent = `${name} booted with keys of kms-${source}.`;
      await refresh();
    }),
  }, `Boot it by kms-${source}`))), alert, done);
}
