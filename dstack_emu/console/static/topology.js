// The picture of a stack: its parts in columns, a KMS with its webhook and its agent in each, and arrows for calls.

import {draw} from "./dom.js";

const WIDE = 170, NARROW = 130, HIGH = 46, COLUMN = 255, ROW = 120, LEFT = 20, TOP = 44, BEND = 70;

// Places every part: trust domains at the left; KMS, and a gateway, in the middle, each above its agent; everything else
// at the right; the PCCS below all.
export function place(services, webhooks, guests, kms) {
  const boxes = new Map();
  const put = (name, column, row, width = NARROW) =>
    boxes.set(name, {name, x: LEFT + column * COLUMN, y: TOP + row * ROW, width, height: HIGH});
  put("outside", 0, 0);
  const own = guests.filter((name) => !name.startsWith("kms-"));
  const hosts = own.filter((name) => services.includes(`agent-${name}`)), domains = own.filter((name) => !hosts.includes(name));
  domains.forEach((name, index) => put(name, 0, 1 + index * 0.6));
  const columns = kms.length + hosts.length + 1;
  kms.forEach((name, index) => {
    if (services.includes(`auth-${name}`) || webhooks.includes(name)) put(`auth-${name}`, 1 + index, 0, WIDE);
    put(`kms-${name}`, 1 + index, 1, WIDE);
    put(`agent-${name}`, 1 + index, 2);
  });
  hosts.forEach((name, index) => {
    if (index === 0 && services.includes("ingress")) put("ingress", 1 + kms.length, 0, WIDE);
    put(name, 1 + kms.length + index, 1, WIDE);
    put(`agent-${name}`, 1 + kms.length + index, 2);
  });
  const others = services.filter((name) => !boxes.has(name) && !["pccs", "control"].includes(name));
  others.forEach((name, index) => put(name, columns, 1 + index * 0.6));
  const lowest = Math.max(2, 0.6 * domains.length + 0.4, 0.6 * others.length + 0.4);
  put("pccs", 0, lowest + 0.8, others.length ? COLUMN * columns + NARROW : COLUMN * (columns - 1) + WIDE);
  return boxes;
}

function anchor(box, toward) {
  const middle = {x: box.x + box.width / 2, y: box.y + box.height / 2};
  const dx = toward.x + toward.width / 2 - middle.x, dy = toward.y + toward.height / 2 - middle.y;
  if (Math.abs(dy) > box.height && Math.abs(dx) < COLUMN / 2)
    return {x: middle.x, y: dy > 0 ? box.y + box.height : box.y};
  return {x: dx > 0 ? box.x + box.width : box.x, y: middle.y};
}

// The way from one part to another: straight, down to the PCCS beside what is below, or over what is between.
function route(from, to) {
  if (to.name === "pccs") {
    const x = from.x + WIDE - 20, y = from.width === WIDE ? from.y + from.height : from.y + from.height / 2;
    const start = from.width === WIDE ? `M${x} ${y}` : `M${from.x + from.width} ${y}H${x}`;
    return {path: `${start}V${to.y}`, x, y: to.y - 34, end: {x, y: to.y}, angle: 90};
  }
  const start = anchor(from, to), end = anchor(to, from);
  if (start.y === end.y && Math.abs(start.x - end.x) > COLUMN) {
    const [a, b] = [{x: from.x + from.width / 2, y: from.y}, {x: to.x + to.width / 2, y: to.y}];
    const bend = {x: (a.x + b.x) / 2, y: a.y - BEND}, passed = Math.round(Math.abs(b.x - a.x) / COLUMN);
    const at = passed % 2 ? 0.5 : 0.5 - 0.5 / passed;  // the label stands between two columns
    return {path: `M${a.x} ${a.y}Q${bend.x} ${bend.y} ${b.x} ${b.y}`, x: a.x + at * (b.x - a.x), y: a.y - 2 * at * (1 - at) * BEND + 4,
            end: b, angle: degrees(bend, b)};
  }
  const isSteep = start.x === end.x && end.y < start.y;  // below its label, others pass from column to column
  return {path: `M${start.x} ${start.y}L${end.x} ${end.y}`, x: (start.x + end.x) / 2, y: isSteep ? end.y + 24 : (start.y + end.y) / 2,
          end, angle: degrees(start, end)};
}

function degrees(from, to) {
  return Math.atan2(to.y - from.y, to.x - from.x) * 180 / Math.PI;
}

// A path by its last part.
function called(name) {
  return name.startsWith("/") && name.lastIndexOf("/") > 0 ? `…${name.slice(name.lastIndexOf("/"))}` : name;
}

function shortened(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

function arrow(edge, from, to) {
  const {path, x, y, end, angle} = route(from, to), state = edge.outcome ?? "";
  const isFlat = Math.abs(end.y - y) < 2;
  return draw("g", {},
    draw("title", {}, `${edge.caller} → ${edge.service}${edge.call ? `: ${edge.call}, ${edge.text}` : ""}`),
    draw("path", {class: `arrow ${state}`, d: path}),
    draw("path", {class: `head ${state}`, d: "M0 0L-10 4V-4Z", transform: `translate(${end.x} ${end.y}) rotate(${angle})`}),
    edge.call ? draw("text", {class: `label ${state}`, x, y: isFlat ? y - 8 : y, "text-anchor": "middle"},
      shortened(called(edge.call), 20),
      state === "ok" ? "" : draw("tspan", {x, dy: 14}, state)) : "");
}

// Draws the parts, each of which calls `open` with its name, and the arrows of `edges` (caller, service, call, outcome).
export function picture(boxes, edges, states, open) {
  const all = [...boxes.values()];
  const width = Math.max(...all.map((box) => box.x + box.width)) + LEFT;
  const height = Math.max(...all.map((box) => box.y + box.height)) + LEFT;
  const arrows = edges.filter((edge) => boxes.has(edge.caller) && boxes.has(edge.service) && edge.caller !== edge.service)
    .map((edge) => arrow(edge, boxes.get(edge.caller), boxes.get(edge.service)));
  const parts = all.map((box) => part(box, states.get(box.name) ?? "", open));
  return draw("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "The parts and their calls"},
    arrows.map((each) => [...each.children].filter((child) => child.localName !== "text")).map((shapes) => draw("g", {}, shapes)),
    parts, arrows);
}

function part(box, state, open) {
  const isPart = box.name !== "outside";
  const acts = isPart ? {
    role: "button", tabindex: 0, "data-key": `part ${box.name}`, "aria-label": `${box.name}, ${state}`,
    onclick: () => open(box.name),
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(box.name);
    },
  } : {};
  return draw("g", acts,
    draw("rect", {class: "box", x: box.x, y: box.y, width: box.width, height: box.height, rx: 6,
                  "stroke-dasharray": isPart ? null : "4 3"}),
    draw("text", {class: "title", x: box.x + 10, y: box.y + 19}, shortened(box.name, 17)),
    draw("text", {class: "dim", x: box.x + 10, y: box.y + 36}, shortened(isPart ? state : "every other caller", 22)));
}
